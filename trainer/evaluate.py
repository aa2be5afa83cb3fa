"""How good a model is while it learns: exact top-1, top-5 and loss, each image counted once.

What tl-eval finds out about a finished checkpoint is the evaluator's.
"""

import time
from collections.abc import Iterable
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from tqdm import tqdm

from .distributed import Place, reduce
from .feed import Batch

Precision = Literal["fp32", "bf16"]


class EvalResult(TypedDict):
    """What an evaluation found."""

    top1: float
    """Percent of the images whose best class is the right one."""
    top5: float
    """Percent of the images whose five best classes hold the right one."""
    loss: float
    """Mean cross-entropy with the right class, in nats."""
    num_images: int
    """Over all processes."""
    images_per_sec: float
    """Over all processes, reading included."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    place: Place,
    *,
    precision: Precision = "fp32",
    progress: bool = False,
) -> EvalResult:
    """Run a model over batches; the sums are taken over all processes.

    Args:
        model: Maps images to class logits; put in evaluation mode, and back afterwards.
        batches: This process's share; the shares may differ in length, and may be empty.
        place: This process among all.
        precision: Arithmetic of the forward pass; the loss is always taken in float32.
        progress: Whether to show a bar on a terminal.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=place.device)
    start = time.perf_counter()
    try:
        hidden = None if progress and place.is_main else True
        for batch in tqdm(batches, desc="evaluate", unit="batch", disable=hidden, leave=False):
            with torch.autocast(place.device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = model(batch.images)
            sums += _sums(logits.float(), batch.classes)
    finally:
        model.train(was_training)
    num_right, num_in_top5, loss, num_images = reduce(place, sums, "sum").tolist()
    secs = torch.tensor([time.perf_counter() - start], dtype=torch.float64, device=place.device)
    if not num_images:
        raise ValueError("there is no image to evaluate on")
    return EvalResult(
        top1=100 * num_right / num_images,
        top5=100 * num_in_top5 / num_images,
        loss=loss / num_images,
        num_images=round(num_images),
        images_per_sec=num_images / reduce(place, secs, "max").item(),
    )


def _sums(logits: Float[Tensor, "b c"], classes: Int64[Tensor, " b"]) -> Float64[Tensor, "4"]:
    """Count right answers, answers in the top five, loss and images of a batch."""
    best = logits.topk(min(5, logits.shape[1])).indices == classes[:, None]
    loss = F.cross_entropy(logits, classes, reduction="sum")
    count = torch.full((), len(classes), device=logits.device)  # torch.tensor makes the host wait
    return torch.stack([best[:, 0].sum(), best.sum(), loss, count]).double()
