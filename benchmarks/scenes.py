"""Draws a sheet of the scenes that tokenlabel.segmenter.scenes composes, for docs/learning.md.

    python benchmarks/scenes.py [--out docs/images/scenes.png]

The names of that module are passed on to the benchmarks beside this file.
"""

from pathlib import Path

import click

from tokenlabel.segmenter.scenes import (
    BACKGROUND,
    NUM_CLASSES,
    Digits,
    PlacedDigit,
    Scene,
    SceneConfig,
    compose_scene,
    compose_scenes,
    load_digits,
    write_image_folder,
)

__all__ = [
    "BACKGROUND",
    "NUM_CLASSES",
    "TRAIN_SCENES",
    "VAL_SCENES",
    "Digits",
    "PlacedDigit",
    "Scene",
    "SceneConfig",
    "compose_scene",
    "compose_scenes",
    "load_digits",
    "write_image_folder",
]

TRAIN_SCENES = SceneConfig(sides_px=(64, 96), num_digits=(3, 6))
VAL_SCENES = SceneConfig()
"""Square, so that the view of evaluation, a centre crop, shows all of them."""


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("docs/images/scenes.png"),
    show_default=True, help="Picture to write.",
)  # fmt: skip
def main(out: Path) -> None:
    """Draw a sheet of scenes, each with its label: two rows to train on, one as if held out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train, held_out = load_digits()
    figure, axes = plt.subplots(3, 8, figsize=(12, 5.6), layout="constrained")
    scenes = [
        *compose_scenes(train, 16, seed=0, config=TRAIN_SCENES),
        *compose_scenes(held_out, 8, seed=0, config=VAL_SCENES),
    ]
    for axis, scene in zip(axes.flat, scenes):
        axis.imshow(scene.pixels)
        axis.set_title(f"label {scene.label}", fontsize=9)
        axis.axis("off")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    click.echo(out)


if __name__ == "__main__":
    main()
