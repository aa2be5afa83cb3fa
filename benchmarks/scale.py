"""What breaks first when a data set grows? Indices of made-up samples, really built and opened.

    python benchmarks/scale.py                      a million samples; four minutes
    python benchmarks/scale.py --samples 14197122   ImageNet-21k: an hour, 12 GiB of memory
    python benchmarks/scale.py --steps open,read    only steps that begin so
    python benchmarks/scale.py --quick              a smoke test

Other numbers of samples than the million write results/scale-SAMPLES.json.

Nothing but the pixels is missing: a list of images, the .json of every slice of a label set, an
index.json, and an .idx for every tar are written as the commands write them; the tars are sparse
files of the right size. Each step runs in a process of its own: its time, what it holds at the end,
and its peak. The last columns multiply by the samples of ImageNet-21k and of 400 million; all steps
are linear but for sorting, whose logarithm grows by a third.

Files come out of the machine's memory here: on a network file system add a round trip for each.
"""

import argparse
import gc
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from record import forget_peak, markdown, memory_mib, write

SIZES = {"21k": 14_197_122, "400m": 400_000_000}
JPEG_BYTES = 110_000
"""Of ImageNet's photos, on average."""
MAP_BYTES = 3_900
SLICE = 10_000
FEW = 1_000
SAMPLES = 1_000_000
NUM_CLASSES = 1_000
FORMATTER = argparse.RawDescriptionHelpFormatter


def key(number: int) -> str:
    """Name a sample as ImageNet does: nearly all keys have 19 characters."""
    wnid = f"n{number // 700:08d}"
    return f"{wnid}/{wnid}_{number}"


# --------------------------------------------------------------------------------- what is opened


def write_list(folder: Path, num_samples: int) -> None:
    path = folder / "images.csv"
    with path.open("w") as file:
        file.writelines(f"{key(i)}.JPEG,{key(i)[:9]}\n" for i in range(num_samples))
    first = folder / f"{key(0)}.JPEG"
    first.parent.mkdir(parents=True, exist_ok=True)
    first.touch()


def write_label_set(folder: Path, num_samples: int) -> None:
    from tokenlabel.labeler import label_set

    settings = {
        "teacher": {"name": "made up"},
        "fit": "native",
        "k": 5,
        "num_classes": NUM_CLASSES,
        "source": {"num_listed": num_samples},
    }
    folder.mkdir()
    in_tar = 512 + math.ceil(MAP_BYTES / 512) * 512
    records = []
    for number, start in enumerate(range(0, num_samples, SLICE)):
        count = min(SLICE, num_samples - start)
        record = label_set.Slice(
            number=number,
            settings=settings,
            samples={key(start + i): (512 + i * in_tar, MAP_BYTES) for i in range(count)},
            quarantined={},
            num_correct=None,
            bytes=count * in_tar + 1024,
            sha256=f"{number:064d}",
        )
        (folder / label_set.json_name(number)).write_bytes(label_set.slice_json(record))
        sparse(folder / label_set.tar_name(number), record.bytes)
        # The index needs their number, not the keys of all at a time.
        records.append((record.bytes, count))
    write_label_index(folder, settings, records)


def write_label_index(
    folder: Path, settings: dict[str, Any], records: list[tuple[int, int]]
) -> None:
    from tokenlabel.labeler import label_set

    slices = [
        label_set.Slice(
            number=number,
            settings=settings,
            samples=dict.fromkeys(map(str, range(count)), (0, MAP_BYTES)),
            quarantined={},
            num_correct=None,
            bytes=num_bytes,
            sha256=f"{number:064d}",
        )
        for number, (num_bytes, count) in enumerate(records)
    ]
    names = [str(i) for i in range(NUM_CLASSES)]
    label_set.write_index(folder, slices, settings=settings, class_names=names)


def write_shards(folder: Path, num_samples: int) -> None:
    from tokenlabel.shards import index as index_file
    from tokenlabel.shards.pack import DEFAULT_SHARD_BYTES

    folder.mkdir()
    sizes = {"jpg": JPEG_BYTES, "cls": 3, "tlm": MAP_BYTES}
    in_tar = {name: 512 + math.ceil(size / 512) * 512 for name, size in sizes.items()}
    per_shard = DEFAULT_SHARD_BYTES // sum(in_tar.values())
    shards = []
    for number, start in enumerate(range(0, num_samples, per_shard)):
        count = min(per_shard, num_samples - start)
        rows, offset = [], 0
        for i in range(start, start + count):
            row = []
            for name, size in sizes.items():
                row.append((f"{key(i)}.{name}", offset + 512, size))
                offset += in_tar[name]
            rows.append(row)
        entry = index_file.ShardEntry(
            name=index_file.shard_name("train", number),
            samples=count,
            bytes=offset + 1024,
            sha256=f"{number:064d}",
            idx_sha256=f"{number:064d}",
        )
        sparse(folder / entry.name, entry.bytes)
        (folder / entry.idx_name).write_text(index_file.format_idx(rows))
        shards.append(entry)
    names = [str(i) for i in range(NUM_CLASSES)]
    split = index_file.SplitIndex(
        num_samples=num_samples,
        has_labels=True,
        seed=0,
        shards=shards,
        labels={},
        num_listed=num_samples,
        quarantined={},
        repaired={},
    )
    index_file.write_index(
        index_file.ShardIndex(
            folder=folder,
            num_classes=NUM_CLASSES,
            class_ids=names,
            class_names=names,
            splits={"train": split},
        )
    )


def sparse(path: Path, num_bytes: int) -> None:
    """Make a file of a size that takes no room on the disk."""
    with path.open("wb") as file:
        file.truncate(num_bytes)


# ------------------------------------------------------------------------------------------ steps


def list_images(folder: Path) -> Any:
    from tokenlabel.labeler.sources import open_source

    return open_source(folder / "images.csv")


def look_at_slices(folder: Path) -> Any:
    from tokenlabel.labeler.label_set import read_slices

    return read_slices(folder / "labels")


def open_label_set(folder: Path) -> Any:
    from tokenlabel.labeler.label_set import LabelSet

    return LabelSet.open(folder / "labels")


def plan_packing(folder: Path) -> Any:
    from tokenlabel.labeler.label_set import LabelSet
    from tokenlabel.labeler.sources import open_source
    from tokenlabel.shards.pack import join, shuffled

    labels = LabelSet.open(folder / "labels")
    source = open_source(folder / "images.csv")
    join([sample.key for sample in source.samples], labels, False)
    return labels, source, shuffled(source.samples, 0)


def open_index(folder: Path) -> Any:
    from tokenlabel.shards.index import read_index

    index = read_index(folder / "shards")
    return index, index.shard_paths("train")


def open_reader(folder: Path) -> Any:
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline

    paths = [str(path) for path in sorted((folder / "shards").glob("*.tar"))]
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        fields: Any = fn.readers.webdataset(
            paths=paths,
            index_paths=[path.removesuffix(".tar") + ".idx" for path in paths],
            ext=["jpg", "cls", "tlm"],
            missing_component_behavior="error",
            tensor_init_bytes=4096,
            random_shuffle=True,
        )
        pipeline.set_outputs(*fields)
    pipeline.build()
    pipeline.reader_meta()  # waits until the indices are read
    return pipeline


Step = Callable[[Path], Any]
STEPS: dict[str, tuple[str, Step]] = {
    "list images from a file": ("tl-label, tl-shard", list_images),
    "read the .json of all slices": ("tl-label generate, at its start and end", look_at_slices),
    "open the label set": ("tl-shard", open_label_set),
    "match and shuffle": ("tl-shard pack, with both above", plan_packing),
    "read index.json, look for the shards": ("tl-train, tl-eval", open_index),
    "open DALI's reader": ("tl-train, tl-eval, each process", open_reader),
}


def measured(step: Step, few: Path, folder: Path) -> dict[str, float]:
    """Run a step in this process, which should be a fresh one, first on few samples.

    What it imports and sets up for any number of them is not what is asked for.
    """
    step(few)
    gc.collect()
    forget_peak()
    before_mib, start_secs = memory_mib("VmRSS"), time.perf_counter()
    cpu_secs = time.process_time()
    kept = step(folder)
    secs, cpu_secs = time.perf_counter() - start_secs, time.process_time() - cpu_secs
    peak_mib, held_mib = memory_mib("VmHWM"), memory_mib("VmRSS")
    del kept
    return {
        "secs": secs,
        "cpu_secs": cpu_secs,
        "held_mib": held_mib - before_mib,
        "peak_mib": peak_mib - before_mib,
    }


def in_fresh_process(step: Step, few: Path, folder: Path) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measured, (step, few, folder))


def build(folder: Path, num_samples: int) -> None:
    folder.mkdir()
    write_list(folder, num_samples)
    write_label_set(folder / "labels", num_samples)
    write_shards(folder / "shards", num_samples)


def scaled(step: str, command: str, found: dict[str, float], num_samples: int) -> dict[str, Any]:
    """Make a row: what was measured, then per sample, then for the sizes that are asked about."""
    row: dict[str, Any] = {"step": step, "by": command, **found}
    row["us_a_sample"] = 1e6 * found["cpu_secs"] / num_samples
    row["peak_bytes_a_sample"] = 2**20 * found["peak_mib"] / num_samples
    for name, size in SIZES.items():
        row[f"mins_{name}"] = found["cpu_secs"] * size / num_samples / 60
        row[f"peak_gib_{name}"] = found["peak_mib"] * size / num_samples / 1024
    return row


def on_disk(folder: Path) -> dict[str, int]:
    """Bytes of all indices; tars are not counted."""

    def total(files: Iterator[Path]) -> int:
        return sum(path.stat().st_size for path in files)

    return {
        "slice_json_bytes": total((folder / "labels").glob("labels-*.json")),
        "label_index_bytes": (folder / "labels/index.json").stat().st_size,
        "idx_bytes": total((folder / "shards").glob("*.idx")),
        "shard_index_bytes": (folder / "shards/index.json").stat().st_size,
        "num_slices": sum(1 for _ in (folder / "labels").glob("*.tar")),
        "num_shards": sum(1 for _ in (folder / "shards").glob("*.tar")),
        "label_tar_bytes": total((folder / "labels").glob("*.tar")),
        "shard_tar_bytes": total((folder / "shards").glob("*.tar")),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FORMATTER)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--steps", default="", help="first words of steps, apart by commas")
    parser.add_argument("--scratch", type=Path, help="where some 400 bytes a sample may lie")
    options = parser.parse_args()
    count = 20_000 if options.quick else options.samples
    rows = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        few, folder = Path(name, "few"), Path(name, "many")
        build(few, FEW)
        build(folder, count)
        for step, (command, function) in STEPS.items():
            if not step.startswith(tuple(options.steps.split(","))):
                continue
            rows.append(scaled(step, command, in_fresh_process(function, few, folder), count))
            print(f"{step}: {rows[-1]['secs']:.1f} s", flush=True)
        sizes = on_disk(folder)
    print(markdown(rows))
    print(markdown([sizes]))
    if not options.quick:
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        facts = {"samples": count, "memory_bytes": memory_bytes, "on_disk": sizes}
        name = "scale" if count == SAMPLES else f"scale-{count}"
        print(f"written to {write(name, rows, **facts)}")


if __name__ == "__main__":
    main()
