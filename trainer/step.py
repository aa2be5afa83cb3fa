"""From a batch to its gradients: forward and backward pass, at once or in parts.

A batch too large for a device is computed in parts whose gradients are added. Each part holds
images from the front of the batch and their partners in mixing from its back, and its loss is
divided by the number of parts: so targets, mixed pairs and loss are those of the whole batch, and
only batch norm, which sees a part at a time, and the draws of stochastic depth differ.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..labeler.geometry import TokenTargets
from .feed import Batch
from .loss import TokenLabelLoss, token_label_loss
from .mix_token import MixBox
from .mixup import PixelMix, mix_pixels, mix_targets
from .recipe import Recipe, RunConfig
from .targets import batch_targets, pick


def share_of(batch_size: int, num_processes: int) -> int:
    """Images of a step that fall to each process.

    Raises:
        ValueError: They cannot be shared out evenly.
    """
    if batch_size % num_processes:
        raise ValueError(
            f"optim.batch_size = {batch_size} cannot be shared by {num_processes} processes; "
            "it is the batch over all of them and must be a multiple of their number"
        )
    return batch_size // num_processes


def step_seed(seed: int, step: int, rank: int) -> int:
    """Mix the three into one 64-bit seed; neighbouring steps and ranks get unrelated ones."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def batch_statistics(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Pair each buffer with a copy of what it holds now."""
    return [(buffer, buffer.clone()) for buffer in model.buffers()]


def restore_if(bad: Tensor, saved: list[tuple[Tensor, Tensor]]) -> None:
    """Undo what a bad step did to them: one NaN in a running mean would stay for ever."""
    for buffer, before in saved:
        buffer.copy_(torch.where(bad.bool(), before, buffer))


def precision_on(device: torch.device, config: RunConfig) -> Literal["bf16", "fp32"]:
    """Choose the arithmetic of the forward pass."""
    if config.precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return "bf16" if has_bf16 else "fp32"
    return config.precision


def is_compiled_on(device: torch.device, config: RunConfig) -> bool:
    """Choose whether torch.compile is used."""
    return config.compile == "on" or (config.compile == "auto" and device.type == "cuda")


def num_parts(num_images: int, most: int | None) -> int:
    """Find the smallest number of equal parts, of whole mixed pairs, that hold few enough.

    Args:
        num_images: A process's share of a step.
        most: Images that it may compute at once; None: all.

    Raises:
        ValueError: There are no such parts.
    """
    if most is None or num_images <= most:
        return 1
    for parts in range(2, num_images // 2 + 1):
        if num_images % (2 * parts) == 0 and num_images // parts <= most:
            return parts
    raise ValueError(
        f"run.device_batch_size = {most}: a process's {num_images} images of a step cannot be "
        "computed in equal parts of so few; parts have an even number of images, so that "
        "MixToken finds its pairs: change run.device_batch_size, optim.batch_size or the number "
        "of processes"
    )


def rows_of_part(part: int, num_images: int, parts: int) -> Int64[Tensor, " r"]:
    """List the places in the batch of part 0, 1, …: as many from the front as from the back."""
    half = num_images // (2 * parts)
    front = torch.arange(part * half, (part + 1) * half)
    return torch.cat([front, num_images - 1 - front.flip(0)])


def targets_of(batch: Batch, recipe: Recipe, grid: tuple[int, int]) -> TokenTargets:
    """Build what a recipe teaches on a batch, for a student with this token grid."""
    return batch_targets(
        batch.maps,
        batch.views,
        batch.classes,
        grid,
        num_classes=recipe.model.num_classes,
        frames=batch.frames,
        smoothing=recipe.labels.smoothing,
        fill=recipe.labels.fill,
        class_target=recipe.labels.class_target,
    )


def add_gradients(
    trained: nn.Module,
    batch: Batch,
    targets: TokenTargets,
    mix: MixBox | PixelMix | None,
    recipe: Recipe,
    *,
    parts: int,
    bf16: bool,
) -> TokenLabelLoss:
    """Add the gradients of a batch's loss to those that the parameters hold.

    Args:
        trained: A student, or DistributedDataParallel around one, which then exchanges gradients
            once, after the last part.
        batch: This process's share of the step.
        targets: See `targets_of`.
        mix: See mixup.draw_mix; all parts are mixed alike.
        recipe: Gives the weights of the losses.
        parts: See `num_parts`.
        bf16: Whether the forward pass computes in bfloat16.

    Returns:
        The losses of the whole batch.
    """
    box = mix if isinstance(mix, MixBox) else None
    losses = []
    for part in range(parts):
        images, taught = batch.images, targets
        if parts > 1:
            rows = rows_of_part(part, len(images), parts).to(images.device, non_blocking=True)
            images, taught = images[rows], pick(targets, rows)
        if isinstance(mix, PixelMix):
            mirrored = torch.arange(len(images) - 1, -1, -1, device=images.device)
            taught = mix_targets(taught, pick(taught, mirrored), mix)
            images = mix_pixels(images, images[mirrored], mix)
        is_last = part == parts - 1
        with nullcontext() if is_last else _without_exchange(trained):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
                class_logits, aux_logits, _ = trained(images, box)
            loss = token_label_loss(
                class_logits,
                aux_logits,
                taught,
                box=box,
                class_weight=recipe.labels.class_weight,
                dense_weight=recipe.labels.dense_weight,
            )
            (loss.total / parts).backward()
        losses.append([value.detach() for value in loss])
    return TokenLabelLoss(*(torch.stack(values).mean() for values in zip(*losses)))


def _without_exchange(trained: nn.Module) -> AbstractContextManager[None]:
    return trained.no_sync() if isinstance(trained, DistributedDataParallel) else nullcontext()
