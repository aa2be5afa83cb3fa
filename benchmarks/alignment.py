"""Claim: our token targets say what the teacher says of the crop; the published geometry does not.

    python benchmarks/alignment.py          needs the extra [demo]; 20 minutes
    python benchmarks/alignment.py --quick  a smoke test on two photos

Random-resized crops of 20 real photos, each as it is (square) and cut to 4:3 and 3:4. The truth of
a crop is what the teacher itself says of it at 448 px, 14×14 cells. Against it stand the token
targets that were sampled from the label map of the whole photo:

    token   share of tokens whose best class is the teacher's
    small   the same, for crops of less than 35 % of the photo's area
    view    share of crops whose class target has the teacher's best class (of its mean)
    square  token and view on the square photos alone
    KL      KL(teacher on the crop ‖ target), nats, mean over tokens
    ±       half of the 95 % interval of token, by bootstrap over photos
    time    of the teacher, in units of one pass at 576 px
    bytes   of the .tlm, mean over photos
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
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
from tokenlabel.labeler.label_map import LabelMap, encode
from tokenlabel.labeler.score import num_tiles
from tokenlabel.labeler.teacher import Teacher

CROP_PX = 448
NUM_CROPS = 8
SMALL = 0.35
ASPECTS = (1.0, 4 / 3, 3 / 4)
"""Width over height that each photo is cut to; the photos are square."""
FIGURE = Path(__file__).parent.parent / "docs/images/label-quality.png"
Levels = list[LabelMap]
Sampler = Callable[[Levels, Tensor, tuple[int, int]], TokenTargets]


@dataclass(frozen=True)
class Choice:
    """One way to make label maps and to read them."""

    name: str
    fit: str
    sizes: tuple[int, ...]
    top_k: int
    sampler: Sampler
    in_figure: bool = False
    tiles: bool = False

    @property
    def time(self) -> float:
        """Of the teacher, one pass at 576 px is 1."""
        first = self.sizes[0]
        sides = [first * num_tiles(size, first) if self.tiles else size for size in self.sizes]
        return sum(side**2 for side in sides) / 576**2


@dataclass(frozen=True)
class Scores:
    """What came out for one choice, one value per crop; photos run slowest."""

    area: Tensor
    """Of the crop, as a share of the photo's."""
    token: Tensor
    view: Tensor
    divergence: Tensor

    def first(self, num_crops: int) -> "Scores":
        """Keep the scores of the first crops."""
        return Scores(*(values[:num_crops] for values in vars(self).values()))


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


def ours(fill: Fill) -> Sampler:
    """Sample through views and windows."""

    def targets(levels: Levels, boxes: Tensor, grid: tuple[int, int]) -> TokenTargets:
        maps = PaletteMaps.from_label_maps([levels] * len(boxes))
        return sample_targets(maps, crop_view(boxes), grid, fill=fill)

    return targets


def published(*, mend_axes: bool) -> Sampler:
    """Read a centre crop's map as if it were the whole image's, with y and x exchanged or not."""

    def targets(levels: Levels, boxes: Tensor, grid: tuple[int, int]) -> TokenTargets:
        whole = [replace(level, window=(0.0, 0.0, 1.0, 1.0)) for level in levels]
        return ours("zero")(whole, boxes if mend_axes else boxes[:, [1, 0, 3, 2]], grid)

    return targets


def choices() -> list[Choice]:
    """List the lines of the table."""
    residual = ours("residual")
    pyramids = [(576, 896), (448, 896), (448, 704, 1152), (448, 640, 896), (448, 640, 896, 1280)]
    shown = [(448, 896), (448, 640, 896, 1280)]
    return [
        Choice("published geometry", "center", (576,), 5, published(mend_axes=False), True),
        Choice("… axes mended", "center", (576,), 5, published(mend_axes=True)),
        Choice("fit center, zero fill", "center", (576,), 5, ours("zero")),
        Choice("fit stretch, zero fill", "stretch", (576,), 5, ours("zero")),
        Choice("fit native, zero fill", "native", (576,), 5, ours("zero")),
        Choice("fit native (the default)", "native", (576,), 5, residual, True),
        Choice("native, top 10", "native", (576,), 10, residual),
        Choice("native at 448", "native", (448,), 5, residual),
        Choice("native at 768", "native", (768,), 5, residual),
        *(
            Choice(f"levels {','.join(map(str, sizes))}", "native", sizes, 5, residual, in_figure)
            for sizes in pyramids
            for in_figure in [sizes in shown]
        ),
        Choice("levels 448,896, top 10", "native", (448, 896), 10, residual),
        Choice("levels 448,640,896,1280, top 10", "native", (448, 640, 896, 1280), 10, residual),
        *(
            Choice(f"{name}, tiles, top {top_k}", "native", sizes, top_k, residual, shown, True)
            for name, sizes, top_k, shown in [
                ("levels 448,896", (448, 896), 5, False),
                ("levels 448,896", (448, 896), 10, False),
                ("levels 448,640,1280", (448, 640, 1280), 10, False),
                ("levels 448,640,896,1280", (448, 640, 896, 1280), 5, True),
                ("levels 448,640,896,1280", (448, 640, 896, 1280), 10, False),
            ]
        ),
    ]


def score(target: TokenTargets, logits: Tensor, boxes: Tensor) -> Scores:
    """Compare the targets of one photo's crops with the truth."""
    p = logits.flatten(2).transpose(1, 2).softmax(2)
    q = target.dense_tokens()
    return Scores(
        area=(boxes[:, 2:] - boxes[:, :2]).prod(1),
        token=(p.argmax(2) == q.argmax(2)).float().mean(1),
        view=(logits.mean((2, 3)).argmax(1) == target.dense_view().argmax(1)).float(),
        divergence=(p * (p.clamp(min=1e-30).log() - q.clamp(min=1e-30).log())).sum(2).mean(1),
    )


def joined(parts: Sequence[Scores]) -> Scores:
    """Put the scores of several photos one after the other."""
    return Scores(*(torch.cat(values) for values in zip(*(vars(part).values() for part in parts))))


def row(choice: Choice, scores: Scores, num_bytes: float) -> dict[str, Any]:
    """One line of the table."""
    per_photo = scores.token.view(-1, NUM_CROPS).mean(1).numpy()
    draws = np.random.default_rng(0).integers(len(per_photo), size=(2000, len(per_photo)))
    square = scores.first(len(scores.area) // len(ASPECTS))
    low, high = np.quantile(per_photo[draws].mean(1), [0.025, 0.975])
    return {
        "label map": choice.name,
        "token": scores.token.mean().item(),
        "±": float(high - low) / 2,
        "small": scores.token[scores.area < SMALL].mean().item(),
        "view": scores.view.mean().item(),
        "square token": square.token.mean().item(),
        "square view": square.view.mean().item(),
        "KL": scores.divergence.mean().item(),
        "time": choice.time,
        "bytes": num_bytes,
    }


def draw(scores: dict[str, Scores], out: Path) -> None:
    """Draw token agreement over the area of the crop."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    edges = torch.tensor([0.08, 0.15, 0.25, 0.35, 0.5, 0.7, 1.01])
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, values in scores.items():
        band = torch.bucketize(values.area, edges)
        present = [i for i in range(1, len(edges)) if (band == i).any()]
        areas = [values.area[band == i].mean().item() for i in present]
        agreement = [values.token[band == i].mean().item() for i in present]
        axis.plot(areas, agreement, marker="o", label=name)
    axis.set(
        xlabel="area of the crop, share of the photo",
        ylabel="tokens with the teacher's class",
        ylim=(0, None),
    )
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(out, dpi=110)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="two photos: a smoke test")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    photos = demo_photos()[: 2 if quick else None]
    photos = [cut(photo, aspect) for aspect in ASPECTS for photo in photos]
    boxes = [random_boxes(photo) for photo in photos]
    sizes = {CROP_PX, *(size for choice in choices() for size in choice.sizes)}
    teachers = {size: demo_teacher(size) for size in sorted(sizes)}
    truths = [
        truth(teachers[CROP_PX], photo, box)
        for photo, box in zip(tqdm(photos, "crops", disable=None), boxes)
    ]
    grid = (truths[0].shape[2], truths[0].shape[3])
    most = max(choice.top_k for choice in choices())
    made: dict[tuple[str, int, int | None], Levels] = {}

    def maps(fit: str, size: int, top_k: int, tile_px: int | None) -> Levels:
        key = (fit, size, tile_px)
        if key not in made:
            shown = tqdm(photos, f"{fit} {size}", disable=None)
            made[key] = [
                label(teachers[size], p, fit=fit, top_k=most, tile_px=tile_px) for p in shown
            ]
        return [
            replace(level, scores=level.scores[:top_k], classes=level.classes[:top_k])
            for level in made[key]
        ]

    rows, in_figure = [], {}
    for choice in choices():
        first = choice.sizes[0]
        levels = [
            maps(choice.fit, size, choice.top_k, first if choice.tiles and size > first else None)
            for size in choice.sizes
        ]
        pyramids = [list(of_photo) for of_photo in zip(*levels)]
        scores = joined(
            [
                score(choice.sampler(pyramid, box, grid), logits, box)
                for pyramid, logits, box in zip(pyramids, truths, boxes)
            ]
        )
        num_bytes = float(np.mean([len(encode(pyramid)) for pyramid in pyramids]))
        rows.append(row(choice, scores, num_bytes))
        assert math.isfinite(rows[-1]["KL"])
        if choice.in_figure:
            in_figure[choice.name] = scores
    print(markdown(rows))
    if not quick:
        draw(in_figure, FIGURE)
        print(f"written to {write('alignment', rows, photos=len(photos), crops=NUM_CROPS)}")


if __name__ == "__main__":
    main()
