"""Many checkpoints × many sets → one table, resumable.

    OUT/cells/DIGEST.npz      the predictions of one checkpoint on one set
    OUT/table.md .csv .json   what metrics make of them; written anew after each cell

A cell's digest covers what decides its predictions: the checkpoint's bytes, the images and their
classes, the options. A second start finds finished cells by it, wherever their rows and columns
now stand.
"""

import hashlib
import json
import logging
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..labeler.folder import replace_file
from ..labeler.storage import local_path
from ..trainer.distributed import Place, from_main
from ..trainer.published import find_weights
from ..trainer.recipe import build_record
from . import metrics
from .data import Decoder, open_data
from .metrics import HeadMetrics, Metrics
from .predict import Precision, PredictConfig, predict
from .predictions import MODEL, Predictions
from .report import MEANINGS, count_images, in_words, with_interval

_FORMAT = 1  # counts up when cells of before mean something else
_NO_MATTER = ("batch_size", "num_workers")  # options that change no prediction

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CheckpointRow:
    """A [[checkpoint]] of a plan; but for the first two keys see PredictConfig."""

    checkpoint: str | None = None
    """File, URL or name of published weights; left out: those that timm has of `model`."""
    name: str | None = None
    """In the table; left out: what `checkpoint` says, or else the model."""
    model: str | None = None
    image_size: int | None = None
    crop_pct: float | None = None
    ema: bool | None = None

    @property
    def title(self) -> str:
        """What people read."""
        return self.name or self.checkpoint or self.model or ""


@dataclass(frozen=True, kw_only=True)
class DataColumn:
    """A [[data]] of a plan; but for the first two keys see PredictConfig."""

    data: str
    """Data set or source of images."""
    name: str | None = None
    """In the table; left out: what `data` says, and the split."""
    split: str | None = None
    classes: str | None = None
    root: str | None = None
    labels: str | None = None
    subset: str | None = None

    @property
    def title(self) -> str:
        """What people read."""
        return self.name or " ".join(filter(None, (self.data, self.split, self.labels)))


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """The [options] of a plan, for all cells; see PredictConfig."""

    decoder: Decoder | None = None
    flip: bool = False
    num_crops: int = 1
    precision: Precision = "fp32"
    batch_size: int = 64
    num_workers: int | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to evaluate on what."""

    checkpoints: tuple[CheckpointRow, ...]
    data: tuple[DataColumn, ...]
    options: CommonOptions = CommonOptions()

    def __post_init__(self) -> None:
        """Refuse a plan without cells, or with two of one name."""
        for kind, entries in (("checkpoint", self.checkpoints), ("data", self.data)):
            if not entries:
                raise ValueError(f"the table has no {kind}; give --{kind}, or [[{kind}]] in a plan")
            titles = [entry.title for entry in entries]
            twice = next((title for title in titles if titles.count(title) > 1), None)
            if twice is not None:
                raise ValueError(
                    f"{kind} {twice!r} stands in the table twice; give each a name = of its own"
                )
        if not all(row.title for row in self.checkpoints):
            raise ValueError("a [[checkpoint]] needs checkpoint = or model =")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A checkpoint on a set: numbers, or why there are none, or neither until its turn."""

    checkpoint: str
    data: str
    found: Metrics | None = None
    facts: Mapping[str, Any] | None = None
    """See Predictions."""
    num_unreadable: int = 0
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Turn into plain values."""
        plain = {name: value for name, value in vars(self).items() if name != "found"}
        return plain | (self.found.to_json() if self.found else {})


# ------------------------------------------------------------------------------------- plan


def read_plan(path: Path) -> Plan:
    """Read a plan, TOML with [[checkpoint]], [[data]] and [options]; paths start where you are.

    Raises:
        ValueError: It is no TOML, or has an unknown key or a value of another kind.
        OSError: It is not there.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    unknown = set(content) - {"checkpoint", "data", "options"}
    if unknown:
        raise ValueError(
            f"{path}: unknown key {sorted(unknown)[0]!r}; a plan has [[checkpoint]], [[data]] and "
            "[options]"
        )
    return Plan(
        checkpoints=_records(CheckpointRow, content, "checkpoint", path),
        data=_records(DataColumn, content, "data", path),
        options=build_record(CommonOptions, content.get("options", {}), "options."),
    )


def simple_plan(checkpoints: Sequence[str], data: Sequence[str], **options: Any) -> Plan:
    """Make a plan whose rows and columns share all options, by the fields of PredictConfig."""

    def shared(kind: type) -> dict[str, Any]:
        return {field.name: options[field.name] for field in fields(kind) if field.name in options}

    of_data = shared(DataColumn)
    if of_data.get("classes") is not None:
        of_data["classes"] = str(of_data["classes"])
    return Plan(
        checkpoints=tuple(
            CheckpointRow(checkpoint=c, **shared(CheckpointRow)) for c in checkpoints
        ),
        data=tuple(DataColumn(data=d, **of_data) for d in data),
        options=CommonOptions(**shared(CommonOptions)),
    )


def _records(kind: type, content: Mapping[str, Any], key: str, path: Path) -> tuple[Any, ...]:
    tables = content.get(key, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"{path}: {key} is no list of tables; write [[{key}]] above each of them")
    for table in tables:
        if key == "data" and "data" not in table:
            raise ValueError(f"{path}: a [[data]] has no data = FOLDER")
    return tuple(build_record(kind, table, f"{key}.") for table in tables)


# -------------------------------------------------------------------------------------- job


def evaluate_many(plan: Plan, out: Path, place: Place) -> list[Cell]:
    """Fill a table, and write it after each cell.

    A cell that fails keeps its reason, and the others go on.

    Args:
        plan: What to evaluate on what.
        out: Folder for cells and tables; one that has cells is continued.
        place: This process among all.

    Returns:
        All cells, checkpoint by checkpoint; with numbers on the main process alone.

    Raises:
        OSError: `out` cannot be written to.
    """
    if place.is_main:
        (out / "cells").mkdir(parents=True, exist_ok=True)
    digests: dict[str, str | Exception] = from_main(
        place, _digests(plan) if place.is_main else None
    )
    cells = {
        (row.title, column.title): Cell(checkpoint=row.title, data=column.title)
        for row in plan.checkpoints
        for column in plan.data
    }
    for row in plan.checkpoints:
        for column in plan.data:
            _logger.info("%s on %s", row.title, column.title)
            parts = [digests[f"checkpoint {row.title}"], digests[f"data {column.title}"]]
            cell = _fill(row, column, plan.options, parts, out / "cells", place)
            if cell.problem is not None:
                _logger.warning("%s on %s: %s", row.title, column.title, cell.problem)
            cells[row.title, column.title] = cell
            if place.is_main:
                write_tables(list(cells.values()), out)
    return list(cells.values())


def _fill(
    row: CheckpointRow,
    column: DataColumn,
    options: CommonOptions,
    digests: Sequence[str | Exception],
    folder: Path,
    place: Place,
) -> Cell:
    cell = Cell(checkpoint=row.title, data=column.title)
    for digest in digests:
        if isinstance(digest, Exception):
            return replace(cell, problem=_one_line(digest))
    path = folder / f"{_digest([*digests, _options(options)])}.npz"
    finished = from_main(place, _load(path) if place.is_main else None)
    # Among several processes torch's own errors mean that one of them is lost: no cell can go on.
    failures = (ValueError, OSError, RuntimeError)[: 3 if place.world_size == 1 else 2]
    try:
        predictions = finished or predict(
            row.checkpoint, column.data, _config(row, column, options), place
        )
        if not place.is_main:
            return cell
        if finished is None:
            predictions.save(path)
        return replace(
            cell,
            found=metrics.measure(predictions),
            facts=predictions.facts,
            num_unreadable=len(predictions.unreadable),
        )
    except failures as error:
        _logger.debug("%s on %s", row.title, column.title, exc_info=True)
        return replace(cell, problem=_one_line(error))


def _config(row: CheckpointRow, column: DataColumn, options: CommonOptions) -> PredictConfig:
    of_row, of_column = asdict(row), asdict(column)
    del of_row["name"], of_row["checkpoint"], of_column["name"], of_column["data"]
    of_column["classes"] = None if column.classes is None else Path(column.classes)
    return PredictConfig(**of_row, **of_column, **asdict(options))


def _load(path: Path) -> Predictions | None:
    """Read a finished cell; one that is damaged is made again."""
    if not path.exists():
        return None
    try:
        return Predictions.load(path)
    except ValueError as error:
        _logger.warning("%s; it is made again", error)
        return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ---------------------------------------------------------------------------------- digests


def _digests(plan: Plan) -> dict[str, str | Exception]:
    """Digest each checkpoint and each set once, or say why it cannot be read."""
    found: dict[str, str | Exception] = {}
    for kind, entries in (("checkpoint", plan.checkpoints), ("data", plan.data)):
        for entry in entries:
            try:
                found[f"{kind} {entry.title}"] = _digest(_content(entry))
            except (ValueError, OSError) as error:
                found[f"{kind} {entry.title}"] = error
    return found


def _content(entry: CheckpointRow | DataColumn) -> list[Any]:
    """Collect all of a row or column that decides predictions."""
    if isinstance(entry, DataColumn):
        return _content_of_data(entry)
    weights = None
    if entry.checkpoint is not None:
        with find_weights(entry.checkpoint).open("rb") as file:
            weights = hashlib.file_digest(file, "sha256").hexdigest()
    return [weights, entry.model, entry.image_size, entry.crop_pct, entry.ema]


def _content_of_data(column: DataColumn) -> list[Any]:
    """List the images by key, class and place, and the files that hold them by size and date."""
    classes = None if column.classes is None else Path(column.classes)
    source = open_data(column.data, split=column.split, classes=classes, root=column.root).source
    files = {sample.file: _stamp(sample.file) for sample in source.samples}
    images = [
        (sample.key, sample.class_index, sample.offset, sample.num_bytes, files[sample.file])
        for sample in source.samples
    ]
    labels = [_text_of(option) for option in (column.labels, column.subset)]
    return [images, source.class_ids, labels]


def _stamp(location: str) -> tuple[int, int] | None:
    path = local_path(location)
    if path is None:
        return None
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _text_of(option: str | None) -> str | None:
    """Take a file's content, not its name; what is no file is a name in itself."""
    if option is None or not Path(option).is_file():
        return option
    return Path(option).read_bytes().hex()


def _options(options: CommonOptions) -> dict[str, Any]:
    return {name: x for name, x in asdict(options).items() if name not in _NO_MATTER}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, content]).encode()).hexdigest()[:32]


# ---------------------------------------------------------------------------------- tables


def write_tables(cells: Sequence[Cell], out: Path) -> None:
    """Write table.md, table.csv and table.json into a folder."""
    content = json.dumps([cell.to_json() for cell in cells], indent=1, ensure_ascii=False)
    for name, text in (
        ("table.json", content + "\n"),
        ("table.csv", to_csv(cells)),
        ("table.md", to_markdown(cells)),
    ):
        replace_file(out / name, text.encode("utf-8", errors="surrogateescape"))


def to_csv(cells: Sequence[Cell]) -> str:
    """Write a line for each cell and head; cells without numbers have one line, with the reason."""
    return metrics.table_csv([line for cell in cells for line in _lines(cell)])


def _lines(cell: Cell) -> list[dict[str, Any]]:
    about = {"checkpoint": cell.checkpoint, "data": cell.data}
    names = [field.name for field in fields(HeadMetrics)]
    if cell.found is None:
        columns = ["head", "images", *(f"{n}{end}" for n in names for end in ("", "_low", "_high"))]
        empty = dict.fromkeys([*columns, "unreadable", "images_per_sec"], "")
        return [about | empty | {"problem": cell.problem or "not yet"}]
    facts = cell.facts or {}
    lines = []
    for head, found in cell.found.heads.items():
        numbers: dict[str, Any] = {"head": head, "images": cell.found.num_images}
        for name in names:
            value, low, high = (f"{x:.6g}" for x in getattr(found, name))
            numbers |= {name: value, f"{name}_low": low, f"{name}_high": high}
        numbers |= {
            "unreadable": cell.num_unreadable,
            "images_per_sec": f"{facts.get('images_per_sec', math.nan):.6g}",
        }
        lines.append(about | numbers | {"problem": ""})
    return lines


def to_markdown(cells: Sequence[Cell]) -> str:
    """Write top-1 as checkpoints × data, all numbers below it, and reasons at the end."""
    rows = list(dict.fromkeys(cell.checkpoint for cell in cells))
    columns = list(dict.fromkeys(cell.data for cell in cells))
    by_name = {(cell.checkpoint, cell.data): cell for cell in cells}
    best = {column: _best([by_name[row, column] for row in rows]) for column in columns}
    lines = _markdown(
        ["top-1, %", *columns],
        [[row, *(_top1(by_name[row, column], best[column]) for column in columns)] for row in rows],
    )
    measured = [cell for cell in cells if cell.found is not None]
    if measured:
        heads = ["checkpoint", "data", "head", "images", *(words for words, _ in MEANINGS.values())]
        rows = [line for cell in measured for line in _numbers(cell)]
        lines += ["", *_markdown(heads, rows, num_words=3)]
    problems = [cell for cell in cells if cell.problem is not None or cell.num_unreadable]
    if problems:
        lines += ["", *(f"- {cell.checkpoint} on {cell.data}: {_why(cell)}" for cell in problems)]
    return "\n".join(lines) + "\n"


def _best(cells: Sequence[Cell]) -> float:
    values = [cell.found.heads[MODEL].top1.value for cell in cells if cell.found is not None]
    return max(values) if len(values) > 1 else math.inf


def _top1(cell: Cell, best: float) -> str:
    if cell.found is None:
        return "not yet" if cell.problem is None else "failed"
    top1 = cell.found.heads[MODEL].top1
    words = in_words(top1)
    return f"**{words}**" if top1.value == best else words


def _numbers(cell: Cell) -> list[list[str]]:
    assert cell.found is not None
    return [
        [
            cell.checkpoint,
            cell.data,
            head,
            f"{cell.found.num_images:,}",
            *(with_interval(found, field) for field in MEANINGS),
        ]
        for head, found in cell.found.heads.items()
    ]


def _why(cell: Cell) -> str:
    return cell.problem or f"{count_images(cell.num_unreadable)} could not be read"


def _markdown(
    names: Sequence[str], rows: Sequence[Sequence[str]], *, num_words: int = 1
) -> list[str]:
    lines = [names, ["---"] * num_words + ["---:"] * (len(names) - num_words), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
