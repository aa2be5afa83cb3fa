"""A photo with what models said of it, for the sheets of mistakes and disagreements."""

from collections.abc import Mapping

from PIL import Image

from ..labeler.draw import scaled
from ..labeler.sources import unescape
from ..trainer import page
from .predictions import MODEL, Predictions

_PICTURE_PX = 320


def card(
    key: str,
    photo: Image.Image | None,
    answers: Mapping[str, Predictions],
    *,
    heads: Mapping[str, str] | None = None,
) -> str:
    """Show a photo with what one or several models said of it, as HTML.

    Args:
        key: Of the image, which all predictions hold.
        photo: None where it cannot be read.
        answers: Predictions by the name to show.
        heads: Whose answers, by the same names; left out: the models' own.
    """
    heads = heads or {}
    lists = [
        page.beside(name, _ranking(predictions, key, heads.get(name, MODEL)))
        for name, predictions in answers.items()
    ]
    picture = page.beside(f"{unescape(key)} (no photo)")
    if photo is not None:
        picture = page.figure(scaled(photo, _PICTURE_PX), unescape(key))
    right = " or ".join(right_names(next(iter(answers.values())), key))
    return page.card(right or "class not known", [picture, f"<div>{''.join(lists)}</div>"])


def right_names(predictions: Predictions, key: str) -> list[str]:
    """Name the right classes of an image, of which there may be none."""
    row = predictions.keys.index(key)
    if predictions.valid is not None:
        return [predictions.class_names[c] for c in predictions.valid[row]]
    index = int(predictions.classes[row])
    return [predictions.class_names[index]] if index >= 0 else []


def _ranking(predictions: Predictions, key: str, head: str) -> str:
    row, scores = predictions.keys.index(key), predictions.heads[head]
    names = [predictions.class_names[c] for c in scores.top_classes[row].tolist()]
    each = zip(names, scores.top_probs[row].tolist(), strict=True)
    return page.ranking(each, right=right_names(predictions, key))
