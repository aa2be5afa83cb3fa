"""Claim: the feed hands over augmented crops with token labels faster than others do without.

    python benchmarks/feed.py            a thousand photos of 500×375, 60 KB; two minutes
    python benchmarks/feed.py --quick    a smoke test

Images per second of CPU time, all processes and threads counted: on a machine with n cores a path
does n times that. Random-resized crop to 224, flip, normalised float32 batches of 64. With and
without RandAugment (rand-m9-mstd0.5-inc1). One epoch each, in turn, several times, each path in a
process of its own, which stays:

    published       DataLoader and PIL, in the published code's order: the whole image is flipped
                    and goes through RandAugment, then it is cropped; a torch file of labels for
                    each image, read but not moved along, which takes little
    timm            timm's transforms and DataLoader, which crop first, no labels
    webdataset      the same transforms on tars, no labels
    torchvision v2  its tensor transforms, no labels; one operation of RandAugment an image, which
                    is how many timm's two make that are each drawn with probability a half
    ours            TrainFeed on the CPU, token labels decoded and moved along; freed memory is
                    kept, as tl-train does on a CPU
    ours, for a GPU what the CPU does where a GPU does the rest: reading, decoding the crop's
                    region, decoding labels
"""

import argparse
import io
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from nvidia.dali import fn
from nvidia.dali.pipeline import pipeline_def
from PIL import Image
from record import markdown, write
from samples import lay_out, make_samples
from timm.data import auto_augment
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.data.transforms_factory import create_transform
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.io import decode_jpeg
from torchvision.transforms import v2

from tokenlabel.labeler.cpu import keep_freed_memory
from tokenlabel.labeler.geometry import PaletteMaps
from tokenlabel.labeler.label_map import decode_batch
from tokenlabel.labeler.label_set import LabelSet
from tokenlabel.labeler.sources import open_source
from tokenlabel.shards.index import ShardIndex, read_index
from tokenlabel.shards.pack import pack
from tokenlabel.trainer.feed import TrainFeed
from tokenlabel.trainer.recipe import AugmentConfig

FORMATTER = argparse.RawDescriptionHelpFormatter
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
SIDE_PX = 224
BATCH = 64
WORKERS = 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def posterize(image: Image.Image, num_bits: int, **_: Any) -> Image.Image:
    """Do what timm 1.0.31 asks Pillow for, also at 0 bits, which Pillow 13 refuses."""
    if num_bits < 8:
        return image.point([value & -(1 << (8 - num_bits)) for value in range(256)] * 3)
    return image


for _name in ("Posterize", "PosterizeOriginal", "PosterizeIncreasing"):
    auto_augment.NAME_TO_OP[_name] = posterize


def timm_transform(rand_augment: bool) -> Callable[[Image.Image], torch.Tensor]:
    return create_transform(  # pyright: ignore[reportReturnType]
        SIDE_PX,
        is_training=True,
        auto_augment=RAND_AUGMENT if rand_augment else None,
        color_jitter=0.0,
        interpolation="random",
        mean=MEAN,
        std=STD,
    )


def published_transform(rand_augment: bool) -> Callable[[Image.Image], torch.Tensor]:
    """Make timm's steps anew, in the published code's order."""
    options = {
        "translate_const": int(0.45 * SIDE_PX),
        "img_mean": tuple(round(255 * value) for value in MEAN),
    }
    change = auto_augment.rand_augment_transform(RAND_AUGMENT, options)
    return v1.Compose(
        [
            v1.RandomHorizontalFlip(),
            *([change] if rand_augment else []),
            RandomResizedCropAndInterpolation(SIDE_PX, interpolation="random"),
            v1.ToTensor(),
            v1.Normalize(MEAN, STD),
        ]
    )


class Files(Dataset):
    """Images as files, transformed one by one; with the published label files or without."""

    def __init__(self, folder: Path, transform: Callable, *, labels: bool) -> None:
        self._paths = sorted((folder / "images").rglob("*.jpg"))
        self._transform, self._labels = transform, labels

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: int) -> tuple[Any, ...]:
        path = self._paths[i]
        image = self._transform(Image.open(path).convert("RGB"))
        if not self._labels:
            return image, i
        return image, i, torch.load(path.with_suffix(".pt"), weights_only=True)


class Tensors(Dataset):
    """Images as files, decoded and transformed as tensors."""

    def __init__(self, folder: Path, rand_augment: bool) -> None:
        self._paths = sorted((folder / "images").rglob("*.jpg"))
        steps: list[Any] = [
            v2.RandomResizedCrop(SIDE_PX, antialias=True),
            v2.RandomHorizontalFlip(),
            *([v2.RandAugment(num_ops=1)] if rand_augment else []),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
        self._transform = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        data = torch.frombuffer(bytearray(self._paths[i].read_bytes()), dtype=torch.uint8)
        return self._transform(decode_jpeg(data)), i


def loaded(dataset: Any) -> Iterator[int]:
    """Go once through a data set with DataLoader; yields batch sizes."""
    shuffle = None if isinstance(dataset, torch.utils.data.IterableDataset) else True
    loader: Any = DataLoader(
        dataset, BATCH, shuffle=shuffle, num_workers=WORKERS, multiprocessing_context="fork"
    )
    for images, *_ in loader:
        yield len(images)


def published(folder: Path, rand_augment: bool) -> Iterator[int]:
    return loaded(Files(folder, published_transform(rand_augment), labels=True))


def timm_loader(folder: Path, rand_augment: bool) -> Iterator[int]:
    return loaded(Files(folder, timm_transform(rand_augment), labels=False))


def from_webdataset(folder: Path, rand_augment: bool) -> Iterator[int]:
    transform = timm_transform(rand_augment)

    def sample(item: dict[str, Any]) -> tuple[torch.Tensor, int]:
        return transform(Image.open(io.BytesIO(item["jpg"])).convert("RGB")), int(item["cls"])

    tars = sorted(str(path) for path in (folder / "shards").glob("*.tar"))
    dataset: Any = webdataset.WebDataset(tars, shardshuffle=len(tars))  # pyright: ignore
    return loaded(dataset.shuffle(200).map(sample))


def torchvision_v2(folder: Path, rand_augment: bool) -> Iterator[int]:
    return loaded(Tensors(folder, rand_augment))


def ours(folder: Path, rand_augment: bool) -> Iterator[int]:
    index = read_index(folder / "shards")
    augment = AugmentConfig(
        auto_augment=RAND_AUGMENT if rand_augment else "none", color_jitter=0.0, random_erasing=0.0
    )
    feed = TrainFeed(
        index, image_size=(SIDE_PX, SIDE_PX), batch_size=BATCH, augment=augment, num_threads=WORKERS
    )
    for _ in range(feed.num_samples // BATCH):
        yield len(next(feed).images)
    feed.close()


def ours_for_a_gpu(folder: Path, _: bool) -> Iterator[int]:
    index = read_index(folder / "shards")
    pipeline = reading_pipeline(
        index, batch_size=BATCH, num_threads=WORKERS, device_id=None, seed=0
    )
    pipeline.build()
    for _batch in range(index.split("train").num_samples // BATCH):
        regions, labels = pipeline.run()
        data = [np.asarray(labels.at(i)).tobytes() for i in range(BATCH)]
        PaletteMaps.from_arrays(decode_batch(data))
        yield len(regions)


@pipeline_def
def reading_pipeline(index: ShardIndex) -> Any:
    paths = index.shard_paths("train")
    read: Any = fn.readers.webdataset(
        paths=[str(path) for path in paths],
        index_paths=[str(path.with_suffix(".idx")) for path in paths],
        ext=["jpg", "tlm"],
        random_shuffle=True,
        name="reader",
    )
    images, labels = read
    regions = fn.decoders.image_random_crop(
        images, random_area=(0.08, 1.0), random_aspect_ratio=(3 / 4, 4 / 3), hw_decoder_load=0
    )
    return regions, labels


PATHS: dict[str, Callable[[Path, bool], Iterable[int]]] = {
    "published": published,
    "timm": timm_loader,
    "webdataset": from_webdataset,
    "torchvision v2": torchvision_v2,
    "ours": ours,
    "ours, for a GPU": ours_for_a_gpu,
}


def make_data(folder: Path, count: int) -> None:
    """Write the same photos as files, with a torch file of labels beside each, and as shards."""
    samples = make_samples(count)
    lay_out(samples, folder)
    for sample in samples:
        arrays = decode_batch([sample["tlm"]])
        classes = arrays.palette[0][arrays.indices[0, 0]]
        planes = np.stack([arrays.scores[0, 0], classes.astype(np.float16)])
        torch.save(torch.from_numpy(planes), folder / f"images/{sample['__key__']}.pt")
    source = open_source(str(folder / "images"), classes=folder / "classes.txt")
    pack(
        source, folder / "shards", split="train", labels=LabelSet.open(folder / "labels"),
        shard_size=max(1, count // 8),
    )  # fmt: skip


def cpu_secs() -> float:
    """CPU time of this process and of all its children that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def prepare(path: str) -> None:
    """Set a path's process up."""
    torch.set_num_threads(1)
    if path == "ours":
        keep_freed_memory()


def rates(path: str, folder: Path, rand_augment: bool) -> list[float]:
    """Go through one epoch; images per second of CPU time, and of wall time."""
    cpu, wall = cpu_secs(), time.perf_counter()
    num_images = sum(PATHS[path](folder, rand_augment))
    return [num_images / (cpu_secs() - cpu), num_images / (time.perf_counter() - wall)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FORMATTER)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    rows = []
    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory())
        make_data(Path(name), 2 * BATCH if quick else 1024)
        spawn = multiprocessing.get_context("spawn")
        processes = {
            path: stack.enter_context(ProcessPoolExecutor(1, spawn, prepare, (path,)))
            for path in PATHS
        }
        for rand_augment in (True, False):
            found: dict[str, list[list[float]]] = {path: [] for path in PATHS}
            for _ in range(1 if quick else 3):
                for path, process in processes.items():
                    speeds = process.submit(rates, path, Path(name), rand_augment).result()
                    found[path].append(speeds)
            per_core = {p: statistics.median(cpu for cpu, _ in runs) for p, runs in found.items()}
            fastest = max(per_core[peer] for peer in ("timm", "webdataset", "torchvision v2"))
            for path, runs in found.items():
                speeds = [cpu for cpu, _ in runs]
                rows.append(
                    {
                        "rand_augment": "yes" if rand_augment else "no",
                        "path": path,
                        "img_per_cpu_sec": per_core[path],
                        "spread": max(speeds) - min(speeds),
                        "img_per_sec": statistics.median(wall for _, wall in runs),
                        "to_published": per_core[path] / per_core["published"],
                        "to_fastest_peer": per_core[path] / fastest,
                    }
                )
    print(markdown(rows))
    if not quick:
        print(f"written to {write('feed', rows, workers=WORKERS, batch=BATCH)}")


if __name__ == "__main__":
    main()
