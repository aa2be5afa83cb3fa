"""Claim: packing is several times as fast as webdataset's TarWriter, index and checksums included.

    python benchmarks/pack.py            photos and label maps made up from the demo's; two minutes
    python benchmarks/pack.py --quick    a smoke test: few samples

"write": samples that lie in memory (a JPEG of about 60 KB, a class, a label map of about 4 KB) go
into a tar, by webdataset.TarWriter and by ours, which hashes them and makes DALI's index besides,
and waits for the disk.

"pack": from JPEG files and a label set to finished shards. The baseline reads each file and its
label map, in order, on one core, and hands both to TarWriter. Ours runs tl-shard pack, which
shuffles, looks at every image (--check decode, or ends) and at every label map's checksum.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from record import markdown, write
from samples import lay_out, make_samples

from tokenlabel.labeler import label_set
from tokenlabel.labeler.images import Check
from tokenlabel.labeler.sources import open_source
from tokenlabel.shards.pack import pack
from tokenlabel.shards.writer import SplitWriter

SAMPLES = 2000
REPEATS = 5
FORMATTER = argparse.RawDescriptionHelpFormatter


def with_webdataset(samples: list[dict[str, Any]], folder: Path) -> None:
    with webdataset.TarWriter(str(folder / "train.tar")) as writer:  # pyright: ignore
        for sample in samples:
            writer.write(sample)


def with_ours(samples: list[dict[str, Any]], folder: Path) -> None:
    writer = SplitWriter(folder, "train", 400_000_000, None)
    for sample in samples:
        fields = [(name, data) for name, data in sample.items() if name != "__key__"]
        writer.add(sample["__key__"], fields)
    writer.close()


def files_with_webdataset(folder: Path, out: Path) -> None:
    labels = label_set.LabelSet.open(folder / "labels")
    with webdataset.TarWriter(str(out / "train.tar")) as writer:  # pyright: ignore
        for path in sorted((folder / "images").rglob("*.jpg")):
            key = path.relative_to(folder / "images").with_suffix("").as_posix()
            writer.write(
                {
                    "__key__": key,
                    "jpg": path.read_bytes(),
                    "cls": key[:2].encode(),
                    "tlm": labels.read(key),
                }
            )


def files_with_ours(check: Check, folder: Path, out: Path) -> None:
    source = open_source(str(folder / "images"), classes=folder / "classes.txt")
    labels = label_set.LabelSet.open(folder / "labels")
    pack(source, out, split="train", labels=labels, check=check)


def microseconds(
    jobs: dict[str, Callable[[Path], None]], count: int, repeats: int, scratch: Path
) -> list[dict[str, Any]]:
    """Run the jobs in turn, several times: wall and CPU time per sample, the first job being 1."""
    walls: dict[str, list[float]] = {name: [] for name in jobs}
    cpus: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            out = scratch / "out"
            out.mkdir()
            wall, cpu = time.perf_counter(), time.process_time()
            job(out)
            walls[name].append(1e6 * (time.perf_counter() - wall) / count)
            cpus[name].append(1e6 * (time.process_time() - cpu) / count)
            shutil.rmtree(out)
    first = next(iter(jobs))
    return [
        {
            "job": name,
            "wall_us": statistics.median(walls[name]),
            "cpu_us": statistics.median(cpus[name]),
            "spread_us": max(walls[name]) - min(walls[name]),
            "samples_per_sec": 1e6 / statistics.median(walls[name]),
            "times_faster": statistics.median(a / b for a, b in zip(walls[first], walls[name])),
            "times_less_cpu": statistics.median(a / b for a, b in zip(cpus[first], cpus[name])),
        }
        for name in jobs
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=FORMATTER)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    count, repeats = (40, 1) if quick else (SAMPLES, REPEATS)
    samples = make_samples(count)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = microseconds(
            {
                "write, webdataset": partial(with_webdataset, samples),
                "write, ours": partial(with_ours, samples),
            },
            count, repeats, folder,
        )  # fmt: skip
        lay_out(samples, folder)
        rows += microseconds(
            {
                "pack, webdataset": partial(files_with_webdataset, folder),
                "pack, ours": partial(files_with_ours, "decode", folder),
                "pack, ours, --check ends": partial(files_with_ours, "ends", folder),
            },
            count, repeats, folder,
        )  # fmt: skip
    print(markdown(rows))
    if not quick:
        sizes = {part: float(np.mean([len(s[part]) for s in samples])) for part in ("jpg", "tlm")}
        print(f"written to {write('pack', rows, samples=count, mean_bytes=sizes)}")


if __name__ == "__main__":
    main()
