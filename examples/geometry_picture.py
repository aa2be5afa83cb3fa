"""Draw docs/images/geometry.jpg: a view of a photo, its tokens, and where they read the map."""

import argparse
import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F

from tokenlabel.labeler.geometry import apply_view, compose, crop_view, flip_view, token_points

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

MAP_GRID = (12, 18)
TOKEN_GRID = (7, 7)
CORNERS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])


def turned_and_mirrored_view(aspect: float) -> torch.Tensor:
    """A crop, turned by 20 degrees about its centre in pixels, then mirrored; (1, 2, 3)."""
    crop = crop_view(torch.tensor([[0.3, 0.12, 0.8, 0.92]]))
    width, height = 0.5 * aspect, 0.8  # of the crop, in units of the image's height
    turn = math.radians(20)
    cos, sin = math.cos(turn), math.sin(turn)
    rotation = torch.tensor([[cos, -sin * height / width], [sin * width / height, cos]])
    centre = torch.tensor([0.5, 0.5])
    offset = centre - rotation @ centre
    turned = compose(crop, torch.cat([rotation, offset[:, None]], 1)[None])
    return compose(turned, flip_view(torch.tensor([True])))


def draw(photo: np.ndarray, out: Path) -> None:
    """Write the picture; photo is (h, w, 3) uint8."""
    height, width = photo.shape[:2]
    view = turned_and_mirrored_view(width / height)
    points = token_points(TOKEN_GRID)
    colours = plt.get_cmap("viridis")(points[:, 1].numpy())
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.6), width_ratios=[width / height, 1], layout="constrained"
    )
    left.imshow(photo, extent=(0, 1, 1, 0), aspect=height / width)
    for row in range(MAP_GRID[0] + 1):
        left.axhline(row / MAP_GRID[0], color="white", lw=0.5, alpha=0.6)
    for col in range(MAP_GRID[1] + 1):
        left.axvline(col / MAP_GRID[1], color="white", lw=0.5, alpha=0.6)
    outline = apply_view(view, CORNERS)[0]
    left.plot(*outline.T, color="tab:orange", lw=2.5)
    left.scatter(*apply_view(view, points)[0].T, s=9, c=colours, edgecolors="black", lw=0.3)
    left.set(xlim=(0, 1), ylim=(1, 0), xlabel="x", ylabel="y", title="image, map cells, view")
    size = 350
    pixels = torch.from_numpy(photo).permute(2, 0, 1)[None].float()
    centres = token_points((size, size), per_side=1)
    where = apply_view(view, centres).reshape(1, size, size, 2) * 2 - 1
    crop = F.grid_sample(pixels, where, align_corners=False)[0].permute(1, 2, 0).byte().numpy()
    right.imshow(crop, extent=(0, 1, 1, 0))
    for i in range(TOKEN_GRID[0] + 1):
        right.axhline(i / TOKEN_GRID[0], color="tab:orange", lw=1)
        right.axvline(i / TOKEN_GRID[1], color="tab:orange", lw=1)
    right.scatter(*points.T, s=9, c=colours, edgecolors="black", lw=0.3)
    right.set(xlim=(0, 1), ylim=(1, 0), xlabel="u", ylabel="v", title="training crop, tokens")
    figure.savefig(out, dpi=80)


def main() -> None:
    """Draw with a photo of scikit-image (extra: demo)."""
    from skimage.data import chelsea

    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).parent.parent / "docs/images/geometry.jpg"
    parser.add_argument("--out", type=Path, default=default)
    draw(chelsea(), parser.parse_args().out)


if __name__ == "__main__":
    main()
