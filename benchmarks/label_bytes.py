"""Claim: a label map of real photos takes half the bytes of a torch file, and loses nothing.

    python benchmarks/label_bytes.py        needs the extra [demo]; a minute

Maps of the demo's photos, by the demo's teacher at 576 px (18×18 cells), top 5. Sizes are bytes per
image. KL is that of token targets made from what was stored, against those from float16, on a grid
of 14×14 tokens over the whole image.

Times are CPU time a map, medians; all ways of decoding run in turn, 256 maps at a time. torch reads
256 files, as published code does, from the system's cache of them, or bytes in memory; ours decodes
bytes in memory, as they come out of a tar. Freed memory is kept, as commands do on a CPU.
"""

import io
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from photos import demo_photos, demo_teacher, label
from record import markdown, write
from tqdm import tqdm

from tokenlabel.labeler.cpu import keep_freed_memory
from tokenlabel.labeler.geometry import PaletteMaps, crop_view, sample_targets
from tokenlabel.labeler.label_map import (
    LabelMap,
    decode,
    decode_batch,
    encode,
    keep_mass,
    train_dictionary,
)

TOKEN_GRID = (14, 14)
TOP_K = 5
BATCH = 256
REPEATS = 30


def torch_file(label_map: LabelMap) -> bytes:
    """Store scores and classes as published sets do: one float16 tensor, saved by torch."""
    buffer = io.BytesIO()
    planes = np.stack([label_map.scores, label_map.classes.astype(np.float16)])
    torch.save(torch.from_numpy(planes), buffer)
    return buffer.getvalue()


def raw(label_map: LabelMap) -> bytes:
    """Store float16 scores and uint16 classes, compressed."""
    planes = label_map.scores.tobytes() + label_map.classes.astype(np.uint16).tobytes()
    return zstandard.ZstdCompressor(level=3).compress(planes)


def kl_from(exact: list[LabelMap], stored: list[LabelMap]) -> float:
    """Mean KL(targets of exact ‖ targets of stored) over all tokens, nats."""
    whole = crop_view(torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(len(exact), 1))
    p, q = (
        sample_targets(PaletteMaps.from_label_maps(maps), whole, TOKEN_GRID).dense_tokens().double()
        for maps in (exact, stored)
    )
    return (p * (p.clamp(min=1e-30).log() - q.clamp(min=1e-30).log())).sum(2).mean().item()


def microseconds(
    jobs: Mapping[str, Callable[[], Any]], count: int, repeats: int = REPEATS
) -> dict[str, float]:
    """Run the jobs in turn, several times: median CPU time of each, for one of `count` maps."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            start = time.process_time()
            job()
            times[name].append(time.process_time() - start)
    return {name: 1e6 * float(np.median(taken)) / count for name, taken in times.items()}


def row(name: str, sizes: list[int], **more: Any) -> dict[str, Any]:
    """One line of the table."""
    empty = {"kl": None, "encode_us": None, "decode_us": None}
    sizes_of = {"mean_bytes": float(np.mean(sizes)), "largest_bytes": max(sizes)}
    return {"encoding": name, **sizes_of, **empty, **more}


def repeated(items: list[Any]) -> list[Any]:
    """Make a batch out of the few that there are."""
    return (items * BATCH)[:BATCH]


def main() -> None:
    """Measure and print."""
    keep_freed_memory()
    teacher = demo_teacher(576)
    photos = demo_photos()
    maps, native = (
        [label(teacher, photo, fit=fit, top_k=TOP_K) for photo in tqdm(photos, disable=None)]
        for fit in ("stretch", "native")
    )
    files = [torch_file(m) for m in maps]
    in_memory = repeated(files)
    rows = [
        row("torch file, no normaliser", [len(f) for f in files]),
        row("torch file, no normaliser, in memory", [len(f) for f in files]),
        row("float16 + uint16, zstd 3, no normaliser", [len(raw(m)) for m in maps]),
    ]
    bare = [replace(m, log_normalizer=None) for m in maps]
    rows.append(row(".tlm, no normaliser", [len(encode(m)) for m in bare]))
    rows.append(row(".tlm 8-bit, no normaliser", [len(encode(m, score_bits=8)) for m in bare]))
    dictionary = train_dictionary([encode(m) for m in maps[::2]] * 8)
    decoding: dict[str, Callable[[], Any]] = {}
    for name, exact, variant, options in [
        (".tlm", maps, maps, {}),
        (".tlm 8-bit", maps, maps, {"score_bits": 8}),
        (".tlm, dictionary of the other half", maps[1::2], maps[1::2], {"dictionary": dictionary}),
        (".tlm, mass 0.99", maps, [keep_mass(m, 0.99) for m in maps], {}),
        (".tlm, mass 0.95", maps, [keep_mass(m, 0.95) for m in maps], {}),
        (".tlm 8-bit, mass 0.95", maps, [keep_mass(m, 0.95) for m in maps], {"score_bits": 8}),
        (".tlm, native: grids of many shapes", native, native, {}),
    ]:
        reading = {key: value for key, value in options.items() if key == "dictionary"}
        data = [encode(m, **options) for m in variant]
        stored = [decode(d, **reading)[0] for d in data]
        encoding = {name: lambda v=variant, o=options: [encode(m, **o) for m in v]}
        rows.append(
            row(
                name,
                [len(d) for d in data],
                kl=kl_from(exact, stored),
                encode_us=microseconds(encoding, len(data), 5)[name],
            )
        )
        batch = repeated(data)
        decoding[name] = lambda b=batch, r=reading: decode_batch(b, **r)
    assert all(decode(encode(m))[0].equals(m) for m in maps)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{number}.pt") for number in range(BATCH)]
        for path, file in zip(paths, in_memory):
            path.write_bytes(file)
        torch_jobs = {
            "torch file, no normaliser": lambda: [torch.load(path) for path in paths],
            "torch file, no normaliser, in memory": lambda: [
                torch.load(io.BytesIO(file)) for file in in_memory
            ],
        }
        taken = microseconds(torch_jobs | decoding, BATCH)
    for entry in rows:
        entry["decode_us"] = taken.get(entry["encoding"])
    print(markdown(rows))
    print(f"written to {write('label_bytes', rows, photos=len(photos), grid=[18, 18], k=TOP_K)}")


if __name__ == "__main__":
    main()
