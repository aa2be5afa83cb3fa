"""Pictures of explanations, and the command that draws them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner, Result
from packed import labels_for
from PIL import Image

from tokenlabel import cli
from tokenlabel.explainer.methods import METHODS
from tokenlabel.explainer.sheet import ClassView, Explanation, ModelView, draw_sheet, overlay
from tokenlabel.labeler.sources import open_source

VIT = "test_vit"
RED, TEAL = (200, 30, 20), (10, 120, 140)


def colour_at(image: Image.Image, x: float, y: float) -> tuple[int, ...]:
    pixel = image.getpixel((int(x * image.width), int(y * image.height)))
    assert isinstance(pixel, tuple)
    return pixel


def is_grey(colour: tuple[int, ...]) -> bool:
    return max(colour) - min(colour) <= 2


def explanation(photo: Image.Image, *, num_models: int = 1) -> Explanation:
    heatmap = np.zeros((2, 2), np.float32)
    heatmap[0, 1] = 1
    views = [
        ModelView(
            name=f"model {number}",
            photo=photo,
            answers=[("cat", 0.9), ("dog", 0.1)],
            labels=None,
            heatmaps={"raw": heatmap},
            classes=[ClassView(name="cat", probability=0.9, heatmaps={"gae": heatmap})],
        )
        for number in range(num_models)
    ]
    return Explanation(title="photo", right="cat", views=views)


def test_a_heatmap_colours_the_patches_that_count_and_greys_the_rest():
    photo = Image.new("RGB", (64, 64), RED)
    painted = overlay(photo, np.array([[0, 0.01], [0.02, 0]], np.float32))
    assert is_grey(colour_at(painted, 0.1, 0.1)) and is_grey(colour_at(painted, 0.9, 0.9))
    assert not is_grey(colour_at(painted, 0.25, 0.75))
    brightest = np.asarray(painted, dtype=float).sum(2).argmax()
    assert brightest // 64 >= 32 and brightest % 64 < 32


def test_probabilities_are_not_stretched():
    photo = Image.new("RGB", (64, 64), RED)
    nowhere = np.array([[0, 0.01], [0.02, 0]], np.float32)
    faint = np.asarray(overlay(photo, nowhere, is_probability=True), dtype=int)
    assert (faint.max(2) - faint.min(2)).max() <= 4
    flat = overlay(photo, np.full((2, 2), 0.3, np.float32))
    assert is_grey(colour_at(flat, 0.25, 0.25))


def test_the_photo_keeps_its_colours():
    photo = Image.new("RGB", (64, 64), RED)
    photo.paste(TEAL, (32, 0, 64, 64))
    sheet = np.asarray(draw_sheet(explanation(photo)))
    assert (sheet == RED).all(2).sum() == (sheet == TEAL).all(2).sum() > 20_000
    assert not (sheet == RED[::-1]).all(2).any()


def test_two_models_stand_side_by_side():
    photo = Image.new("RGB", (64, 64), RED)
    one, two = (draw_sheet(explanation(photo, num_models=n)) for n in (1, 2))
    assert two.width > 1.9 * one.width and two.height == one.height


# --------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of two small ViTs, photos in class folders, and labels of them."""
    root = tmp_path_factory.mktemp("explain")
    for key, colour in (("cats/a", RED), ("cats/b", TEAL), ("dogs/c", TEAL)):
        path = root / "photos" / f"{key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (200, 160), colour).save(path)
    source = open_source(root / "photos")
    labels_for(source, root / "labels", class_names=source.class_names)
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(timm.create_model(VIT).state_dict(), root / f"vit{seed}.pth")
    return root


def run(folder: Path, *arguments: str) -> Result:
    base = ["--checkpoint", str(folder / "vit0.pth"), "--model", VIT, "--device", "cpu"]
    return CliRunner().invoke(cli.explain, [*base, *arguments], standalone_mode=True)


def test_the_command_writes_a_sheet_of_each_image_and_one_page(folder: Path, tmp_path: Path):
    arguments = ["--images", str(folder / "photos"), "--labels", str(folder / "labels")]
    arguments += ["--class", "top1", "--class", "tabby", "--method", "all"]
    arguments += ["--second", str(folder / "vit1.pth"), "--second-model", VIT]
    result = run(folder, *arguments, "--limit", "2", "--out", str(tmp_path), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["num_listed"] == 3 and list(found["images"]) == ["cats/a", "cats/b"]
    for key, each in found["images"].items():
        sheet = Image.open(tmp_path / f"{key}.png")
        assert str(tmp_path / f"{key}.png") == each["sheet"] and sheet.width > 1000
        assert each["class"] == "cats" and len(each["models"]) == 2
        for model in each["models"]:
            assert [entry["class"] for entry in model["classes"]][1:] == ["tabby"]
            answers = list(model["answers"].items())
            assert answers[0] == (model["classes"][0]["class"], model["classes"][0]["probability"])
            drawn = set(model["heatmaps"]) | set(model["classes"][0]["heatmaps"])
            assert drawn == set(METHODS) - {"dense"}
            assert np.shape(model["classes"][0]["heatmaps"]["gae"]) == (10, 10)
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', html)
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert "cats (" in html and "the teacher&#x27;s token labels" in html


def test_one_image_and_the_default_method_need_no_more_options(folder: Path, tmp_path: Path):
    out, photo = tmp_path / "out", folder / "photos" / "dogs" / "c.png"
    result = run(folder, "--images", str(photo), "--out", str(out))
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[0] == str(out / "c.png")
    assert "160 × 160 px" in result.output and result.output.endswith(f"{out / 'index.html'}\n")


def test_an_unreadable_image_is_left_out_and_named(folder: Path, tmp_path: Path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "broken.jpg").write_bytes(b"no image")
    Image.new("RGB", (50, 50), RED).save(photos / "good.png")
    result = run(folder, "--images", str(photos), "--out", str(tmp_path / "out"))
    assert result.exit_code == 0 and "left out: broken: not a JPEG" in result.output
    (photos / "good.png").unlink()
    result = run(folder, "--images", str(photos), "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "none of the images can be read; broken: not a JPEG" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "dense"], "dense does not work with test_vit; possible: gae"),
        (["--class", "tabbi"], "has no class 'tabbi'; did you mean tabby"),
        (["--start-layer", "99"], "start_layer = 99; the model's blocks are 0 to"),
        (["--second-model", VIT, "--second", "nowhere.pth"], "nowhere.pth does not exist"),
        (["--images", "nowhere"], "nowhere does not exist"),
    ],
)
def test_mistakes_are_one_line(folder: Path, tmp_path: Path, arguments: list[str], message: str):
    given = ["--images", str(folder / "photos"), "--out", str(tmp_path), *arguments]
    result = run(folder, *given)
    assert result.exit_code == 2 and message in result.output.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_labels_of_other_images_are_refused(folder: Path, tmp_path: Path):
    photo = folder / "photos" / "dogs" / "c.png"
    given = ["--images", str(photo), "--out", str(tmp_path), "--labels", str(folder / "labels")]
    result = run(folder, *given)
    assert result.exit_code == 2
    assert "has labels for none of these images, whose keys are like 'c'" in result.output
