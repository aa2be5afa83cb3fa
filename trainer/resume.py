"""Where a run goes on: which checkpoint fits these processes, and what may have changed."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .checkpoint import Checkpoint, read, read_best, read_latest
from .data import Data
from .distributed import Place, from_main
from .recipe import Duration, Recipe, differences, parse_recipe
from .watch import DivergedError

log = logging.getLogger(__name__)

_FREE = (
    "summary", "paper_top1", "evaluation.", "model.grad_checkpointing",
    "run.workers", "run.compile", "run.checkpoint_every", "run.log_every",
    "run.device_batch_size",
)  # fmt: skip
"""Keys that may change between the parts of one run; they do not decide what it computes."""


def find_checkpoint(folder: Path, place: Place, steps_per_epoch: float) -> Checkpoint:
    """Read the newest checkpoint that these processes can go on from, and say what is lost.

    The position of N feeds in the middle of a pass means nothing to another number of them; at the
    end of an epoch they can begin the next pass.

    Raises:
        ValueError: None is whole and fits; says of each why.
    """

    def why_not(checkpoint: Checkpoint) -> str | None:
        saved, here = checkpoint.world_size, place.world_size
        if saved == here or ends_epoch(checkpoint.step, steps_per_epoch):
            return None
        return (
            f"was saved by {saved} processes, not {here}, at step {checkpoint.step}, in the middle "
            f"of an epoch: start {saved} again, or begin anew with --overwrite"
        )

    checkpoint = newest_checkpoint(folder, place, why_not)
    if place.is_main and checkpoint.world_size != place.world_size:
        log.warning(
            "the run was saved by %d processes and goes on with %d: from the end of epoch %d, "
            "step %d, with order and augmentation of the images drawn anew",
            checkpoint.world_size, place.world_size,
            round(checkpoint.step / steps_per_epoch), checkpoint.step,
        )  # fmt: skip
    return checkpoint


def newest_checkpoint(
    folder: Path, place: Place, why_not: Callable[[Checkpoint], str | None] = lambda found: None
) -> Checkpoint:
    """Read the newest checkpoint that is whole and fits, on all processes; log what is passed over.

    Args:
        folder: Of the checkpoints.
        place: This process among all.
        why_not: Says of a whole checkpoint why it does not fit; None if it does.

    Raises:
        ValueError: None is whole and fits; says of each why.
    """
    if not place.is_main:
        return read(from_main(place, None))
    path, checkpoint, problems = read_latest(folder, why_not)
    for problem in problems:
        log.warning("passed over: %s", problem)
    if problems:
        log.warning("going on from %s, step %d, instead", path, checkpoint.step)
    from_main(place, path)
    return checkpoint


def find_best(folder: Path) -> dict[str, object] | None:
    """Read what is the best evaluation so far, which is best.pt's, whatever was passed over."""
    try:
        return read_best(folder)
    except ValueError as error:
        log.warning("%s: the next evaluation counts as the best", error)
        return None


def refuse_other_run(checkpoint: Checkpoint, recipe: Recipe, data: Data) -> None:
    """Refuse to go on with a run that computes something else.

    Raises:
        ValueError: Recipe or classes differ; says in what.
    """
    changed = differences(parse_recipe(checkpoint.recipe), recipe)
    refuse_changes(changed, checkpoint, data.class_ids, free=_FREE)


def refuse_changes(
    changed: list[str], checkpoint: Checkpoint, class_ids: list[str], *, free: tuple[str, ...]
) -> None:
    """Refuse changed keys of a recipe but those that begin like `free`, and other classes.

    Raises: see `refuse_other_run`.
    """
    changed = [name for name in changed if not name.startswith(free)]
    if changed:
        raise ValueError(
            f"--resume with another recipe than the run's: {', '.join(changed)} changed; take the "
            "run's own recipe.toml, or start a new run with --init and the run's checkpoint"
        )
    if checkpoint.class_ids != class_ids:
        raise ValueError(
            f"--resume with other classes: the run has {len(checkpoint.class_ids)}, the data set "
            f"{len(class_ids)}, or their order differs; take the run's data set"
        )


def is_due(every: Duration, step: int, steps_per_epoch: float) -> bool:
    """Tell whether a whole number of these durations ends nearest to this step.

    Each is counted from the beginning, so that one of an epoch never drifts from the epochs' ends.
    """
    factor = steps_per_epoch if every.unit == "epochs" else 1.0
    return _ends(max(1.0, every.amount * factor), step)


def ends_epoch(step: int, steps_per_epoch: float) -> bool:
    """Tell whether a whole number of passes ends nearest to this step."""
    return _ends(steps_per_epoch, step)


def _ends(period: float, step: int) -> bool:
    return step > 0 and step == round(round(step / period) * period)


@contextmanager
def saying_the_way_back(describe: Callable[[], str]) -> Iterator[None]:
    """Add to an error in the middle of a run what is saved, which `way_back` has words for."""
    try:
        yield
    except DivergedError:
        raise  # going on would end there again
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{error}. {describe()}") from error


def way_back(done: int, saved: int | None) -> str:
    """Say where a run stopped and how it goes on, from steps done and saved."""
    where = f"is saved up to step {saved}: --resume goes on from there"
    if saved is None:
        where = "had no checkpoint yet: start it again with --resume or --overwrite"
    return f"The run stopped at step {done} and {where}"
