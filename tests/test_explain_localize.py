"""Heat against the places of objects: pointing game, mass, segmentation, annotations."""

import csv
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, confusion_matrix

from tokenlabel.evaluator.data import EvalView, PilView
from tokenlabel.explainer.localize import (
    VOID,
    average_precision,
    localize,
    open_annotations,
    segment,
    segmentation_scores,
    write_images,
)

IMAGENET_XML = """<annotation>
  <folder>val</folder><filename>{name}</filename>
  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>
  {boxes}
</annotation>"""
IMAGENET_BOX = """<object><name>n01751748</name><bndbox>
  <xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""


def a_view(
    side_px: int = 32, *, crop_pct: float = 0.875, crop_mode: str = "center", width_px: int = 0
) -> EvalView:
    return EvalView(
        image_size=(side_px, width_px or side_px),
        crop_pct=crop_pct,
        interpolation="nearest",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        crop_mode=crop_mode,
    )


def heats(num: int, *, seed: int = 0, side: int = 12) -> torch.Tensor:
    return torch.randn(num, side, side, generator=torch.Generator().manual_seed(seed))


def masks(num: int, *, seed: int = 0, side: int = 12, void: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1 if void else 0, 2, (num, side, side), generator=generator)


def write_table(path: Path, *rows: tuple) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("image", "x0", "y0", "x1", "y1"), *rows])
    return path


def write_png(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)


# -------------------------------------------------------------------------------- heat inside


def test_pointing_game_and_mass_are_those_of_a_loop_over_pixels():
    heat, inside = heats(20), heats(20, seed=1) > 0.5
    found = localize(heat, inside)
    for i in range(20):
        best, within, total, place = -math.inf, 0.0, 0.0, False
        for y in range(12):
            for x in range(12):
                value = heat[i, y, x].item()
                if value > best:
                    best, place = value, bool(inside[i, y, x])
                total += max(value, 0)
                within += max(value, 0) * bool(inside[i, y, x])
        assert bool(found.hit[i]) == place
        assert found.mass[i].item() == pytest.approx(within / total, rel=1e-6)
    assert 0 < found.hit.sum() < 20


def test_of_several_hottest_pixels_all_must_lie_inside():
    heat = torch.zeros(3, 2, 2)
    heat[:, 0] = 5
    inside = torch.tensor([[[1, 1], [0, 0]], [[1, 0], [0, 0]], [[1, 1], [1, 0]]]).bool()
    assert localize(heat, inside).hit.tolist() == [True, False, True]


def test_heat_that_is_the_same_everywhere_points_nowhere():
    inside = torch.zeros(1, 4, 4, dtype=torch.bool)
    inside[0, 0, 0] = True
    assert not localize(torch.ones(1, 4, 4), inside).hit
    assert localize(torch.ones(1, 4, 4), inside).mass == 1 / 16


def test_without_positive_heat_no_share_of_it_lies_inside():
    found = localize(-torch.ones(1, 3, 3), torch.eye(3).bool()[None])
    assert found.mass.tolist() == [0]


def test_an_object_out_of_sight_is_not_hit():
    nothing = torch.zeros(2, 12, 12, dtype=torch.bool)
    found = localize(heats(2), nothing)
    assert found.hit.tolist() == [False, False] and found.mass.tolist() == [0, 0]


def test_the_scale_of_heat_changes_neither_number():
    heat, inside = heats(5), heats(5, seed=1) > 0
    for ours, theirs in zip(localize(heat, inside), localize(1000 * heat, inside)):
        torch.testing.assert_close(ours, theirs)


# ------------------------------------------------------------------------------- segmentation


@pytest.mark.parametrize("with_ties", [False, True])
def test_average_precision_is_that_of_scikit_learn(with_ties):
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.random(200).astype(np.float32)
        if with_ties:
            scores = np.round(scores, 1)
        right = rng.random(200) < rng.uniform(0.05, 0.9)
        assert average_precision(scores, right) == pytest.approx(
            average_precision_score(right, scores), abs=1e-12
        )


def test_an_image_is_segmented_by_the_published_protocol():
    for heat, mask in zip(heats(10), masks(10, seed=3)):
        stretched = (heat - heat.min()) / (heat.max() - heat.min())
        counted = mask != VOID
        answers = (stretched > stretched.mean())[counted]
        both = torch.stack([1 - stretched, stretched])
        one_hot = torch.stack([mask == 0, mask == 1])
        found = segment(heat, mask)
        assert list(found[:4]) == confusion_matrix(mask[counted], answers).ravel().tolist()
        assert found.average_precision == pytest.approx(
            average_precision_score(one_hot[:, counted].ravel(), both[:, counted].ravel())
        )


def test_accuracy_and_iou_are_those_of_the_confusion_matrix_of_all_images():
    images, truth, answers = [], [], []
    for heat, mask in zip(heats(8), masks(8, seed=5)):
        images.append(segment(heat, mask))
        stretched = (heat - heat.min()) / (heat.max() - heat.min())
        counted = mask != VOID
        truth.append(mask[counted])
        answers.append((stretched > stretched.mean())[counted])
    matrix = confusion_matrix(torch.cat(truth), torch.cat(answers).long())
    right = matrix.diagonal()
    ious = right / (matrix.sum(0) + matrix.sum(1) - right)
    found = segmentation_scores(np.array([images, images[:1] * 8], np.float64).mean(1))
    assert found["pixel_accuracy"][0] == pytest.approx(100 * right.sum() / matrix.sum())
    assert found["miou"][0] == pytest.approx(100 * ious.mean())
    precisions = [image.average_precision for image in images]
    expected = [100 * np.mean(precisions), 100 * precisions[0]]
    assert found["mean_ap"].tolist() == pytest.approx(expected)


def test_heat_that_is_the_same_everywhere_answers_background_without_a_rank():
    mask = masks(1, void=False)[0]
    found = segment(torch.full((12, 12), 0.3), mask)
    assert found[:4] == ((mask == 0).sum(), 0, (mask == 1).sum(), 0)
    assert found.average_precision == 0.5


def test_void_pixels_count_nowhere_but_in_the_mean():
    heat = torch.tensor([[0.0, 0.4, 1.0]])
    with_void = segment(heat, torch.tensor([[0, 1, VOID]]))
    assert with_void[:4] == (1, 0, 1, 0)  # the mean is 0.47 because of the void pixel
    assert segment(heat[:, :2], torch.tensor([[0, 1]]))[:4] == (1, 0, 0, 1)


def test_the_heat_of_a_mask_itself_is_perfect():
    for mask in masks(3, void=False):
        found = segmentation_scores(np.array([segment(mask.float(), mask)], np.float64))
        assert found == {"pixel_accuracy": 100, "mean_ap": 100, "miou": 100}


def test_a_mask_of_other_values_or_of_none_is_refused():
    with pytest.raises(ValueError, match="the mask has pixels of value 7; allowed: 1 on the obj"):
        segment(torch.rand(2, 2), torch.tensor([[0, 7], [1, 1]]))
    with pytest.raises(ValueError, match="the mask says of no pixel whether the object is there"):
        segment(torch.rand(2, 2), torch.full((2, 2), VOID))


# -------------------------------------------------------------------------------- annotations

VIEWS = {
    "centre crop": a_view(),
    "whole": a_view(crop_pct=1.0),
    "squashed": a_view(crop_mode="squash", crop_pct=1.0),
    "squashed crop": a_view(crop_mode="squash", crop_pct=0.8),
    "oblong": a_view(width_px=48),
}
IMAGE_HW = (45, 70)


def rasterised(boxes: list, view: EvalView, image_hw: tuple[int, int]) -> np.ndarray:
    """Draw boxes at 16 times the image's size, and let the view's own code cut the picture."""
    fine = 16
    picture = np.zeros((image_hw[0] * fine, image_hw[1] * fine), np.uint8)
    for box in boxes:
        x0, y0, x1, y1 = (round(edge * fine) for edge in box)
        picture[y0:y1, x0:x1] = 255
    return PilView(view).cut(Image.fromarray(picture).convert("RGB"))[0, 0] == 255


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_boxes_in_a_view_are_those_drawn_into_the_image_before_it_is_cut(tmp_path, view):
    rng = np.random.default_rng(0)
    for i in range(6):
        x, y = (np.sort(rng.uniform(0, length, (2, 2)).round(2)) for length in IMAGE_HW[::-1])
        boxes = [(x[n, 0], y[n, 0], x[n, 1] + 0.01, y[n, 1] + 0.01) for n in range(1 + i % 2)]
        boxes = [tuple(np.minimum(box, IMAGE_HW[::-1] * 2)) for box in boxes]
        found = open_annotations(write_table(tmp_path / "b.csv", *[("a.jpg", *b) for b in boxes]))
        inside = found.inside("a", view, IMAGE_HW).numpy()
        expected = rasterised(boxes, view, IMAGE_HW)
        assert inside.shape == view.image_size
        wrong = inside != expected
        # Pixels whose centre lies within a 16th of a pixel of an edge may fall to either side.
        edges = inside != np.roll(inside, 1, 0), inside != np.roll(inside, 1, 1)
        edges = edges[0] | edges[1] | np.roll(edges[0], -1, 0) | np.roll(edges[1], -1, 1)
        assert not (wrong & ~edges).any() and wrong.mean() < 0.01


def test_a_whole_pixel_box_in_the_whole_view_is_exact(tmp_path):
    found = open_annotations(write_table(tmp_path / "b.csv", ("a", 2, 3, 5, 4), ("a", 0, 0, 1, 9)))
    expected = np.zeros((10, 10), bool)
    expected[3, 2:5] = expected[:9, 0] = True
    inside = found.inside("a", a_view(10, crop_pct=1.0), (10, 10))
    assert (inside.numpy() == expected).all()


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_masks_in_a_view_are_those_that_pillow_resizes_to_the_nearest_pixel(tmp_path, view):
    values = np.random.default_rng(1).integers(0, 2, (45, 71))
    write_png(tmp_path / "cats/a.png", values)
    found = open_annotations(tmp_path).inside("cats/a", view, (45, 71)).numpy()
    picture = Image.fromarray(values.astype(np.uint8) * 255).convert("RGB")
    assert (found == (PilView(view).cut(picture)[0, 0] == 255)).all()
    if view.crop_mode == "squash" and view.crop_pct == 1:
        nearest = picture.resize((32, 32), Image.Resampling.NEAREST)
        assert (found == (np.asarray(nearest)[..., 0] == 255)).all()


def test_in_masks_255_is_void_where_it_is_not_the_only_value(tmp_path):
    write_png(tmp_path / "voc.png", np.array([[0, 15], [255, 15]]))
    write_png(tmp_path / "binary.png", np.array([[0, 255], [255, 0]]))
    found, view = open_annotations(tmp_path), a_view(2, crop_pct=1.0)
    assert found.mask("voc", view, (2, 2)).tolist() == [[0, 1], [VOID, 1]]
    assert found.inside("voc", view, (2, 2)).tolist() == [[False, True], [False, True]]
    assert found.mask("binary", view, (2, 2)).tolist() == [[0, 1], [1, 0]]


def test_corners_in_imagenets_xml_are_pixels_of_the_box(tmp_path):
    boxes = IMAGENET_BOX.format(1, 2, 3, 2) + IMAGENET_BOX.format(6, 6, 8, 7)
    text = IMAGENET_XML.format(name="val_1", width=8, height=8, boxes=boxes)
    (tmp_path / "val").mkdir()
    (tmp_path / "val/val_1.xml").write_text(text)
    expected = np.zeros((8, 8), bool)
    expected[2, 1:4] = expected[6:, 6:] = True
    found = open_annotations(tmp_path)
    inside = found.inside("n01751748/val_1", a_view(8, crop_pct=1.0), (8, 8))
    assert (inside.numpy() == expected).all()


def test_what_a_view_shows_beyond_the_image_is_void(tmp_path):
    found = open_annotations(write_table(tmp_path / "b.csv", ("a", 0, 0, 4, 4)))
    mask = found.mask("a", a_view(6, crop_pct=1.5, crop_mode="squash"), (4, 4)).numpy()
    assert (mask[1:-1, 1:-1] == 1).all()
    rim = mask.copy()
    rim[1:-1, 1:-1] = VOID
    assert (rim == VOID).all()


def test_images_are_found_by_key_path_or_last_part(tmp_path):
    rows = [("cats/a b.JPG", 0, 0, 1, 1), ("dogs/c.png", 0, 0, 1, 1), ("d", 0, 0, 1, 1)]
    found = open_annotations(write_table(tmp_path / "b.csv", *rows))
    for name in ("cats/a b.jpg", "cats/a%20b", "a b", "dogs/c", "elsewhere/c.jpeg", "d", "x/d"):
        assert name in found, name
    assert "e" not in found and "cats/a" not in found and len(found) == 3


def test_a_last_part_that_two_images_share_is_not_guessed(tmp_path):
    rows = [("cats/a", 0, 0, 1, 1), ("dogs/a", 0, 0, 2, 2)]
    found = open_annotations(write_table(tmp_path / "b.csv", *rows))
    assert found.inside("dogs/a", a_view(2, crop_pct=1.0), (2, 2)).all()
    with pytest.raises(ValueError, match="has annotations of cats/a and dogs/a, so it is not"):
        found.inside("a", a_view(), (2, 2))


# --------------------------------------------------------------------------------- mistakes


def test_an_image_without_annotation_is_named(tmp_path):
    found = open_annotations(write_table(tmp_path / "b.csv", ("cat", 0, 0, 1, 1)))
    with pytest.raises(
        ValueError, match=r"b\.csv has no annotation of the image dog, only of cat$"
    ):
        found.inside("dog", a_view(), (4, 4))


def test_a_box_beyond_its_image_is_named_with_its_line(tmp_path):
    found = open_annotations(write_table(tmp_path / "b.csv", ("a", 0, 0, 1, 1), ("b", 2, 0, 9, 3)))
    assert found.inside("b", a_view(), (3, 9)).any()
    with pytest.raises(
        ValueError, match=r"b\.csv, line 3: the box 2,0,9,3 reaches beyond its image of 8 × 3 px"
    ):
        found.inside("b", a_view(), (3, 8))


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((1, 2, "x", 4), r"line 2: the box '1,2,x,4' is not four numbers"),
        ((1, 2, 3), r"line 2: the box '1,2,3,' is not four numbers"),
        ((4, 2, 3, 9), r"line 2: the box 4,2,3,9 is empty; x0 must be less than x1"),
        ((1, 2, 3, "nan"), r"line 2: the box 1,2,3,nan is empty"),
    ],
)
def test_a_line_that_is_no_box_is_named(tmp_path, box, message):
    with pytest.raises(ValueError, match=message):
        open_annotations(write_table(tmp_path / "b.csv", ("a", *box)))


def test_a_table_without_the_right_columns_is_named(tmp_path):
    path = tmp_path / "b.csv"
    path.write_text("image,xmin,ymin,x1,y1\na,0,0,1,1\n")
    with pytest.raises(ValueError, match=r"has no column x0, y0; its first line must name the"):
        open_annotations(path)
    path.write_text("image,x0,y0,x1,y1\n")
    with pytest.raises(ValueError, match=r"b\.csv has no boxes"):
        open_annotations(path)


def test_a_mask_of_another_size_is_named(tmp_path):
    write_png(tmp_path / "a.png", np.ones((4, 6)))
    with pytest.raises(
        ValueError, match=r"a\.png is of an image of 6 × 4 px, but a has 4 × 6 px; give the ann"
    ):
        open_annotations(tmp_path).inside("a", a_view(), (6, 4))


def test_a_damaged_or_coloured_mask_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    found = open_annotations(tmp_path)
    with pytest.raises(ValueError, match=r"a\.png: the mask is no PNG file"):
        found.inside("a", a_view(), (4, 4))
    with pytest.raises(ValueError, match=r"b\.png: the mask is in colours"):
        found.inside("b", a_view(), (4, 4))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation", r"a\.xml is no XML file"),
        (IMAGENET_XML.format(name="a", width=8, height=8, boxes=""), r"a\.xml has no boxes"),
        (
            IMAGENET_XML.format(name="a", width="", height=8, boxes=""),
            r"a\.xml does not say how large its image is",
        ),
        (
            IMAGENET_XML.format(name="a", width=8, height=8, boxes=IMAGENET_BOX.format(1, 5, 3, 4)),
            r"a\.xml: the box 1,5,3,4 is empty",
        ),
        (
            IMAGENET_XML.format(name="a", width=8, height=8, boxes=IMAGENET_BOX.format(1, 1, 3, 9)),
            r"a\.xml: the box 1,1,4,9 reaches beyond its image of 8 × 8 px",
        ),
        (
            IMAGENET_XML.format(name="a", width=9, height=8, boxes=IMAGENET_BOX.format(1, 1, 3, 3)),
            r"a\.xml is of an image of 9 × 8 px, but a has 8 × 8 px",
        ),
    ],
)
def test_what_is_wrong_with_a_file_of_boxes_is_said_with_its_name(tmp_path, text, message):
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_annotations(tmp_path).inside("a", a_view(), (8, 8))


def test_what_holds_no_annotations_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"boxes\.csv does not exist"):
        open_annotations(tmp_path / "boxes.csv")
    with pytest.raises(ValueError, match=r"holds no annotations: neither \.xml"):
        open_annotations(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match=r"a\.txt holds no annotations that are known"):
        open_annotations(tmp_path / "a.txt")
    write_png(tmp_path / "a.png", np.ones((2, 2)))
    (tmp_path / "a.xml").touch()
    with pytest.raises(ValueError, match=r"holds both boxes \(\.xml\) and masks \(\.png\)"):
        open_annotations(tmp_path)


# ------------------------------------------------------------------------ ImageNet-Segmentation


def test_without_h5py_the_matlab_file_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "gtsegs_ijcv.mat").touch()
    with pytest.raises(ValueError, match=r"gtsegs_ijcv\.mat is an HDF5 file; .* pip install h5py"):
        open_annotations(tmp_path / "gtsegs_ijcv.mat")


def write_mat(h5py: types.ModuleType, path: Path, images: dict[str, tuple]) -> None:
    """Write images and masks as MATLAB does: cells are references, axes are turned round."""
    with h5py.File(path, "w", userblock_size=512) as file:
        columns = {"id": [], "img": [], "gt": []}
        for i, (name, (pixels, mask)) in enumerate(images.items()):
            letters = np.array([[ord(letter)] for letter in name], np.uint16)
            columns["id"].append(file.create_dataset(f"#refs#/id{i}", data=letters).ref)
            turned = pixels.transpose(2, 1, 0)
            columns["img"].append(file.create_dataset(f"#refs#/img{i}", data=turned).ref)
            inner = file.create_dataset(f"#refs#/mask{i}", data=mask.T)
            cell = file.create_dataset(f"#refs#/gt{i}", (1, 1), h5py.ref_dtype)
            cell[0, 0] = inner.ref
            columns["gt"].append(cell.ref)
        for name, references in columns.items():
            column = file.create_dataset(f"value/{name}", (len(references), 1), h5py.ref_dtype)
            for i, reference in enumerate(references):
                column[i, 0] = reference


def test_imagenet_segmentation_is_read_as_matlab_wrote_it(tmp_path):
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    images = {
        name: (rng.integers(0, 256, (*hw, 3), np.uint8), rng.integers(0, 2, hw, np.uint8))
        for name, hw in {"n02113799_10212": (20, 30), "n01440764_1": (24, 16)}.items()
    }
    path = tmp_path / "gtsegs_ijcv.mat"
    write_mat(h5py, path, images)
    found = open_annotations(path)
    assert len(found) == 2
    for name, (pixels, mask) in images.items():
        view = a_view(pixels.shape[0], width_px=pixels.shape[1], crop_mode="squash", crop_pct=1.0)
        inside = found.inside(f"{name}.JPEG", view, mask.shape).numpy()
        assert (inside == (mask == 1)).all()
    (tmp_path / "images").mkdir()
    (tmp_path / "images/n01440764_1.png").write_bytes(b"there already")
    assert write_images(path, tmp_path / "images") == 2
    assert (tmp_path / "images/n01440764_1.png").read_bytes() == b"there already"
    (tmp_path / "images/n01440764_1.png").unlink()
    assert write_images(path, tmp_path / "images") == 2
    for name, (pixels, _) in images.items():
        assert (np.asarray(Image.open(tmp_path / f"images/{name}.png")) == pixels).all()


def test_another_hdf5_file_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "other.mat", "w") as file:
        file["weights"] = np.ones(3)
    with pytest.raises(ValueError, match=r"other\.mat is not gtsegs_ijcv\.mat, which has the"):
        open_annotations(tmp_path / "other.mat")
    (tmp_path / "old.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    with pytest.raises(ValueError, match=r"old\.mat is not gtsegs_ijcv\.mat"):
        open_annotations(tmp_path / "old.mat")
