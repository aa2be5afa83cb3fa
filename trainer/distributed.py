"""Which process of how many this is, and on which device it works."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others before it gives up, unless it is told otherwise. They
wait while the main one saves, downloads weights or draws, which takes less."""

_OTHERS_FAIL = re.compile(r"(?i)timed? ?out|connection (closed|reset|refused)|broken pipe")
"""What torch's backends say when other processes are not there."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """One process's place among all of them."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0


def from_main(place: Place, value: Any) -> Any:
    """Give every process the main process's value."""
    if place.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=place.device)
    return box[0]


def from_all(place: Place, value: Any) -> list[Any]:
    """Give every process the values of all, in the order of their ranks."""
    if place.world_size == 1:
        return [value]
    values: list[Any] = [None] * place.world_size
    dist.all_gather_object(values, value)
    return values


def reduce(place: Place, tensor: torch.Tensor, how: Literal["sum", "max"]) -> torch.Tensor:
    """Combine a tensor of all processes in place, and return it; the host does not wait."""
    if place.world_size > 1:
        dist.all_reduce(tensor, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
    return tensor


def copy_from_main(place: Place, tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite every process's tensors by the main process's."""
    if place.world_size > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


@contextmanager
def join_processes(device: str = "auto", *, timeout: timedelta = TIMEOUT) -> Iterator[Place]:
    """Find this process's place; under torchrun, connect it with the others until the end.

    Args:
        device: "cpu", "cuda", "cuda:1", or "auto" for a GPU where there is one. Under torchrun each
            process of a node takes the GPU of its local rank.
        timeout: How long one process waits for the others.

    Raises:
        ValueError: The device does not exist here.
        OSError: Another process hangs or has died.
    """
    chosen = _device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Place(device=chosen)
        return
    try:
        _connect("nccl" if chosen.type == "cuda" else "gloo", timeout)
        yield Place(device=chosen, rank=dist.get_rank(), world_size=dist.get_world_size())
    except RuntimeError as error:
        if not _OTHERS_FAIL.search(str(error)):
            raise
        raise OSError(
            f"process {os.environ.get('RANK')} stops: another one has died or not answered for "
            f"{timeout.total_seconds():g} s; what happened is in its own messages. Start all "
            "again, a training run with --resume"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _connect(backend: str, timeout: timedelta) -> None:
    """Make the process group that torchrun's variables describe.

    After a restart (torchrun --max-restarts) its store still holds the addresses of the processes
    that have died, so each attempt has its own names in it.
    """
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    attempt = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(
        backend, store=attempt, rank=rank, world_size=world_size, timeout=timeout
    )


def _device(name: str) -> torch.device:
    num_gpus = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if num_gpus else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"--device {name!r} is no device; use auto, cpu, cuda or cuda:N"
        ) from error
    if device.type == "cuda":
        if device.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"--device {name} is one GPU, and this machine has "
                f"{os.environ['LOCAL_WORLD_SIZE']} processes; --device cuda gives each its own"
            )
        index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
        if index >= num_gpus:
            raise ValueError(
                f"--device {name}: GPU {index} is not there; this machine has {num_gpus}"
            )
        return torch.device("cuda", index)
    return device
