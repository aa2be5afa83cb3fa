"""Evaluation: exact numbers, each image once, and no weight silently left out."""

import itertools
import json
import re
import subprocess
import sys
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from shard_sets import NUM_CLASSES, jpeg, make_samples, noise, write_split
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from tokenlabel.cli import evaluate as tl_eval
from tokenlabel.evaluator.data import DECODERS, EvalImages, EvalView, open_data, seen_box
from tokenlabel.evaluator.models import load_for_eval
from tokenlabel.labeler.images import load_image
from tokenlabel.labeler.sources import open_source
from tokenlabel.shards.index import ShardIndex, read_index
from tokenlabel.shards.pack import pack
from tokenlabel.trainer import checkpoint as checkpoint_file
from tokenlabel.trainer.distributed import Place
from tokenlabel.trainer.evaluate import evaluate
from tokenlabel.trainer.feed import Batch, EvalFeed
from tokenlabel.trainer.models import create_model
from tokenlabel.trainer.models.lvvit import lvvit_t
from tokenlabel.trainer.recipe import parse_recipe, to_toml

ALONE = Place(device=torch.device("cpu"))
VIEW = EvalView(
    image_size=(32, 32),
    crop_pct=0.9,
    interpolation="bicubic",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
RECIPE = f"""
[model]
name = "lvvit_t"
num_classes = {NUM_CLASSES}
image_size = 32
kwargs = {{ depth = 2, embed_dim = 24, num_heads = 2, stem_width = 8 }}
[augment]
mean = [0.5, 0.5, 0.5]
[evaluation]
crop_pct = 0.8
interpolation = "bilinear"
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """23 samples in split val, in five shards."""
    folder = tmp_path_factory.mktemp("data")
    return write_split(folder, make_samples(f"s{i:02d}" for i in range(23)), split="val")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, data: ShardIndex) -> Path:
    """A checkpoint of a tiny model; its averaged weights answer class 3 whatever they see."""
    torch.manual_seed(0)
    recipe = parse_recipe(RECIPE)
    model = create_model(recipe.model)
    ema = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ema["head.bias"][3] = 1000.0
    path = tmp_path_factory.mktemp("own") / "best.pt"
    content = checkpoint_file.Checkpoint(
        recipe=RECIPE,
        class_ids=data.class_ids,
        class_names=data.class_names,
        grid=(2, 2),
        step=7,
        model=model.state_dict(),
        ema=ema,
    )
    checkpoint_file.save(content, path)
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as the authors of LV-ViT publish it, for 40 classes at 32 px."""
    model = lvvit_t(img_size=32, num_classes=NUM_CLASSES)
    weights = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    path = tmp_path_factory.mktemp("published") / "lvvit_t.pth"
    torch.save({"state_dict": weights}, path)
    return path


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(tl_eval, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


# ------------------------------------------------------------------------------- numbers


class _Reads(nn.Module):
    """Answers what its images hold: image[0, 0] are the logits."""

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        return images[:, 0, 0]


def batches_of(logits: np.ndarray, classes: np.ndarray, sizes: list[int]) -> list[Batch]:
    starts = np.cumsum([0, *sizes])
    return [
        Batch(
            images=torch.from_numpy(logits[a:b])[:, None, None].repeat(1, 3, 1, 1),
            classes=torch.from_numpy(classes[a:b]),
            views=torch.eye(2, 3).repeat(b - a, 1, 1),
            maps=None,
            keys=[str(i) for i in range(a, b)],
        )
        for a, b in zip(starts[:-1].tolist(), starts[1:].tolist())
    ]


def test_the_numbers_are_those_of_a_slow_loop():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((50, 12)).astype(np.float32) * 3
    classes = rng.integers(0, 12, 50)
    num_right, num_in_top5, loss = 0, 0, 0.0
    for row, right in zip(logits.astype(np.float64), classes):
        ranked = sorted(range(12), key=lambda c: -row[c])
        num_right += ranked[0] == right
        num_in_top5 += right in ranked[:5]
        loss -= row[right] - np.log(np.exp(row).sum())
    result = evaluate(_Reads(), batches_of(logits, classes, [20, 20, 7, 3]), ALONE)
    assert result["top1"] == pytest.approx(100 * num_right / 50)
    assert result["top5"] == pytest.approx(100 * num_in_top5 / 50)
    assert result["loss"] == pytest.approx(loss / 50, rel=1e-6)
    assert result["num_images"] == 50
    assert 0 < num_right < num_in_top5 < 50


def test_fewer_than_five_classes_are_all_in_the_top_five():
    logits = np.eye(3, dtype=np.float32)
    result = evaluate(_Reads(), batches_of(logits, np.array([0, 1, 0]), [3]), ALONE)
    assert result["top1"] == pytest.approx(200 / 3)
    assert result["top5"] == 100


@pytest.mark.parametrize("training", [True, False])
def test_the_model_goes_back_to_its_mode(training):
    model = _Reads().train(training)
    evaluate(model, batches_of(np.eye(2, dtype=np.float32), np.array([0, 1]), [2]), ALONE)
    assert model.training is training


def test_no_image_at_all_is_an_error():
    with pytest.raises(ValueError, match="no image to evaluate on"):
        evaluate(_Reads(), [], ALONE)


# --------------------------------------------------------------------------- class folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven photos of odd shapes in three classes."""
    rng = np.random.default_rng(0)
    root = tmp_path / "photos"
    for i, (rows, cols) in enumerate([(40, 57), (64, 48), (35, 35), (33, 90), (81, 50), (36, 41)]):
        path = root / f"class {i % 3}" / f"photo.{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(noise(rng, rows, cols)))
    Image.fromarray(noise(rng, 50, 70)).convert("RGBA").save(root / "class 1" / "clear.png")
    return root


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("image_size", [(32, 32), (32, 40)])
def test_a_folder_and_its_shards_look_the_same(folder, tmp_path, image_size, crop_mode):
    view = EvalView(**asdict(VIEW) | {"image_size": image_size, "crop_mode": crop_mode})
    pack(open_source(folder), tmp_path / "shards", split="val", num_workers=1)
    index = read_index(tmp_path / "shards")
    (trained,) = EvalFeed(index, "val", **asdict(view), batch_size=7, num_threads=1)
    packed, loose = open_data(tmp_path / "shards"), open_data(folder)
    by_decoder: dict[Any, dict[str, Tensor]] = {}
    for data, decoder in itertools.product([packed, loose], DECODERS):
        feed = EvalImages(data, view, decoder=decoder, batch_size=4, place=ALONE, num_workers=1)
        batches = list(feed)
        assert [len(batch.places) for batch in batches] == [4, 3]
        by_decoder[data is packed, decoder] = {
            data.source.samples[i].key: image[0]
            for batch in batches
            for i, image in zip(batch.places, batch.images)
        }
    assert list(by_decoder[True, "dali"]) == trained.keys  # the order in which they lie
    std = torch.tensor(view.std)[:, None, None]
    for i, key in enumerate(trained.keys):
        assert torch.equal(by_decoder[True, "dali"][key], trained.images[i])
        for images in by_decoder.values():
            difference = (images[key] - trained.images[i]) * std
            limit = 2 if key == "class%201/clear" else 0.5  # packing made a JPEG of this PNG
            assert 255 * float(difference.abs().mean()) < limit


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("image_size", [(32, 32), (32, 40)])
def test_pillows_view_is_timms(folder, image_size, crop_mode):
    view = EvalView(**asdict(VIEW) | {"image_size": image_size, "crop_mode": crop_mode})
    transform: Any = create_transform(
        image_size[0] if image_size == (32, 32) else image_size,
        interpolation="bicubic",
        crop_pct=0.9,
        crop_mode=crop_mode,
    )
    data = open_data(folder)
    feed = EvalImages(data, view, decoder="pil", batch_size=7, place=ALONE, num_workers=1)
    for i, image in enumerate(next(iter(feed)).images[:, 0]):
        photo = load_image(data.source.read(data.source.samples[i]))
        assert torch.equal(image, transform(photo))


@pytest.mark.parametrize("decoder", ["pil", "dali"])
def test_five_crops_are_the_centre_and_the_corners(folder, decoder):
    """Each is compared with the whole resized photo, of which it must be that part."""
    data = open_data(folder)
    feed = EvalImages(
        data, VIEW, decoder=decoder, batch_size=7, place=ALONE, num_crops=5, num_workers=1
    )
    (batch,) = feed
    for i, crops in enumerate(batch.images):
        photo = load_image(data.source.read(data.source.samples[i]))
        scale = 35 / min(photo.size)
        width, height = (int(scale * side) for side in photo.size)
        resized = photo.resize((width, height), Image.Resampling.BICUBIC)
        middle = (round((height - 32) / 2), round((width - 32) / 2))
        corners = [(top, left) for top in (0, height - 32) for left in (0, width - 32)]
        for (top, left), crop in zip([middle, *corners], crops, strict=True):
            part = np.asarray(resized.crop((left, top, left + 32, top + 32)))
            pixels = 255 * (
                crop.permute(1, 2, 0) * torch.tensor(VIEW.std) + torch.tensor(VIEW.mean)
            )
            assert np.abs(pixels.numpy() - part).mean() < 0.7


def test_ranks_share_batches_and_no_image_twice(folder):
    data = open_data(folder)
    shares = []
    for rank in range(3):
        place = Place(device=torch.device("cpu"), rank=rank, world_size=3)
        feed = EvalImages(data, VIEW, decoder="pil", batch_size=2, place=place, num_workers=1)
        shares.append([batch.places for batch in feed])
        assert len(feed) == len(shares[-1])
    assert shares == [[[0, 1], [6]], [[2, 3]], [[4, 5]]]


def test_unreadable_photos_are_counted_and_named(folder, own, data, tmp_path):
    (folder / "class 0" / "torn.jpg").write_bytes(jpeg(noise(np.random.default_rng(1)))[:300])
    classes, out = tmp_path / "names.txt", tmp_path / "result.json"
    classes.write_text("\n".join(data.class_ids))
    arguments = ["--checkpoint", own, "--data", folder, "--classes", classes, "--json", out]
    code, table, err = run(*arguments, "--workers", 1)
    assert code == 1
    assert "images    7\n" in table and "left out  1 unreadable image\n" in table
    assert "  class%200/torn: " in table
    assert re.search("^tl-eval: 1 of 8 images could not be read .* --allow-corrupt$", err, re.M)
    report = json.loads(out.read_text())
    assert report["num_images"] == 7 and list(report["unreadable"]) == ["class%200/torn"]
    assert report["split"] is None
    code, _, err = run(*arguments, "--workers", 1, "--allow-corrupt", "--decoder", "dali")
    assert code == 0 and "could not be read" not in err
    assert list(json.loads(out.read_text())["unreadable"]) == ["class%200/torn"]


@pytest.mark.parametrize("decoder", ["pil", "dali"])
def test_a_damaged_image_in_a_shard_is_named_and_the_others_count(tmp_path, decoder, own):
    samples = make_samples(f"s{i}" for i in range(7))
    samples[4]["s4.jpg"] = samples[4]["s4.jpg"][:400]
    write_split(tmp_path, samples, split="val")
    code, table, err = run(
        "--checkpoint", own, "--data", tmp_path, "--decoder", decoder, "--workers", 1
    )
    assert code == 1 and "images    6\n" in table and re.search("^  s4: ", table, re.M)
    assert "1 of 7 images could not be read" in err


def test_a_set_without_a_readable_image_is_an_error(tmp_path, own):
    (tmp_path / "class 0").mkdir()
    (tmp_path / "class 0" / "empty.jpg").write_bytes(b"")
    code, out, err = run("--checkpoint", own, "--data", tmp_path)
    assert (code, out) == (2, "") and re.search("none of the 1 images .* the file is empty", err)


def test_the_seen_box_is_inside_and_centred():
    for image_hw in [(480, 640), (640, 480), (500, 500), (333, 1001), (9, 7)]:
        x0, y0, x1, y1 = seen_box(image_hw, VIEW)
        assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
        assert x0 + x1 == pytest.approx(1, abs=0.1) and y0 + y1 == pytest.approx(1, abs=0.1)
        shorter = y1 - y0 if image_hw[0] <= image_hw[1] else x1 - x0
        assert shorter == pytest.approx(32 / 35)


# --------------------------------------------------------------------------------- models


def test_our_own_checkpoint_brings_model_view_and_classes(own, data):
    loaded = load_for_eval(own)
    assert (loaded.name, loaded.weights, loaded.num_classes) == ("lvvit_t", "ema", NUM_CLASSES)
    assert loaded.class_ids == data.class_ids
    assert loaded.view.image_size == (32, 32)
    assert (loaded.view.crop_pct, loaded.view.interpolation) == (0.8, "bilinear")
    assert loaded.view.mean == (0.5, 0.5, 0.5)
    assert load_for_eval(own, ema=False).weights == "raw"
    assert load_for_eval(own, crop_pct=1.0).view.crop_pct == 1.0
    larger = load_for_eval(own, image_size=64)
    assert larger.view.image_size == (64, 64)
    assert larger.model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, NUM_CLASSES)


def test_a_published_lvvit_is_known_by_its_shape(published):
    loaded = load_for_eval(published)
    assert (loaded.name, loaded.weights) == ("lvvit_t", "published")
    assert loaded.view.image_size == (32, 32) and loaded.view.crop_pct == 0.9
    assert loaded.class_ids is None
    expected = torch.load(published, weights_only=True)["state_dict"]
    found = loaded.model.state_dict()
    assert all(torch.equal(expected[f"module.{name}"], found[name]) for name in found)


def test_any_timm_model_can_be_named(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=7)
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    loaded = load_for_eval(path, model="test_resnet")
    assert loaded.num_classes == 7
    assert (loaded.view.image_size, loaded.view.crop_pct) == ((160, 160), 0.95)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.eval()(images), loaded.model.eval()(images))


def test_misfitting_weights_are_named(published, tmp_path):
    weights: dict[str, Any] = torch.load(published, weights_only=True)["state_dict"]
    del weights["module.blocks.0.mlp.fc1.bias"]
    weights["module.blocks.99.bias"] = torch.zeros(1)
    weights["module.norm.bias"] = torch.zeros(3)
    path = tmp_path / "changed.pth"
    torch.save(weights, path)
    with pytest.raises(ValueError) as error:
        load_for_eval(path)
    assert "missing: blocks.0.mlp.fc1.bias" in str(error.value)
    assert "unexpected: blocks.99.bias" in str(error.value)
    assert "norm.bias 3 instead of 240" in str(error.value)


def test_weights_of_another_timm_model_are_named(tmp_path):
    path = tmp_path / "resnet.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    with pytest.raises(ValueError, match=r"missing \(.*patch_embed"):
        load_for_eval(path, model="test_vit")
    with pytest.raises(ValueError, match="does not show which model .* --model resnet50"):
        load_for_eval(path)
    with pytest.raises(ValueError, match="unknown model 'test_resnat'; did you mean test_resnet"):
        load_for_eval(path, model="test_resnat")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_for_eval(tmp_path / "no.pt")


@pytest.mark.parametrize("dense_weight", [0.0, 1.0])
def test_a_timm_model_of_tl_train_brings_its_view_and_loads_under_its_name_too(
    tmp_path, dense_weight
):
    text = f"""
        [model]
        name = "test_vit"
        num_classes = 3
        image_size = 32
        [augment]
        mean = [0.1, 0.2, 0.3]
        [labels]
        dense_weight = {dense_weight}
        class_target = "label"
        [evaluation]
        crop_pct = 0.8
    """
    torch.manual_seed(0)
    model = create_model(parse_recipe(text).model, dense=dense_weight > 0).eval()
    content = checkpoint_file.Checkpoint(
        recipe=to_toml(parse_recipe(text)), class_ids=list("abc"), class_names=list("abc"),
        grid=(2, 2), step=1, model=model.state_dict(),
    )  # fmt: skip
    path = tmp_path / "best.pt"
    checkpoint_file.save(content, path)
    images = torch.randn(2, 3, 32, 32)
    for name in (None, "test_vit", "test_vit.r160_in1k"):
        loaded = load_for_eval(path, model=name)
        assert (loaded.num_classes, loaded.weights) == (3, "raw")
        assert loaded.class_ids == list("abc")
        assert (loaded.view.image_size, loaded.view.crop_pct) == ((32, 32), 0.8)
        assert loaded.view.mean == (0.1, 0.2, 0.3)
        torch.testing.assert_close(loaded.model.eval()(images), model(images))
    assert load_for_eval(path, image_size=48).view.image_size == (48, 48)


@pytest.mark.parametrize("ema", [True, False])
def test_files_of_other_programs_leave_no_choice_of_weights(tmp_path, ema):
    path = tmp_path / "weights.pt"
    torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), path)
    with pytest.raises(ValueError, match="--ema and --raw choose .* is of another program"):
        load_for_eval(path, model="test_resnet", ema=ema)


# --------------------------------------------------------------------------------- sources


def test_every_source_of_the_same_photos_gives_the_same_numbers(own, folder, tmp_path, data):
    """Class folders, a tar of them, shards of other programs, and a list."""
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(data.class_ids))
    photos = sorted(path for path in folder.rglob("*.*") if path.is_file())
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(folder, arcname=".")
    listed = [f"{path.relative_to(folder)},{path.parent.name}" for path in photos]
    (tmp_path / "photos.csv").write_text("\n".join(listed))
    with tarfile.open(tmp_path / "shard-0.tar", "w") as tar:
        for i, path in enumerate(photos):
            tar.add(path, arcname=f"{i}{path.suffix}")
            number = data.class_ids.index(path.parent.name)
            (tmp_path / "number").write_text(str(number))
            tar.add(tmp_path / "number", arcname=f"{i}.cls")
    named = ["--classes", classes]
    sources = [
        [folder, *named],
        [tmp_path / "photos.tar", *named],
        [tmp_path / "photos.csv", "--root", folder, *named],
        [tmp_path / "shard-*.tar"],
    ]
    found = []
    for source in sources:
        code, text, err = run(
            "--checkpoint", own, "--raw", "--workers", 1, "--json", "-", "--data", *source
        )
        assert code == 0, err
        report = json.loads(text)
        found.append((report["num_images"], report["top1"], round(report["loss"], 5)))
    assert found == [found[0]] * len(sources)
    assert found[0][0] == 7


def test_numbered_classes_beyond_the_model_are_refused(published, tmp_path, folder):
    (tmp_path / "list.csv").write_text(f"{folder}/class 0/photo.0.jpg,{NUM_CLASSES}")
    code, _, err = run("--checkpoint", published, "--data", tmp_path / "list.csv")
    assert code == 2
    assert f"has {NUM_CLASSES + 1} classes, the model {NUM_CLASSES}" in err


# --------------------------------------------------------------------------------- command


def test_the_command_prints_a_table_or_json(own, data):
    code, table, _ = run("--checkpoint", own, "--data", data.folder, "--workers", 1)
    assert code == 0
    numbers, heads = table.split("\n\n")
    rows = dict(line.split(maxsplit=1) for line in numbers.splitlines())
    assert rows["model"] == "lvvit_t, ema weights"
    assert rows["data"] == f"{data.folder}, split val"
    assert rows["view"] == "32 × 32 px, crop 0.8, bilinear"
    assert rows["images"] == "23"
    assert rows["top-1"].startswith(f"{100 / 23:.2f} [0.00, ")  # one image of class 3
    assert rows["decoder"] == "DALI"
    names = [line.split()[0] for line in heads.splitlines()]
    assert names == ["head", "model", "class", "dense_mean", "dense_max", "published"]
    code, text, _ = run("--checkpoint", own, "--data", data.folder, "--raw", "--json", "-")
    report = json.loads(text)
    assert code == 0 and report["weights"] == "raw"
    assert report["image_size"] == [32, 32] and report["num_images"] == 23
    assert report["loss"] == pytest.approx(np.log(NUM_CLASSES), rel=0.2)


def test_two_processes_of_the_command_find_what_one_finds(own, data, tmp_path):
    command = [str(Path(sys.executable).parent / "tl-eval"), "--batch-size", "4", "--workers", "1"]
    command += ["--checkpoint", str(own), "--data", str(data.folder), "--raw", "--json"]
    out = tmp_path / "two.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", "--no-python"]
    finished = subprocess.run([*torchrun, *command, str(out)], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("\ntop-1") == 1
    two = json.loads(out.read_text())
    one = json.loads(run(*command[1:], "-")[1])
    assert two["num_images"] == one["num_images"] == 23
    assert two["heads"] == one["heads"]  # to the last bit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{folder}/.."], "has 1 classes, the model 40; write classes.txt into the fold"),
        (["--data", "{shards}", "--pretrained"], "either --checkpoint FILE or --pretrained with"),
        (["--data", "{shards}", "--predict", "x.txt"], "x.txt ends in '.txt'; .* .npz, .json, .cs"),
        (
            ["--data", "{shards}", "--predict", "{shards}/no/x.npz"],
            "--predict .* /?.*no is missing",
        ),
        (["--data", "{shards}", "--crops", "3"], "--crops 3 is not possible; 1 is the centre, 5"),
        (["--data", "{folder}", "--split", "val"], "--split val is for dataset shards, but .*own"),
        (["--data", "{shards}", "--split", "test"], "no split 'test'; it has 'val'"),
        (["--data", "{shards}", "--classes", "x"], "--classes is for other sources; .* dataset sh"),
        (["--data", "{shards}", "--root", "x"], "--root is for other sources; .* dataset shards"),
        (["--data", "{folder}/class 0"], "says of no image which class it has, .*list of PATH,CL"),
        (["--data", "{shards}", "--model", "lvvit_small"], "unknown model 'lvvit_small'; did you"),
        (["--data", "{shards}", "--crop-pct", "2"], "crop_pct = 2.0; allowed: 0 < crop_pct <= 1"),
        (["--data", "{shards}", "--model", "lvvit_s"], "holds lvvit_t, not lvvit_s"),
        (["--data", "{shards}", "--device", "tpu9"], "--device 'tpu9' is no device"),
        (["--data", "{shards}/no"], "does not exist"),
        (["--data", "{shards}", "--json", "{shards}/no/x"], "folder .*/no is missing"),
    ],
)
def test_mistakes_are_one_line(own, data, folder, arguments, message):
    filled = [argument.format(folder=folder, shards=data.folder) for argument in arguments]
    code, out, err = run("--checkpoint", own, *filled)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert re.search(message, err), err


def test_classes_in_another_order_are_refused(own, folder, tmp_path, data):
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(reversed(data.class_ids)))
    code, _, err = run("--checkpoint", own, "--data", folder, "--classes", classes)
    assert code == 2
    assert "class 0 is 'class 39' in" in err and "but 'class 0' in the checkpoint" in err
