"""tl-explain evaluate: each number against a loop, and files that no interruption changes."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from shard_sets import noise
from test_explain_attention import small_lvvit

from tokenlabel.cli import explain as tl_explain
from tokenlabel.evaluator.data import EvalView, PilView, open_data
from tokenlabel.evaluator.labels import Truth, find_truth
from tokenlabel.evaluator.models import EvalModel
from tokenlabel.evaluator.predictions import MODEL
from tokenlabel.explainer import evaluate as job
from tokenlabel.explainer.evaluate import IMAGES, PICTURE, RESULTS, FaithfulnessConfig, evaluate
from tokenlabel.explainer.localize import (
    localize,
    open_annotations,
    segment,
    segmentation_scores,
)
from tokenlabel.explainer.methods import Options, explain, upsample
from tokenlabel.explainer.perturb import Protocol
from tokenlabel.explainer.scores import Faithfulness, sum_up
from tokenlabel.trainer.distributed import Place, join_processes

ALONE = Place(device=torch.device("cpu"))
NUM_IMAGES = 6
FEW = FaithfulnessConfig(
    methods=("gae", "raw"), protocol=Protocol(num_steps=3), num_compared=2, batch_size=8
)


def tiny_model(seed: int = 0) -> EvalModel:
    return EvalModel(
        model=small_lvvit(seed=seed).float(),
        name="tiny",
        weights="raw",
        view=EvalView(
            image_size=(48, 48),
            crop_pct=0.8,
            interpolation="bicubic",
            mean=(0.5, 0.4, 0.5),
            std=(0.2, 0.2, 0.3),
        ),
        num_classes=5,
        class_ids=[f"class{i}" for i in range(5)],
        has_dense_head=True,
    )


def truth_of(folder: Path, model: EvalModel) -> Truth:
    return find_truth(open_data(folder), model)


def run(
    folder: Path, out: Path, config: FaithfulnessConfig = FEW, seed: int = 0, **annotations: Any
) -> Faithfulness:
    model = tiny_model(seed)
    found = evaluate(model, truth_of(folder, model), out, config, ALONE, **annotations)
    assert found is not None
    return found


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / IMAGES).read_text().splitlines()]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of six photos, each in the class that the tiny model sees in it, but one."""
    folder, rng = tmp_path_factory.mktemp("made") / "photos", np.random.default_rng(0)
    model = tiny_model()
    for i in range(5):
        (folder / f"class{i}").mkdir(parents=True)
    for i in range(NUM_IMAGES):
        photo = Image.fromarray(noise(rng, 60, 72))
        image = PilView(model.view).normalize(torch.from_numpy(PilView(model.view).cut(photo)))
        with torch.no_grad():
            answer = int(model.logits(image)[MODEL].argmax())
        own = (answer + 1) % 5 if i == 2 else answer
        photo.save(folder / f"class{own}" / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def _without_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the curves of `whole` alone: a picture takes three times as long as its numbers."""
    monkeypatch.setattr(job, "draw_curves", lambda _: b"")


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Faithfulness]:
    """What a run that nobody interrupted writes and finds."""
    out = tmp_path_factory.mktemp("whole")
    return out, run(photos, out)


# -------------------------------------------------------------------------------------- numbers


def test_a_line_is_what_a_loop_over_one_image_gives(photos, whole):
    model = tiny_model()
    truth = truth_of(photos, model)
    header, *records = lines_of(whole[0])
    assert [record["key"] for record in records] == [s.key for s in truth.data.source.samples]
    assert header["weights"] != "" and header["num_images"] == NUM_IMAGES
    record, sample, view = records[3], truth.data.source.samples[3], PilView(model.view)
    photo = Image.open(photos / f"{sample.key}.png")
    image = view.normalize(torch.from_numpy(view.cut(photo)))
    with torch.no_grad():
        own = model.logits(image)[MODEL][0]
    assert record["class"] == int(own.argmax())
    assert record["probability"] == pytest.approx(float(own.softmax(0)[record["class"]]), rel=1e-4)
    black = -torch.tensor([0.5, 0.4, 0.5]) / torch.tensor([0.2, 0.2, 0.3])
    for method in ("gae", "raw", "random"):
        heat = explain(method, model.model, image, torch.tensor([record["class"]]))
        pixels = upsample(heat, (48, 48))[0].flatten()
        order = sorted(range(48 * 48), key=lambda i: -float(pixels[i]))  # noqa: B023
        found = record["methods"][method]["positive"]
        for step in (0, 4, 9):
            changed = image.clone().flatten(2)
            changed[0, :, order[: 48 * 48 * step // 10]] = black[:, None]
            with torch.no_grad():
                logits = model.logits(changed.view_as(image))[MODEL][0]
            right = int(int(logits.argmax()) == truth.classes[3])
            assert found["right"][step] == right
            probability = float(logits.softmax(0)[record["class"]])
            assert found["probability"][step] == pytest.approx(probability, abs=1e-4)


def test_numbers_are_averages_of_the_lines(whole):
    out, found = whole
    _, *records = lines_of(out)
    assert list(found.methods) == ["gae", "raw", "random"]  # which nobody asked for
    assert found.clean_accuracy is not None
    assert found.clean_accuracy.value == pytest.approx(100 * 5 / 6)
    assert found.num_images == NUM_IMAGES and found.unreadable == {}
    for method, scores in found.methods.items():
        assert list(scores.measures) == ["positive", "negative", "insertion", "deletion"]
        own = [record["methods"][method] for record in records]
        right = np.array([each["negative"]["right"] for each in own], float).mean(0)
        area = 100 * sum((right[i] + right[i + 1]) / 20 for i in range(9))
        assert scores.measures["negative"].value == pytest.approx(area)
        mean = np.array([each["insertion"]["probability"] for each in own]).mean(0)
        area = 100 * sum((mean[i] + mean[i + 1]) / 6 for i in range(3))
        assert scores.measures["insertion"].value == pytest.approx(area)
        points = scores.curves["insertion"].probability
        assert [point.value for point in points] == pytest.approx(mean)
        for value, low, high in [*scores.measures.values(), *points]:
            assert low <= value <= high
        assert scores.correlation is not None and scores.correlation.num_images == 2
        assert scores.correlation.lowest > 0.999
    plain = json.loads((out / RESULTS).read_text())
    assert plain == json.loads(json.dumps(found.to_json()))
    assert plain["methods"]["gae"]["positive"] == found.methods["gae"].measures["positive"].value
    with Image.open(out / PICTURE) as picture:
        assert picture.width > 800


def test_unknown_classes_leave_agreement_with_the_whole_image(photos, tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    for path in sorted(photos.rglob("*.png")):
        (folder / path.name).write_bytes(path.read_bytes())
    found = run(folder, tmp_path / "out")
    assert found.clean_accuracy is None
    for scores in found.methods.values():
        assert scores.curves["positive"].accuracy[0].value == 1
    with pytest.raises(ValueError, match="says of no image which it has; explain the predicted"):
        run(folder, tmp_path / "label", replace(FEW, explained="label"))


def test_the_right_class_is_explained_if_wanted(photos, tmp_path):
    run(photos, tmp_path, replace(FEW, explained="label"))
    classes = [int(record["key"].split("/")[0][-1]) for record in lines_of(tmp_path)[1:]]
    assert [record["class"] for record in lines_of(tmp_path)[1:]] == classes


def test_float64_finds_what_float32_finds(photos, whole, tmp_path):
    found = run(photos, tmp_path, replace(FEW, double=True))
    for method, scores in found.methods.items():
        for name, number in scores.measures.items():
            assert number.value == pytest.approx(
                whole[1].methods[method].measures[name].value, 0.02
            )


def line(i: int, **curves: list[int]) -> dict[str, Any]:
    methods: Mapping[str, Any] = {
        name: {"positive": {"right": right, "probability": right}} for name, right in curves.items()
    }
    return {"key": f"{i}", "class": 0, "right": True, "probability": 1.0, "methods": methods}


def test_methods_are_told_apart_from_random_image_by_image():
    falls, late = [1] + 9 * [0], 5 * [1] + 5 * [0]
    lines = [line(i, good=falls, same=late, random=late) for i in range(20)]
    # Better on half of the images, worse on the others.
    for i, each in enumerate(lines):
        curve = (falls, [1] * 9 + [0])[i % 2]
        each["methods"]["mixed"] = {"positive": {"right": curve, "probability": curve}}
    header = {
        "methods": ["good", "same", "mixed", "random"],
        "protocol": {"curves": ["positive"]},
        "annotations": {},
        "labels_known": True,
    }
    found = sum_up(header, lines)
    assert found.methods["good"].measures["positive"].value == pytest.approx(5)
    assert found.methods["random"].measures["positive"].value == pytest.approx(45)
    assert found.methods["good"].less_random["positive"].value == pytest.approx(-40)
    like = {name: each.is_like_random("positive") for name, each in found.methods.items()}
    assert like == {"good": False, "same": True, "mixed": True, "random": False}


def test_objects_found_by_heat_have_intervals_and_differences_over_images():
    rng = np.random.default_rng(0)
    random = [[*rng.integers(20, 90, 4).tolist(), rng.uniform(0.4, 0.8)] for _ in range(30)]
    good = [[a + 4, b - 4, c, d, precision + 0.03] for a, b, c, d, precision in random]
    lines = [
        {"key": f"{i}", "class": 0, "right": True, "probability": 1.0}
        | {"methods": {"good": {"segmentation": good[i]}, "random": {"segmentation": random[i]}}}
        for i in range(30)
    ]
    header = {
        "methods": ["good", "random"],
        "protocol": {"curves": []},
        "annotations": {"segmentation": "masks"},
        "labels_known": True,
    }
    found = sum_up(header, lines).methods
    draws = []
    for _ in range(1000):
        again = np.array(good)[rng.integers(30, size=30)].sum(0)
        draws.append(100 * (again[0] + again[3]) / again[:4].sum())
    accuracy = found["good"].measures["pixel_accuracy"]
    assert accuracy[1:] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.3)
    for measure in ("pixel_accuracy", "mean_ap", "miou"):
        # Apart their intervals overlap; image by image one is always the better.
        assert found["good"].measures[measure].low < found["random"].measures[measure].high
        assert found["good"].less_random[measure].low > 0
    assert found["good"].less_random["mean_ap"] == pytest.approx((3, 3, 3))


# -------------------------------------------------------------------------------- where heat lies


def test_heat_is_compared_with_boxes_and_masks(photos, tmp_path):
    keys = [str(path.relative_to(photos)) for path in sorted(photos.rglob("*.png"))]
    rows = "".join(f"{key},18,12,50,40\n" for key in keys[:4])
    (tmp_path / "boxes.csv").write_text(f"image,x0,y0,x1,y1\n{rows}")
    mask = np.zeros((60, 72), np.uint8)
    mask[12:40, 18:50] = 255
    for key in keys[1:3]:
        (tmp_path / "masks" / key).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(tmp_path / "masks" / key)
    boxes, masks = open_annotations(tmp_path / "boxes.csv"), open_annotations(tmp_path / "masks")
    out = tmp_path / "out"
    found = run(photos, out, boxes=boxes, masks=masks, segmentation=masks)
    assert found.num_annotated == {"boxes": 4, "masks": 2, "segmentation": 2}
    assert found.facts["view"]["crop_mode"] == "squash"  # images are seen whole
    model = tiny_model()
    view = replace(model.view, crop_pct=1.0, crop_mode="squash")
    for method in ("gae", "raw"):
        hits, masses, segmented = [], [], []
        for record in lines_of(out)[1:5]:
            key, seen = record["key"], PilView(view)
            photo = Image.open(photos / f"{key}.png")
            image = seen.normalize(torch.from_numpy(seen.cut(photo)))
            heat = explain(method, model.model, image, torch.tensor([record["class"]]))
            heat = upsample(heat, (48, 48))
            place = localize(heat, boxes.inside(key, view, (60, 72))[None])
            hits.append(100 * float(place.hit))
            masses.append(100 * float(place.mass))
            if key in masks:
                segmented.append(segment(heat[0], masks.mask(key, view, (60, 72))))
        measures = found.methods[method].measures
        assert measures["boxes_hit"].value == pytest.approx(np.mean(hits))
        assert measures["boxes_mass"].value == pytest.approx(np.mean(masses), rel=1e-4)
        assert measures["masks_mass"].value == pytest.approx(np.mean(masses[1:3]), rel=1e-4)
        expected = segmentation_scores(np.mean(segmented, axis=0, keepdims=True))
        for name, (value,) in expected.items():
            assert measures[name].value == pytest.approx(value, rel=1e-4)
            assert name in found.methods[method].less_random


def test_without_curves_only_annotated_images_are_looked_at(photos, tmp_path):
    key = str(sorted(photos.rglob("*.png"))[2].relative_to(photos))
    (tmp_path / "boxes.csv").write_text(f"image,x0,y0,x1,y1\n{key},0,0,72,60\n")
    boxes = open_annotations(tmp_path / "boxes.csv")
    config = replace(FEW, protocol=Protocol(curves=()))
    found = run(photos, tmp_path / "out", config, boxes=boxes)
    assert found.num_images == 1 and not (tmp_path / "out" / PICTURE).exists()
    assert {name: each.measures["boxes_mass"].value for name, each in found.methods.items()} == (
        pytest.approx({"gae": 100, "raw": 100, "random": 100})
    )


# ------------------------------------------------------------------------------ again, and many


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(photos, whole, tmp_path, monkeypatch):
    write, looked = job._append, []

    def torn(path: Path, records: Any) -> None:
        write(path, records)
        looked.append(1)
        if len(looked) == 3:
            with path.open("rb+") as file:
                file.truncate(path.stat().st_size - 40)
            raise KeyboardInterrupt

    monkeypatch.setattr(job, "_append", torn)
    with pytest.raises(KeyboardInterrupt):
        run(photos, tmp_path)
    assert not (tmp_path / RESULTS).exists()
    monkeypatch.setattr(job, "_append", lambda *args: (looked.append(1), write(*args)))
    run(photos, tmp_path)
    assert len(looked) == 3 + NUM_IMAGES - 2
    for name in (IMAGES, RESULTS):
        assert (tmp_path / name).read_bytes() == (whole[0] / name).read_bytes()
    monkeypatch.setattr(job, "load_image", None)  # a finished one looks at no image again
    assert run(photos, tmp_path).to_json() == whole[1].to_json()


@pytest.mark.parametrize(
    ("change", "seed", "message"),
    [
        ({"methods": ("gae",)}, 0, 'configuration: methods \\["gae", "raw", "random"\\], now '),
        ({"num_images": 3}, 0, "another configuration: num_images 6, now 3; give another --out"),
        ({"options": Options(start_layer=1)}, 0, "options.start_layer 0, now 1; give"),
        ({"explained": "label"}, 0, 'explained "prediction", now "label"'),
        ({}, 1, "of another configuration: other weights; give another --out, or remove"),
    ],
)
def test_results_of_another_configuration_are_refused(photos, whole, change, seed, message):
    before = (whole[0] / IMAGES).read_bytes()
    with pytest.raises(ValueError, match=message):
        run(photos, whole[0], replace(FEW, **change), seed)
    assert (whole[0] / IMAGES).read_bytes() == before


def test_damaged_results_are_refused(photos, whole, tmp_path):
    lines = (whole[0] / IMAGES).read_bytes().splitlines(keepends=True)
    for spoilt, message in (
        ([b"not json\n"], "line 1, is damaged; remove the file"),
        ([b"{}\n"], "is no file of tl-explain evaluate; give another --out"),
        ([*lines[:2], b"[]\n"], "line 3, is damaged"),
        ([lines[0], *lines[2:]], "line 2, is of the image .*, expected .*damaged: remove it"),
    ):
        (tmp_path / IMAGES).write_bytes(b"".join(spoilt))
        with pytest.raises(ValueError, match=message):
            run(photos, tmp_path)


def test_unreadable_images_are_left_out_and_named(photos, whole, tmp_path):
    folder = tmp_path / "photos"
    for path in photos.rglob("*.png"):
        copied = folder / path.relative_to(photos)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(path.read_bytes())
    bad = sorted(folder.rglob("*.png"))[1]
    bad.write_bytes(b"no image")
    key = bad.relative_to(folder).with_suffix("").as_posix()
    found = run(folder, tmp_path / "out")
    assert found.num_images == NUM_IMAGES - 1 and list(found.unreadable) == [key]
    expected = [record for record in lines_of(whole[0])[1:] if record["key"] != key]
    good = [record for record in lines_of(tmp_path / "out")[1:] if record["key"] != key]
    assert [record["methods"]["raw"]["positive"] for record in good] == (
        [record["methods"]["raw"]["positive"] for record in expected]
    )
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the images can be read; .*: .*"):
        run(folder, tmp_path / "none")


def become(rank: int, port: int, photos: Path, out: Path) -> None:
    """Be one of two processes."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ["MASTER_ADDR"] = "localhost"
    torch.set_num_threads(1)
    job.draw_curves = lambda _: b""
    model = tiny_model()
    with join_processes("cpu") as place:
        found = evaluate(model, truth_of(photos, model), out, FEW, place)
    assert (found is None) == (rank == 1)


def test_two_processes_write_what_one_writes(photos, whole, tmp_path):
    finished = subprocess.run(
        [sys.executable, __file__, str(photos), str(tmp_path)], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    header, *records = lines_of(tmp_path)
    assert [header, *records] == lines_of(whole[0])
    assert (tmp_path / RESULTS).read_bytes() == (whole[0] / RESULTS).read_bytes()


# -------------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "vit.pt"
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", num_classes=5).state_dict(), path)
    return path


def command(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(tl_explain, ["evaluate", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_prints_a_table_and_writes_all(photos, checkpoint, tmp_path):
    arguments = ["--checkpoint", checkpoint, "--model", "test_vit", "--image-size", "48"]
    arguments += ["--images", photos, "--out", tmp_path, "--method", "rollout", "--steps", "2"]
    arguments += ["--target", "class", "--start-layer", "1", "--num-images", "3"]
    code, out, err = command(*arguments)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("test_vit, 48 × 48 px, 3 images, clean accuracy ")
    assert lines[2].startswith("area under curve, %")
    assert lines[2].split()[4:] == "positive ↓ negative ↑ insertion ↑ deletion ↓".split() + (
        ["fp32", "and", "fp64"]
    )
    assert [line.split()[0] for line in lines[3:5]] == ["rollout", "random"]
    assert "1.000000 (1.0000)" in lines[3]
    assert "fp32 and fp64: correlation of the heatmaps, median (lowest) of 3 images" in out
    assert lines[-2:] == [str(tmp_path / RESULTS), str(tmp_path / PICTURE)]
    code, again, err = command(*arguments, "--json")
    assert code == 0, err
    assert json.loads(again) == json.loads((tmp_path / RESULTS).read_text())
    shown = json.loads(again)["methods"]["rollout"]["positive"]
    assert lines[3].split()[1] == f"{shown:.1f}"


def test_mistakes_of_the_command_are_one_line(photos, checkpoint, tmp_path):
    rest = ["--images", photos, "--out", tmp_path / "out"]
    vit = ["--checkpoint", checkpoint, "--model", "test_vit"]
    (tmp_path / "boxes.csv").write_text("image,x0,y0,x1,y1\nelsewhere.jpg,0,0,5,5\n")
    for arguments, message in (
        (rest, "give --checkpoint FILE, or --model NAME"),
        ([*vit, *rest, "--curve", "none", "--curve", "positive"], "--curve none stands beside"),
        ([*vit, *rest, "--curve", "none"], "nothing to measure: neither curves nor annotations"),
        ([*vit, *rest, "--method", "dense"], "dense does not work with test_vit; possible: gae"),
        ([*vit, *rest, "--boxes", tmp_path / "no.csv"], "no.csv does not exist"),
        (
            [*vit, *rest, "--boxes", tmp_path / "boxes.csv"],
            "says nothing of any image that is looked at; keys of images are like",
        ),
    ):
        code, _, err = command(*arguments)
        assert code == 2 and err.count("\n") == 1 and message in err, err
    assert not (tmp_path / "out").exists()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("localhost", 0))
        free_port = free.getsockname()[1]
    child = os.fork()
    become(1 if child == 0 else 0, free_port, Path(sys.argv[1]), Path(sys.argv[2]))
    if child:
        assert os.waitpid(child, 0)[1] == 0
