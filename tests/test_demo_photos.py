"""The demo's photos are what their folders say, and its teacher is a real one."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data.imagenet_info import ImageNetInfo

from tokenlabel.labeler.teacher import Teacher, load_teacher

ROOT = Path(__file__).parents[1]


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


demo_photos = load_example("demo_photos")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    demo_photos.main.main(["--out", str(folder)], standalone_mode=False)
    return folder


def photos_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/*"))


def crop_for(teacher: Teacher, path: Path) -> torch.Tensor:
    """The middle of a photo at the teacher's own size, as it is evaluated."""
    side = teacher.image_size
    middle = ImageOps.fit(Image.open(path).convert("RGB"), (side, side))
    return torch.from_numpy(np.array(middle)).permute(2, 0, 1)


@pytest.fixture(scope="module")
def ranks(demo: Path) -> dict[str, int]:
    """The rank that the demo's teacher gives to each photo's folder; 0 is its first guess."""
    teacher = load_teacher(
        "tf_efficientnet_lite0", checkpoint=demo / "teacher.pth", device="cpu", precision="fp32"
    )
    photos = [*photos_in(demo / "photos"), *photos_in(demo / "photos-val")]
    crops = [crop_for(teacher, path) for path in photos]
    logits = teacher.dense(torch.stack(crops)).mean((2, 3))
    order = logits.argsort(dim=1, descending=True)
    wnids = ImageNetInfo().label_names()
    classes = torch.tensor([wnids.index(path.parent.name) for path in photos])
    found = (order == classes[:, None]).int().argmax(dim=1)
    return {path.name: int(rank) for path, rank in zip(photos, found, strict=True)}


def test_the_teacher_names_the_folder_of_most_training_photos(ranks: dict[str, int]):
    train = [rank for name, rank in ranks.items() if name.startswith("imagenet_")]
    assert len(train) == 20
    assert sum(rank == 0 for rank in train) >= 17


def test_each_validation_photo_shows_its_class_to_the_teacher(ranks: dict[str, int]):
    val = {name: rank for name, rank in ranks.items() if not name.startswith("imagenet_")}
    assert len(val) == len(demo_photos.VAL_PHOTOS) == 5
    assert max(val.values()) < 5, val


def test_classes_are_listed_in_imagenets_order_with_distinct_names(demo: Path):
    lines = (demo / "photos" / "classes.txt").read_text(encoding="utf-8").splitlines()
    wnids, names = zip(*(line.split("\t") for line in lines), strict=True)
    assert list(wnids) == ImageNetInfo().label_names()
    assert len(set(names)) == 1000
    assert names[22] == "bald eagle"
    assert names[134] == "crane (n02012849)"


def test_both_photo_folders_list_the_same_classes(demo: Path):
    train, val = (demo / name / "classes.txt" for name in ("photos", "photos-val"))
    assert train.read_bytes() == val.read_bytes()


def test_a_missing_package_is_named_with_the_remedy():
    with pytest.raises(demo_photos.click.ClickException, match=r"no_such_package.*\[demo\]"):
        demo_photos.package_folder("no_such_package")
