"""benchmarks/faithfulness.py: annotations, measures, ranking and pictures, without the training."""

import importlib
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tokenlabel.evaluator.data import EvalView
from tokenlabel.evaluator.models import EvalModel
from tokenlabel.evaluator.predictions import MODEL
from tokenlabel.explainer.localize import open_annotations
from tokenlabel.explainer.perturb import Protocol
from tokenlabel.trainer.models import create_model
from tokenlabel.trainer.recipe import load_recipe

VIEW = EvalView(
    image_size=(96, 96),
    crop_pct=1.0,
    interpolation="bicubic",
    mean=(0.5, 0.5, 0.5),
    std=(0.2, 0.2, 0.2),
)
NUM_SCENES = 2


@pytest.fixture(scope="module", autouse=True)
def _on_path():
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    yield
    sys.path.pop(0)


@pytest.fixture(scope="module")
def bench():
    return importlib.import_module("faithfulness")


@pytest.fixture(scope="module")
def digits(bench):
    return bench.load_digits()[1]


@pytest.fixture(scope="module")
def scenes(bench, digits):
    return list(bench.compose_scenes(digits, NUM_SCENES, seed=2, config=bench.SCENES))


@pytest.fixture(scope="module")
def student(bench) -> EvalModel:
    """The benchmark's student, untrained."""
    torch.manual_seed(0)
    model = create_model(load_recipe(bench.RECIPE, bench.CHANGES).model).eval()
    assert isinstance(model, nn.Module)
    return EvalModel(
        model=model,
        name="student",
        weights="raw",
        view=VIEW,
        num_classes=10,
        class_ids=[f"digit-{i}" for i in range(10)],
        has_dense_head=True,
    )


@pytest.fixture(scope="module")
def folder(bench, digits, scenes, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("faithful")
    bench.write_image_folder(digits, out / "held-out", NUM_SCENES, seed=2, config=bench.SCENES)
    bench.write_annotations(scenes, out)
    return out


@pytest.fixture(scope="module")
def run(bench, student, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "train_student", lambda folder, seed, *, quick: folder)
        patch.setattr(bench, "load_for_eval", lambda path: student)
        few = partial(bench.FaithfulnessConfig, protocol=Protocol(num_steps=2), num_compared=1)
        patch.setattr(bench, "FaithfulnessConfig", few)
        return bench.measure(folder, 0, quick=True)


def test_annotations_lie_where_the_largest_digits_are(bench, scenes, folder):
    boxes, masks = (open_annotations(folder / name) for name in ("boxes.csv", "masks"))
    assert len(boxes) == len(masks) == NUM_SCENES
    for i, scene in enumerate(scenes):
        key, size = bench.key_of(i, scene), scene.class_map.shape
        assert (folder / f"held-out/{key}.jpg").exists()
        mask = masks.inside(key, VIEW, size).numpy()
        assert (mask == (scene.class_map == scene.label)).all()
        rows, cols = np.nonzero(boxes.inside(key, VIEW, size).numpy())
        box = (cols.min(), rows.min(), cols.max() + 1, rows.max() + 1)
        assert box == scene.digits[0].box


def test_every_arm_is_measured_by_everything_on_the_same_scenes(bench, run):
    assert list(run["arms"]) == list(bench.ARMS)
    for arm, found in run["arms"].items():
        assert set(found["measures"]) == set(bench.MEASURES), arm
        for value, low, high in found["measures"].values():
            assert low <= value <= high
        whole = {found["curves"][name]["accuracy"][0] for name in ("positive", "negative")}
        assert {round(100 * value, 6) for value in whole} == {round(run["clean"][0], 6)}
        assert found["curves"]["insertion"]["fractions"][-1] == 1


def test_what_was_measured_is_not_measured_again(bench, run, folder, monkeypatch):
    def never(*args, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr(bench, "train_student", never)
    assert bench.measure(folder, 0, quick=True) == run


def test_arms_with_equal_options_are_measured_together(bench):
    first, second = bench.by_options().values()
    assert second == {"transformer_attribution, start layer 1": "transformer_attribution"}
    assert {**first, **second}.keys() == bench.ARMS.keys()


def a_run(bench, **values: dict[str, float]) -> dict:
    """Every arm has 50 at everything, but what `values` say of measures."""
    arms = {}
    for arm in bench.ARMS:
        found = {
            name: [v := values.get(name, {}).get(arm, 50.0), v - 2, v + 2]
            for name in bench.MEASURES
        }
        curve = {"fractions": [0.0, 0.5], "accuracy": [0.8, 0.4], "probability": [0.7, 0.3]}
        arms[arm] = {
            "measures": found,
            "like_random": ["positive"] if arm == "raw" else [],
            "correlation": 1.0,
            "curves": {name: curve for name in ("positive", "negative", "insertion", "deletion")},
        }
    return {"clean": [80.0, 75.0, 85.0], "arms": arms}


def test_rows_are_means_over_seeds_and_places_know_what_is_better(bench):
    better = {"positive": {"gae": 10.0}, "negative": {"gae": 90.0}, "miou": {"raw": 70.0}}
    runs = [a_run(bench, **better), a_run(bench, **(better | {"positive": {"gae": 20.0}}))]
    rows = {row["method"]: row for row in bench.summarise(runs)}
    assert rows["gae"]["positive"] == 15
    assert (rows["gae"]["positive low"], rows["gae"]["positive high"]) == (13, 17)
    assert rows["gae"]["positive seeds"] == [10, 20]
    assert rows["raw"]["positive like random"] == 2 and rows["gae"]["positive like random"] == 0
    # Of 7 arms, gae is the first in two of four measures and shares the middle place in two.
    assert rows["gae"]["place, pixels taken away"] == (1 + 1 + 4 + 4) / 4
    assert rows["random"]["place, pixels taken away"] == (4.5 + 4.5 + 4 + 4) / 4
    assert bench.ranked(list(rows.values()), "pixels taken away")[0] is rows["gae"]
    assert bench.ranked(list(rows.values()), "on the object")[0] is rows["raw"]


def test_the_page_has_every_number_of_the_result(bench):
    table = importlib.import_module("table")
    runs = [a_run(bench, positive={"gae": 12.3})]
    machine = {"date": "2026-01-02", "processor": "Slide rule", "cores": 3}
    machine |= {"python": "3.11.0", "torch": "2.6.0"}
    result = {"machine": machine, "rows": bench.summarise(runs), "runs": runs}
    text = table.faithful({"faithfulness": result | {"tables": bench.tables()}})
    lines = text.splitlines()
    assert "positive ↓ | negative ↑ | insertion ↑ | deletion ↓ |" in lines[0]
    assert lines[2].startswith("| gae | 3.2 | 12.3 ± 2.0 | 50.0 ± 2.0 |")
    (raw, _) = (line for line in lines if line.startswith("| raw |"))
    assert "| 50.0 ± 2.0 ~ | 50.0 ± 2.0 |" in raw
    assert lines[-1].startswith("Right on the scenes as they are: 80.0 %. Measured on: 2026-01-02,")
    assert table.faithful({}) == "Nothing was measured yet."


@dataclass(frozen=True, eq=False, kw_only=True)
class Answering(EvalModel):
    """A student that gives set answers, one image after another."""

    answers: list[tuple[int, int]]
    """Best and second."""
    asked: list[int] = field(default_factory=list)

    def logits(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        best, second = self.answers[len(self.asked)]
        self.asked.append(1)
        logits = torch.zeros(1, self.num_classes)
        logits[0, best], logits[0, second] = 2, 1
        return {MODEL: logits}


def test_examples_are_scenes_that_show_both_best_answers(bench, student, scenes, tmp_path):
    both = [(scene.label, scene.digits[1].digit) for scene in scenes]
    shown = {placed.digit for placed in scenes[0].digits}
    absent = next(i for i in range(10) if i not in shown)
    given = {name: value for name, value in vars(student).items() if name != "classes"}
    for first in (both[0][::-1], (both[0][0], absent)):
        model = Answering(**given, answers=[first, both[1]])
        (found,) = bench.find_examples(model, scenes)
        assert found.scene is scenes[1] and found.key == bench.key_of(1, scenes[1])
    assert {heatmap.shape for heatmap in found.heatmaps.values()} == {(6, 6)}
    bench.draw([a_run(bench)], [found], tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as figure:
        assert min(figure.size) > 800


@pytest.mark.slow
def test_a_quick_run_prints_both_rankings(bench, tmp_path, capsys):
    bench.main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for table in bench.TABLES:
        assert f"| method | place, {table} |" in printed
    assert printed.count("| random |") == 2 and "written to" not in printed
