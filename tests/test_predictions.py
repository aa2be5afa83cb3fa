"""Predictions: each image once, whatever holds it and however many processes look at it."""

import csv
import json
import multiprocessing
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.models
import torch
from click.testing import CliRunner
from shard_sets import NUM_CLASSES, jpeg, make_samples, noise, write_split
from test_demo_photos import demo_photos

from tokenlabel.cli import evaluate as tl_eval
from tokenlabel.evaluator.data import EvalImages, EvalView, crop_places, open_data
from tokenlabel.evaluator.metrics import measure
from tokenlabel.evaluator.models import EvalModel, load_for_eval
from tokenlabel.evaluator.predict import (
    PredictConfig,
    compare_decoders,
    open_photos,
    predict,
    prepare,
)
from tokenlabel.evaluator.predictions import HeadScores, Predictions
from tokenlabel.labeler.sources import open_source
from tokenlabel.shards.pack import pack
from tokenlabel.trainer.distributed import Place, join_processes
from tokenlabel.trainer.models import create_model
from tokenlabel.trainer.models.lvvit import lvvit_t
from tokenlabel.trainer.recipe import ModelConfig

ALONE = Place(device=torch.device("cpu"))
LITE0 = "tf_efficientnet_lite0"
HEADS = ["model", "class", "dense_mean", "dense_max", "published"]


def made(num_images: int = 6, *, num_classes: int = 9, seed: int = 0, **other: Any) -> Predictions:
    """Random answers of two heads."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(num_classes), (2, num_images))
    classes = rng.integers(-1, num_classes, num_images)
    order = np.argsort(-probs, 2)[:, :, :5]
    true = np.log(probs[:, np.arange(num_images), classes])
    heads = {
        name: HeadScores(
            top_classes=order[i],
            top_probs=np.take_along_axis(probs[i], order[i], 1).astype(np.float32),
            true_log_probs=np.where(classes >= 0, true[i], np.nan),
        )
        for i, name in enumerate(["model", "class"])
    }
    facts = {"checkpoint": "a.pt", "view": {"image_size": [32, 32]}, "images_per_sec": 3.5}
    content: dict[str, Any] = {
        "keys": [f"wörter/{i}" for i in range(num_images)],
        "classes": classes,
        "heads": heads,
        "num_classes": num_classes,
        "class_names": [f"klass {i}, ähnlich" for i in range(num_classes)],
        "unreadable": {"torn": "the file is empty (0 bytes)"},
        "facts": facts,
    }
    return Predictions(**content | other)


def assert_same(a: Predictions, b: Predictions) -> None:
    for name in ("keys", "num_classes", "class_names", "valid", "unreadable", "facts"):
        assert getattr(a, name) == getattr(b, name), name
    np.testing.assert_array_equal(a.classes, b.classes)
    assert list(a.heads) == list(b.heads)
    for name, head in a.heads.items():
        for field, values in vars(head).items():
            np.testing.assert_array_equal(values, getattr(b.heads[name], field))


# ----------------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", [".npz", ".json"])
@pytest.mark.parametrize("valid", [None, [(1, 2), (), (8,), (0,), (), (3, 4, 5)]])
def test_what_is_saved_is_read_again(tmp_path, suffix, valid):
    predictions = made(valid=valid)
    path = tmp_path / f"answers{suffix}"
    predictions.save(path)
    assert_same(Predictions.load(path), predictions)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_no_images_are_saved_too(tmp_path, suffix):
    nothing = made().select([])
    nothing.save(tmp_path / f"none{suffix}")
    found = Predictions.load(tmp_path / f"none{suffix}")
    assert len(found) == 0 and found.heads["model"].top_classes.shape[0] == 0


def test_a_spreadsheet_has_a_line_for_every_image_the_unreadable_ones_too(tmp_path):
    predictions = made(valid=[(1, 2), (), (8,), (0,), (), (3, 4, 5)])
    predictions.save(tmp_path / "answers.csv")
    with (tmp_path / "answers.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows] == [*predictions.keys, "torn"]
    assert rows[-1]["unreadable"] == "the file is empty (0 bytes)" and not rows[-1]["class_1"]
    for i, row in enumerate(rows[:-1]):
        known = predictions.classes[i] >= 0
        assert row["class"] == (str(predictions.classes[i]) if known else "")
        head, other = predictions.heads["model"], predictions.heads["class"]
        assert [int(row[f"class_{k}"]) for k in range(1, 6)] == head.top_classes[i].tolist()
        assert row["name_1"] == f"klass {head.top_classes[i, 0]}, ähnlich"
        assert float(row["prob_2"]) == pytest.approx(head.top_probs[i, 1], abs=1e-6)
        assert int(row["class_class"]) == other.top_classes[i, 0]
        assert bool(row["true_log_prob"]) == known
    assert [row["valid"] for row in rows[:3]] == ["1 2", "", "8"]


def test_predictions_of_some_images_come_in_the_order_asked_for():
    predictions = made()
    some = predictions.select(["wörter/4", "wörter/1"])
    assert some.keys == ["wörter/4", "wörter/1"]
    expected = predictions.heads["class"].top_classes[[4, 1]]
    np.testing.assert_array_equal(some.heads["class"].top_classes, expected)
    np.testing.assert_array_equal(some.classes, predictions.classes[[4, 1]])
    with pytest.raises(ValueError, match="2 images have no prediction, e.g. a, b"):
        predictions.select(["a", "wörter/1", "b"])


def test_files_that_hold_something_else_are_refused(tmp_path):
    for name, content in [("a.json", b"[1]"), ("b.json", b"{"), ("c.npz", b"PK"), ("d.npz", b"")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="holds no predictions of tl-eval .* or is damaged"):
            Predictions.load(tmp_path / name)
    np.savez(tmp_path / "code.npz", about=np.array([{}], object))
    with pytest.raises(ValueError, match="holds no predictions .*allow_pickle=False"):
        Predictions.load(tmp_path / "code.npz")
    made().save(tmp_path / "ok.json")
    later = json.loads((tmp_path / "ok.json").read_text()) | {"version": 2}
    (tmp_path / "later.json").write_text(json.dumps(later))
    with pytest.raises(ValueError, match="of version 2, this program reads 1"):
        Predictions.load(tmp_path / "later.json")
    with pytest.raises(ValueError, match=r"'\.txt'; predictions are written as \.npz, \.json"):
        made().save(tmp_path / "x.txt")
    with pytest.raises(ValueError, match="is for spreadsheets"):
        Predictions.load(tmp_path / "x.csv")


def test_answers_must_be_as_many_as_keys_and_keys_distinct():
    predictions = made()
    mistakes: list[dict[str, Any]] = [{"keys": ["a"] * 6}, {"keys": list("abc")}, {"valid": [()]}]
    for wrong in mistakes:
        with pytest.raises(ValueError, match="keys, not all distinct or not of as many answers"):
            made(**wrong)
    with pytest.raises(ValueError, match="the first head must be 'model'"):
        made(heads={"class": predictions.heads["class"]})


# ----------------------------------------------------------------------------------- heads


def tiny_lvvit() -> EvalModel:
    torch.manual_seed(0)
    config = ModelConfig(
        name="lvvit_t", num_classes=7, image_size=32,
        kwargs={"depth": 2, "embed_dim": 24, "num_heads": 2, "stem_width": 8},
    )  # fmt: skip
    return eval_model(create_model(config))


def tiny_timm(name: str, **kwargs: Any) -> EvalModel:
    torch.manual_seed(0)
    return eval_model(
        create_model(ModelConfig(name=name, num_classes=7, image_size=32, kwargs=kwargs))
    )


def eval_model(model: Any) -> EvalModel:
    view = EvalView(
        image_size=(32, 32),
        crop_pct=1.0,
        interpolation="bicubic",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    return EvalModel(
        model=model.eval(), name="m", weights="raw", view=view, num_classes=7, class_ids=None,
        has_dense_head=True,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["lvvit", "vit", "volo"])
def test_heads_are_what_the_layers_say(kind):
    loaded = {
        "lvvit": tiny_lvvit,
        "vit": lambda: tiny_timm("test_vit"),
        "volo": lambda: tiny_timm("volo_d1_224"),
    }[kind]()
    model: Any = loaded.model
    (weight,) = [w for name, w in model.named_parameters() if name.endswith("aux_head.weight")]
    torch.nn.init.normal_(weight)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        found, own = loaded.logits(images), model(images)
        # In training mode only drop path and batch norm would differ, and these are switched off.
        model.training = True
        class_logits, tokens, _ = model(images)
    assert list(found) == HEADS
    torch.testing.assert_close(found["model"], own)
    torch.testing.assert_close(found["dense_mean"], tokens.mean(1))
    torch.testing.assert_close(found["dense_max"], tokens.amax(1))
    torch.testing.assert_close(found["class"], class_logits)
    torch.testing.assert_close(found["published"], class_logits + 0.5 * tokens.amax(1))
    other = "class" if kind == "vit" else "published"
    assert torch.equal(found["model"], found[other])
    assert not torch.allclose(found["class"], found["published"])


# ----------------------------------------------------------------------- published LV-ViT files


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven photos without classes."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("photos")
    for i in range(7):
        (folder / f"{i}.jpg").write_bytes(jpeg(noise(rng)))
    return folder


@pytest.mark.parametrize(
    ("name", "nested"),
    [("lvvit_t", True), ("lvvit_t", False), ("lvvit_s", False), ("lvvit_m", True)]
    + [("lvvit_l", False)],
)
def test_published_files_of_all_sizes_are_evaluated(tmp_path, photos, name, nested):
    with torch.device("meta"):
        shapes = timm.create_model(name, img_size=32).state_dict()
    # One number for a whole tensor: files of 600 MB need not be written.
    weights = {key: torch.full((), 0.01).expand(tensor.shape) for key, tensor in shapes.items()}
    weights["head.bias"] = torch.arange(1000.0) / 100
    content = {"state_dict": {f"module.{k}": v for k, v in weights.items()}} if nested else weights
    torch.save(content, tmp_path / "published.pth.tar")
    config = PredictConfig(without_labels=True, num_workers=1, batch_size=4)
    found = predict(tmp_path / "published.pth.tar", photos, config, ALONE)
    assert found.facts["model"] == name and list(found.heads) == HEADS
    # All else says the same of every class, so the bias of the class head decides.
    assert found.heads["model"].top_classes.tolist() == [[999, 998, 997, 996, 995]] * 7
    assert found.class_names[1].startswith("goldfish")


def test_a_t2t_vit_without_dense_head_has_one_answer(tmp_path, photos):
    weights = timm.create_model("t2t_vit_14", img_size=32, num_classes=5, depth=14).state_dict()
    weights = {name: tensor for name, tensor in weights.items() if "aux_head" not in name}
    torch.save(weights, tmp_path / "t2t.pth")
    loaded = load_for_eval(tmp_path / "t2t.pth")
    assert loaded.name == "t2t_vit_14" and not loaded.has_dense_head
    loaded.model.eval()
    assert list(loaded.logits(torch.zeros(1, 3, 32, 32))) == ["model"]


def test_a_missing_tensor_is_refused_by_name(tmp_path, photos):
    weights = lvvit_t(img_size=32, num_classes=5).state_dict()
    del weights["blocks.3.attn.qkv.weight"]
    torch.save({"state_dict": weights}, tmp_path / "torn.pth")
    result = run("--checkpoint", tmp_path / "torn.pth", "--data", photos, "--predict", "x.csv")
    assert result[0] == 2 and "missing: blocks.3.attn.qkv.weight" in result[2]


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(tl_eval, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


# -------------------------------------------------------------------------------- pretrained


@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "lvvit_t.in1k"])
def test_pretrained_weights_are_downloaded(tmp_path, photos, monkeypatch, name):
    """As timm does it, from an address that begins with file: instead of https:."""
    torch.manual_seed(5)
    model = timm.create_model(name)
    torch.save(model.state_dict(), tmp_path / "published.pth")
    registry: Any = timm.models._registry._model_pretrained_cfgs
    config = replace(registry[name], url=(tmp_path / "published.pth").as_uri(), hf_hub_id=None)
    monkeypatch.setitem(registry, name, config)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    out = tmp_path / "answers.npz"
    code, table, err = run(
        "--model", name, "--pretrained", "--data", photos, "--predict", out, "--workers", 1
    )
    assert code == 0, err
    assert "images    7, none with a known class\n" in table and f"{out}\n" in table
    assert (tmp_path / "cache/hub/checkpoints/published.pth").is_file()
    found = Predictions.load(out)
    assert found.facts["weights"] == "published" and set(found.classes.tolist()) == {-1}
    assert np.isnan(found.heads["model"].true_log_probs).all()
    loaded = load_for_eval(None, model=name)
    same = loaded.model.state_dict()
    assert all(torch.equal(tensor, same[key]) for key, tensor in model.state_dict().items())
    assert loaded.has_dense_head == name.startswith("lvvit")


def test_pretrained_weights_that_cannot_be_had_are_one_line(tmp_path, photos, monkeypatch):
    registry: Any = timm.models._registry._model_pretrained_cfgs
    name = "test_resnet.r160_in1k"
    config = replace(registry[name], url=(tmp_path / "no.pth").as_uri(), hf_hub_id=None)
    monkeypatch.setitem(registry, name, config)
    code, _, err = run("--model", name, "--pretrained", "--data", photos, "--predict", "x.csv")
    assert code == 2 and "weights of test_resnet.r160_in1k could not be loaded" in err
    assert run("--pretrained", "--data", photos, "--predict", "x.csv")[2].endswith(
        "of which model?\n"
    )


# ----------------------------------------------------------------------------------- views


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a tiny timm model for 7 classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("small") / "resnet.pt"
    torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), path)
    return path


def test_probabilities_of_flips_and_crops_are_averaged(small, photos):
    config = PredictConfig(
        model="test_resnet", image_size=32, flip=True, num_crops=5, without_labels=True,
        num_workers=1, batch_size=3, decoder="pil",
    )  # fmt: skip
    found = predict(small, photos, config, ALONE).heads["model"]
    loaded = load_for_eval(small, model="test_resnet", image_size=32)
    data = open_data(photos)
    feed = EvalImages(
        data, loaded.view, decoder="pil", batch_size=7, place=ALONE, num_crops=5, num_workers=1
    )
    (batch,) = feed
    with torch.no_grad():
        for i, crops in enumerate(batch.images):
            views = [view for crop in crops for view in (crop, crop.flip(2))]
            probs = [loaded.model.eval()(view[None]).double().softmax(1)[0] for view in views]
            mean = torch.stack(probs).mean(0)
            order = mean.argsort(descending=True)[:5]
            assert found.top_classes[i].tolist() == order.tolist()
            np.testing.assert_allclose(found.top_probs[i], mean[order], atol=1e-6)


def test_a_single_view_that_is_mirrored_twice_answers_as_seen_once(small, photos):
    plain = PredictConfig(
        model="test_resnet", image_size=32, without_labels=True, num_workers=1, decoder="pil"
    )
    once = predict(small, photos, plain, ALONE).heads["model"]
    flipped = predict(small, photos, replace(plain, flip=True), ALONE).heads["model"]
    assert np.abs(once.top_probs - flipped.top_probs).max() > 1e-4


def test_crops_lie_in_a_grid():
    assert crop_places(1) == [(0.5, 0.5)]
    assert crop_places(4) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert sorted(crop_places(5)) == sorted([*crop_places(4), (0.5, 0.5)])
    assert crop_places(9)[4] == (0.5, 0.5) and len(set(crop_places(9))) == 9
    for num_crops in (-1, 0, 3, 8):
        with pytest.raises(ValueError, match="is not possible; 1 is the centre"):
            crop_places(num_crops)


# ------------------------------------------------------------------------------- processes


def _predict_as(rank: int, world_size: int, port: int, arguments: Any, out: Path) -> None:
    torch.set_num_threads(1)  # others stayed behind in the process that was forked
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    with join_processes("cpu") as place:
        predict(arguments[0], arguments[1], arguments[2], place).save(out / f"{rank}.npz")
    sys.stdout.flush()
    os._exit(0)  # pytest's own ends of a process are its parent's


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize("num_images", [7, 2])
def test_one_two_and_three_processes_answer_alike_to_the_last_bit(tmp_path, small, num_images):
    """Sizes that do not divide; of two images, two of three processes get none."""
    torch.set_num_threads(1)  # as in the others
    samples = make_samples(f"s{i}" for i in range(num_images))
    if num_images == 7:
        samples[3]["s3.jpg"] = b"torn"
    (tmp_path / "data").mkdir()
    write_split(tmp_path / "data", samples, split="val")
    (tmp_path / "map.json").write_text(
        json.dumps({f"class {i}": i % 7 for i in range(NUM_CLASSES)})
    )
    config = PredictConfig(
        model="test_resnet", image_size=32, batch_size=2, num_workers=1, decoder="pil",
        labels=str(tmp_path / "map.json"),
    )  # fmt: skip
    arguments = (small, tmp_path / "data", config)
    alone = predict(*arguments, ALONE)
    assert len(alone) + len(alone.unreadable) == num_images
    fork = multiprocessing.get_context("fork")
    for world_size in (2, 3):
        out = tmp_path / str(world_size)
        out.mkdir()
        port = free_port()
        processes = [
            fork.Process(target=_predict_as, args=(rank, world_size, port, arguments, out))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        for rank in range(world_size):
            found = Predictions.load(out / f"{rank}.npz")
            assert found.facts.pop("num_processes") == world_size
            del found.facts["images_per_sec"]
            ours = {k: v for k, v in alone.facts.items() if k in found.facts}
            assert_same(replace(found, facts=ours), replace(alone, facts=ours))
            assert measure(found).to_json() == measure(alone).to_json()


# ------------------------------------------------------------------------------ real photos


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 photos in class folders and in shards, and EfficientNet-Lite0."""
    folder = tmp_path_factory.mktemp("demo")
    demo_photos.make_train_photos(folder / "photos")
    demo_photos.copy_teacher(folder / "teacher.pth")
    pack(open_source(folder / "photos"), folder / "shards", split="val", num_workers=2)
    return folder


@pytest.mark.parametrize("data", ["photos", "shards"])
@pytest.mark.parametrize("decoder", ["pil", "dali"])
def test_a_real_model_names_18_of_20_photos(demo, data, decoder):
    config = PredictConfig(model=LITE0, decoder=decoder, batch_size=10, num_workers=2)
    found = predict(demo / "teacher.pth", demo / data, config, ALONE)
    right = found.heads["model"].top_classes[:, 0] == found.classes
    assert (right.sum(), len(right)) == (18, 20)


def test_decoders_differ_little_and_it_is_said_by_how_much(demo):
    config = PredictConfig(model=LITE0, batch_size=8, num_workers=2, image_size=128)
    job = prepare(demo / "teacher.pth", demo / "photos", config, ALONE)
    found = compare_decoders(job)
    feeds = [
        torch.cat([batch.images for batch in job.images(decoder)])[:, 0]
        for decoder in ("pil", "dali")
    ]
    with torch.no_grad():
        probs = [
            torch.cat([job.model.model(x) for x in feed.split(8)]).softmax(1) for feed in feeds
        ]
    num_differing = int((probs[0].argmax(1) != probs[1].argmax(1)).sum())
    assert (found.num_images, found.differing_answers) == (20, 5 * num_differing)
    gaps = [float(abs(a[a.argmax()] - b[a.argmax()])) for a, b in zip(*probs)]
    pixels = (feeds[0] - feeds[1]).abs() * 0.5 * 255
    assert found.prob_difference == pytest.approx(np.mean(gaps), rel=1e-3)
    assert found.max_pixel_difference == pytest.approx(float(pixels.max()), rel=1e-5)
    assert found.mean_pixel_difference == pytest.approx(float(pixels.mean()), rel=1e-4)
    assert 0.05 < found.mean_pixel_difference < 0.5 and found.max_pixel_difference < 20
    assert found.pil.facts["decoder"] == "pil" and found.dali.facts["decoder"] == "dali"


def test_photos_are_found_by_their_keys(demo):
    data = open_data(demo / "shards")
    keys = [sample.key for sample in data.source.samples[:2]]
    found = open_photos(data)([*keys, "unknown"])
    assert list(found) == keys and found[keys[0]].mode == "RGB"
