"""Photos, classes and label maps, of ImageNet's sizes, that several benchmarks read and write."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from photos import demo_photos
from PIL import Image

from tokenlabel.labeler import label_set
from tokenlabel.labeler.label_map import LabelMap, encode

PHOTO_PX = (500, 375)
QUALITY = 92
"""At which the demo's photos take about 60 KB each."""


def make_samples(count: int) -> list[dict[str, Any]]:
    """Make JPEGs out of mirrored and shifted demo photos, each with random scores as label map."""
    photos = [photo.resize(PHOTO_PX) for photo in demo_photos()]
    rng = np.random.default_rng(0)
    samples = []
    for i in range(count):
        pixels = np.roll(np.asarray(photos[i % len(photos)]), i, axis=1)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
        samples.append(
            {
                "__key__": f"{i % 10:02d}/{i:06d}",
                "jpg": buffer.getvalue(),
                "cls": str(i % 10).encode(),
                "tlm": encode(random_map(rng)),
            }
        )
    return samples


def random_map(rng: np.random.Generator) -> LabelMap:
    """Scores of 200 of 1,000 classes, in patches, as real maps have them."""
    coarse = rng.standard_normal((200, 5, 5)).astype(np.float32) * 3
    logits = np.kron(coarse, np.ones((1, 4, 4), np.float32))[:, :18, :18]
    logits += rng.standard_normal(logits.shape).astype(np.float32)
    order = np.argsort(-logits, axis=0)[:5]
    return LabelMap(
        scores=np.take_along_axis(logits, order, 0).astype(np.float16),
        classes=(5 * order).astype(np.uint32),
        num_classes=1000,
        log_normalizer=np.log(np.exp(logits).sum(0)).astype(np.float16),
    )


def lay_out(samples: list[dict[str, Any]], folder: Path) -> None:
    """Write what pack reads: class folders of images, and a label set."""
    for sample in samples:
        path = folder / f"images/{sample['__key__']}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample["jpg"])
    classes = [f"{number:02d}" for number in range(1000)]
    (folder / "classes.txt").write_text("\n".join(classes))
    label_set.check_output(folder / "labels")
    settings = {"teacher": {"name": "random"}, "fit": "native", "k": 5, "num_classes": 1000}
    record = label_set.write_slice(
        folder / "labels",
        0,
        ((sample["__key__"], sample["tlm"]) for sample in samples),
        settings=settings,
        quarantined={},
        num_correct=None,
    )
    label_set.write_index(folder / "labels", [record], settings=settings, class_names=classes)
