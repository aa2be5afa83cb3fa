"""The training loop: dataset shards → checkpoints.

`train` finds this process's place and opens the data; `fit` is the run itself, read top to bottom.
All randomness of a step that is not the feed's own comes from (seed, step, rank), so a run that
was killed at any step and resumed computes what it would have computed anyway.
"""

import logging
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..labeler.interrupt import StopRequest
from ..shards.index import ShardIndex, read_index
from . import run_log
from .checkpoint import Checkpoint, load_weights, save_step
from .dashboards import Dashboard, TensorBoard, Wandb, import_wandb
from .data import Data, open_data
from .distributed import TIMEOUT, Place, copy_from_main, from_all, from_main, join_processes, reduce
from .evaluate import evaluate
from .mixup import draw_mix
from .models import Student, create_model, pretrained_facts
from .optim import Ema, Schedule, explain_lr, make_optimizer, skip_if
from .preview import draw_crops
from .published import fetch
from .recipe import IMAGENET_MEAN, IMAGENET_STD, Recipe, to_toml
from .report import write_report
from .resume import (
    ends_epoch,
    find_best,
    find_checkpoint,
    is_due,
    refuse_other_run,
    saying_the_way_back,
    way_back,
)
from .run_log import RunLog, in_words, summarise
from .step import (
    add_gradients,
    batch_statistics,
    is_compiled_on,
    num_parts,
    precision_on,
    restore_if,
    share_of,
    step_seed,
    targets_of,
)
from .watch import Health, Window, clock, in_short, naming_bus_errors

log = logging.getLogger(__name__)

_NUM_CROPS = 4
"""On the dashboards' sheets of crops and targets, one each epoch."""


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
    timeout: timedelta = TIMEOUT,
    wandb: str | None = None,
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
        timeout: How long one process waits for the others.
        wandb: Project of Weights & Biases that shows the run, too; None: none.

    Raises:
        ValueError: Recipe, data and processes do not fit each other; says what to change.
        OSError: Something is in the way, missing, or the disk is full.
    """
    if wandb is not None:
        import_wandb()
    with join_processes(device, timeout=timeout) as place:
        if not place.is_main:
            logging.getLogger(__package__).setLevel(logging.ERROR)  # all learn of the same things
        recipe = resolve(recipe, read_index(data))
        opened = open_data(recipe, data, place, split=split, val_split=val_split)
        outcome = fit(
            recipe, opened, out, place,
            init=init, init_ema=init_ema, resume=resume, overwrite=overwrite, wandb=wandb,
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
    wandb: str | None = None,
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
        checkpoint = find_checkpoint(out / run_log.CHECKPOINTS, place, steps_per_epoch)
        refuse_other_run(checkpoint, recipe, data)
    elif resume:
        log.info("%s holds no checkpoint yet: starting at step 0", out)
    start = checkpoint.step if checkpoint else 0
    schedule = Schedule.of(recipe, steps_per_epoch)
    total = schedule.total_steps

    # -------------------------------------------------------------- model, average, optimizer
    on_gpu = place.device.type == "cuda"
    if on_gpu:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    model = _create_student(recipe, place, checkpoint, init=init, init_ema=init_ema)
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
    best = find_best(out / run_log.CHECKPOINTS) if checkpoint and place.is_main else None
    metrics = checkpoint.metrics if checkpoint else {}
    health = Health(checkpoint.num_skipped if checkpoint else 0)
    saved = start if checkpoint else None
    owes_evaluation = checkpoint is not None and checkpoint.owes_evaluation
    checkpoint = None  # its tensors take as much memory as the model and its optimizer
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
        dashboards: list[Dashboard] = []
        if wandb is not None:
            dashboards.append(Wandb(out, project=wandb, recipe=to_toml(recipe)))
        dashboards.append(TensorBoard(out / run_log.TENSORBOARD, step=start))
        records = RunLog(out, step=start, dashboards=dashboards)
    log.info("%s", explain_lr(recipe.optim, num_processes=place.world_size, num_parts=parts))
    log.info(
        "%s with %s weights on %s, %s%s; from step %d to %d, %.4g steps an epoch",
        recipe.model.name, f"{sum(p.numel() for p in model.parameters()):,}", place.device,
        precision, ", compiled" if compiled else "", start, total, steps_per_epoch,
    )  # fmt: skip

    window = Window(place)
    done = start

    def what_now() -> str:
        return way_back(done, saved)

    def evaluate_both() -> bool:
        """Evaluate raw and averaged weights; tell whether these are the best so far."""
        nonlocal metrics, best
        assert data.eval_batches is not None
        results = {}
        for weights, net in [("raw", model)] + ([("ema", ema.model)] if ema else []):
            # Each process has its own running statistics; the main one's are saved.
            copy_from_main(place, net.buffers())
            results[weights] = evaluate(net, data.eval_batches, place, precision=precision)
        metrics, candidate = summarise(results, done)
        is_best = best is None or candidate["top1"] >= best["top1"]
        best = candidate if is_best else best
        log.info("step %d/%d: %s", done, total, in_words(metrics))
        if records:
            records.write("eval", done, done / steps_per_epoch, metrics)
        return is_best

    def save(*, is_best: bool, owes_evaluation: bool) -> None:
        nonlocal saved
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
                owes_evaluation=owes_evaluation,
            )
            whole = ends_epoch(done, steps_per_epoch)
            save_step(state, out / run_log.CHECKPOINTS, is_best=is_best, ends_epoch=whole)
            records.draw()
        saved = done

    with ExitStack() as stack:
        stack.enter_context(saying_the_way_back(what_now))
        stack.enter_context(closing(feed))
        if records:
            stack.enter_context(records)
        stop = stack.enter_context(StopRequest())
        stack.enter_context(naming_bus_errors(lambda: f"{_lost_memory(data.source)}. {what_now()}"))
        stack.enter_context(logging_redirect_tqdm())
        hidden = None if place.is_main else True  # None: hidden unless stderr is a terminal
        bar = stack.enter_context(tqdm(total=total, initial=start, unit="step", disable=hidden))
        if owes_evaluation and data.eval_batches is not None:
            save(is_best=evaluate_both(), owes_evaluation=False)
        model.train()
        window.restart()
        while done < total and not health.stop_requested:
            # ---------------------------------------------------------- one step
            step = done
            with window.waiting():
                batch = next(feed)
            torch.manual_seed(step_seed(recipe.run.seed, step, place.rank))
            mix = draw_mix(recipe, model.grid, step)
            targets = targets_of(batch, recipe, model.grid)
            statistics = batch_statistics(model)
            optimizer.zero_grad()
            loss = add_gradients(
                trained, batch, targets, mix, recipe, parts=parts, bf16=precision == "bf16"
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
            restore_if(bad, statistics)
            if ema:
                ema.update(step, bad)
            window.add([*loss, norm], bad)
            done += 1
            bar.update()

            # ---------------------------------------------------------- records
            epoch = done / steps_per_epoch
            is_last, new_epoch = done == total, ends_epoch(done, steps_per_epoch)
            evaluating = data.eval_batches is not None and (
                is_last or is_due(recipe.evaluation.every, done, steps_per_epoch)
            )
            saving = (
                evaluating or is_last or is_due(recipe.run.checkpoint_every, done, steps_per_epoch)
            )
            health.note(done, flags, batch.keys)
            for skipped_step, keys in health.look(place, wait=saving):
                if records:
                    skipped_epoch = skipped_step / steps_per_epoch
                    records.write("skipped", skipped_step, skipped_epoch, {"keys": keys})
            owed = False
            if health.stop_requested and not is_last:
                log.warning("told to stop: saving at step %d of %d", done, total)
                # Who stops us may not wait for long.
                saving, evaluating, owed = True, False, evaluating
            if records and (step == 0 or new_epoch):
                sheet = draw_crops(
                    batch, recipe, model.grid, data.class_names, mix=mix, most=_NUM_CROPS
                )
                records.show("crops", done, sheet)
            # A line before each checkpoint, for a resumed run starts a new mean.
            if saving or is_due(recipe.run.log_every, done, steps_per_epoch):
                values = window.close(recipe.optim.batch_size)
                values |= {"lr": schedule.lr(step), "num_skipped": health.num_skipped}
                bar.set_postfix_str(in_short(values))
                left = clock((total - done) * recipe.optim.batch_size / values["images_per_sec"])
                log.info(
                    "step %d/%d, epoch %.4g: %s, %s left",
                    done, total, epoch, in_short(values), left,
                )  # fmt: skip
                if records:
                    records.write("train", done, epoch, values)
            is_best = evaluating and evaluate_both()
            if saving:
                save(is_best=is_best, owes_evaluation=owed)
                window.restart()
    if done < total:
        log.warning("stopped at step %d of %d; --resume goes on", done, total)
    return Outcome(step=done, total_steps=total, metrics=metrics, best=best, is_main=place.is_main)


def _create_student(
    recipe: Recipe,
    place: Place,
    checkpoint: Checkpoint | None,
    *,
    init: Path | str | None,
    init_ema: bool | None,
) -> Student:
    """Build the model on its device, with the weights that a new run begins with."""
    if recipe.model.pretrained and init:
        raise ValueError(
            f"--init {init} and model.pretrained = true both give initial weights; leave one out, "
            "e.g. by --set model.pretrained=false"
        )
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
    return model.to(place.device)


def _lost_memory(source: str) -> str:
    return (
        f"a file in use cannot be read any more: a shard of {source} was cut short, its disk "
        f"fails, or /dev/shm is full; tl-shard verify {source} says which shards are damaged"
    )
