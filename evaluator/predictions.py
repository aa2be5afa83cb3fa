"""What a model said of each image: the one thing that every table and report is made of.

An .npz holds all of it as plain arrays and one line of JSON, a .json holds all of it as text, and a
.csv one line an image for spreadsheets.
"""

import csv
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64

from ..labeler.folder import replace_file

FORMAT = "tokenlabel-predictions"
VERSION = 1
TOP_K = 5
"""Classes kept of each image and head; fewer where a model has fewer."""
MODEL = "model"
"""The head that is the model's own answer; it comes first."""
SUFFIXES = (".npz", ".json", ".csv")


@dataclass(frozen=True, kw_only=True)
class HeadScores:
    """What one head said of each image."""

    top_classes: Int64[np.ndarray, "n k"]
    """Class indices, best first."""
    top_probs: Float32[np.ndarray, "n k"]
    """Their probabilities: softmax over the classes that were considered."""
    true_log_probs: Float64[np.ndarray, " n"]
    """Log-probability of the image's class, of all its right classes together where it may have
    several; NaN where it has none."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Answers to a whole set of images, in the order of the data set."""

    keys: list[str]
    """Of the images that could be read; unique."""
    classes: Int64[np.ndarray, " n"]
    """The image's class, -1 where it is not known; the first of several right ones."""
    heads: dict[str, HeadScores]
    """"model", the model's own answer, comes first; what token-labelled models have besides:
    "class" (class head), "dense_mean" and "dense_max" (dense head's logits, over the tokens) and
    "published" (class head + half of the dense head's maximum)."""
    num_classes: int
    class_names: list[str]
    valid: list[tuple[int, ...]] | None = None
    """All right classes of each image where labels allow several; an image without any does not
    count. None where an image has one class."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Key of each image that could not be read → why."""
    facts: dict[str, Any] = field(default_factory=dict)
    """How they came to be: checkpoint, model, weights, data, split, view, decoder, precision,
    images_per_sec, …; plain values that JSON can hold."""

    def __len__(self) -> int:
        """Return the number of images that could be read."""
        return len(self.keys)

    def __post_init__(self) -> None:
        """Compare lengths, so that no answer stands beside another image's key."""
        num_images = len(self.keys)
        lengths = [len(self.classes), *(len(head.top_classes) for head in self.heads.values())]
        if self.valid is not None:
            lengths.append(len(self.valid))
        if set(lengths) != {num_images} or len(set(self.keys)) != num_images:
            raise ValueError(f"{num_images} keys, not all distinct or not of as many answers")
        if next(iter(self.heads), None) != MODEL:
            raise ValueError(f"the first head must be {MODEL!r}, not {list(self.heads)[:1]}")

    def select(self, keys: Sequence[str]) -> "Predictions":
        """Take those of some images, in the order given.

        Raises:
            ValueError: If an image is not among them.
        """
        place = {key: i for i, key in enumerate(self.keys)}
        unknown = [key for key in keys if key not in place]
        if unknown:
            raise ValueError(
                f"{len(unknown)} images have no prediction, e.g. {', '.join(unknown[:3])}"
            )
        rows = np.array([place[key] for key in keys], np.int64)
        return Predictions(
            keys=list(keys),
            classes=self.classes[rows],
            heads={name: _rows_of(head, rows) for name, head in self.heads.items()},
            num_classes=self.num_classes,
            class_names=self.class_names,
            valid=None if self.valid is None else [self.valid[row] for row in rows.tolist()],
            unreadable=self.unreadable,
            facts=self.facts,
        )

    def save(self, path: Path) -> None:
        """Write a file, .npz, .json or .csv by its suffix, in one step.

        Raises:
            ValueError: Another suffix.
            OSError: It cannot be written.
        """
        check_suffix(path)
        form = {".npz": _to_npz, ".json": _to_json, ".csv": _to_csv}[path.suffix]
        replace_file(path, form(self))

    @classmethod
    def load(cls, path: Path) -> "Predictions":
        """Read an .npz or .json that `save` has written.

        Raises:
            OSError: It is not there.
            ValueError: It is something else, or damaged.
        """
        check_suffix(path)
        if path.suffix == ".csv":
            raise ValueError(
                f"{path} is for spreadsheets and does not hold all; give the .npz or .json"
            )
        data = path.read_bytes()
        try:
            return _from_npz(data) if path.suffix == ".npz" else _from_json(data)
        except (KeyError, TypeError, ValueError, IndexError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} holds no predictions of tl-eval --predict, or is damaged: "
                f"{str(error).strip() or type(error).__name__}"
            ) from error


def check_suffix(path: Path) -> None:
    """Refuse a file name that `Predictions.save` would refuse, before work is done."""
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path} ends in {path.suffix or 'nothing'!r}; predictions are written as "
            f"{', '.join(SUFFIXES)}"
        )


def _rows_of(head: HeadScores, rows: Int64[np.ndarray, " m"]) -> HeadScores:
    return HeadScores(
        top_classes=head.top_classes[rows],
        top_probs=head.top_probs[rows],
        true_log_probs=head.true_log_probs[rows],
    )


# --------------------------------------------------------------------------------------- npz


def _to_npz(predictions: Predictions) -> bytes:
    arrays: dict[str, Any] = {
        "keys": np.array(predictions.keys, np.str_),
        "classes": predictions.classes,
        "class_names": np.array(predictions.class_names, np.str_),
        "about": np.array(json.dumps(_about(predictions), ensure_ascii=False)),
    }
    for name, head in predictions.heads.items():
        arrays[f"{name}.top_classes"] = head.top_classes
        arrays[f"{name}.top_probs"] = head.top_probs
        arrays[f"{name}.true_log_probs"] = head.true_log_probs
    if predictions.valid is not None:
        arrays["valid"] = np.array([i for one in predictions.valid for i in one], np.int64)
        arrays["num_valid"] = np.array([len(one) for one in predictions.valid], np.int64)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def _from_npz(data: bytes) -> Predictions:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        about = _check_about(json.loads(str(arrays["about"])))
        valid = None
        if "valid" in arrays:
            ends = np.cumsum(arrays["num_valid"])[:-1]
            valid = [tuple(one.tolist()) for one in np.split(arrays["valid"], ends)]
            valid = valid[: len(arrays["num_valid"])]  # of nothing, split makes one part
        return Predictions(
            keys=arrays["keys"].tolist(),
            classes=arrays["classes"],
            heads={
                name: HeadScores(
                    top_classes=arrays[f"{name}.top_classes"],
                    top_probs=arrays[f"{name}.top_probs"],
                    true_log_probs=arrays[f"{name}.true_log_probs"],
                )
                for name in about["heads"]
            },
            num_classes=about["num_classes"],
            class_names=arrays["class_names"].tolist(),
            valid=valid,
            unreadable=about["unreadable"],
            facts=about["facts"],
        )


def _about(predictions: Predictions) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "num_classes": predictions.num_classes,
        "heads": list(predictions.heads),
        "unreadable": predictions.unreadable,
        "facts": predictions.facts,
    }


def _check_about(about: Any) -> dict[str, Any]:
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError("it was written by another program")
    if about.get("version") != VERSION:
        raise ValueError(f"it is of version {about.get('version')}, this program reads {VERSION}")
    return about


# -------------------------------------------------------------------------------------- json


def _to_json(predictions: Predictions) -> bytes:
    content = _about(predictions) | {
        "class_names": predictions.class_names,
        "keys": predictions.keys,
        "classes": predictions.classes.tolist(),
        "valid": predictions.valid,
        "heads": {
            name: {
                "top_classes": head.top_classes.tolist(),
                # Digits enough that the same float32 is read again.
                "top_probs": [[float(str(p)) for p in row] for row in head.top_probs],
                "true_log_probs": [
                    None if np.isnan(x) else x for x in head.true_log_probs.tolist()
                ],
            }
            for name, head in predictions.heads.items()
        },
    }
    return (json.dumps(content, ensure_ascii=False) + "\n").encode()


def _from_json(data: bytes) -> Predictions:
    content = _check_about(json.loads(data))
    shape = (len(content["keys"]), -1) if content["keys"] else (0, 0)
    valid = content["valid"]
    return Predictions(
        keys=content["keys"],
        classes=np.array(content["classes"], np.int64),
        heads={
            name: HeadScores(
                top_classes=np.array(head["top_classes"], np.int64).reshape(shape),
                top_probs=np.array(head["top_probs"], np.float32).reshape(shape),
                true_log_probs=np.array(head["true_log_probs"], np.float64),
            )
            for name, head in content["heads"].items()
        },
        num_classes=content["num_classes"],
        class_names=content["class_names"],
        valid=None if valid is None else [tuple(one) for one in valid],
        unreadable=content["unreadable"],
        facts=content["facts"],
    )


# --------------------------------------------------------------------------------------- csv


def _to_csv(predictions: Predictions) -> bytes:
    """Write a line for each image; those that could not be read come last, without answers."""
    head = predictions.heads[MODEL]
    places = range(1, head.top_classes.shape[1] + 1)
    columns = ["key", "class", "true_log_prob"]
    columns += [f"{what}_{i}" for i in places for what in ("class", "name", "prob")]
    others = {name: scores for name, scores in predictions.heads.items() if name != MODEL}
    columns += [f"{name}_{what}" for name in others for what in ("class", "prob")]
    if predictions.valid is not None:
        columns.append("valid")
    if predictions.unreadable:
        columns.append("unreadable")
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    for i, key in enumerate(predictions.keys):
        row: dict[str, Any] = {"key": key}
        if predictions.classes[i] >= 0:
            row["class"] = predictions.classes[i]
        if not np.isnan(head.true_log_probs[i]):
            row["true_log_prob"] = f"{head.true_log_probs[i]:.6f}"
        for place, index, prob in zip(places, head.top_classes[i].tolist(), head.top_probs[i]):
            row[f"class_{place}"] = index
            row[f"name_{place}"] = predictions.class_names[index]
            row[f"prob_{place}"] = f"{prob:.6f}"
        for name, scores in others.items():
            row[f"{name}_class"] = scores.top_classes[i, 0]
            row[f"{name}_prob"] = f"{scores.top_probs[i, 0]:.6f}"
        if predictions.valid is not None:
            row["valid"] = " ".join(map(str, predictions.valid[i]))
        writer.writerow(row)
    for key, reason in predictions.unreadable.items():
        writer.writerow({"key": key, "unreadable": reason})
    return file.getvalue().encode("utf-8", errors="surrogateescape")
