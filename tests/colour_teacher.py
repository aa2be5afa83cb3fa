"""A teacher whose answers can be foreseen: a cell's class is the colour nearest to its mean."""

import colorsys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tokenlabel.labeler.teacher import Teacher, as_teacher

NUM_CLASSES = 12
STRIDE = 8
COLOURS = torch.tensor([colorsys.hsv_to_rgb(i / NUM_CLASSES, 1, 1) for i in range(NUM_CLASSES)])


class NearestColour(nn.Module):
    """What timm's classifiers have, and no more."""

    num_classes = NUM_CLASSES
    num_features = 3
    feature_info = ({"reduction": STRIDE},)
    pretrained_cfg = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bicubic"}

    def forward_features(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, STRIDE)

    def forward_head(self, cells: Tensor) -> Tensor:
        return -20 * (cells.flatten(1)[:, None] - COLOURS).square().sum(-1)


def colour_teacher(image_size: int = 64) -> Teacher:
    return as_teacher(
        NearestColour(), name="nearest colour", image_size=image_size, device=torch.device("cpu")
    )


def patchwork(
    seed: int, *, size: tuple[int, int], patches: tuple[int, int] = (4, 4)
) -> Image.Image:
    """A (width, height) photo of patches (rows, cols) in the colours of random classes."""
    classes = np.random.default_rng(seed).integers(0, NUM_CLASSES, patches)
    pixels = (COLOURS[torch.from_numpy(classes)] * 255).round().byte().numpy()
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
