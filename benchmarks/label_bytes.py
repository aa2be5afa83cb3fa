"""Claim: a label map of real photos takes half the bytes of a torch file, and loses nothing.

    python benchmarks/label_bytes.py        needs the extra [demo]; a minute

Maps of the demo's photos, by the demo's teacher at 576 px (18×18 cells), top 5. Sizes are bytes per
image. KL is that of token targets made from what was stored, against those from float16, on a grid
of 14×14 tokens over the whole image.
"""

import io
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import zstandard
from photos import demo_photos, demo_teacher, label
from record import markdown, write
from tqdm import tqdm

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


def microseconds(call: Callable[[], Any], count: int, repeats: int = 5) -> float:
    """Median time of a call over `count` maps, per map."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e6 * float(np.median(times)) / count


def row(name: str, sizes: list[int], **more: Any) -> dict[str, Any]:
    """One line of the table."""
    empty = {"kl": None, "encode_us": None, "decode_us": None}
    sizes_of = {"mean_bytes": float(np.mean(sizes)), "largest_bytes": max(sizes)}
    return {"encoding": name, **sizes_of, **empty, **more}


def main() -> None:
    """Measure and print."""
    teacher = demo_teacher(576)
    photos = demo_photos()
    maps = [
        label(teacher, photo, fit="stretch", top_k=TOP_K) for photo in tqdm(photos, disable=None)
    ]
    files = [torch_file(m) for m in maps]
    load_us = microseconds(
        lambda: [torch.load(io.BytesIO(f), weights_only=True) for f in files], len(files)
    )
    rows = [
        row("torch file, no normaliser", [len(f) for f in files], decode_us=load_us),
        row("float16 + uint16, zstd 3, no normaliser", [len(raw(m)) for m in maps]),
    ]
    bare = [replace(m, log_normalizer=None) for m in maps]
    rows.append(row(".tlm, no normaliser", [len(encode(m)) for m in bare]))
    rows.append(row(".tlm 8-bit, no normaliser", [len(encode(m, score_bits=8)) for m in bare]))
    halves = [encode(m) for m in maps]
    dictionary = train_dictionary([encode(m) for m in maps[::2]] * 8)
    for name, variant, options in [
        (".tlm", maps, {}),
        (".tlm 8-bit", maps, {"score_bits": 8}),
        (".tlm, dictionary of the other half", maps[1::2], {"dictionary": dictionary}),
        (".tlm, mass 0.99", [keep_mass(m, 0.99) for m in maps], {}),
        (".tlm, mass 0.95", [keep_mass(m, 0.95) for m in maps], {}),
        (".tlm 8-bit, mass 0.95", [keep_mass(m, 0.95) for m in maps], {"score_bits": 8}),
    ]:
        reading = {key: value for key, value in options.items() if key == "dictionary"}
        data = [encode(m, **options) for m in variant]
        stored = [decode(d, **reading)[0] for d in data]
        exact = maps if len(variant) == len(maps) else maps[1::2]
        many = (data * 256)[:256]
        rows.append(
            row(
                name,
                [len(d) for d in data],
                kl=kl_from(exact, stored),
                encode_us=microseconds(
                    lambda v=variant, o=options: [encode(m, **o) for m in v], len(data)
                ),
                decode_us=microseconds(lambda m=many, r=reading: decode_batch(m, **r), 256),
            )
        )
    assert all(decode(d)[0].equals(m) for d, m in zip(halves, maps))
    print(markdown(rows))
    print(f"written to {write('label_bytes', rows, photos=len(photos), grid=[18, 18], k=TOP_K)}")


if __name__ == "__main__":
    main()
