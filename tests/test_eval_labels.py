"""Right answers: classes matched by name, reassessed labels, class maps, subsets."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from shard_sets import jpeg
from timm.data.imagenet_info import ImageNetInfo
from timm.data.real_labels import RealLabelsImagenet

from tokenlabel.evaluator.data import EvalData, EvalView, open_data
from tokenlabel.evaluator.labels import Truth, find_truth
from tokenlabel.evaluator.metrics import measure
from tokenlabel.evaluator.models import EvalModel
from tokenlabel.evaluator.predict import PredictConfig, predict
from tokenlabel.trainer.distributed import Place

ALONE = Place(device=torch.device("cpu"))
INFO = ImageNetInfo()
WNIDS = INFO.label_names()
VIEW = EvalView(
    image_size=(8, 8),
    crop_pct=1.0,
    interpolation="bicubic",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
PHOTO = jpeg(np.full((8, 8, 3), 90, np.uint8))


class _Named(torch.nn.Module):
    """A model with the facts that timm's have and nothing to compute."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.pretrained_cfg = {"num_classes": num_classes, "architecture": "resnet50"}


def model_of(num_classes: int = 1000, ids: list[str] | None = None) -> EvalModel:
    if ids is not None:
        num_classes = len(ids)
    return EvalModel(
        model=_Named(num_classes),
        name="resnet50",
        weights="published",
        view=VIEW,
        num_classes=num_classes,
        class_ids=ids,
        class_names=ids,
    )


def folder_of(root: Path, classes: dict[str, list[str]]) -> EvalData:
    """Class folders → photos of these names."""
    for folder, photos in classes.items():
        (root / folder).mkdir(parents=True)
        for photo in photos:
            (root / folder / f"{photo}.jpg").write_bytes(PHOTO)
    return open_data(root)


def right(truth: Truth) -> dict[str, int]:
    keys = [sample.key for sample in truth.data.source.samples]
    return dict(zip(keys, truth.classes.tolist(), strict=True))


# -------------------------------------------------------------------------------- own classes


def test_wnid_folders_are_imagenets_classes_whichever_of_them_there_are(tmp_path, caplog):
    folders = [WNIDS[999], WNIDS[3], WNIDS[500]]
    with caplog.at_level(logging.INFO):
        truth = find_truth(folder_of(tmp_path, {wnid: ["a"] for wnid in folders}), model_of())
    assert right(truth) == {f"{WNIDS[i]}/a": i for i in (3, 500, 999)}
    assert truth.class_names[999].startswith("toilet tissue")
    assert "has 3 of the model's 1000 classes" in caplog.text
    assert truth.valid is None and truth.considered is None and truth.is_known


def test_folders_of_imagenet_v2_are_numbers_and_not_sorted_names(tmp_path):
    """0, 1, 10, 100, 101, …: by their place in the alphabet accuracy would be nearly 0."""
    truth = find_truth(
        folder_of(tmp_path, {str(number): ["a"] for number in range(1000)}), model_of()
    )
    assert right(truth) == {f"{number}/a": number for number in range(1000)}


def test_folders_that_are_numbers_keep_the_checkpoints_order(tmp_path):
    ids = sorted(map(str, range(12)))  # as tl-train takes them from folders 0 to 11
    data = folder_of(tmp_path, {str(number): ["a"] for number in (2, 10)})
    assert right(find_truth(data, model_of(ids=ids))) == {"10/a": 2, "2/a": 4}


def test_classes_of_the_checkpoint_are_found_by_name(tmp_path):
    data = folder_of(tmp_path, {"cat": ["a"], "ant": ["b"]})
    assert right(find_truth(data, model_of(ids=["cat", "bee", "ant"]))) == {"ant/b": 2, "cat/a": 0}
    with pytest.raises(ValueError, match="class 0 is 'ant' in .*, but 'cat' in the checkpoint"):
        find_truth(data, model_of(ids=["cat", "ant"]))
    with pytest.raises(
        ValueError, match="has 2 classes, the model 3; write classes.txt .*--labels"
    ):
        find_truth(data, model_of(ids=["cat", "bee", "ape"]))


def test_photos_without_classes_have_no_right_answer(tmp_path):
    (tmp_path / "a.jpg").write_bytes(PHOTO)
    truth = find_truth(open_data(tmp_path), model_of())
    assert right(truth) == {"a": -1} and not truth.is_known


# ------------------------------------------------------------------------------------- ReaL


def val_images(root: Path, numbers: list[int], folder: str = "") -> EvalData:
    (root / folder).mkdir(exist_ok=True)
    for number in numbers:
        (root / folder / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(PHOTO)
    return open_data(root)


def test_reassessed_labels_are_those_that_timm_reads(tmp_path):
    names = [f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(50_000)]
    theirs = RealLabelsImagenet(names).real_labels
    numbers = [1, 2, 3, 777, 25_000, 49_999, 50_000]
    empty = next(i + 1 for i, name in enumerate(names) if not theirs[name])
    data = val_images(tmp_path, sorted({*numbers, empty}))
    truth = find_truth(data, model_of(), labels="real")
    for sample, valid, first in zip(data.source.samples, truth.valid or (), truth.classes):
        expected = theirs[f"{sample.key}.JPEG"]
        assert list(valid) == expected
        assert first == (expected[0] if expected else -1)
    assert () in (truth.valid or ())


def test_the_images_own_class_comes_first_where_it_is_right(tmp_path):
    val_images(tmp_path, [1], WNIDS[5])
    val_images(tmp_path, [2], WNIDS[6])
    (tmp_path / "real.json").write_text(json.dumps([[9, 5], [8, 7]]))
    truth = find_truth(open_data(tmp_path), model_of(), labels=str(tmp_path / "real.json"))
    assert truth.valid == [(9, 5), (8, 7)] and truth.classes.tolist() == [5, 8]


def test_reassessed_labels_follow_the_models_own_order(tmp_path):
    ids = WNIDS[::-1]
    val_images(tmp_path, [1])
    (tmp_path / "real.json").write_text(json.dumps([[0, 999]]))
    truth = find_truth(open_data(tmp_path), model_of(ids=ids), labels=str(tmp_path / "real.json"))
    assert truth.valid == [(999, 0)]


# -------------------------------------------------------------------------------- class maps


def test_a_class_map_gives_folders_one_or_several_classes(tmp_path, caplog):
    data = folder_of(
        tmp_path / "data", {"Air freshener": ["a"], "Chair": ["b", "c"], "Teapot": ["d"]}
    )
    names = [INFO.index_to_description(i) for i in range(1000)]
    (teapot,) = [i for i, name in enumerate(names) if name.startswith("teapot")]
    mapping = {"Chair": [423, "n04099969", "barber chair"], "Teapot": "teapot", "Sofa": 831}
    (tmp_path / "map.json").write_text(json.dumps(mapping))
    (tmp_path / "map.csv").write_text(
        "Chair,423,n04099969\nChair,barber chair\n\nTeapot,teapot\nSofa,831\n"
    )
    for name in ("map.json", "map.csv"):
        with caplog.at_level(logging.INFO):
            truth = find_truth(data, model_of(), labels=str(tmp_path / name))
        assert right(truth) == {"Chair/b": 423, "Chair/c": 423, "Teapot/d": teapot}
        assert truth.valid == [(423, 765), (423, 765), (teapot,)]
        assert truth.num_left_out == 1
        assert "1 images are left out, their folders are not in it" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", "1", "is no label file; give real, a .json of reassessed labels, or a class map"),
        ("x.json", "3", "holds a int; expected a list over ImageNet's .* or an object FOLDER: CLA"),
        ("x.json", "{", "x.json is damaged: Expecting property name"),
        ("x.json", "[[1], 2]", "entry 1 is 2, expected a list of class indices from 0 to 999"),
        ("x.json", "[[1000]]", r"entry 0 is \[1000\], expected a list of class indices"),
        ("x.json", "[[true]]", r"entry 0 is \[True\], expected"),
        ("x.json", "[[1]]", "is for the 1 images ILSVRC2012_val_00000001 .* has an image cat/a"),
        ("x.json", '{"cat": 1.5}', "folder 'cat' has the value 1.5, expected one class or a list"),
        ("x.json", '{"cat": []}', r"folder 'cat' has the value \[\], expected"),
        ("x.json", '{"cat": 1000}', "folder 'cat': resnet50 has no class '1000'; its classes are"),
        ("x.json", '{"cat": "catt"}', "folder 'cat': resnet50 has no class 'catt'"),
        ("x.json", '{"dog": 3}', "names none of the 1 folders of .*, e.g. 'cat', but 'dog'"),
        ("x.csv", "cat\n", "folder 'cat' has the value"),
    ],
)
def test_label_files_that_are_something_else_are_refused(tmp_path, name, content, message):
    data = folder_of(tmp_path / "data", {"cat": ["a"]})
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        find_truth(data, model_of(), labels=str(tmp_path / name))


def test_reassessed_labels_need_imagenets_classes(tmp_path):
    data = val_images(tmp_path, [1])
    with pytest.raises(ValueError, match="ImageNet's 1,000 classes; resnet50 has 40, and 1,000 of"):
        find_truth(data, model_of(40), labels="real")
    with pytest.raises(FileNotFoundError, match="no.json"):
        find_truth(data, model_of(), labels=str(tmp_path / "no.json"))


# ------------------------------------------------------------------------------------ subset


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
def test_the_subsets_of_imagenet_are_those_that_timm_lists(tmp_path, name):
    root = Path(timm.__file__).parent / "data" / "_info"
    expected = np.loadtxt(root / f"{name.replace('-', '_')}_indices.txt", dtype=int)
    data = folder_of(tmp_path, {WNIDS[i]: ["a"] for i in expected[[0, 7, 199]]})
    truth = find_truth(data, model_of(), subset=name)
    assert truth.considered is not None and truth.considered.tolist() == sorted(expected.tolist())
    assert right(truth) == {f"{WNIDS[i]}/a": i for i in expected[[0, 7, 199]]}


def test_a_subset_may_be_a_file_or_the_classes_that_there_are(tmp_path):
    data = folder_of(tmp_path / "data", {WNIDS[5]: ["a"], WNIDS[9]: ["b"]})
    (tmp_path / "some.txt").write_text(f"{WNIDS[9]}\n5  # and one by its number\n100..102\n")
    truth = find_truth(data, model_of(), subset=str(tmp_path / "some.txt"))
    assert truth.considered is not None and truth.considered.tolist() == [5, 9, 100, 101, 102]
    truth = find_truth(data, model_of(), subset="folders")
    assert truth.considered is not None and truth.considered.tolist() == [5, 9]


def test_subsets_that_cannot_be_are_refused(tmp_path):
    data = folder_of(tmp_path / "data", {WNIDS[5]: ["a", "b"], WNIDS[9]: ["c"]})
    (tmp_path / "some.txt").write_text("9\n10\n")
    with pytest.raises(ValueError, match="does not hold the class of 2 images .*electric ray"):
        find_truth(data, model_of(), subset=str(tmp_path / "some.txt"))
    with pytest.raises(FileNotFoundError, match="neither a file nor one of imagenet-a, imagenet-r"):
        find_truth(data, model_of(), subset="imagenet-b")
    with pytest.raises(ValueError, match="those of resnet50 are not known by name"):
        find_truth(open_data(flat(tmp_path)), model_of(40), subset="imagenet-a")
    with pytest.raises(ValueError, match="says of no image which class it has"):
        find_truth(open_data(flat(tmp_path)), model_of(), subset="folders")


def flat(root: Path) -> Path:
    (root / "flat").mkdir(exist_ok=True)
    (root / "flat" / "a.jpg").write_bytes(PHOTO)
    return root / "flat"


# ------------------------------------------------------------------------------- predictions


def test_answers_are_chosen_in_the_subset_and_any_right_one_counts(tmp_path):
    """Probabilities are those of a softmax over four logits, written out."""
    torch.manual_seed(1)
    model = timm.create_model("test_resnet", num_classes=12).eval()
    torch.save(model.state_dict(), tmp_path / "resnet.pt")
    data = tmp_path / "data"
    folder_of(data, {"a": ["0"], "b": ["1"], "c": ["2"]})
    rng = np.random.default_rng(0)
    for i, path in enumerate(sorted(data.rglob("*.jpg"))):
        path.write_bytes(jpeg(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8), quality=90 + i))
    (tmp_path / "map.json").write_text(json.dumps({"a": [3, 7], "b": [11, 2], "c": 5}))
    (tmp_path / "some.txt").write_text("3\n5\n7\n11\n")
    options: dict[str, Any] = dict(
        model="test_resnet", image_size=32, num_workers=1, decoder="pil",
        labels=str(tmp_path / "map.json"), subset=str(tmp_path / "some.txt"),
    )  # fmt: skip
    found = predict(tmp_path / "resnet.pt", data, PredictConfig(**options), ALONE)
    plain = {**options, "labels": None, "subset": None, "without_labels": True}
    (tmp_path / "list.txt").write_text("".join(f"{p}\n" for p in sorted(data.rglob("*.jpg"))))
    free = predict(tmp_path / "resnet.pt", tmp_path / "list.txt", PredictConfig(**plain), ALONE)
    assert found.valid == [(3, 7), (11, 2), (5,)]
    scores, all_scores = found.heads["model"], free.heads["model"]
    assert scores.top_classes.shape == (3, 4) and all_scores.top_classes.shape == (3, 5)
    right = [{3, 7}, {11}, {5}]  # 2 is no answer that can be given
    for i in range(3):
        probs = dict(zip(scores.top_classes[i].tolist(), scores.top_probs[i].tolist()))
        assert set(probs) == {3, 5, 7, 11} and sum(probs.values()) == pytest.approx(1)
        expected = np.log(sum(probs[c] for c in right[i]))
        assert scores.true_log_probs[i] == pytest.approx(expected, abs=1e-5)
        common = [c for c in all_scores.top_classes[i].tolist() if c in probs]
        assert common == [c for c in scores.top_classes[i].tolist() if c in common]
    is_right = [int(top) in r for top, r in zip(scores.top_classes[:, 0], right)]
    assert measure(found).heads["model"].top1.value == pytest.approx(100 * np.mean(is_right))
