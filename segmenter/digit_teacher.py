"""A teacher that knows single handwritten digits, and label maps of scenes made with it.

It never sees a scene: what it knows of one is what it says of the surroundings of each cell.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor, nn
from tqdm import trange

from ..labeler.teacher import Teacher, load_teacher
from .scenes import NUM_CLASSES, Digits, SceneConfig, compose_scenes

NAME = "test_resnet"
"""A small CNN of timm."""
SCALE = 2
"""How much larger than its pixels it sees a scene: its cells of 32 px are 16 px of it."""

SIDES_PX = (32, 48)
"""Of the images of single digits that it learns from."""

Labelled = tuple[UInt8[Tensor, "_ 3 _ _"], Int64[Tensor, "_"] | Float32[Tensor, "_ c"]]
"""Images, and the class of each or the probabilities of all classes."""

_USUAL = SceneConfig()
_BATCH_SIZES = (128, 57)
"""As many pixels of either side."""


def one_digit(side_px: int, config: SceneConfig = _USUAL) -> SceneConfig:
    """Configure images of one digit each, large and small as in these scenes."""
    usual_px = config.sides_px[0] * config.sides_px[1]
    return replace(
        config,
        sides_px=(side_px, side_px),
        num_digits=(1, 1),
        largest_px=(config.smallest_px, min(config.largest_px[1], side_px - 2 - 2 * config.rim_px)),
        num_scraps=round(2 * config.num_scraps * side_px**2 / usual_px),
    )


def single_digits(
    digits: Digits, num: int, side_px: int, *, seed: int, config: SceneConfig
) -> tuple[UInt8[Tensor, "n 3 h w"], Int64[Tensor, " n"]]:
    """Make images of one digit each and their classes."""
    scenes = list(compose_scenes(digits, num, seed=seed, config=one_digit(side_px, config)))
    pixels = torch.from_numpy(np.stack([scene.pixels for scene in scenes])).permute(0, 3, 1, 2)
    return pixels.contiguous(), torch.tensor([scene.label for scene in scenes])


def train_teacher(
    digits: Digits, *, num_steps: int, num_images: int, config: SceneConfig
) -> nn.Module:
    """Teach the CNN single digits as in these scenes, in two sizes of their surroundings."""
    sets = [single_digits(digits, num_images, side, seed=side, config=config) for side in SIDES_PX]
    return train_on(sets, num_steps=num_steps)


def train_on(sets: Sequence[Labelled], *, num_steps: int) -> nn.Module:
    """Teach the CNN images of the sides SIDES_PX, one set of each, by turns."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=NUM_CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, num_steps, pct_start=0.06)
    model.train()
    for step in trange(num_steps, desc="teacher", disable=None):
        images, targets = sets[step % 2]
        chosen = torch.randint(len(images), (_BATCH_SIZES[step % 2],))
        loss = F.cross_entropy(model(teacher_input(model, images[chosen])), targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def teacher_input(
    model: nn.Module, images: UInt8[Tensor, "n 3 h w"]
) -> Float32[Tensor, "n 3 larger_h larger_w"]:
    """Enlarge and normalise as tl-label does at an image size of SCALE times the scene."""
    size = (images.shape[2] * SCALE, images.shape[3] * SCALE)
    larger = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
    config: dict[str, Any] = model.pretrained_cfg  # pyright: ignore[reportAssignmentType]
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (larger.clamp(0, 255) / 255 - mean) / std


def save_as_teacher(model: nn.Module, path: Path, *, device: str) -> Teacher:
    """Write a trained CNN's weights and open them as tl-label does."""
    torch.save(model.state_dict(), path)
    side_px = _USUAL.sides_px[0] * SCALE
    return load_teacher(NAME, checkpoint=path, image_size=side_px, device=device)
