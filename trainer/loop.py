"""The training loop: dataset shards → checkpoints.

`train` finds this process's place and opens the data; `fit` is the run itself, read top to bottom.
All randomness of a step that is not the feed's own comes from (seed, step, rank), so a run that
was killed at any step and resumed computes what it would have computed anyway.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..shards.index import ShardIndex, read_index
from . import run_log
from .checkpoint import Checkpoint, load_weights, read, read_latest, save_step
from .distributed import Place, copy_from_main, from_all, from_main, join_processes, reduce
from .evaluate import EvalResult, evaluate
from .feed import Batch, EvalFeed, TrainFeed
from .mix_token import sample_box
from .models import create_model, pretrained_facts
from .optim import Ema, Schedule, explain_lr, make_optimizer, skip_if
from .preview import draw_crops
from .published import fetch
from .recipe import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Duration,
    Recipe,
    differences,
    parse_recipe,
    to_toml,
)
from .report import write_report
from .run_log import RunLog
from .step import (
    add_gradients,
    is_compiled_on,
    num_parts,
    precision_on,
    share_of,
    targets_of,
)
from .watch import DivergedError, Health, StopSignal, Window

log = logging.getLogger(__name__)

_FREE_ON_RESUME = (
    "summary", "paper_top1", "evaluation.", "model.grad_checkpointing",
    "run.workers", "run.compile", "run.checkpoint_every", "run.log_every",
    "run.device_batch_size",
)  # fmt: skip
"""Keys that may change between the parts of one run; they do not decide what it computes."""

_NUM_CROPS = 4
"""On TensorBoard's sheets of crops and targets, one each epoch."""


@runtime_checkable
class Feed(Protocol):
    """What the loop asks of a source of training batches; feed.TrainFeed is the real one."""

    def __next__(self) -> Batch:
        """Give the next batch, without end."""
        ...

    def state(self) -> Any:
        """Describe the position after the last batch, in values that torch.save keeps safe."""
        ...

    def close(self) -> None:
        """Free threads and memory."""
        ...


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run learns from."""

    source: str
    """Where it lies, for the records."""
    split: str = "train"
    """Which part of it is learned from, for the records."""
    class_ids: list[str]
    class_names: list[str]
    num_samples: int
    """In one pass over the training split, over all processes."""
    open_train: Callable[[Any, int], Feed]
    """Make the feed, from its state after the last batch, or from None for the beginning of a pass,
    whose number, 0 in a new run, comes second."""
    eval_batches: Iterable[Batch] | None
    """The validation split, iterated anew at each evaluation; None where there is none."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Where a run has come to."""

    step: int
    total_steps: int
    metrics: dict[str, float]
    """The latest evaluation, see run_log; empty where there was none."""
    best: dict[str, Any] | None
    is_main: bool
    """Whether this process is the one that speaks for all."""


def train(
    recipe: Recipe,
    *,
    data: Path,
    out: Path,
    split: str = "train",
    val_split: str | None = None,
    init: Path | str | None = None,
    init_ema: bool | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
) -> Outcome:
    """Train on a data set made by shards.pack.

    Args:
        recipe: What to compute; `resolve` fills in what it leaves to data and weights.
        data: The data set's folder.
        out: The run folder.
        split: The data set's split to learn from.
        val_split: The split to evaluate on; left out: "val" where the data set has it.
        init: Checkpoint to take initial weights from, ours or a published one: see find_weights.
        init_ema: Whether its averaged weights are taken; left out: what the file prefers.
        resume: Go on with the run in `out`; begin anew where there is none yet.
        overwrite: Delete the run in `out` first.
        device: See distributed.join_processes.

    Raises:
        ValueError: Recipe, data and processes do not fit each other; says what to change.
        OSError: Something is in the way, missing, or the disk is full.
    """
    with join_processes(device) as place:
        if not place.is_main:
            logging.getLogger(__package__).setLevel(logging.WARNING)
        recipe = resolve(recipe, read_index(data))
        opened = open_data(recipe, data, place, split=split, val_split=val_split)
        outcome = fit(
            recipe, opened, out, place,
            init=init, init_ema=init_ema, resume=resume, overwrite=overwrite,
        )  # fmt: skip
        if place.is_main:
            try:
                write_report(out)
            except (OSError, ValueError) as error:  # the run itself is saved
                log.warning("no report was written: %s", error)
        return outcome


def resolve(recipe: Recipe, index: ShardIndex) -> Recipe:
    """Fill in the class count of the data set and the normalisation of published weights.

    A recipe that says num_classes = 0 gets the data set's. One whose model begins with published
    weights gets the mean and std that these were trained with, unless it names others than
    ImageNet's, which are the default.
    """
    model, augment = recipe.model, recipe.augment
    if not model.num_classes:
        model = replace(model, num_classes=index.num_classes)
    if model.pretrained and (augment.mean, augment.std) == (IMAGENET_MEAN, IMAGENET_STD):
        facts = pretrained_facts(model.name)
        augment = replace(augment, mean=facts["mean"], std=facts["std"])
    return replace(recipe, model=model, augment=augment)


def open_data(
    recipe: Recipe,
    folder: Path,
    place: Place,
    *,
    split: str = "train",
    val_split: str | None = None,
) -> Data:
    """Open dataset shards as a recipe wants them.

    Raises:
        ValueError: Class counts differ, or label maps are missing.
    """
    index = read_index(folder)
    wanted = recipe.model.num_classes
    labels = index.split(split).labels if recipe.labels.needs_maps else None
    if recipe.labels.needs_maps and not index.split(split).has_labels:
        raise ValueError(
            f"split {split!r} of {folder} has no label maps, which the recipe learns from; pack it "
            "with tl-shard pack --labels, or learn from classes alone: "
            "--set labels.dense_weight=0 --set labels.class_target=label"
        )
    if labels is not None and labels.get("num_classes", wanted) != wanted:
        raise ValueError(
            f"the label maps of {folder} are over {labels['num_classes']} classes, the recipe's "
            f"model has {wanted}; --set model.num_classes={labels['num_classes']}, or make labels "
            f"with a teacher of {wanted} classes"
        )
    if index.num_classes != wanted:
        raise ValueError(
            f"{folder} has {index.num_classes} classes, the recipe's model {wanted}; "
            f"--set model.num_classes={index.num_classes}"
            + (", and give tl-shard pack the teacher's --classes" if labels is not None else "")
        )
    if val_split is None and "val" in index.splits:
        val_split = "val"
    size, view = recipe.model.image_hw, recipe.evaluation

    def open_train(state: Any, first_pass: int) -> Feed:
        seed = _pass_seed(recipe.run.seed, first_pass) if state is None else state["seed"]
        return TrainFeed(
            index,
            split,
            image_size=size,
            batch_size=share_of(recipe.optim.batch_size, place.world_size),
            augment=recipe.augment,
            device=place.device,
            seed=seed,
            rank=place.rank,
            world_size=place.world_size,
            num_threads=recipe.run.workers,
            with_labels=recipe.labels.needs_maps,
            state=state,
        )

    eval_batches = None
    if val_split is not None:
        eval_batches = EvalFeed(
            index,
            val_split,
            image_size=size,
            crop_pct=view.crop_pct,
            interpolation=view.interpolation,
            mean=recipe.augment.mean,
            std=recipe.augment.std,
            batch_size=max(1, view.batch_size // place.world_size),
            device=place.device,
            rank=place.rank,
            world_size=place.world_size,
            num_threads=recipe.run.workers,
        )
    return Data(
        source=str(folder.resolve()),
        split=split,
        class_ids=index.class_ids,
        class_names=index.class_names,
        num_samples=index.split(split).num_samples,
        open_train=open_train,
        eval_batches=eval_batches,
    )


def fit(
    recipe: Recipe,
    data: Data,
    out: Path,
    place: Place,
    *,
    init: Path | str | None = None,
    init_ema: bool | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Outcome:
    """Run a recipe to its end, or to SIGTERM, see `train`."""
    # -------------------------------------------------------------- where this run stands
    local_batch_size = share_of(recipe.optim.batch_size, place.world_size)
    parts = num_parts(local_batch_size, recipe.run.device_batch_size)
    found = place.is_main and run_log.check_folder(out, resume=resume, overwrite=overwrite)
    resuming = from_main(place, found)
    steps_per_epoch = data.num_samples / recipe.optim.batch_size
    checkpoint = None
    if resuming:
        checkpoint = _find_checkpoint(out / run_log.CHECKPOINTS, place, steps_per_epoch)
        _refuse_other_run(checkpoint, recipe, data)
    elif resume:
        log.info("%s holds no checkpoint yet: starting at step 0", out)
    if recipe.model.pretrained and init:
        raise ValueError(
            f"--init {init} and model.pretrained = true both give initial weights; leave one out, "
            "e.g. by --set model.pretrained=false"
        )
    start = checkpoint.step if checkpoint else 0
    schedule = Schedule.of(recipe, steps_per_epoch)
    total = schedule.total_steps

    # -------------------------------------------------------------- model, average, optimizer
    on_gpu = place.device.type == "cuda"
    if on_gpu:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(recipe.run.seed)
    download = recipe.model.pretrained and not checkpoint
    is_dense = recipe.labels.dense_weight > 0
    model = create_model(recipe.model, dense=is_dense, pretrained=download)
    fresh_heads = True
    if download:
        num_pretrained = pretrained_facts(recipe.model.name)["num_classes"]
        fresh_heads = num_pretrained != recipe.model.num_classes
    if init and not checkpoint:
        report = load_weights(model, fetch(str(init), place), ema=init_ema, new_heads=True)
        fresh_heads = bool(report.dropped or report.begun)
        log.info("%s", report)
    if not is_dense:
        model.silence_dense_head(zero=fresh_heads)
    model.to(place.device)
    if on_gpu:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = make_optimizer(model, recipe.optim)
    ema = Ema(model, recipe.ema) if recipe.ema.decay else None
    if checkpoint:
        model.load_state_dict(checkpoint.model)
        optimizer.load_state_dict(checkpoint.optimizer)
        if ema and checkpoint.ema:
            ema.model.load_state_dict(checkpoint.ema)
    precision = precision_on(place.device, recipe.run)
    compiled = is_compiled_on(place.device, recipe.run)
    if compiled:
        model.compile_training()
    trained = DistributedDataParallel(model) if place.world_size > 1 else model

    # -------------------------------------------------------------- feed, records
    if checkpoint and checkpoint.world_size == place.world_size:
        feed = data.open_train(checkpoint.feed[place.rank], 0)
    else:
        feed = data.open_train(None, round(start / steps_per_epoch))
    records = None
    if place.is_main:
        # Only now, when recipe, weights and data have proved to fit: a mistake leaves no folder.
        run_log.prepare_folder(out, overwrite=overwrite)
        run_log.replace_text(out / run_log.RECIPE, to_toml(recipe))
        about = {
            "data": data.source,
            "split": data.split,
            "processes": place.world_size,
            "device": str(place.device),
        }
        run_log.write_environment(out, step=start, about=about)
        records = RunLog(out, step=start)
    log.info("%s", explain_lr(recipe.optim, num_processes=place.world_size, num_parts=parts))
    log.info(
        "%s with %s weights on %s, %s%s; from step %d to %d, %.4g steps an epoch",
        recipe.model.name, f"{sum(p.numel() for p in model.parameters()):,}", place.device,
        precision, ", compiled" if compiled else "", start, total, steps_per_epoch,
    )  # fmt: skip

    best = checkpoint.best if checkpoint else None
    metrics = checkpoint.metrics if checkpoint else {}
    health = Health(checkpoint.num_skipped if checkpoint else 0)
    window = Window(place)
    done = start
    saved = start if checkpoint else None

    def is_due(every: Duration) -> bool:
        return done % every.steps(steps_per_epoch) == 0 or done == total

    with ExitStack() as stack:
        stack.enter_context(_saying_the_way_back(lambda: (done, saved)))
        stack.enter_context(closing(feed))
        if records:
            stack.enter_context(closing(records))
        stop = stack.enter_context(StopSignal())
        stack.enter_context(logging_redirect_tqdm())
        hidden = None if place.is_main else True  # None: hidden unless stderr is a terminal
        bar = stack.enter_context(tqdm(total=total, initial=start, unit="step", disable=hidden))
        model.train()
        while done < total and not health.stop_requested:
            # ---------------------------------------------------------- one step
            step = done
            with window.waiting():
                batch = next(feed)
            torch.manual_seed(_step_seed(recipe.run.seed, step, place.rank))
            box = None
            if recipe.model.mix_token:
                # The same box on all processes: then how many there are changes nothing, and one
                # box for the whole batch is what the paper describes.
                box = sample_box(model.grid, np.random.default_rng([recipe.run.seed, step]))
            targets = targets_of(batch, recipe, model.grid)
            statistics = _batch_statistics(model)
            optimizer.zero_grad()
            loss = add_gradients(
                trained, batch, targets, box, recipe, parts=parts, bf16=precision == "bf16"
            )
            gradients = [p for p in model.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm([p.grad for p in gradients if p.grad is not None])
            if recipe.optim.clip_grad:
                nn.utils.clip_grads_with_norm_(gradients, recipe.optim.clip_grad, norm)
            is_bad = ~(norm.isfinite() & loss.total.isfinite())
            flags = torch.stack([is_bad, torch.full_like(is_bad, stop.requested)]).float()
            bad = reduce(place, flags, "max")[0]
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr(step)
            skip_if(optimizer, bad)
            optimizer.step()
            _restore_if(bad, statistics)
            if ema:
                ema.update(step)
            window.add([*loss, norm], bad)
            done += 1
            bar.update()

            # ---------------------------------------------------------- records
            epoch = done / steps_per_epoch
            evaluating = data.eval_batches is not None and is_due(recipe.evaluation.every)
            saving = evaluating or is_due(recipe.run.checkpoint_every)
            health.note(done, flags, batch.keys)
            for skipped_step, keys in health.look(place, wait=saving):
                if records:
                    skipped_epoch = skipped_step / steps_per_epoch
                    records.write("skipped", skipped_step, skipped_epoch, {"keys": keys})
            if health.stop_requested and done < total:
                log.warning("told to stop: saving at step %d of %d", done, total)
                saving, evaluating = True, False  # who stops us may not wait for long
            if records and (step == 0 or _ends_epoch(done, steps_per_epoch)):
                sheet = draw_crops(
                    batch, recipe, model.grid, data.class_names, box=box, most=_NUM_CROPS
                )
                records.show("crops", done, sheet)
            # A line before each checkpoint, for a resumed run starts a new mean.
            if saving or is_due(recipe.run.log_every):
                values = window.close(recipe.optim.batch_size)
                values |= {"lr": schedule.lr(step), "num_skipped": health.num_skipped}
                bar.set_postfix_str(_short(values))
                left = _hours((total - done) * recipe.optim.batch_size / values["images_per_sec"])
                log.info(
                    "step %d/%d, epoch %.4g: %s, %s left", done, total, epoch, _short(values), left
                )
                if records:
                    records.write("train", done, epoch, values)
            is_best = False
            if data.eval_batches is not None and evaluating:
                results = {}
                for weights, net in [("raw", model)] + ([("ema", ema.model)] if ema else []):
                    # Each process has its own running statistics; the main one's are saved.
                    copy_from_main(place, net.buffers())
                    results[weights] = evaluate(net, data.eval_batches, place, precision=precision)
                metrics, candidate = _summarise(results, done)
                is_best = best is None or candidate["top1"] >= best["top1"]
                best = candidate if is_best else best
                log.info("step %d/%d: %s", done, total, _in_words(metrics))
                if records:
                    records.write("eval", done, epoch, metrics)
            if saving:
                feed_states = from_all(place, feed.state())
                if records:
                    state = Checkpoint(
                        recipe=to_toml(recipe),
                        class_ids=data.class_ids,
                        class_names=data.class_names,
                        grid=model.grid,
                        step=done,
                        model=model.state_dict(),
                        ema=ema.model.state_dict() if ema else None,
                        optimizer=optimizer.state_dict(),
                        feed=feed_states,
                        world_size=place.world_size,
                        num_skipped=health.num_skipped,
                        best=best,
                        metrics=metrics,
                    )
                    save_step(
                        state,
                        out / run_log.CHECKPOINTS,
                        is_best=is_best,
                        ends_epoch=_ends_epoch(done, steps_per_epoch),
                    )
                    records.draw()
                saved = done
                window.restart()
    if done < total:
        log.warning("stopped at step %d of %d; --resume goes on", done, total)
    return Outcome(step=done, total_steps=total, metrics=metrics, best=best, is_main=place.is_main)


@contextmanager
def _saying_the_way_back(where: Callable[[], tuple[int, int | None]]) -> Iterator[None]:
    """Add to an error in the middle of a run what is saved; `where` gives steps done and saved."""
    try:
        yield
    except DivergedError:
        raise  # going on would end there again
    except (OSError, ValueError) as error:
        done, saved = where()
        way_back = f"is saved up to step {saved}: --resume goes on from there"
        if saved is None:
            way_back = "had no checkpoint yet: start it again with --resume or --overwrite"
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{error}. The run stopped at step {done} and {way_back}") from error


def _pass_seed(seed: int, first_pass: int) -> int:
    """Seed of a feed that begins with a later pass than the first: it has no position to go to."""
    if first_pass == 0:
        return seed
    return int(np.random.SeedSequence([seed, first_pass]).generate_state(1)[0])


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Mix the three into one 64-bit seed; neighbouring steps and ranks get unrelated ones."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def _find_checkpoint(folder: Path, place: Place, steps_per_epoch: float) -> Checkpoint:
    """Read the newest checkpoint that these processes can go on from, and say what is lost.

    The position of N feeds in the middle of a pass means nothing to another number of them; at the
    end of an epoch they can begin the next pass.
    """

    def why_not(checkpoint: Checkpoint) -> str | None:
        saved, here = checkpoint.world_size, place.world_size
        if saved == here or _ends_epoch(checkpoint.step, steps_per_epoch):
            return None
        return (
            f"was saved by {saved} processes, not {here}, at step {checkpoint.step}, in the middle "
            f"of an epoch: start {saved} again, or begin anew with --overwrite"
        )

    found = None
    if place.is_main:
        path, checkpoint, problems = read_latest(folder, why_not)
        found = path
        for problem in problems:
            log.warning("passed over: %s", problem)
        if problems:
            log.warning("going on from %s, step %d, instead", path, checkpoint.step)
        if checkpoint.world_size != place.world_size:
            log.warning(
                "the run was saved by %d processes and goes on with %d: from the end of epoch %d, "
                "step %d, with order and augmentation of the images drawn anew",
                checkpoint.world_size, place.world_size,
                round(checkpoint.step / steps_per_epoch), checkpoint.step,
            )  # fmt: skip
    else:
        checkpoint = None
    path = from_main(place, found)
    return checkpoint or read(path)


def _ends_epoch(step: int, steps_per_epoch: float) -> bool:
    """Tell whether a whole number of passes ends nearest to this step."""
    return step > 0 and step == round(round(step / steps_per_epoch) * steps_per_epoch)


def _refuse_other_run(checkpoint: Checkpoint, recipe: Recipe, data: Data) -> None:
    changed = differences(parse_recipe(checkpoint.recipe), recipe)
    changed = [name for name in changed if not name.startswith(_FREE_ON_RESUME)]
    if changed:
        raise ValueError(
            f"--resume with another recipe than the run's: {', '.join(changed)} changed; take the "
            "run's own recipe.toml, or start a new run with --init and the run's checkpoint"
        )
    if checkpoint.class_ids != data.class_ids:
        raise ValueError(
            f"--resume with other classes: the run has {len(checkpoint.class_ids)}, the data set "
            f"{len(data.class_ids)}, or their order differs; take the run's data set"
        )


def _batch_statistics(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Pair each floating-point buffer with a copy of what it holds now."""
    return [(b, b.clone()) for b in model.buffers() if b.is_floating_point()]


def _restore_if(bad: Tensor, saved: list[tuple[Tensor, Tensor]]) -> None:
    """Undo a bad step's running means: one NaN in them would stay for ever."""
    for buffer, before in saved:
        buffer.copy_(torch.where(bad.bool(), before, buffer))


def _summarise(
    results: Mapping[str, EvalResult], done: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Flatten evaluations of raw and averaged weights, and name the better one."""
    metrics: dict[str, float] = {"num_images": float(results["raw"]["num_images"])}
    for weights, result in results.items():
        metrics[f"{weights}_top1"] = result["top1"]
        metrics[f"{weights}_top5"] = result["top5"]
        metrics[f"{weights}_loss"] = result["loss"]
    candidates = [
        {"top1": result["top1"], "loss": result["loss"], "step": done, "weights": weights}
        for weights, result in results.items()
    ]
    return metrics, max(candidates, key=_goodness)


def _goodness(evaluation: dict[str, Any]) -> tuple[float, float]:
    """Order evaluations by top-1; where it is the same, the lower loss is better."""
    return evaluation["top1"], -evaluation["loss"]


def _in_words(metrics: dict[str, float]) -> str:
    parts = [
        f"{weights} top-1 {metrics[f'{weights}_top1']:.2f} %, "
        f"top-5 {metrics[f'{weights}_top5']:.2f} %, loss {metrics[f'{weights}_loss']:.4g}"
        for weights in ("raw", "ema")
        if f"{weights}_top1" in metrics
    ]
    return f"{'; '.join(parts)} on {metrics['num_images']:.0f} images"


def _short(values: dict[str, float]) -> str:
    memory = f", {values['gpu_memory_gb']:.1f} GB" if "gpu_memory_gb" in values else ""
    return (
        f"loss {values['loss']:.4g}, lr {values['lr']:.3g}, "
        f"{values['images_per_sec']:.4g} images/s, data wait {values['data_wait']:.0%}{memory}"
    )


def _hours(secs: float) -> str:
    minutes, seconds = divmod(round(secs), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
