"""Small data sets with masks, and a small segmentation model, for tests."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from tokenlabel.segmenter.pack import open_masks, pack
from tokenlabel.segmenter.recipe import SegRecipe
from tokenlabel.trainer.recipe import parse_record

NAMES = ["ground", "tree", "car", "sky"]

TINY = """
[model]
name = "upernet_lvvit_t"
num_classes = 0
image_size = 32
mlp_drop = 0.1
drop_path = 0.1
kwargs = { embed_dim = 8, depth = 4, num_heads = 2, stem_width = 4, out_blocks = [0, 1, 2, 3], \
head_dim = 8, deep_dim = 8 }
[inference]
short_px = 32
long_px = 96
window_px = 32
stride_px = 21
[augment]
short_px = 32
long_px = 96
crop_px = 32
[optim]
batch_size = 4
lr = 1e-3
[schedule]
duration = "7 steps"
warmup = "2 steps"
[ema]
decay = 0.9
[evaluation]
every = "4 steps"
num_sheets = 1
[run]
workers = 0
checkpoint_every = "2 steps"
log_every = "1 steps"
"""


def tiny_recipe(*overrides: str) -> SegRecipe:
    return parse_record(SegRecipe, TINY, overrides)


def blocks(rng: np.random.Generator, height: int, width: int, num: int = 4) -> np.ndarray:
    """A mask of a few large rectangles of classes."""
    coarse = Image.fromarray(rng.integers(0, num, (3, 4), dtype=np.uint8))
    return np.array(coarse.resize((width, height), Image.Resampling.NEAREST))


def paint(mask: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """An image whose colours say which class a pixel has, with some noise."""
    colours = np.array([[200, 60, 40], [30, 180, 60], [60, 60, 220], [220, 220, 90]])
    noisy = colours[mask.clip(0, 3)] + rng.normal(0, 10, (*mask.shape, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def png(mask: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return buffer.getvalue()


def write_pairs(folder: Path, num: int, *, seed: int = 0) -> Path:
    """Write images/*.jpg and masks/*.png of several sizes, some pixels without a class."""
    rng = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(num):
        mask = blocks(rng, *[(40, 52), (33, 60), (48, 36)][i % 3])
        paint(mask, rng).save(folder / "images" / f"{i:03}.jpg", quality=95)
        mask[:2] = 255
        (folder / "masks" / f"{i:03}.png").write_bytes(png(mask))
    (folder / "names.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    return folder


def write_shards(folder: Path, *, num_train: int = 10, num_val: int = 5) -> Path:
    """Pack a train and a val split."""
    for seed, (split, num) in enumerate({"train": num_train, "val": num_val}.items()):
        pairs = write_pairs(folder / split, num, seed=seed)
        source = open_masks([str(pairs)], split=split, classes=pairs / "names.txt")
        pack(source, folder / "shards", split=split, num_workers=1)
    return folder / "shards"
