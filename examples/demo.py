"""Run the main job on 20 photos, from images to a report; `make demo` calls this.

    python examples/demo.py [--out demo]

Each command is printed before it runs: copy it, put your own folders in, and it does the same job
on your data.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
MADE_HERE = ("photos", "photos-val", "teacher.pth", "labels", "shards", "run")


@click.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo"),
    help="Folder for everything the demo makes. What an earlier demo left there is replaced.",
)
def main(out: Path) -> None:
    """Run the main job on 20 photos, from images to a report."""
    started = time.monotonic()
    remove_earlier_demo(out)
    script = os.path.relpath(ROOT / "examples" / "demo_photos.py")
    run("Photos and a teacher out of installed packages", f"python {script} --out {out}")
    run(
        "The teacher scores every photo on a grid of cells",
        f"tl-label generate --images {out}/photos --out {out}/labels "
        f"--teacher tf_efficientnet_lite0 --checkpoint {out}/teacher.pth --image-size 288",
    )
    run(
        "Photos and label maps become one data set",
        f"tl-shard pack --images {out}/photos --labels {out}/labels --out {out}/shards "
        "--split train",
    )
    run(
        "Other photos become its validation split; they need no label maps",
        f"tl-shard pack --images {out}/photos-val --out {out}/shards --split val",
    )
    run(
        "A small LV-ViT learns the label of every token",
        f"tl-train run --recipe demo --data {out}/shards --out {out}/run",
    )
    best = f"{out}/run/checkpoints/best.pt"
    run(
        "How well it knows the photos that it was trained on",
        f"tl-eval --checkpoint {best} --data {out}/shards --split train",
    )
    run(
        "And the validation photos, whose classes it never saw: this shows the command, no more",
        f"tl-eval --checkpoint {best} --data {out}/shards --split val",
    )
    picture = os.path.relpath(ROOT / "docs" / "images" / "segmentation-demo.jpg")
    run(
        "Segmentation takes longer; the report shows what tl-seg demo drew on another day",
        f"tl-train report {out}/run --picture {picture} "
        "'Segmentation from a token-labelled start and from scratch, as tl-seg demo drew it'",
    )
    minutes, secs = divmod(round(time.monotonic() - started), 60)
    click.echo(f"\nDone in {minutes} min {secs} s. Open the report in a browser:")
    click.echo(f"  {(out / 'run' / 'report.html').resolve().as_uri()}")


def remove_earlier_demo(out: Path) -> None:
    """Remove what an earlier demo made, and nothing else that may stand in the folder."""
    for name in MADE_HERE:
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def run(what: str, command: str) -> None:
    """Print a command and run it; end the demo if it fails."""
    click.echo(f"\n# {what}\n$ {command}", nl=True)
    started = time.monotonic()
    program, *arguments = shlex.split(command)
    status = subprocess.run([executable(program), *arguments], check=False).returncode
    if status != 0:
        click.echo(f"The demo stopped: this command ended with status {status}.", err=True)
        sys.exit(status if status > 0 else 1)
    click.echo(f"  ({time.monotonic() - started:.0f} s)")


def executable(program: str) -> str:
    """Find a program in the environment that runs this script, activated or not."""
    if program == "python":
        return sys.executable
    return str(Path(sysconfig.get_path("scripts")) / program)


if __name__ == "__main__":
    main()
