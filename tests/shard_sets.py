"""Small data sets for tests: pictures of known content in shards written by hand."""

import io
import tarfile
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

import numpy as np
from conftest import random_map
from PIL import Image

from tokenlabel.labeler.label_map import encode
from tokenlabel.shards.index import ShardEntry, ShardIndex, SplitIndex, format_idx, write_index

NUM_CLASSES = 40


def jpeg(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **{"quality": 95, "subsampling": 0} | options)
    return file.getvalue()


def painted(rows: int, cols: int) -> np.ndarray:
    """An image whose red says how far right a pixel is, and whose green how far down."""
    x = np.broadcast_to((np.arange(cols) + 0.5) / cols, (rows, cols))
    y = np.broadcast_to((np.arange(rows) + 0.5)[:, None] / rows, (rows, cols))
    return np.rint(255 * np.stack([x, y, np.full_like(x, 0.5)], 2)).astype(np.uint8)


def noise(rng: np.random.Generator, rows: int = 40, cols: int = 56) -> np.ndarray:
    small = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((cols, rows), Image.Resampling.BICUBIC))


def write_shard(folder: Path, name: str, samples: list[dict[str, bytes]]) -> ShardEntry:
    """Write a tar and its .idx by hand; each sample maps member names to their bytes."""
    tar, rows = folder / name, []
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as archive:
        for sample in samples:
            rows.append([])
            for member, data in sample.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                rows[-1].append((member, archive.offset + 512, len(data)))
                archive.addfile(info, io.BytesIO(data))
    idx = tar.with_suffix(".idx")
    idx.write_text(format_idx(rows), encoding="utf-8")
    return ShardEntry(
        name=name,
        samples=len(samples),
        bytes=tar.stat().st_size,
        sha256=sha256(tar.read_bytes()).hexdigest(),
        idx_sha256=sha256(idx.read_bytes()).hexdigest(),
    )


def write_split(
    folder: Path, samples: list[dict[str, bytes]], *, split: str = "train", shard_size: int = 5
) -> ShardIndex:
    starts = range(0, len(samples), shard_size)
    shards = [
        write_shard(folder, f"{split}-{i:06d}.tar", samples[start : start + shard_size])
        for i, start in enumerate(starts)
    ]
    names = [f"class {i}" for i in range(NUM_CLASSES)]
    entry = SplitIndex(
        num_samples=len(samples),
        has_labels=all(any(name.endswith(".tlm") for name in sample) for sample in samples),
        seed=0,
        shards=shards,
        labels=None,
        num_listed=len(samples),
        quarantined={},
        repaired={},
    )
    index = ShardIndex(
        folder=folder,
        num_classes=NUM_CLASSES,
        class_ids=names,
        class_names=names,
        splits={split: entry},
    )
    write_index(index)
    return index


def make_samples(keys: Iterable[str], *, seed: int = 0) -> list[dict[str, bytes]]:
    """Noise images; sample number i has class i modulo the class count and a label map."""
    rng = np.random.default_rng(seed)
    return [
        {
            f"{key}.jpg": jpeg(noise(rng)),
            f"{key}.cls": str(i % NUM_CLASSES).encode(),
            f"{key}.tlm": encode(random_map(rng, num_classes=NUM_CLASSES)),
        }
        for i, key in enumerate(keys)
    ]
