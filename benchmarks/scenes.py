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
    "Digits",
    "PlacedDigit",
    "Scene",
    "SceneConfig",
    "compose_scene",
    "compose_scenes",
    "load_digits",
    "write_image_folder",
]


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("docs/images/scenes.png"),
    show_default=True, help="Picture to write.",
)  # fmt: skip
def main(out: Path) -> None:
    """Draw a sheet of training scenes, each with its label."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train, _ = load_digits()
    figure, axes = plt.subplots(3, 8, figsize=(12, 5), layout="constrained")
    scenes = compose_scenes(train, axes.size, seed=0, config=SceneConfig())
    for axis, scene in zip(axes.flat, scenes):
        axis.imshow(scene.pixels)
        axis.set_title(f"label {scene.label}", fontsize=9)
        axis.axis("off")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    click.echo(out)


if __name__ == "__main__":
    main()
