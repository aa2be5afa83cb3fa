"""Training runs for test_loop.py that need processes of their own: killed ones, and two at once.

Run as a script it imports the package once and forks for each run, for importing takes longer than
the runs do. It has to fork before torch starts any threads, so it computes nothing itself.
"""

import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import random_map
from shard_sets import NUM_CLASSES, make_samples, write_split

from tokenlabel.labeler.geometry import PaletteMaps, crop_view
from tokenlabel.shards.index import write_index
from tokenlabel.trainer import loop
from tokenlabel.trainer.distributed import join_processes
from tokenlabel.trainer.feed import Batch, TrainFeed
from tokenlabel.trainer.loop import Data
from tokenlabel.trainer.models.lvvit import PatchEmbed
from tokenlabel.trainer.recipe import Recipe, parse_recipe

TINY = """
[model]
name = "lvvit_t"
num_classes = 40
image_size = 64
drop_path = 0.2
kwargs = { embed_dim = 16, depth = 2, num_heads = 2, stem_width = 4 }
[optim]
batch_size = 4
lr = 1e-3
lr_batch_size = 4
[schedule]
duration = "12 steps"
warmup = "2 steps"
cooldown = "2 steps"
[run]
workers = 1
log_every = "1 steps"
checkpoint_every = "3 steps"
[evaluation]
every = "100 epochs"
"""

Spoil = Callable[[Batch, int], object]
"""Given a batch and its number, from 1, does something to it or to the process."""

KILLS = {
    "before-the-first-checkpoint": (1, False),
    "in-the-middle-of-a-pass": (5, False),
    "while-saving": (6, True),
    "in-a-later-pass": (11, False),
}
"""Step at which each killed run dies, and whether it dies while the checkpoint is written."""


def tiny_recipe(*overrides: str) -> Recipe:
    return parse_recipe(TINY, overrides)


class FixedFeed:
    """Batches that depend on their number alone; each process gets its rows of the same batch."""

    def __init__(self, rows: list[int], state: Any = None, spoil: Spoil | None = None) -> None:
        self.rows, self.spoil = rows, spoil
        self.num = state["num"] if state else 0

    def __next__(self) -> Batch:
        rng = np.random.default_rng(self.num % 3)  # few enough to be learned
        maps = [random_map(rng, num_classes=NUM_CLASSES) for _ in range(8)]
        rows = torch.tensor(self.rows)
        batch = Batch(
            images=torch.from_numpy(rng.standard_normal((8, 3, 64, 64)).astype(np.float32))[rows],
            classes=torch.from_numpy(rng.integers(0, NUM_CLASSES, 8))[rows],
            views=crop_view(torch.tensor([[0.1, 0.2, 0.8, 1.0]] * len(rows))),
            maps=PaletteMaps.from_label_maps([maps[row] for row in self.rows]),
            keys=[f"image {self.num}.{row}" for row in self.rows],
        )
        self.num += 1
        if self.spoil:
            self.spoil(batch, self.num)
        return batch

    def state(self) -> dict[str, int]:
        return {"num": self.num}

    def close(self) -> None:
        pass


def fixed_data(
    rows: list[int] | None = None, spoil: Spoil | None = None, *, num_eval: int = 0
) -> Data:
    names = [f"class {i}" for i in range(NUM_CLASSES)]
    eval_feed = FixedFeed([0, 1, 2, 3])
    return Data(
        source="made up",
        class_ids=names,
        class_names=names,
        num_samples=20,
        open_train=lambda state: FixedFeed(rows or [0, 1, 2, 3], state, spoil),
        eval_batches=[next(eval_feed) for _ in range(num_eval)] or None,
    )


def write_data(folder: Path) -> None:
    """23 labelled training samples in five shards, 6 of validation without labels."""
    folder.mkdir()
    index = write_split(folder, make_samples(f"t{i}" for i in range(23)))
    unlabelled = [
        {name: data for name, data in sample.items() if not name.endswith("tlm")}
        for sample in make_samples((f"v{i}" for i in range(6)), seed=1)
    ]
    val = write_split(folder, unlabelled, split="val")
    write_index(replace(index, splits=index.splits | val.splits))


# ------------------------------------------------------------------------------ as a script


def in_forks(*jobs: Callable[[], object]) -> list[int]:
    """Run each job in a process of its own, all at once; return how they ended, as waitpid does."""
    children = []
    for job in jobs:
        child = os.fork()
        if child == 0:
            try:
                job()
                os._exit(0)
            except BaseException as error:
                sys.stderr.write(f"{error!r}\n")
                os._exit(1)
        children.append(child)
    return [os.waitpid(child, 0)[1] for child in children]


def run_on_shards(
    data: Path, out: Path, *, kill_at: int | None = None, in_save: bool = False
) -> None:
    """Train on real shards through DALI; die by SIGKILL when batch `kill_at` is asked for.

    With `in_save` die instead when the checkpoint after that batch has been written but not yet
    renamed.
    """
    torch.set_num_threads(1)
    deliver, rename = TrainFeed.__next__, Path.replace

    def deliver_or_die(self: TrainFeed) -> Batch:
        if self.state()["num_batches"] == kill_at and not in_save:
            os.kill(os.getpid(), signal.SIGKILL)
        return deliver(self)

    def rename_or_die(self: Path, target: Path) -> Path:
        if in_save and target.name == f"step-{kill_at}.pt":
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)

    loop.write_report = lambda out: out  # tested elsewhere; it would take most of the time
    TrainFeed.__next__ = deliver_or_die
    Path.replace = rename_or_die  # pyright: ignore[reportAttributeAccessIssue]
    recipe = tiny_recipe("evaluation.every=4 steps")
    loop.train(recipe, data=data, out=out, resume=True, device="cpu")


def run_as(rank: int, world_size: int, port: int, out: Path, *, frozen: bool = True) -> None:
    """Train on the same batches of 8 as one process or as two.

    Batch norm's statistics are frozen unless the run is about them; each process evaluates other
    images.
    """
    torch.set_num_threads(1)
    if frozen:
        PatchEmbed.train = lambda self, mode=True: torch.nn.Module.train(self, False)  # pyright: ignore[reportAttributeAccessIssue]
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    os.environ |= {name: str(v) for name, v in zip(names, (rank, rank, world_size, port))}
    os.environ["MASTER_ADDR"] = "localhost"
    # Image i's partner in MixToken is image 7 - i: both processes hold whole pairs.
    rows = {1: [list(range(8))], 2: [[0, 1, 6, 7], [2, 3, 4, 5]]}[world_size][rank]
    recipe = tiny_recipe(
        "optim.batch_size=8", "optim.lr=1e-2", "model.drop_path=0", "optim.clip_grad=0.5"
    )
    data = fixed_data(rows, num_eval=world_size)
    data = replace(data, eval_batches=list(data.eval_batches or [])[rank : rank + 1])
    with join_processes("cpu") as place:
        loop.fit(recipe, data, out, place)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return sock.getsockname()[1]


def main(folder: Path) -> None:
    """Make the runs that the tests compare, each in its own folder."""
    data = folder / "data"
    write_data(data)
    assert in_forks(partial(run_on_shards, data, folder / "undisturbed")) == [0]
    for name, (step, in_save) in KILLS.items():
        run = partial(run_on_shards, data, folder / name)
        assert in_forks(partial(run, kill_at=step, in_save=in_save)) == [signal.SIGKILL]
        assert in_forks(run) == [0]
    port = free_port()
    assert in_forks(partial(run_as, 0, 1, port, folder / "one-process")) == [0]
    pair = [partial(run_as, rank, 2, port, folder / "two-processes") for rank in (0, 1)]
    assert in_forks(*pair) == [0, 0]
    out = folder / "two-processes-with-statistics"
    pair = [partial(run_as, rank, 2, port, out, frozen=False) for rank in (0, 1)]
    assert in_forks(*pair) == [0, 0]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
