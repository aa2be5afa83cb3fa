"""Training runs for test_loop.py that need processes of their own: killed ones, and two at once.

Run as a script it imports the package once and forks for each run, for importing takes longer than
the runs do. It has to fork before torch starts any threads, so it computes nothing itself.
"""

import importlib
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import random_map
from PIL import Image
from shard_sets import NUM_CLASSES, make_samples, write_split

from tokenlabel.labeler.geometry import PaletteMaps, crop_view
from tokenlabel.shards.index import write_index
from tokenlabel.trainer import loop, run_log
from tokenlabel.trainer.data import Data
from tokenlabel.trainer.distributed import join_processes
from tokenlabel.trainer.feed import Batch, TrainFeed
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


USER_ERROR = 2 << 8
"""What waitpid says of a process that ended with status 2."""

PAIR_KILLS = list(zip(((0,), (1,), (0, 1)), sorted(random.Random(4).sample(range(1, 13), 3))))
"""Which of two processes are killed at once, and at which step; one kill after the other."""

PAIR = ("optim.batch_size=8", "run.device_batch_size=2", "schedule.duration=11 steps")
"""The recipe of the runs on two processes; epoch 4 ends with step 12, the run with step 13."""


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
        open_train=lambda state, first_pass: FixedFeed(rows or [0, 1, 2, 3], state, spoil),
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


def fork(job: Callable[[], object]) -> int:
    """Run a job in a process of its own."""
    child = os.fork()
    if child == 0:
        try:
            job()
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
    return child


def in_forks(*jobs: Callable[[], object]) -> list[int]:
    """Run each job in a process of its own, all at once; return how they ended, as waitpid does."""
    children = [fork(job) for job in jobs]
    return [os.waitpid(child, 0)[1] for child in children]


def run_on_shards(
    data: Path,
    out: Path,
    *overrides: str,
    kill_at: int | None = None,
    in_save: bool = False,
    before_batch: Callable[[int], object] = lambda number: None,
) -> None:
    """Train on real shards through DALI; die by SIGKILL when batch `kill_at` is asked for.

    With `in_save` die instead when the checkpoint after that batch has been written but not yet
    renamed. What the run says when it fails is written to OUT.txt. `before_batch` gets the number
    of batches so far.
    """
    torch.set_num_threads(1)
    without_pictures()
    deliver, rename = TrainFeed.__next__, Path.replace

    def deliver_or_die(self: TrainFeed) -> Batch:
        number = self.state()["num_batches"]
        if number == kill_at and not in_save:
            os.kill(os.getpid(), signal.SIGKILL)
        before_batch(number)
        return deliver(self)

    def rename_or_die(self: Path, target: Path) -> Path:
        if in_save and target.name == f"step-{kill_at}.pt":
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)

    TrainFeed.__next__ = deliver_or_die
    Path.replace = rename_or_die  # pyright: ignore[reportAttributeAccessIssue]
    recipe = tiny_recipe("evaluation.every=4 steps", *overrides)
    with noting_error(out):
        loop.train(recipe, data=data, out=out, resume=True, device="cpu")


def without_pictures() -> None:
    """Leave out what is tested elsewhere and would take most of the time."""
    loop.write_report = lambda out: out
    loop.draw_crops = lambda *_, **options: Image.new("RGB", (8, 8))
    run_log.draw_curves = lambda *_: None


@contextmanager
def noting_error(out: Path) -> Iterator[None]:
    """Add all that is said to OUT.txt; end with a line and status 2 where the command does."""
    text = out.with_suffix(".txt").open("a")
    os.dup2(text.fileno(), sys.stderr.fileno())
    try:
        yield
    except (OSError, ValueError) as error:
        text.write(f"{error}\n")
        text.flush()
        os._exit(2)


def refuse_large_files(number: int) -> None:
    """From the fifth batch on, let writing fail as it does on a full disk: in the middle."""
    if number == 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))


def become(rank: int, world_size: int, port: int) -> None:
    """Make this process one of many, as torchrun does."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    os.environ |= {name: str(v) for name, v in zip(names, (rank, rank, world_size, port))}
    os.environ["MASTER_ADDR"] = "localhost"


def fill_disk(out: Path, number: int) -> None:
    """Let the checkpoint of step 6 be written to a full disk."""
    if number == 5:
        (out / "checkpoints" / ".step-6.pt.tmp").symlink_to("/dev/full")


def cut_shards_short(data: Path, number: int) -> None:
    """Before the sixth batch, take away what the run reads, as a failing disk does."""
    if number == 5:
        for shard in data.glob("train-*.tar"):
            os.truncate(shard, 0)


def signal_itself(number: int) -> None:
    """Be told to stop before the eighth batch."""
    if number == 7:
        os.kill(os.getpid(), signal.SIGTERM)


def pair_on_shards(
    data: Path, out: Path, *overrides: str, **special: dict[str, Any]
) -> list[Callable[[], object]]:
    """Make the jobs of a run on real shards on two processes, in parts.

    `special` has arguments of run_on_shards for the processes rank_0 and rank_1.
    """
    port = free_port()

    def run(rank: int) -> None:
        become(rank, 2, port)
        run_on_shards(data, out, *PAIR, *overrides, **special.get(f"rank_{rank}", {}))

    return [partial(run, 0), partial(run, 1)]


def killed_pair(data: Path, out: Path, ranks: tuple[int, ...], step: int) -> None:
    """Begin or go on with a run of two processes, of which some are killed at a step."""
    ends = in_forks(*pair_on_shards(data, out, **{f"rank_{r}": {"kill_at": step} for r in ranks}))
    # One that is left, perhaps for a moment only, learns of it and ends by itself.
    assert signal.SIGKILL in ends and set(ends) <= {signal.SIGKILL, USER_ERROR}, ends
    assert all(ends[rank] == USER_ERROR for rank in {0, 1} - set(ranks)), ends


def pair_killed_at_any_moment(data: Path, out: Path, *overrides: str, seed: int) -> int:
    """Run on two processes to the end, though one or both are killed again and again.

    Returns:
        How often they were.
    """
    chance, num_kills = random.Random(seed), 0
    while True:
        children = [fork(job) for job in pair_on_shards(data, out, *overrides)]
        if num_kills < 12:
            time.sleep(chance.uniform(0.3, 2.0))
            for child in chance.choice([children, children[:1], children[1:]]):
                os.kill(child, signal.SIGKILL)
        ends = [os.waitpid(child, 0)[1] for child in children]
        if ends == [0, 0]:
            return num_kills
        assert set(ends) <= {0, signal.SIGKILL, USER_ERROR}, ends
        num_kills += 1


def run_with_one_that_hangs(out: Path) -> list[int]:
    """Train on two processes of which the second stands still in step 3; wait for the first."""
    port = free_port()

    def stand_still(batch: Batch, number: int) -> None:
        if number == 3:
            os.kill(os.getpid(), signal.SIGSTOP)

    def run(rank: int) -> None:
        without_pictures()
        become(rank, 2, port)
        data = fixed_data([0, 1, 2, 3], stand_still if rank else None)
        with noting_error(out), join_processes("cpu", timeout=timedelta(seconds=2)) as place:
            loop.fit(tiny_recipe("optim.batch_size=8"), data, out, place)

    first, second = fork(partial(run, 0)), fork(partial(run, 1))
    ends = [os.waitpid(first, 0)[1]]
    os.kill(second, signal.SIGKILL)
    return [*ends, os.waitpid(second, 0)[1]]


def spoil_third(batch: Batch, number: int) -> None:
    """Make an image of the third batch one whose loss is no number."""
    if number == 3:
        batch.images[1, :, 5, 5] = torch.nan


def run_as(
    rank: int,
    world_size: int,
    port: int,
    out: Path,
    *overrides: str,
    frozen: bool = True,
    spoil: Spoil | None = None,
) -> None:
    """Train on the same batches of 8 as one process or as two.

    Batch norm's statistics are frozen unless the run is about them; each process evaluates other
    images.
    """
    torch.set_num_threads(1)
    without_pictures()
    if frozen:
        PatchEmbed.train = lambda self, mode=True: torch.nn.Module.train(self, False)  # pyright: ignore[reportAttributeAccessIssue]
    become(rank, world_size, port)
    # Image i's partner in MixToken is image 7 - i: both processes hold whole pairs.
    rows = {1: [list(range(8))], 2: [[0, 1, 6, 7], [2, 3, 4, 5]]}[world_size][rank]
    recipe = tiny_recipe(
        "optim.batch_size=8", "optim.lr=1e-2", "model.drop_path=0", "optim.clip_grad=0.5",
        *overrides,
    )  # fmt: skip
    data = fixed_data(rows, spoil, num_eval=world_size)
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
    importlib.import_module("torch.utils.tensorboard")  # once for all forks
    assert in_forks(partial(run_on_shards, data, folder / "undisturbed")) == [0]
    for name, (step, in_save) in KILLS.items():
        run = partial(run_on_shards, data, folder / name)
        assert in_forks(partial(run, kill_at=step, in_save=in_save)) == [signal.SIGKILL]
        assert in_forks(run) == [0]
    full = partial(run_on_shards, data, folder / "full-disk")
    assert in_forks(partial(full, before_batch=refuse_large_files)) == [USER_ERROR]
    assert in_forks(full) == [0]
    lost = partial(run_on_shards, folder / "lost-data", folder / "lost-shards")
    shutil.copytree(data, folder / "lost-data")
    hook = partial(cut_shards_short, folder / "lost-data")
    assert in_forks(partial(lost, before_batch=hook)) == [USER_ERROR]
    shutil.copytree(data, folder / "lost-data", dirs_exist_ok=True)
    assert in_forks(lost) == [0]

    assert in_forks(*pair_on_shards(data, folder / "pair")) == [0, 0]
    for ranks, step in PAIR_KILLS:
        killed_pair(data, folder / "killed-pair", ranks, step)
    assert in_forks(*pair_on_shards(data, folder / "killed-pair")) == [0, 0]
    out = folder / "pair-on-full-disk"
    ends = in_forks(
        *pair_on_shards(data, out, rank_0={"before_batch": partial(fill_disk, out)}),
    )
    assert ends == [USER_ERROR, USER_ERROR]
    assert in_forks(*pair_on_shards(data, out)) == [0, 0]
    out = folder / "stopped-pair"
    jobs = pair_on_shards(data, out, rank_1={"before_batch": signal_itself})
    assert in_forks(*jobs) == [0, 0]
    shutil.copytree(out, folder / "stopped-and-resumed-pair")
    assert in_forks(*pair_on_shards(data, folder / "stopped-and-resumed-pair")) == [0, 0]
    assert run_with_one_that_hangs(folder / "hanging") == [USER_ERROR, signal.SIGKILL]
    port = free_port()
    assert in_forks(partial(run_as, 0, 1, port, folder / "one-process")) == [0]
    pair = [partial(run_as, rank, 2, port, folder / "two-processes") for rank in (0, 1)]
    assert in_forks(*pair) == [0, 0]
    for world_size, name in ((1, "one-process-in-parts"), (2, "two-processes-in-parts")):
        jobs = [
            partial(run_as, rank, world_size, port, folder / name, "run.device_batch_size=2")
            for rank in range(world_size)
        ]
        assert in_forks(*jobs) == [0] * world_size
    out = folder / "one-of-two-not-finite"
    spoils = (None, spoil_third)
    pair = [partial(run_as, rank, 2, port, out, spoil=spoils[rank]) for rank in (0, 1)]
    assert in_forks(*pair) == [0, 0]
    out = folder / "two-processes-with-statistics"
    pair = [partial(run_as, rank, 2, port, out, frozen=False) for rank in (0, 1)]
    assert in_forks(*pair) == [0, 0]


def main_slow(folder: Path) -> None:
    """Make a longer run of two processes, undisturbed and killed at any moment."""
    data = folder / "data"
    write_data(data)
    importlib.import_module("torch.utils.tensorboard")
    longer = ("schedule.duration=60 steps", "evaluation.every=7 steps")
    assert in_forks(*pair_on_shards(data, folder / "pair", *longer)) == [0, 0]
    num_kills = pair_killed_at_any_moment(data, folder / "killed-pair", *longer, seed=7)
    print(f"{num_kills} kills")


if __name__ == "__main__":
    (main_slow if sys.argv[2:] == ["slow"] else main)(Path(sys.argv[1]))
