"""Training of a segmentation model: shards with masks → checkpoints.

`train` finds this process's place and opens the data; `fit` is the run itself, read top to bottom.
Checkpoints, records, guards and the way to resume are the trainer's. All randomness of a step comes
from (seed, step, rank) and that of a crop from (seed, its position in the run): a run that was
killed and resumed computes what it would have computed anyway, and may go on with another number
of processes at any step.
"""

import logging
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..labeler.folder import replace_file
from ..labeler.interrupt import StopRequest
from ..labeler.sheet import to_png
from ..shards.index import ShardIndex, read_index
from ..trainer import run_log
from ..trainer.checkpoint import Checkpoint, save_step
from ..trainer.dashboards import TensorBoard
from ..trainer.distributed import (
    TIMEOUT,
    Place,
    copy_from_main,
    from_main,
    join_processes,
    reduce,
)
from ..trainer.loop import Outcome
from ..trainer.optim import Ema, make_optimizer, skip_if
from ..trainer.published import fetch
from ..trainer.recipe import OptimConfig, RunConfig, differences, parse_record, to_toml
from ..trainer.resume import (
    ends_epoch,
    find_best,
    is_due,
    newest_checkpoint,
    refuse_changes,
    saying_the_way_back,
    way_back,
)
from ..trainer.run_log import RunLog
from ..trainer.step import batch_statistics, precision_on, restore_if, share_of, step_seed
from ..trainer.watch import Health, Window, clock, in_short
from .class_sets import class_set_of
from .evaluate import confusion
from .feed import SegSamples, SegTrainFeed
from .loss import seg_loss
from .metrics import SegResult
from .recipe import SegOptimConfig, SegRecipe, SegSchedule
from .sheet import Compared, draw_sheet
from .uper_net import UperNet, create_model
from .weights import PUBLISHED, find_weights, start_from

log = logging.getLogger(__name__)

_FREE = (
    "summary", "paper_miou", "evaluation.", "model.grad_checkpointing",
    "run.workers", "run.checkpoint_every", "run.log_every",
)  # fmt: skip
"""Keys that may change between the parts of one run; they do not decide what it computes."""

_LOSSES = ("loss", "main_loss", "aux_loss")
_PANELS: tuple[run_log.Panel, ...] = (
    ("loss", "train", _LOSSES),
    ("mIoU in %", "eval", ("raw_miou", "ema_miou")),
    ("learning rate", "train", ("lr",)),
)


def train(
    recipe: SegRecipe,
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
) -> Outcome:
    """Train on a data set made by segmenter.pack.

    Args:
        recipe: What to compute; a class count of 0 becomes the data set's.
        data: The data set's folder.
        out: The run folder.
        split: The data set's split to learn from.
        val_split: The split to evaluate on; left out: "val" where the data set has it.
        init: LV-ViT or a segmentation model to begin with, ours or published: a file, a URL, or a
            name, see trainer.published and weights.PUBLISHED.
        init_ema: Whether its averaged weights are taken; left out: what the file prefers.
        resume: Go on with the run in `out`; begin anew where there is none yet.
        overwrite: Delete the run in `out` first.
        device: See distributed.join_processes.
        timeout: How long one process waits for the others.

    Raises:
        ValueError: Recipe, data and processes do not fit each other; says what to change.
        OSError: Something is in the way, missing, or the disk is full.
    """
    with join_processes(device, timeout=timeout) as place:
        if not place.is_main:
            logging.getLogger(__name__.partition(".")[0]).setLevel(logging.ERROR)
        index = read_index(data)
        if val_split is None and "val" in index.splits:
            val_split = "val"
        return fit(
            resolve(recipe, index), index, out, place, split=split, val_split=val_split,
            init=init, init_ema=init_ema, resume=resume, overwrite=overwrite,
        )  # fmt: skip


def resolve(recipe: SegRecipe, index: ShardIndex) -> SegRecipe:
    """Fill in the class count of the data set where the recipe leaves it open.

    Raises:
        ValueError: The recipe has another one.
    """
    wanted = recipe.model.num_classes
    if wanted and wanted != index.num_classes:
        raise ValueError(
            f"{index.folder} has {index.num_classes} classes, the recipe's model {wanted}; "
            f"--set model.num_classes={index.num_classes}"
        )
    return replace(recipe, model=replace(recipe.model, num_classes=index.num_classes))


def fit(
    recipe: SegRecipe,
    index: ShardIndex,
    out: Path,
    place: Place,
    *,
    split: str,
    val_split: str | None,
    init: Path | str | None = None,
    init_ema: bool | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Outcome:
    """Run a recipe to its end, or to SIGTERM, see `train`."""
    # -------------------------------------------------------------- where this run stands
    share_of(recipe.optim.batch_size, place.world_size)  # raises where it cannot be shared out
    samples = SegSamples(index, split)
    val_samples = None if val_split is None else SegSamples(index, val_split)
    classes = class_set_of(index.class_names)
    found = place.is_main and run_log.check_folder(out, resume=resume, overwrite=overwrite)
    steps_per_epoch = len(samples) / recipe.optim.batch_size
    checkpoint = None
    if from_main(place, found):
        checkpoint = newest_checkpoint(out / run_log.CHECKPOINTS, place)
        changed = differences(parse_record(SegRecipe, checkpoint.recipe), recipe)
        refuse_changes(changed, checkpoint, index.class_ids, free=_FREE)
    elif resume:
        log.info("%s holds no checkpoint yet: starting at step 0", out)
    start = checkpoint.step if checkpoint else 0
    schedule = SegSchedule.of(recipe, steps_per_epoch)
    total = schedule.total_steps

    # -------------------------------------------------------------- model, average, optimizer
    on_gpu = place.device.type == "cuda"
    if on_gpu:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    model = _create_model(recipe, place, init=None if checkpoint else init, init_ema=init_ema)
    optimizer = _make_optimizer(model, recipe.optim)
    ema = Ema(model, recipe.ema) if recipe.ema.decay else None
    if checkpoint:
        model.load_state_dict(checkpoint.model)
        optimizer.load_state_dict(checkpoint.optimizer)
        if ema and checkpoint.ema:
            ema.model.load_state_dict(checkpoint.ema)
    precision = precision_on(place.device, RunConfig(precision=recipe.run.precision))
    trained = DistributedDataParallel(model) if place.world_size > 1 else model

    # -------------------------------------------------------------- feed, records
    feed = SegTrainFeed(
        samples,
        recipe.augment,
        batch_size=recipe.optim.batch_size,
        mean=recipe.model.mean,
        std=recipe.model.std,
        seed=recipe.run.seed,
        step=start,
        rank=place.rank,
        world_size=place.world_size,
        device=place.device,
        num_workers=recipe.run.workers,
    )
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
            "data": str(index.folder.resolve()),
            "split": split,
            "processes": place.world_size,
            "device": str(place.device),
        }
        run_log.write_environment(out, step=start, about=about)
        board = TensorBoard(out / run_log.TENSORBOARD, step=start)
        records = RunLog(out, step=start, dashboards=[board], panels=_PANELS)
    log.info(
        "%s with %s weights on %s × %d, %s; from step %d to %d, %.4g steps an epoch",
        recipe.model.name, f"{sum(p.numel() for p in model.parameters()):,}", place.device,
        place.world_size, precision, start, total, steps_per_epoch,
    )  # fmt: skip

    window = Window(place, (*_LOSSES, "grad_norm"))
    done = start

    def what_now() -> str:
        return way_back(done, saved)

    def evaluate_both() -> bool:
        """Evaluate raw and averaged weights; tell whether these are the best so far."""
        nonlocal metrics, best
        assert val_samples is not None
        results: dict[str, SegResult] = {}
        compared: list[Compared] = []
        nets: dict[str, Any] = {"raw": model} | ({"ema": ema.model} if ema else {})
        for weights, net in nets.items():
            # Where norms are not synchronised each process has its own; the main one's are saved.
            copy_from_main(place, net.buffers())
            matrix, compared = confusion(
                net, val_samples, place, config=recipe.inference, model_config=recipe.model,
                precision=precision, num_workers=recipe.run.workers,
                num_compared=recipe.evaluation.num_sheets,
            )  # fmt: skip
            results[weights] = matrix.result()
        metrics, candidate = _summarise(results, done)
        is_best = best is None or candidate["miou"] >= best["miou"]
        best = candidate if is_best else best
        log.info("step %d/%d: %s", done, total, _in_words(metrics))
        if records:
            records.write("eval", done, done / steps_per_epoch, metrics)
            if compared:
                sheet = draw_sheet(compared, classes, ignore_index=samples.ignore_index)
                records.show("predictions", done, sheet)
                replace_file(out / run_log.PREDICTIONS, to_png(sheet, optimize=False))
        return is_best

    def save(*, is_best: bool, owes_evaluation: bool) -> None:
        nonlocal saved
        if records:
            state = Checkpoint(
                recipe=to_toml(recipe),
                class_ids=index.class_ids,
                class_names=index.class_names,
                grid=model.grid,
                step=done,
                model=model.state_dict(),
                ema=ema.model.state_dict() if ema else None,
                optimizer=optimizer.state_dict(),
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
        stack.enter_context(logging_redirect_tqdm())
        hidden = None if place.is_main else True  # None: hidden unless stderr is a terminal
        bar = stack.enter_context(tqdm(total=total, initial=start, unit="step", disable=hidden))
        if owes_evaluation and val_samples is not None:
            save(is_best=evaluate_both(), owes_evaluation=False)
        model.train()
        window.restart()
        while done < total and not health.stop_requested:
            # ---------------------------------------------------------- one step
            step = done
            with window.waiting():
                batch = next(feed)
            torch.manual_seed(step_seed(recipe.run.seed, step, place.rank))
            statistics = batch_statistics(model)
            optimizer.zero_grad()
            with torch.autocast(place.device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits, aux_logits = trained(batch.images)
            loss = seg_loss(
                logits,
                aux_logits,
                batch.masks,
                averaging=recipe.loss.averaging,
                ignore_index=samples.ignore_index,
                aux_weight=recipe.loss.aux_weight,
            )
            loss.total.backward()
            gradients = [p for p in model.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm([p.grad for p in gradients if p.grad is not None])
            if recipe.optim.clip_grad:
                nn.utils.clip_grads_with_norm_(gradients, recipe.optim.clip_grad, norm)
            is_bad = ~(norm.isfinite() & loss.total.isfinite())
            flags = torch.stack([is_bad, torch.full_like(is_bad, stop.requested)]).float()
            bad = reduce(place, flags, "max")[0]
            lr = schedule.lr_of(step)
            for group in optimizer.param_groups:
                group["lr"] = lr
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
            is_last = done == total
            evaluating = val_samples is not None and (
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
            # A line before each checkpoint, for a resumed run starts a new mean.
            if saving or is_due(recipe.run.log_every, done, steps_per_epoch):
                values = window.close(recipe.optim.batch_size)
                values |= {"lr": lr, "num_skipped": health.num_skipped}
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


def _create_model(
    recipe: SegRecipe, place: Place, *, init: Path | str | None, init_ema: bool | None
) -> UperNet:
    """Build the model on its device, with the weights that a new run begins with."""
    torch.manual_seed(recipe.run.seed)
    model = create_model(recipe.model)
    if init:
        name = str(init)
        path = find_weights(name, place) if name in PUBLISHED else fetch(name, place)
        log.info("%s", start_from(model, path, ema=init_ema))
    if place.world_size > 1 and place.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place, since the model is no norm
    elif place.world_size > 1:
        log.warning("on CPUs each process normalises its own images: norms are not synchronised")
    return model.to(place.device)


def _make_optimizer(model: UperNet, config: SegOptimConfig) -> torch.optim.AdamW:
    given: dict[str, Any] = {
        name: asdict(config)[name] for name in ("betas", "eps", "weight_decay")
    }
    if config.decayed == "matrices":
        return make_optimizer(model, OptimConfig(**given))
    # Fused, as make_optimizer's: see skip_if.
    return torch.optim.AdamW(model.parameters(), lr=0.0, fused=True, **given)


def _summarise(results: dict[str, SegResult], done: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Flatten evaluations into a line of metrics.jsonl, and name the better weights."""
    metrics: dict[str, float] = {"num_images": float(results["raw"].num_images)}
    for weights, result in results.items():
        metrics[f"{weights}_miou"] = result.miou
        metrics[f"{weights}_pixel_accuracy"] = result.pixel_accuracy
        metrics[f"{weights}_mean_accuracy"] = result.mean_accuracy
    candidates = [
        {"miou": result.miou, "step": done, "weights": weights}
        for weights, result in results.items()
    ]
    return metrics, max(candidates, key=lambda found: found["miou"])


def _in_words(metrics: dict[str, float]) -> str:
    parts = [
        f"{weights} mIoU {metrics[f'{weights}_miou']:.2f} %, "
        f"pixel accuracy {metrics[f'{weights}_pixel_accuracy']:.2f} %"
        for weights in ("raw", "ema")
        if f"{weights}_miou" in metrics
    ]
    return f"{'; '.join(parts)} on {metrics['num_images']:.0f} images"
