"""Claim: our token targets say what the teacher says of the crop; the published geometry does not.

    python benchmarks/alignment.py          needs the extra [demo]; about five minutes

Random-resized crops of 20 real photos, each as it is (square) and cut to 4:3 and 3:4. The truth of
a crop is what the teacher itself says of it at 448 px, 14×14 cells. Against it stand the token
targets that were sampled from the label map of the whole photo:

    token   share of tokens whose best class is the teacher's
    small   the same, for crops of less than 35 % of the photo's area
    view    share of crops whose class target has the teacher's best class (of its mean)
    KL      KL(teacher on the crop ‖ target), nats, mean over tokens
    ±       half of the 95 % interval of token, by bootstrap over photos
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from photos import demo_photos, demo_teacher, label
from PIL import Image
from record import markdown, write
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from tqdm import tqdm

from tokenlabel.labeler.geometry import Fill, PaletteMaps, TokenTargets, crop_view, sample_targets
from tokenlabel.labeler.label_map import LabelMap
from tokenlabel.labeler.teacher import Teacher

CROP_PX = 448
NUM_CROPS = 8
SMALL = 0.35
Levels = list[LabelMap]


def cut(photo: Image.Image, aspect: float) -> Image.Image:
    """Cut the middle of a photo to an aspect ratio."""
    width = min(photo.width, round(photo.height * aspect))
    height = min(photo.height, round(photo.width / aspect))
    left, top = (photo.width - width) // 2, (photo.height - height) // 2
    return photo.crop((left, top, left + width, top + height))


def random_boxes(photo: Image.Image) -> Tensor:
    """Boxes (x0, y0, x1, y1) in image fractions, from torchvision's random-resized crop."""
    boxes = []
    for _ in range(NUM_CROPS):
        top, left, height, width = RandomResizedCrop.get_params(
            photo,  # pyright: ignore[reportArgumentType]: takes PIL images, too
            scale=[0.08, 1.0],
            ratio=[3 / 4, 4 / 3],
        )
        boxes.append([left, top, left + width, top + height])
    size = [photo.width, photo.height] * 2
    return torch.tensor(boxes) / torch.tensor(size)


def truth(teacher: Teacher, photo: Image.Image, boxes: Tensor) -> Tensor:
    """The teacher's logits on each crop, (crops, classes, 14, 14)."""
    scale = torch.tensor([photo.width, photo.height] * 2)
    crops = [
        np.array(photo.resize((CROP_PX, CROP_PX), Image.Resampling.BICUBIC, box=tuple(box)))
        for box in (boxes * scale).tolist()
    ]
    return teacher.dense(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2))


def ours(fill: Fill) -> Callable[[Levels, Tensor, tuple[int, int]], TokenTargets]:
    """Sample through views and windows."""

    def targets(levels: Levels, boxes: Tensor, grid: tuple[int, int]) -> TokenTargets:
        maps = PaletteMaps.from_label_maps([levels] * len(boxes))
        return sample_targets(maps, crop_view(boxes), grid, fill=fill)

    return targets


def published(*, mend_axes: bool) -> Callable[[Levels, Tensor, tuple[int, int]], TokenTargets]:
    """Read a centre crop's map as if it were the whole image's, with y and x exchanged or not."""

    def targets(levels: Levels, boxes: Tensor, grid: tuple[int, int]) -> TokenTargets:
        whole = [replace(level, window=(0.0, 0.0, 1.0, 1.0)) for level in levels]
        return ours("zero")(whole, boxes if mend_axes else boxes[:, [1, 0, 3, 2]], grid)

    return targets


def measure(
    name: str, cost: float, targets: list[TokenTargets], truths: list[Tensor], boxes: list[Tensor]
) -> dict[str, Any]:
    """One line of the table; lists run over photos."""
    token, small, view, divergence = [], [], [], []
    for target, logits, box in zip(targets, truths, boxes):
        p = logits.flatten(2).transpose(1, 2).double().softmax(2)
        q = target.dense_tokens().double()
        right = (p.argmax(2) == q.argmax(2)).double().mean(1)
        area = (box[:, 2:] - box[:, :2]).prod(1)
        token.append(right)
        small.append(right[area < SMALL])
        view.append(logits.mean((2, 3)).argmax(1) == target.dense_view().argmax(1))
        divergence.append((p * (p.clamp(min=1e-30) / q.clamp(min=1e-30)).log()).sum(2).mean(1))
    per_photo = torch.stack([t.mean() for t in token])
    draws = torch.from_numpy(np.random.default_rng(0).integers(len(token), size=(2000, len(token))))
    low, high = per_photo[draws].mean(1).quantile(torch.tensor([0.025, 0.975]).double())
    return {
        "label map": name,
        "teacher time": cost,
        "token": torch.cat(token).mean().item(),
        "±": ((high - low) / 2).item(),
        "small": torch.cat(small).mean().item(),
        "view": torch.cat(view).double().mean().item(),
        "KL": torch.cat(divergence).mean().item(),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="two photos: a smoke test")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    photos = demo_photos()[: 2 if quick else None]
    photos = [cut(photo, aspect) for aspect in (1.0, 4 / 3, 3 / 4) for photo in photos]
    boxes = [random_boxes(photo) for photo in photos]
    sizes = (448, 576, 640, 768, 896, 1280)
    teachers = {size: demo_teacher(size) for size in sizes}
    truths = [
        truth(teachers[448], photo, box)
        for photo, box in zip(tqdm(photos, "crops", disable=None), boxes)
    ]
    grid = (truths[0].shape[2], truths[0].shape[3])
    made: dict[tuple, list[LabelMap]] = {}

    def maps(fit: str, size: int, top_k: int) -> list[LabelMap]:
        key = (fit, size, top_k)
        if key not in made:
            shown = tqdm(photos, f"{fit} {size}", disable=None)
            made[key] = [label(teachers[size], p, fit=fit, top_k=top_k) for p in shown]
        return made[key]

    rows = []
    for name, fit, levels, top_k, sampler in [
        ("published: centre crop, axes exchanged", "center", [576], 5, published(mend_axes=False)),
        ("axes mended", "center", [576], 5, published(mend_axes=True)),
        ("axes and window right: fit center", "center", [576], 5, ours("zero")),
        ("fit stretch", "stretch", [576], 5, ours("zero")),
        ("fit native, zero fill", "native", [576], 5, ours("zero")),
        ("fit native (the default)", "native", [576], 5, ours("residual")),
        ("native, top 10", "native", [576], 10, ours("residual")),
        ("native at 448", "native", [448], 5, ours("residual")),
        ("native at 768", "native", [768], 5, ours("residual")),
        ("pyramid 576,896", "native", [576, 896], 5, ours("residual")),
        ("pyramid 448,640,896", "native", [448, 640, 896], 5, ours("residual")),
        ("pyramid 448,640,896,1280", "native", [448, 640, 896, 1280], 5, ours("residual")),
        ("pyramid 448,640,896,1280, top 10", "native", [448, 640, 896, 1280], 10, ours("residual")),
    ]:
        pyramids = [list(levels_of) for levels_of in zip(*(maps(fit, s, top_k) for s in levels))]
        targets = [sampler(pyramid, box, grid) for pyramid, box in zip(pyramids, boxes)]
        cost = sum(size**2 for size in levels) / 576**2
        rows.append(measure(name, cost, targets, truths, boxes))
        assert math.isfinite(rows[-1]["KL"])
    print(markdown(rows))
    if not quick:
        print(f"written to {write('alignment', rows, photos=len(photos), crops=NUM_CROPS)}")


if __name__ == "__main__":
    main()
