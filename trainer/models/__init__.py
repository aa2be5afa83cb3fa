"""The students. Importing this package registers them with timm."""

import difflib
import inspect

from ..recipe import ModelConfig
from .lvvit import LVViT, lvvit_l, lvvit_m, lvvit_s, lvvit_t

MODELS = {"lvvit_t": lvvit_t, "lvvit_s": lvvit_s, "lvvit_m": lvvit_m, "lvvit_l": lvvit_l}


def create_model(config: ModelConfig) -> LVViT:
    """Build the network of a recipe with fresh weights, on the CPU.

    Raises:
        ValueError: Unknown model, unknown or impossible argument; the known ones are listed.
    """
    if config.name not in MODELS:
        near = difflib.get_close_matches(config.name, MODELS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"model.name = {config.name!r}{hint}; known: {', '.join(MODELS)}")
    fixed = {
        "img_size": config.image_hw,
        "num_classes": config.num_classes,
        "drop_path_rate": config.drop_path,
    }
    free = [name for name in inspect.signature(LVViT).parameters if name not in fixed]
    for name in config.kwargs:
        if name not in free:
            raise ValueError(f"unknown key 'model.kwargs.{name}'; known: {', '.join(free)}")
    try:
        model = MODELS[config.name](**config.kwargs, **fixed)
    except TypeError as error:
        raise ValueError(f"model.kwargs = {config.kwargs} does not build: {error}") from error
    model.set_grad_checkpointing(config.grad_checkpointing)
    return model
