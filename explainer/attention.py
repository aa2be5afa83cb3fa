"""What a transformer computes while it looks at images, taken without leaving a trace in it.

Attention is fused into one operation, which keeps no matrix. Within `trace`, and nowhere else, that
operation is replaced by its formula. The model itself is given nothing but hooks and flags, which
are gone again when `trace` returns or fails.

In shapes, t counts all tokens of an image: the class token and others of its kind first, then the
patches, row-major.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from timm.layers.attention import Attention as TimmAttention
from timm.layers.mlp import Mlp as TimmMlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..trainer.models.lvvit import Attention, Block, LVViT
from ..trainer.models.token_labeled import TokenLabeled

Target = Literal["prediction", "class"]
"""What is explained: the logit that the model answers with, or that of its class head alone."""

Transformer = LVViT | VisionTransformer


@dataclass(eq=False)
class BlockTrace:
    """What one block computed; `inputs` of trace decides about all but the attention."""

    block: nn.Module
    attention: Float[Tensor, "b h t t"] = field(init=False)
    """After the softmax: row i says where token i looks."""
    q: Float[Tensor, "b h t d"] = field(init=False)
    k: Float[Tensor, "b h t d"] = field(init=False)
    v: Float[Tensor, "b h t d"] = field(init=False)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    """What entered "block", "qkv", "proj", "norm2", "fc1" and "fc2", each (b, t, width)."""
    branches: dict[str, Tensor] = field(default_factory=dict)
    """What "attn" and "mlp" added to the tokens, after layer scale or skip_lam."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Trace:
    """One look at a batch of images."""

    model: Transformer
    blocks: list[BlockTrace]
    tokens: Float[Tensor, "b t d"]
    """What the heads read."""
    grid: tuple[int, int]
    """Patches (rows, cols)."""

    @property
    def num_prefix(self) -> int:
        """Number of tokens that are no patch."""
        return self.tokens.shape[1] - self.grid[0] * self.grid[1]

    @property
    def attentions(self) -> list[Float[Tensor, "b h t t"]]:
        """The attention of each block."""
        return [block.attention for block in self.blocks]


@dataclass(frozen=True, eq=False, kw_only=True)
class Readout:
    """A head and what it reads."""

    head: nn.Linear
    weights: Float[Tensor, "b t"]
    """The head sees the sum of the tokens with these weights."""
    factor: float
    """What the head's logits count in the answer."""


def transformer_of(model: nn.Module) -> Transformer:
    """Find the transformer in a model: itself, or what TokenLabeled wraps.

    Raises:
        ValueError: It is none whose attention can be taken; says why.
    """
    found = model.backbone if isinstance(model, TokenLabeled) else model
    why = "it is no vision transformer of ours or timm's"
    if isinstance(found, LVViT | VisionTransformer):
        why = _problem(found)
        if why is None:
            return found
    raise ValueError(
        f"{type(found).__name__} has no attention that could explain it: {why}; possible are "
        "LV-ViT, T2T-ViT and timm's ViT and DeiT"
    )


def has_dense_head(model: LVViT) -> bool:
    """Tell whether the dense head says anything; one that was never taught may be all zero."""
    head: Any = model.aux_head
    return bool(head.weight.any())


def trace(model: nn.Module, images: Float[Tensor, "b 3 h w"], *, inputs: bool = False) -> Trace:
    """Let a model look at images, and keep the attention of each block.

    The model is in evaluation mode meanwhile. Where autograd is on, gradients reach every
    attention, whether or not the weights ask for one.

    Args:
        model: See transformer_of.
        images: Normalised pixels of the model's size, in the precision of its weights.
        inputs: Whether to keep what the layers of each block are given, too.

    Raises:
        ValueError: As transformer_of, or images of another size than the model was built for.
    """
    transformer = transformer_of(model)
    with _recording(transformer, inputs=inputs) as blocks:
        try:
            tokens = transformer.forward_features(images)
        except AssertionError as error:  # how timm says that the size is wrong
            raise ValueError(str(error)) from error
    return Trace(model=transformer, blocks=blocks, tokens=tokens, grid=grid_of(transformer, images))


def grid_of(model: Transformer, images: Float[Tensor, "b 3 h w"]) -> tuple[int, int]:
    """Return the patches (rows, cols) of a batch of images."""
    if isinstance(model, LVViT):
        return model.grid
    embed: Any = model.patch_embed
    if model.dynamic_img_size:
        rows, cols = embed.dynamic_feat_size(tuple(images.shape[-2:]))
    else:
        rows, cols = embed.grid_size
    return int(rows), int(cols)


def class_readouts(trace: Trace) -> list[Readout]:
    """Say what the heads for whole images read; DeiT's distilled models have two of them."""
    model, tokens = trace.model, trace.tokens
    head: Any = model.head
    if isinstance(model, VisionTransformerDistilled):
        other: Any = model.head_dist
        return [
            Readout(head=head, weights=_only(0, tokens), factor=0.5),
            Readout(head=other, weights=_only(1, tokens), factor=0.5),
        ]
    if isinstance(model, LVViT) or model.global_pool == "token":
        return [Readout(head=head, weights=_only(0, tokens), factor=1.0)]
    first = 0 if model.pool_include_prefix else model.num_prefix_tokens
    weights = torch.zeros_like(tokens[..., 0])
    weights[:, first:] = 1 / (tokens.shape[1] - first)
    return [Readout(head=head, weights=weights, factor=1.0)]


def readouts(trace: Trace, classes: Int64[Tensor, " b"], target: Target) -> list[Readout]:
    """Say which heads make the logit of a class, and of which tokens; one or two.

    Args:
        trace: Of the images.
        classes: The class of each image to explain. LV-ViT's dense head counts with the one token
            that gives this class the most.
        target: See Target.
    """
    model, tokens = trace.model, trace.tokens
    found = class_readouts(trace)
    if target == "class":
        return [replace(found[0], factor=1.0)]
    if not isinstance(model, LVViT) or not has_dense_head(model):
        return found
    dense: Any = model.aux_head
    scores = torch.einsum("btd,bd->bt", tokens[:, 1:].detach(), dense.weight[classes])
    best = F.one_hot(1 + scores.argmax(1), tokens.shape[1]).to(tokens.dtype)
    return [*found, Readout(head=dense, weights=best, factor=0.5)]


def head_input(trace: Trace, readout: Readout) -> Float[Tensor, "b d"]:
    """Compute what a head is given."""
    pooled = torch.einsum("bt,btd->bd", readout.weights, trace.tokens)
    return pooled if isinstance(trace.model, LVViT) else trace.model.fc_norm(pooled)


def logits(trace: Trace, parts: Sequence[Readout]) -> list[Float[Tensor, "b c"]]:
    """Compute what each head adds to the answer; their sum is the answer."""
    return [part.factor * part.head(head_input(trace, part)) for part in parts]


def attention_gradients(
    trace: Trace, parts: Sequence[Readout], classes: Int64[Tensor, " b"]
) -> list[Float[Tensor, "b h t t"]]:
    """Differentiate each image's logit of its class by the attention of each block."""
    answer = torch.stack(logits(trace, parts)).sum(0)
    # An image's logit depends on no other image, so that the sum's gradient is each one's own.
    chosen = answer.gather(1, classes[:, None]).sum()
    return list(torch.autograd.grad(chosen, trace.attentions))


def _only(index: int, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b t"]:
    weights = torch.zeros_like(tokens[..., 0])
    weights[:, index] = 1
    return weights


# ------------------------------------------------------------------------------- what can be seen


def _problem(model: Transformer) -> str | None:
    """Say what is in the way of taking a transformer's attention."""
    if not isinstance(model.head, nn.Linear):
        return "it has no classifier"
    for block in _blocks(model):
        if not isinstance(getattr(block, "attn", None), Attention | TimmAttention):
            return f"its blocks are of the kind {type(block).__name__}"
    if isinstance(model, VisionTransformer) and model.global_pool not in ("token", "avg"):
        return f"its head pools tokens by {model.global_pool!r}"
    return None


def check_layers(model: Transformer) -> None:
    """Refuse blocks that are not made of the layers that relevance rules know.

    Raises:
        ValueError: With what there is instead.
    """
    for block in _blocks(model):
        if isinstance(block, Block):
            continue
        known = type(block) is TimmBlock and type(block.mlp) is TimmMlp
        if not known or block.attn.gate is not None:
            kinds = f"{type(block).__name__} with {type(getattr(block, 'mlp', None)).__name__}"
            raise ValueError(
                f"relevance rules know blocks of attention and a two-layer MLP, not {kinds}; "
                "gae needs no rules"
            )


def _blocks(model: Transformer) -> list[Any]:
    return list(model.blocks)


# ------------------------------------------------------------------------------------ recording


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each of its modules back as it was afterwards."""
    with ExitStack() as undo:
        for module in model.modules():
            if module.training:
                _set(undo, module, "training", False)
        yield


@contextmanager
def _recording(model: Transformer, *, inputs: bool) -> Iterator[list[BlockTrace]]:
    """Collect what the blocks compute until the end of the with statement."""
    blocks = [BlockTrace(block) for block in _blocks(model)]
    with ExitStack() as undo:
        undo.enter_context(evaluating(model))
        if model.grad_checkpointing:
            _set(undo, model, "grad_checkpointing", False)
        mode = undo.enter_context(_WithMatrices())
        for each in blocks:
            _watch_attention(undo, mode, each)
            if inputs:
                _watch_layers(undo, each)
        yield blocks


def _set(undo: ExitStack, module: nn.Module, name: str, value: bool) -> None:
    before = getattr(module, name)
    undo.callback(lambda: setattr(module, name, before))
    setattr(module, name, value)


def _watch_attention(undo: ExitStack, mode: "_WithMatrices", each: BlockTrace) -> None:
    attention: Any = each.block.attn
    if getattr(attention, "fused_attn", True) is False:
        _set(undo, attention, "fused_attn", True)

    def enter(*_: Any) -> None:
        mode.current = each

    def leave(*_: Any) -> None:
        mode.current = None

    undo.callback(attention.register_forward_pre_hook(enter).remove)
    undo.callback(attention.register_forward_hook(leave).remove)


def _watch_layers(undo: ExitStack, each: BlockTrace) -> None:
    block: Any = each.block
    layers = {
        "block": block,
        "qkv": block.attn.qkv,
        "proj": block.attn.proj,
        "norm2": block.norm2,
        "fc1": block.mlp.fc1,
        "fc2": block.mlp.fc2,
    }
    for name, layer in layers.items():
        hook = _keeping(lambda args, _, name=name: each.inputs.update({name: args[0].detach()}))
        undo.callback(layer.register_forward_hook(hook).remove)
    ours = isinstance(block, Block)
    divisor = block.residual_divisor if ours else 1.0
    ends = (block.attn, block.mlp) if ours else (block.ls1, block.ls2)
    for name, layer in zip(("attn", "mlp"), ends, strict=True):

        def keep(_: Any, output: Tensor, name: str = name) -> None:
            each.branches[name] = output.detach() / divisor

        undo.callback(layer.register_forward_hook(_keeping(keep)).remove)


def _keeping(keep: Callable[[Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    """Make a forward hook that hands arguments and output on and changes neither."""

    def hook(_: nn.Module, args: Any, output: Any) -> None:
        keep(args, output)

    return hook


class _WithMatrices(TorchFunctionMode):
    """Computes attention step by step while a block is at it."""

    def __init__(self) -> None:
        super().__init__()
        self.current: BlockTrace | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or self.current is None:
            return func(*args, **kwargs)
        assert kwargs.get("attn_mask") is None and not kwargs.get("is_causal")
        return _attend(self.current, *args[:3])


def _attend(
    each: BlockTrace,
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b h t d"],
    v: Float[Tensor, "b h t d"],
) -> Float[Tensor, "b h t d"]:
    weights = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1)
    if torch.is_grad_enabled() and not weights.requires_grad:
        weights.requires_grad_()  # all parameters are frozen: the chain begins here
    each.attention, each.q, each.k, each.v = weights, q.detach(), k.detach(), v.detach()
    return weights @ v
