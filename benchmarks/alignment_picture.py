"""Draw one small crop's labels as each geometry has them; the picture in docs/label-quality.md.

python benchmarks/alignment_picture.py      needs the extra [demo]; half a minute
"""

from pathlib import Path

import click
import torch
from alignment import CROP_PX, Choice, cut, ours, published, truth
from photos import demo_photos, demo_teacher, keep_best, label
from PIL import Image

from tokenlabel.labeler.draw import (
    colours_of,
    colours_of_targets,
    draw_label_map,
    draw_token_targets,
    draw_view,
    with_legend,
)
from tokenlabel.labeler.geometry import crop_view
from tokenlabel.labeler.sheet import stack

PANEL_PX = 300


@click.command()
@click.option("--photo", default=5, show_default=True, help="Which of the 20 photos, from 0.")
@click.option(
    "--box",
    type=float,
    nargs=4,
    default=(0.3, 0.0, 0.75, 0.55),
    show_default=True,
    help="The crop, x0 y0 x1 y1 in fractions of the photo cut to 4:3.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("docs/images/label-quality-crop.jpg"),
    show_default=True,
)
def main(photo: int, box: tuple[float, float, float, float], out: Path) -> None:
    """Draw the crop with what the teacher says of it and what sampled targets say."""
    image = cut(demo_photos()[photo], 4 / 3)
    boxes = torch.tensor([box])
    teacher = demo_teacher(CROP_PX)
    names = teacher.class_names or []
    left, top, right, bottom = (
        round(edge * side) for edge, side in zip(box, [image.width, image.height] * 2)
    )
    crop = image.crop((left, top, right, bottom)).resize(
        (CROP_PX, CROP_PX), Image.Resampling.BICUBIC
    )
    said = keep_best(truth(teacher, image, boxes)[0], top_k=5)
    colours = colours_of(said)
    framed = draw_view(image, crop_view(boxes)[0], longest_px=PANEL_PX)
    drawing = draw_label_map(crop, said, names, colours=colours, longest_px=PANEL_PX)
    title = "A crop, and what the teacher says of the crop itself"
    panels = [with_legend(drawing, photo=framed, title=title)]
    for choice in (
        Choice("By the published geometry", "center", (576,), 5, published(mend_axes=False)),
        Choice("From one map at 576 px", "native", (576,), 5, ours("residual")),
        Choice("From levels 448,896", "native", (448, 896), 5, ours("residual")),
    ):
        levels = [label(demo_teacher(size), image, fit=choice.fit) for size in choice.sizes]
        targets = choice.sampler(levels, boxes, said.grid)
        colours = colours_of_targets(targets, 0, keep=colours)
        drawing = draw_token_targets(
            crop, targets, 0, said.grid, names, colours=colours, longest_px=PANEL_PX
        )
        panels.append(with_legend(drawing, photo=crop, title=choice.name))
    out.parent.mkdir(parents=True, exist_ok=True)
    stack(panels).save(out, quality=82)
    click.echo(out)


if __name__ == "__main__":
    main()
