"""Every way to make a heatmap, by name, with one signature."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from .attention import Target, check_layers, grid_of, transformer_of
from .dense import can_be_dense, dense
from .gae import gae
from .rollout import Heatmaps, raw, rollout
from .transformer_attribution import transformer_attribution

DEFAULT = "gae"

_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class Options:
    """What methods can be told; each heeds what it knows of."""

    target: Target = "prediction"
    """gae, transformer_attribution: what is explained, see attention.Target."""
    start_layer: int = 0
    """gae, transformer_attribution, rollout: the first block that counts."""
    alpha: int | float = 1.0
    """transformer_attribution: see there."""
    seed: int = 0
    """random."""


Run = Callable[[nn.Module, Float[Tensor, "b 3 h w"], Int64[Tensor, " b"], Options], Heatmaps]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to make heatmaps."""

    run: Run
    what: str
    """A line for people."""
    of_class: bool
    """Whether maps of two classes differ."""
    is_probability: bool = False
    """Whether values are probabilities, and not only more or less."""


def _random(
    model: nn.Module,
    images: Float[Tensor, "b 3 h w"],
    classes: Int64[Tensor, " b"],
    options: Options,
) -> Heatmaps:
    """Draw noise that depends on the image's pixels and the seed alone: the control."""
    rows, cols = grid_for(model, images)
    maps = [
        np.random.default_rng([options.seed, zlib.crc32(image.numpy().tobytes())])
        for image in images.float().cpu()
    ]
    noise = np.stack([random.random((rows, cols)) for random in maps])
    return torch.from_numpy(noise).to(images)


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "gae": Method(
            run=lambda m, x, c, o: gae(m, x, c, target=o.target, start_layer=o.start_layer),
            what="attention × gradient, carried through all blocks",
            of_class=True,
        ),
        "transformer_attribution": Method(
            run=lambda m, x, c, o: transformer_attribution(
                m, x, c, target=o.target, start_layer=o.start_layer, alpha=o.alpha
            ),
            what="relevance × gradient, carried through all blocks",
            of_class=True,
        ),
        "dense": Method(
            run=lambda m, x, c, o: dense(m, x, c),
            what="what the dense head says of each patch",
            of_class=True,
            is_probability=True,
        ),
        "rollout": Method(
            run=lambda m, x, c, o: rollout(m, x, start_layer=o.start_layer),
            what="attention of all blocks, multiplied",
            of_class=False,
        ),
        "raw": Method(
            run=lambda m, x, c, o: raw(m, x),
            what="attention of the last block",
            of_class=False,
        ),
        "random": Method(run=_random, what="noise: the control", of_class=False),
    }
)


def explain(
    method: str,
    model: nn.Module,
    images: Float[Tensor, "b 3 h w"],
    classes: Int64[Tensor, " b"],
    options: Options = Options(),  # noqa: B008
) -> Heatmaps:
    """Make a heatmap of each image: what in it speaks for its class.

    Args:
        method: A key of METHODS.
        model: As it was, afterwards; double precision if its weights and the images are.
        images: Normalised pixels.
        classes: The class of each image to explain. Methods that know of no class ignore it.
        options: For the method.

    Returns:
        A value per patch; larger is more. Only maps of one method can be compared.

    Raises:
        ValueError: Unknown method, or one that does not work with the model.
    """
    return find(method).run(model, images, classes, options)


def find(method: str) -> Method:
    """Look a method up.

    Raises:
        ValueError: There is none of this name; says which there are.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    return METHODS[method]


def possible(model: nn.Module) -> list[str]:
    """List the methods that work with a model."""
    found = set()
    if can_be_dense(model):
        found |= {"dense", "random"}
    try:
        transformer = transformer_of(model)
    except ValueError:
        return [name for name in METHODS if name in found]
    found |= {"gae", "rollout", "raw", "random"}
    try:
        check_layers(transformer)
    except ValueError:
        pass
    else:
        found.add("transformer_attribution")
    return [name for name in METHODS if name in found]


def upsample(heatmaps: Heatmaps, size: tuple[int, int]) -> Float[Tensor, "b h w"]:
    """Interpolate bilinearly to the pixels of an image, (height, width), as published.

    A patch's value stands at its centre.
    """
    larger = F.interpolate(heatmaps[:, None], size, mode="bilinear", align_corners=False)
    return larger[:, 0]


def normalize(heatmaps: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
    """Stretch each map to 0 … 1; one that is the same everywhere, but for rounding, becomes 0."""
    flat = heatmaps.flatten(1)
    low, high = flat.amin(1)[:, None, None], flat.amax(1)[:, None, None]
    span = high - low
    is_flat = span <= _ROUNDING * torch.maximum(low.abs(), high.abs())
    return torch.where(is_flat, 0.0, (heatmaps - low) / torch.where(is_flat, 1.0, span))


def grid_for(model: nn.Module, images: Float[Tensor, "b 3 h w"]) -> tuple[int, int]:
    """Return the patches (rows, cols) of a model's own maps."""
    grid: Any = getattr(model, "grid", None)
    return grid if grid is not None else grid_of(transformer_of(model), images)
