"""The sparse cross-entropy of loss.py as one Triton kernel: each logit is read and written once.

Imported on GPUs only, or with TRITON_INTERPRET=1 on a CPU, which is how the tests compare it with
the plain version.
"""

import inspect

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int64
from torch import Tensor

MOST_CLASSES = 65_536
"""What one program's registers hold; the plain version takes over above."""


def sparse_cross_entropies(
    logits: Float[Tensor, "b n c"],
    palette: Int64[Tensor, "b u"],
    probabilities: Float32[Tensor, "b n u"],
    background: Float32[Tensor, "b n"],
    weights: Float32[Tensor, "b n"],
    gradient: Float[Tensor, "b n c"] | None,
) -> Float32[Tensor, "b n"]:
    """Compute each token's weighted cross-entropy, and write the gradient of their sum.

    Args:
        logits: At most MOST_CLASSES classes.
        palette: See geometry.TokenTargets; likewise the others.
        probabilities: Of the palette.
        background: Of all other classes.
        weights: Of the tokens.
        gradient: Contiguous, of the logits' type; overwritten. None where it is not wanted.
    """
    b, n, num_classes = logits.shape
    logits, palette = logits.contiguous(), palette.contiguous()
    losses = torch.empty(b, n, dtype=torch.float32, device=logits.device)
    num_columns = palette.shape[1]
    _kernel[(b * n,)](
        logits, palette, probabilities.contiguous(), background.contiguous(), weights.contiguous(),
        losses, losses if gradient is None else gradient, n, num_columns,
        num_classes=num_classes,
        block_c=triton.next_power_of_2(num_classes),
        block_u=triton.next_power_of_2(num_columns),
        with_gradient=gradient is not None,
        num_warps=4 if num_classes <= 2048 else 16,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return losses


# Palettes differ from batch to batch, which must not mean another kernel for each. Classes do not,
# and of a number that it knows Triton sees how many are read at a time: 8, for 1,000 of 16 bits.
@triton.jit(do_not_specialize=["num_tokens", "num_columns"])
@inspect.unwrap  # where shapes are checked it is wrapped, and Triton needs its module's names
def _kernel(
    logits, palette, probabilities, background, weights, losses, gradient,
    num_tokens, num_columns,
    num_classes: tl.constexpr, block_c: tl.constexpr, block_u: tl.constexpr,
    with_gradient: tl.constexpr,
):  # fmt: skip
    # One program a token. 64 bits: 256 images of 196 tokens and 65,536 classes pass 2³¹.
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block_u)
    in_palette = column < num_columns
    classes = tl.load(
        palette + token // num_tokens * num_columns + column, mask=in_palette, other=0
    )
    behind = tl.load(background + token)
    p = tl.load(probabilities + token * num_columns + column, mask=in_palette, other=0.0)
    above = tl.where(in_palette, p - behind, 0.0)
    of_token = logits + token * num_classes
    x_palette = tl.load(of_token + classes, mask=in_palette, other=0.0).to(tl.float32)

    index = tl.arange(0, block_c)
    is_class = index < num_classes
    x = tl.load(of_token + index, mask=is_class, other=-float("inf")).to(tl.float32)
    largest = tl.max(x, 0)
    powers = tl.exp(x - largest)
    total = tl.sum(powers, 0)
    linear = tl.sum(above * x_palette, 0) + behind * tl.sum(tl.where(is_class, x, 0.0), 0)
    weight = tl.load(weights + token)
    tl.store(losses + token, (largest + tl.log(total) - linear) * weight)
    if with_gradient:
        out = gradient + token * num_classes
        type_out = gradient.dtype.element_ty
        tl.store(out + index, ((powers / total - behind) * weight).to(type_out), mask=is_class)
        # The palette's classes are written once more, after all threads' first writing. They are
        # distinct but for padding, which is as the background and needs no second writing.
        tl.debug_barrier()
        on_palette = tl.exp(x_palette - largest) / total - p
        tl.store(out + classes, (on_palette * weight).to(type_out), mask=above != 0.0)
