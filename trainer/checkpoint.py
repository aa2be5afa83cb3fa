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
    owes_evaluation   whether one was due at this step and was left out, since the run was told to
                      stop; it is made up for when the run goes on

There is no state of random generators in it: all randomness of a step outside the feed comes from
(seed, step, rank), so a run that goes on at step n needs nothing but n.
"""

import argparse
import dataclasses
import math
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from .models import MODELS, Student, architecture, create_model, guess_name, head_names
from .models.lvvit import LVViT, resize_pos_embed, unwrap_state_dict
from .models.t2t_vit import T2TViT, add_dense_head
from .models.token_labeled import DENSE_HEAD, TokenLabeled
from .recipe import ModelConfig, Recipe, parse_recipe

FORMAT = "tokenlabel-checkpoint"
VERSION = 1
NUM_KEPT = 2
"""Checkpoints step-N.pt that stay; last.pt, best.pt and epoch.pt stay in any case."""


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
    owes_evaluation: bool = False


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What `load_weights` had to change."""

    path: Path
    weights: str
    """Which weights of the file: "raw", "ema", or "published" for files of others."""
    resized: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    """Heads of another class count."""
    begun: tuple[str, ...] = ()
    """The dense head where the file has none."""
    unused: tuple[str, ...] = ()
    """The dense head where the model has none."""

    def __str__(self) -> str:
        changes = [f"{', '.join(names)} {verb}" for names, verb in self._changes() if names]
        return f"{self.path}: {self.weights} weights loaded; {'; '.join(changes) or 'all fit'}"

    def _changes(self) -> list[tuple[tuple[str, ...], str]]:
        return [
            (self.resized, "resized"),
            (self.dropped, "dropped (other class count)"),
            (self.begun, "begun anew (not in the file)"),
            (self.unused, "left out (the model has no dense head)"),
        ]


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model ready to use, and what its checkpoint says about it."""

    model: Student
    name: str
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
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, f"{error.strerror} while saving", str(path)) from error
        raise
    _flush_folder(path.parent)


def save_step(
    checkpoint: Checkpoint, folder: Path, *, is_best: bool, ends_epoch: bool = False
) -> Path:
    """Write step-N.pt, point last.pt (best.pt, epoch.pt) at it, and keep but one older step-N.pt.

    Files of later steps are left over from before the run went back to an older checkpoint, and
    temporary ones from when it was killed; they are removed.
    """
    path = folder / f"step-{checkpoint.step}.pt"
    save(checkpoint, path)
    # last.pt comes last: where it points at a checkpoint, the other names are right, too.
    for name, is_meant in (("best", is_best), ("epoch", ends_epoch), ("last", True)):
        if is_meant:
            _link(path, folder / f"{name}.pt")
    files = step_files(folder)
    place = files.index(path)
    for other in files[: max(0, place + 1 - NUM_KEPT)] + files[place + 1 :]:
        other.unlink()
    for left_over in folder.glob(".*.pt.tmp"):
        left_over.unlink()
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
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
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
    content = read_content(path)
    if not is_ours(content):
        raise ValueError(
            f"{path} is not a tokenlabel checkpoint; it was written by another program"
        )
    return to_checkpoint(content, path)


def latest(folder: Path) -> Path:
    """Find the newest checkpoint: last.pt, else the newest step-N.pt."""
    candidates = [folder / "last.pt", *reversed(step_files(folder))]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} holds no checkpoint (last.pt or step-N.pt) to resume from")


def read_latest(
    folder: Path, why_not: Callable[[Checkpoint], str | None] = lambda checkpoint: None
) -> tuple[Path, Checkpoint, list[str]]:
    """Read the newest checkpoint that is whole and fits.

    Args:
        folder: Where save_step has written.
        why_not: Says of a whole checkpoint why it does not fit; None if it does.

    Returns:
        Its path, its content, and why each newer file was passed over.

    Raises:
        FileNotFoundError: There are no checkpoints.
        ValueError: None is whole and fits; says of each why.
    """
    problems: list[str] = []
    seen = set()
    kept = [folder / f"{name}.pt" for name in ("last", "epoch", "best")]
    for path in [kept[0], *reversed(step_files(folder)), *kept[1:]]:
        if not path.is_file() or (file := path.stat().st_ino) in seen:
            continue  # two names of one file
        seen.add(file)
        try:
            found = read(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        problem = why_not(found)
        if problem is None:
            return path, found, problems
        problems.append(f"{path} {problem}")
    if not problems:
        raise FileNotFoundError(f"{folder} holds no checkpoint to resume from")
    raise ValueError(f"no checkpoint can be resumed: {'; '.join(problems)}")


def read_best(folder: Path) -> dict[str, Any] | None:
    """Read what best.pt says of itself, which `Checkpoint.best` describes; None without one.

    Raises:
        ValueError: The file is torn or foreign.
    """
    path = folder / "best.pt"
    return read(path).best if path.is_file() else None


def is_ours(content: Mapping[str, Any]) -> bool:
    """Tell whether a file's content was written by `save`, in whatever version."""
    return content.get("format") == FORMAT


def read_content(path: Path) -> Mapping[str, Any]:
    """Read what a checkpoint file holds, ours or another program's; code in it is never run.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is damaged, or holds other things than tensors and plain values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is torn or not a safetensors file: {error}") from error
    with path.open("rb") as file:
        _refuse_damage(path)
        try:
            # timm's training script, and so the published one, keeps its arguments in its files.
            with torch.serialization.safe_globals([argparse.Namespace]):
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


def to_checkpoint(content: Mapping[str, Any], path: Path) -> Checkpoint:
    """Read what `is_ours` says yes to.

    Raises:
        ValueError: It is of another version, or damaged.
    """
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
    model: Student, path: Path, *, ema: bool | None = None, new_heads: bool = False
) -> LoadReport:
    """Load the weights of a checkpoint, ours or published, into a model.

    Position embeddings of another resolution are resized bicubically.

    Args:
        model: Filled in place; untouched when an error is raised.
        path: Our checkpoint, or a state dict, bare or nested, perhaps prefixed "module.".
        ema: Whether averaged weights are taken where the file has both; left out, those that
            were better when the file was saved as the best, otherwise the averaged ones.
        new_heads: Whether the model keeps its own heads where those of the file have another class
            count, and a timm model its own dense head where the file has none, instead of this
            being an error.

    Raises:
        ValueError: Anything missing, unexpected or of another shape, with its names.
    """
    return _fill(model, read_content(path), path, ema=ema, new_heads=new_heads)


def load_model(
    path: Path,
    *,
    name: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    ema: bool | None = None,
) -> TrainedModel:
    """Build the model that a checkpoint was trained as and load its weights.

    Args:
        path: Our checkpoint, or a published file of a model of ours.
        name: The model's name. Our files know it, the published ones show it by their shapes.
        image_size: Pixels to build the model for; left out, those of the checkpoint.
        ema: Whether averaged weights are taken where the file has both; left out, those that
            were better when the file was saved as the best, otherwise the averaged ones.

    Raises:
        ValueError: A file that does not say which model it holds, or whatever `load_weights`
            refuses.
    """
    content = read_content(path)
    if not is_ours(content):
        config = _published_config(content, name, image_size, path)
        model = create_model(config)
        report = _fill(model, content, path, ema=ema, new_heads=False)
        return TrainedModel(
            model=model,
            name=config.name,
            report=report,
            recipe=None,
            class_ids=None,
            class_names=None,
        )
    checkpoint = to_checkpoint(content, path)
    recipe = parse_recipe(checkpoint.recipe)
    if name is not None and architecture(name) != architecture(recipe.model.name):
        raise ValueError(f"{path} holds {recipe.model.name}, not {name}")
    config = recipe.model
    if image_size is not None:
        config = dataclasses.replace(config, image_size=image_size)
    model = create_model(config, dense=recipe.labels.dense_weight > 0)
    return TrainedModel(
        model=model,
        name=config.name,
        report=_fill(model, content, path, ema=ema, new_heads=False),
        recipe=recipe,
        class_ids=checkpoint.class_ids,
        class_names=checkpoint.class_names,
    )


def _published_config(
    content: Mapping[str, Any],
    name: str | None,
    image_size: int | tuple[int, int] | None,
    path: Path,
) -> ModelConfig:
    """Read model, class count and, unless given, resolution off the shapes of the weights."""
    weights = unwrap_state_dict(content)
    name = name or guess_name(weights)
    if name is None:
        raise ValueError(
            f"{path} does not show which model it is for: it is neither a checkpoint of tl-train "
            "nor a published LV-ViT or T2T-ViT; name its architecture, e.g. --model resnet50"
        )
    if not {"head.bias", "pos_embed"} <= set(weights):
        kind = ", ".join(MODELS)
        raise ValueError(f"{path} is none of {kind}: it has no head.bias or no pos_embed")
    square_px = 16 * math.isqrt(weights["pos_embed"].shape[1] - 1)
    return ModelConfig(
        name=name, num_classes=len(weights["head.bias"]), image_size=image_size or square_px
    )


def _fill(
    model: Student, content: Mapping[str, Any], path: Path, *, ema: bool | None, new_heads: bool
) -> LoadReport:
    weights, kind = choose_weights(content, path, ema)
    begun: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    old_grid = None  # published files do not say their grid; it is square
    if is_ours(content):
        rows, cols = content["grid"]
        old_grid = (rows, cols)
    if isinstance(model, TokenLabeled):
        resized = _fit_timms_pos_embed(weights, model, old_grid)
        if new_heads:
            begun, unused = _fit_dense_head(weights, model)
    else:
        resized = _fit_pos_embed(weights, model, old_grid)
        if isinstance(model, T2TViT) and kind == "published":
            begun = add_dense_head(weights)
    dropped = _fit_heads(weights, model, path, new_heads)
    refuse_misfit(weights, model.state_dict(), path)
    model.load_state_dict(weights)
    return LoadReport(
        path=path, weights=kind, resized=resized, dropped=dropped, begun=begun, unused=unused
    )


def choose_weights(
    content: Mapping[str, Any], path: Path, ema: bool | None
) -> tuple[dict[str, Any], str]:
    """Take averaged or raw weights out of a file's content, and say which they are.

    Args:
        content: Of a file, ours or published.
        path: For messages.
        ema: Whether averaged weights are taken; see `load_weights`.

    Returns:
        The weights, and "raw", "ema", or "published" for files of others.

    Raises:
        ValueError: The file has no such weights.
    """
    if not is_ours(content):
        weights = unwrap_state_dict(content, ema=ema is not False)
        kind = "published"
    else:
        if ema and not content["ema"]:
            raise ValueError(f"{path} holds no averaged weights; take the raw ones")
        kind = "ema" if (_prefers_ema(content) if ema is None else ema) else "raw"
        kind = kind if content["ema"] else "raw"
        weights = dict(content["ema"] if kind == "ema" else content["model"])
    if not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} holds no weights: not all of its values are tensors")
    return weights, kind


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


def _fit_timms_pos_embed(
    weights: dict[str, Any], model: TokenLabeled, old_grid: tuple[int, int] | None
) -> tuple[str, ...]:
    """Resize position embeddings of ViT's shape (1, tokens, d) and VOLO's (1, rows, cols, d)."""
    old, own = weights.get("pos_embed"), model.state_dict().get("pos_embed")
    if old is None or own is None or old.ndim != own.ndim:
        return ()
    if old.shape == own.shape and old_grid in (None, model.grid):
        return ()
    if own.ndim == 4:
        grid_size = list(old.shape[1:3])
        flat = resample_abs_pos_embed(
            old.flatten(1, 2), list(model.grid), grid_size, num_prefix_tokens=0
        )
        weights["pos_embed"] = flat.unflatten(1, model.grid)
        return ("pos_embed",)
    num_prefix = own.shape[1] - math.prod(model.grid)
    side = math.isqrt(max(0, old.shape[1] - num_prefix))
    grid_size = list(old_grid or (side, side))
    if not 0 <= num_prefix == old.shape[1] - math.prod(grid_size):
        return ()  # no grid at all: refused later
    weights["pos_embed"] = resample_abs_pos_embed(
        old, list(model.grid), grid_size, num_prefix_tokens=num_prefix
    )
    return ("pos_embed",)


def _fit_dense_head(
    weights: dict[str, Any], model: TokenLabeled
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Give weights the dense head that the model has, or none; return what was added, removed."""
    own = {k: v for k, v in model.state_dict().items() if k.startswith(f"{DENSE_HEAD}.")}
    added = tuple(name for name in own if name not in weights)
    weights |= {name: own[name] for name in added}
    surplus = [k for k in weights if k.startswith(f"{DENSE_HEAD}.") and k not in own]
    for name in surplus:
        del weights[name]
    return added, tuple(surplus)


def _fit_heads(
    weights: dict[str, Any], model: Student, path: Path, new_heads: bool
) -> tuple[str, ...]:
    """Put the model's own heads in the place of those of another class count; return which."""
    heads = tuple(f"{name}." for name in head_names(model))
    own = {name: value for name, value in model.state_dict().items() if name.startswith(heads)}
    others = [
        name for name in own if name in weights and weights[name].shape[:1] != own[name].shape[:1]
    ]
    if not others:
        return ()
    if not new_heads:
        raise ValueError(
            f"{path} has {len(weights[others[0]])} classes, the model {model.num_classes}; "
            "set model.num_classes to the file's, or start training from it with --init"
        )
    weights |= {name: own[name] for name in others}
    return tuple(others)


def _prefers_ema(content: Mapping[str, Any]) -> bool:
    best = content.get("best")
    return not best or best["step"] != content["step"] or best["weights"] == "ema"


def refuse_misfit(weights: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> None:
    """Compare names and shapes of a file's weights with a model's.

    Raises:
        ValueError: Some are missing, unexpected or of another shape; names them.
    """
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
