"""The commands: parse, call, print. Everything else lives in the stage folders.

Only click is imported at the top: `tl-eval --help` must not wait for torch.
"""

import logging
import re
import sys
from pathlib import Path
from typing import Any, ClassVar

import click


class _UserError(click.ClickException):
    """A user's mistake: one line, exit status 2, no traceback."""

    exit_code = 2

    def __init__(self, command: str, message: str) -> None:
        super().__init__(" ".join(message.split()))
        self.command = command

    def show(self, file: Any = None) -> None:
        click.echo(f"{self.command}: {self.message}", err=True)


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
        for noisy in ("PIL", "matplotlib", "urllib3", "fsspec", "torio"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            if debug:
                raise
            raise _UserError(ctx.command_path, str(error)) from error


class _Group(click.Group):
    command_class = _Command


_FOLDER = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)


# ---------------------------------------------------------------- tl-label: images → label maps


@click.group(cls=_Group)
@click.version_option(package_name="tokenlabel")
def label() -> None:
    """Make, check and look at dense label maps."""


@label.command("generate")
@click.option(
    "--images", type=_FOLDER, required=True, help="Photos in class folders: IMAGES/CLASS/x.jpg."
)
@click.option("--out", type=_FOLDER, required=True, help="Folder of the label set.")
@click.option(
    "--teacher", default="dm_nfnet_f6", show_default=True, help="Any timm classifier, by name."
)
@click.option(
    "--checkpoint",
    type=_FILE,
    help="The teacher's weights: .safetensors, or what torch.save wrote.  [default: timm's, "
    "downloaded once]",
)
@click.option(
    "--image-size",
    type=click.IntRange(min=1),
    help="Side of the teacher's square image, px; rounded to whole cells.  [default: what the "
    "model's own configuration evaluates at, 576 for dm_nfnet_f6]",
)
@click.option(
    "--fit",
    type=click.Choice(["native", "stretch", "center"]),
    default="native",
    show_default=True,
    help="How an image meets the teacher: whole in its own shape, whole made square, or only the "
    "square in its middle.",
)
@click.option("--top-k", default=5, show_default=True, help="Classes kept per cell.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="Images per forward pass.  [default: 64 on a GPU, 4 on a CPU]",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="auto, cpu, cuda or cuda:N. auto takes a GPU if there is one.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    show_default=True,
    help="Of the teacher; auto is bf16 on a GPU, fp32 on a CPU.",
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Threads that decode.  [default: all cores]"
)
@click.option(
    "--shard-size",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    help="Most images in a slice, the unit of work and of resume.",
)
@click.option(
    "--part",
    metavar="I/N",
    help="Do one part of the slices, 1/N to N/N: for job arrays. Parts may run at the same time.",
)
@click.option(
    "--classes",
    type=_FILE,
    help="One class a line, FOLDER or FOLDER<TAB>name; the line number is the class index.  "
    "[default: IMAGES/classes.txt if there, else the sorted folder names]",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace the labels of a run with other settings, if OUT holds such.",
)
def label_generate(
    images: Path,
    out: Path,
    teacher: str,
    checkpoint: Path | None,
    image_size: int | None,
    fit: str,
    top_k: int,
    batch_size: int | None,
    device: str,
    precision: str,
    workers: int | None,
    shard_size: int,
    part: str | None,
    classes: Path | None,
    overwrite: bool,
) -> None:
    """Score every cell of every image with a teacher and keep the best classes.

    A run that was broken off goes on where it stopped: give the same command again.

    \b
    Examples:
      tl-label generate --images photos --out labels
      tl-label generate --images photos --out labels --teacher convnext_tiny --image-size 448
      torchrun --nproc-per-node 8 --no-python tl-label generate --images photos --out labels
    """
    from .labeler.generate import check_output, generate, local_device, share_of_work
    from .labeler.sources import open_source
    from .labeler.teacher import load_teacher

    rank, world_size = share_of_work(part)
    source = open_source(images, classes=classes)
    check_output(out)
    summary = generate(
        source,
        out,
        teacher=load_teacher(
            teacher,
            checkpoint=checkpoint,
            image_size=image_size,
            device=local_device(device),
            precision=precision,
        ),
        fit=fit,
        top_k=top_k,
        batch_size=batch_size,
        num_workers=workers,
        shard_size=shard_size,
        rank=rank,
        world_size=world_size,
        overwrite=overwrite,
    )
    share = f"part {rank + 1} of {world_size}: " if summary.num_unfinished else ""
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
            f"all listed in {out / 'index.json'}"
        )
    for key, reason in list(summary.quarantined.items())[:10]:
        click.echo(f"    {key}: {reason}")
    if summary.num_unfinished:
        click.echo(
            f"  not finished: {summary.num_unfinished} of {_counted(summary.num_slices, 'slice')}; "
            "other processes have them, or their parts must still be run"
        )
    else:
        click.echo(f"  label set: {out}")


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
    type=_FOLDER,
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
    "--allow-missing", is_flag=True, help="Leave out images without a label, and count them."
)
@click.option("--overwrite", is_flag=True, help="Replace the split if OUT has it already.")
def shard_pack(
    images: str,
    labels: Path | None,
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
@click.option("--labels", type=_FOLDER, required=True, help="Label maps made by tl-label generate.")
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
    labels: Path,
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
                "labels": split.labels,
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
        if split.labels is None:
            click.echo("  no label maps")
        else:
            teacher = split.labels.get("teacher", {}).get("name", "unknown teacher")
            click.echo(
                f"  label maps: {teacher}, top {split.labels['k']}, {split.labels['fit']} fit"
            )


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
    """Train image models on token labels."""


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
@click.option("--init", type=_FILE, help="Checkpoint to start from: ours or a published one.")
@click.option(
    "--init-ema/--no-init-ema",
    default=None,
    help="Take its averaged or its raw weights.  [default: whichever it says are better]",
)
@click.option("--resume", is_flag=True, help="Go on with the run in OUT, if there is one.")
@click.option("--overwrite", is_flag=True, help="Delete the run in OUT first.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@_set_option
def train_run(
    recipe: str,
    data: Path,
    out: Path,
    split: str,
    val_split: str | None,
    init: Path | None,
    init_ema: bool | None,
    resume: bool,
    overwrite: bool,
    device: str,
    overrides: tuple[str, ...],
) -> None:
    """Train a model on a data set.

    OUT receives the resolved recipe, metrics.jsonl, TensorBoard events, curves.png, checkpoints
    and at the end report.html. SIGTERM and Ctrl-C save and stop; --resume goes on, and gives what
    an undisturbed run would have given.

    \b
    Examples:
      tl-train run --recipe demo --data demo/shards --out demo/run
      torchrun --nproc-per-node 8 --no-python \\
          tl-train run --recipe lvvit_s_224 --data shards --out run
    """
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
    if outcome.step == outcome.total_steps:
        click.echo(f"{out}/report.html")


@train.command("recipes")
def train_recipes() -> None:
    """List the recipes that come with tokenlabel."""
    from .trainer.recipe import load_recipe, recipe_names

    click.echo(f"{'recipe':<14} {'paper top-1':>11}  summary")
    for name in recipe_names():
        found = load_recipe(name)
        top1 = f"{found.paper_top1:.1f} %" if found.paper_top1 else "-"
        click.echo(f"{name:<14} {top1:>11}  {found.summary}")


@train.command("show")
@click.argument("recipe", metavar="NAME|FILE")
@_set_option
def train_show(recipe: str, overrides: tuple[str, ...]) -> None:
    """Print a recipe with every key spelled out, as a TOML file."""
    from .trainer.recipe import load_recipe, to_toml

    click.echo(to_toml(load_recipe(recipe, overrides)), nl=False)


# ------------------------------------------------------------- tl-eval: checkpoint → numbers


@click.command(cls=_Command)
@click.version_option(package_name="tokenlabel")
@click.option(
    "--checkpoint", type=_FILE, required=True, help="Of tl-train, of LV-ViT, or of a timm model."
)
@click.option(
    "--data",
    type=_FOLDER,
    required=True,
    help="Data set of tl-shard, or a folder of class folders.",
)
@click.option("--split", help="Of the data set.  [default: val]")
@click.option(
    "--classes",
    type=_FILE,
    help="For class folders: one class a line, in the order of the model's outputs.  "
    "[default: DATA/classes.txt if there, else the sorted folder names]",
)
@click.option(
    "--model", metavar="NAME", help="Only weights of timm models need it: --model resnet50."
)
@click.option(
    "--image-size", type=click.IntRange(min=1), help="Pixels.  [default: the checkpoint's]"
)
@click.option(
    "--crop-pct", type=float, help="Part of the image to see.  [default: the checkpoint's]"
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Per process."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option(
    "--ema/--raw", default=None, help="Averaged or raw weights.  [default: the better ones]"
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Reading threads.  [default: all cores]"
)
@click.option("--json", "json_out", metavar="FILE|-", help="Write the result as JSON; - prints it.")
def evaluate(
    checkpoint: Path,
    data: Path,
    split: str | None,
    classes: Path | None,
    model: str | None,
    image_size: int | None,
    crop_pct: float | None,
    batch_size: int,
    device: str,
    precision: Any,
    ema: bool | None,
    workers: int | None,
    json_out: str | None,
) -> None:
    """Measure top-1, top-5 and loss of a checkpoint.

    Every image counts once, on any number of processes. Images are seen as the checkpoint wants
    them: resized, then cut out of the centre. Under torchrun the images are shared out.

    \b
    Examples:
      tl-eval --checkpoint run/checkpoints/best.pt --data shards
      tl-eval --checkpoint lvvit_s-26M-224-83.3.pth.tar --data imagenet/val
      tl-eval --checkpoint resnet50.safetensors --model resnet50 --data imagenet/val
      torchrun --nproc-per-node 8 --no-python tl-eval --checkpoint best.pt --data shards
    """
    import json

    from .trainer.evaluate import evaluate_checkpoint

    if json_out not in (None, "-") and not Path(json_out).parent.is_dir():
        raise FileNotFoundError(f"--json {json_out}: the folder {Path(json_out).parent} is missing")
    report = evaluate_checkpoint(
        checkpoint,
        data,
        split=split,
        classes=classes,
        model=model,
        image_size=image_size,
        crop_pct=crop_pct,
        batch_size=batch_size,
        device=device,
        ema=ema,
        precision=precision,
        num_workers=workers,
    )
    if not report.is_main:
        return
    text = json.dumps(report.to_json(), indent=2, ensure_ascii=False)
    if json_out == "-":
        click.echo(text)
        return
    view, result = report.view, report.result
    height, width = view.image_size
    rows = {
        "model": f"{report.model}, {report.weights} weights",
        "data": f"{report.data}, split {report.split}" if report.split else report.data,
        "view": f"{height} × {width} px, crop {view.crop_pct:g}, {view.interpolation}",
        "top-1": f"{result['top1']:.2f} %",
        "top-5": f"{result['top5']:.2f} %",
        "loss": f"{result['loss']:.4f}",
        "images": f"{result['num_images']:,}",
        "images/s": f"{result['images_per_sec']:,.1f}",
    }
    if report.unreadable:
        rows["left out"] = _counted(len(report.unreadable), "unreadable image")
    for name, value in rows.items():
        click.echo(f"{name:<10}{value}")
    for key, reason in list(report.unreadable.items())[:10]:
        click.echo(f"  {key}: {reason}")
    if json_out is not None:
        Path(json_out).write_text(text + "\n", encoding="utf-8")
