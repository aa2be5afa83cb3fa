"""Checkpoints: everything a run needs to go on, or a model needs to be used, in one file.

A checkpoint is one torch.save file of plain values (it loads with weights_only=True):

    format, version   "tokenlabel-checkpoint", 1
    recipe            the resolved recipe as TOML
    class_ids, class_names   one entry a class, in the order of the logits
    grid              token (rows, cols) of the model, which pos_embed belongs to
    step              number of optimizer steps taken, or skipped because they were not finite
    num_skipped       how many of them were skipped
    world_size        number of processes that trained
    model, ema        state dicts, raw and averaged (ema is None when there is no average)
    optimizer         AdamW's state dict
    feed              one entry a process: where its feed goes on
    best              {"top1", "loss", "step", "weights"} of the best evaluation so far, or None
    metrics           the latest evaluation

There is no state of random generators in it: all randomness of a step outside the feed comes from
(seed, step, rank), so a run that goes on at step n needs nothing but n.
"""

import dataclasses
import math
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .models import create_model
from .models.lvvit import LVViT, resize_pos_embed, unwrap_state_dict
from .recipe import ModelConfig, Recipe, parse_recipe

FORMAT = "tokenlabel-checkpoint"
VERSION = 1
NUM_KEPT = 2
"""Checkpoints step-N.pt that stay; last.pt and best.pt stay in any case."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The content of a checkpoint file, see the module's docstring."""

    recipe: str
    class_ids: list[str]
    class_names: list[str]
    grid: tuple[int, int]
    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    feed: list[Any] = field(default_factory=list)
    world_size: int = 1
    num_skipped: int = 0
    best: dict[str, Any] | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What `load_weights` had to change."""

    path: Path
    weights: str
    """Which weights of the file: "raw", "ema", or "published" for files of others."""
    resized: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def __str__(self) -> str:
        changes = [f"{', '.join(names)} {verb}" for names, verb in self._changes() if names]
        return f"{self.path}: {self.weights} weights loaded; {'; '.join(changes) or 'all fit'}"

    def _changes(self) -> list[tuple[tuple[str, ...], str]]:
        return [(self.resized, "resized"), (self.dropped, "dropped (other class count)")]


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model ready to use, and what its checkpoint says about it."""

    model: LVViT
    report: LoadReport
    recipe: Recipe | None
    """None for published files, which hold no recipe."""
    class_ids: list[str] | None
    class_names: list[str] | None


# ------------------------------------------------------------------------------------- write


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint under a temporary name, flush it to disk, then rename it."""
    fields = {f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint)}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        # A file of Python's own, since torch.save to a path reports a full disk as RuntimeError.
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **fields}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def save_step(checkpoint: Checkpoint, folder: Path, *, is_best: bool) -> Path:
    """Write step-N.pt, point last.pt (and best.pt) at it, and remove all but the newest two."""
    path = folder / f"step-{checkpoint.step}.pt"
    save(checkpoint, path)
    _link(path, folder / "last.pt")
    if is_best:
        _link(path, folder / "best.pt")
    for old in step_files(folder)[:-NUM_KEPT]:
        old.unlink()
    return path


def step_files(folder: Path) -> list[Path]:
    """List the checkpoints step-N.pt, oldest first."""
    found = [(re.fullmatch(r"step-(\d+)\.pt", path.name), path) for path in folder.glob("step-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def _link(source: Path, path: Path) -> None:
    """Make `path` the same file as `source` in one atomic move; a copy where links are refused."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, temporary)
    temporary.replace(path)
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Make a rename in `folder` last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -------------------------------------------------------------------------------------- read


def read(path: Path) -> Checkpoint:
    """Read a checkpoint of our own.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is torn, foreign or of another version; the message says which.
    """
    content = _read_content(path)
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a tokenlabel checkpoint; it was written by another program"
        )
    return _to_checkpoint(content, path)


def latest(folder: Path) -> Path:
    """Find the checkpoint to go on from: last.pt, else the newest step-N.pt."""
    candidates = [folder / "last.pt", *reversed(step_files(folder))]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} holds no checkpoint (last.pt or step-N.pt) to resume from")


def _read_content(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    with path.open("rb") as file:
        _refuse_damage(path)
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} is torn, or holds other things than tensors and plain values; reading "
                "those could run foreign code, so it is refused"
            ) from error
        except Exception as error:  # on foreign bytes it raises whatever it stumbles over
            raise ValueError(f"{path} is torn or not a checkpoint") from error
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} holds a {type(content).__name__}, not the weights of a model")
    return content


def _refuse_damage(path: Path) -> None:
    """Compare a zip file's checksums, which torch.load does not."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path} is torn: {error}") from error
    if damaged:
        raise ValueError(f"{path} is damaged: the checksum of its part {damaged} is wrong")


def _to_checkpoint(content: Mapping[str, Any], path: Path) -> Checkpoint:
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path} is a checkpoint of version {content.get('version')}; this program reads "
            f"version {VERSION}"
        )
    values = {key: value for key, value in content.items() if key not in ("format", "version")}
    try:
        return Checkpoint(**values)
    except TypeError as error:
        raise ValueError(
            f"{path} does not hold what a version {VERSION} checkpoint does"
        ) from error


# ----------------------------------------------------------------------- weights into models


def load_weights(
    model: LVViT, path: Path, *, ema: bool | None = None, new_heads: bool = False
) -> LoadReport:
    """Load the weights of a checkpoint, ours or published, into a model.

    Position embeddings of another resolution are resized bicubically.

    Args:
        model: Filled in place; untouched when an error is raised.
        path: Our checkpoint, or a state dict, bare or nested, perhaps prefixed "module.".
        ema: Whether averaged weights are taken where the file has both; left out, those that
            were better when the file was saved as the best, otherwise the averaged ones.
        new_heads: Whether heads of another class count are left out, so that the model keeps its
            own, instead of being an error.

    Raises:
        ValueError: Anything missing, unexpected or of another shape, with its names.
    """
    return _fill(model, _read_content(path), path, ema=ema, new_heads=new_heads)


def load_model(
    path: Path,
    *,
    name: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    ema: bool | None = None,
) -> TrainedModel:
    """Build the model that a checkpoint was trained as and load its weights.

    Args:
        path: Our checkpoint, or a published file.
        name: The model's name; only published files need it, ours know.
        image_size: Pixels to build the model for; left out, those of the checkpoint.
        ema: Whether averaged weights are taken where the file has both; left out, those that
            were better when the file was saved as the best, otherwise the averaged ones.

    Raises:
        ValueError: A published file without `name`, or whatever `load_weights` refuses.
    """
    content = _read_content(path)
    if content.get("format") != FORMAT:
        if name is None:
            raise ValueError(f"{path} does not say which model it holds; name it, e.g. lvvit_s")
        config = _published_config(content, name, image_size, path)
        model = create_model(config)
        report = _fill(model, content, path, ema=ema, new_heads=False)
        return TrainedModel(
            model=model, report=report, recipe=None, class_ids=None, class_names=None
        )
    checkpoint = _to_checkpoint(content, path)
    recipe = parse_recipe(checkpoint.recipe)
    if name not in (None, recipe.model.name):
        raise ValueError(f"{path} holds {recipe.model.name}, not {name}")
    config = recipe.model
    if image_size is not None:
        config = dataclasses.replace(config, image_size=image_size)
    model = create_model(config)
    return TrainedModel(
        model=model,
        report=_fill(model, content, path, ema=ema, new_heads=False),
        recipe=recipe,
        class_ids=checkpoint.class_ids,
        class_names=checkpoint.class_names,
    )


def _published_config(
    content: Mapping[str, Any], name: str, image_size: int | tuple[int, int] | None, path: Path
) -> ModelConfig:
    """Read the class count, and the resolution unless given, off the shapes of the weights."""
    weights = unwrap_state_dict(content)
    if not {"head.bias", "pos_embed"} <= set(weights):
        raise ValueError(f"{path} is not an LV-ViT: it has no head.bias or no pos_embed")
    square_px = 16 * math.isqrt(weights["pos_embed"].shape[1] - 1)
    return ModelConfig(
        name=name, num_classes=len(weights["head.bias"]), image_size=image_size or square_px
    )


def _fill(
    model: LVViT, content: Mapping[str, Any], path: Path, *, ema: bool | None, new_heads: bool
) -> LoadReport:
    is_ours = content.get("format") == FORMAT
    ema = _prefers_ema(content) if ema is None else ema
    weights = unwrap_state_dict(content, ema=ema)
    if not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} holds no weights: not all of its values are tensors")
    kind = ("ema" if ema and content["ema"] else "raw") if is_ours else "published"
    # Published files do not say their grid; it is square.
    resized = _fit_pos_embed(weights, model, tuple(content["grid"]) if is_ours else None)
    dropped = _fit_heads(weights, model, path, new_heads)
    _refuse_misfit(weights, model.state_dict(), path)
    model.load_state_dict(weights)
    return LoadReport(path=path, weights=kind, resized=resized, dropped=dropped)


def _fit_pos_embed(
    weights: dict[str, Any], model: LVViT, old_grid: tuple[int, int] | None
) -> tuple[str, ...]:
    """Resize pos_embed in place where grids differ; return what was resized."""
    old = weights.get("pos_embed")
    if old is None or old.ndim != 3:
        return ()  # missing or misshapen: refused later, with all other names
    if old_grid == model.grid or (old_grid is None and old.shape[1] == model.pos_embed.shape[1]):
        return ()
    weights["pos_embed"] = resize_pos_embed(old, model.grid, old_grid)
    return ("pos_embed",)


def _fit_heads(
    weights: dict[str, Any], model: LVViT, path: Path, new_heads: bool
) -> tuple[str, ...]:
    """Put the model's own heads in the place of those of another class count; return which."""
    own = {k: v for k, v in model.state_dict().items() if k.startswith(("head.", "aux_head."))}
    num_old = len(weights.get("head.bias", own["head.bias"]))
    if num_old == model.num_classes:
        return ()
    if not new_heads:
        raise ValueError(
            f"{path} has {num_old} classes, the model {model.num_classes}; "
            "set model.num_classes to the file's, or start training from it with --init"
        )
    replaced = tuple(name for name in own if name in weights)
    weights |= {name: own[name] for name in replaced}
    return replaced


def _prefers_ema(content: Mapping[str, Any]) -> bool:
    best = content.get("best") if content.get("format") == FORMAT else None
    return not best or best["step"] != content["step"] or best["weights"] == "ema"


def _refuse_misfit(weights: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> None:
    shapes = [
        f"{name} {_shape(weights[name])} instead of {_shape(tensor)}"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    problems = {
        "missing": [name for name in wanted if name not in weights],
        "unexpected": [name for name in weights if name not in wanted],
        "of another shape": shapes,
    }
    texts = [f"{kind}: {_some(names)}" for kind, names in problems.items() if names]
    if texts:
        raise ValueError(f"{path} holds weights of another architecture: {'; '.join(texts)}")


def _some(names: list[str], at_most: int = 4) -> str:
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"
