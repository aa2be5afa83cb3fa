"""Pictures of label maps: the colour stands where the map says, as strong as the map says."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import random_map
from PIL import Image

from tokenlabel.labeler import draw
from tokenlabel.labeler.geometry import (
    PaletteMaps,
    TokenTargets,
    crop_view,
    flip_view,
    sample_targets,
)
from tokenlabel.labeler.label_map import LabelMap

GREY = (128, 128, 128)
NAMES = [f"class {i}" for i in range(40)]


@pytest.fixture
def without_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the text, so that every pixel is a photo's or a cell's."""
    monkeypatch.setattr(draw, "_NAMED_CONFIDENCE", 2.0)


def sure_map(
    classes: Sequence[Sequence[int]],
    window: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
    probability: float = 0.98,
) -> LabelMap:
    """A top-1 map of 40 classes with the same probability everywhere."""
    grid = np.array(classes, dtype=np.uint32)
    return LabelMap(
        scores=np.zeros((1, *grid.shape), np.float16),
        classes=grid[None],
        num_classes=40,
        log_normalizer=np.full(grid.shape, -np.log(probability), np.float16),
        window=window,
    )


def grey_photo(width: int = 80, height: int = 80) -> Image.Image:
    return Image.new("RGB", (width, height), GREY)


def hue_at(image: Image.Image, x: float, y: float) -> draw.Colour:
    """The palette colour whose hue is nearest to the pixel's, or grey."""
    pixel = np.array(image.getpixel((int(x * image.width), int(y * image.height))), dtype=float)
    hue = pixel - pixel.mean()
    if np.abs(hue).max() < 8:
        return GREY
    # The first five: the two blues differ in lightness more than in hue.
    hues = [np.array(colour) - np.mean(colour) for colour in draw.PALETTE[:5]]
    return draw.PALETTE[int(np.argmax([hue @ h / np.linalg.norm(h) for h in hues]))]


def test_each_cell_is_painted_in_the_colour_of_its_class():
    drawing = draw.draw_label_map(grey_photo(), sure_map([[3, 7], [9, 11]]), NAMES)
    colours = {entry.name: entry.colour for entry in drawing.legend}
    corners = {(0.05, 0.05): 3, (0.95, 0.05): 7, (0.05, 0.95): 9, (0.95, 0.95): 11}
    for (x, y), class_id in corners.items():
        assert hue_at(drawing.image, x, y) == colours[f"class {class_id}"]


def test_a_map_is_painted_inside_its_window_only():
    label_map = sure_map([[3, 3], [3, 3]], window=(0.5, 0.0, 1.0, 0.5))
    image = draw.draw_label_map(grey_photo(), label_map, NAMES).image
    assert hue_at(image, 0.55, 0.05) == hue_at(image, 0.95, 0.45) == draw.PALETTE[0]
    for outside in [(0.45, 0.05), (0.05, 0.95), (0.95, 0.55)]:
        assert hue_at(image, *outside) == GREY


def test_surer_cells_are_more_opaque(without_names: None):
    def blue_left(probability: float) -> int:
        label_map = sure_map([[3]], probability=probability)
        pixel = draw.draw_label_map(grey_photo(), label_map, NAMES).image.getpixel((40, 40))
        assert isinstance(pixel, tuple)
        return pixel[2]

    # The first palette colour is orange, which has no blue.
    blues = [blue_left(p) for p in (0.06, 0.2, 0.5, 0.98)]
    assert blues == sorted(blues, reverse=True)
    assert blues[0] - blues[-1] > 60


def test_the_legend_counts_cells_and_gives_the_highest_probability():
    label_map = sure_map([[3, 3, 7], [3, 3, 7]], probability=0.5)
    legend = draw.draw_label_map(grey_photo(), label_map, NAMES).legend
    assert [str(entry) for entry in legend] == [
        "class 3 (4 cells, up to 50%)",
        "class 7 (2 cells, up to 50%)",
    ]


def test_classes_beyond_the_palette_share_one_entry():
    label_map = sure_map([list(range(20))])
    legend = draw.draw_label_map(grey_photo(), label_map, NAMES).legend
    assert len(legend) == len(draw.PALETTE) + 1
    assert legend[-1].name == "other classes"
    assert legend[-1].num_cells == 20 - len(draw.PALETTE)
    assert len({entry.colour for entry in legend}) == len(legend)


def test_a_wide_guess_does_not_take_a_colour_from_a_sure_cell():
    classes = np.array([[5, 6, 6, 6, 6, 6]])
    normalizer = -np.log(np.where(classes == 5, 0.9, 0.2)).astype(np.float16)
    label_map = LabelMap(
        scores=np.zeros((1, 1, 6), np.float16),
        classes=classes[None].astype(np.uint32),
        num_classes=40,
        log_normalizer=normalizer,
    )
    assert list(draw.colours_of(label_map)) == [5, 6]


def test_probabilities_with_a_normaliser_are_the_teachers():
    label_map = random_map(np.random.default_rng(0))
    assert label_map.log_normalizer is not None
    expected = np.exp(label_map.scores.astype(float) - label_map.log_normalizer.astype(float))
    np.testing.assert_allclose(draw.probabilities(label_map), expected, rtol=1e-12)


@pytest.mark.parametrize("num_classes", [5, 40])
def test_probabilities_without_a_normaliser_are_a_softmax_with_zeros(num_classes: int):
    label_map = random_map(np.random.default_rng(0), num_classes=num_classes, normalizer=False)
    k, rows, cols = label_map.scores.shape
    dense = np.zeros((num_classes, rows, cols))
    dense[:k] = label_map.scores
    expected = (np.exp(dense) / np.exp(dense).sum(0))[:k]
    np.testing.assert_allclose(draw.probabilities(label_map), expected, rtol=1e-9)


def test_probabilities_count_a_repeated_class_once():
    label_map = LabelMap(
        scores=np.array([2.0, 1.0, 1.0], np.float16)[:, None, None],
        classes=np.array([7, 3, 3], np.uint32)[:, None, None],
        num_classes=40,
    )
    total = np.exp(2) + np.exp(1) + 38
    expected = np.exp([2, 1, 1]) / total
    np.testing.assert_allclose(draw.probabilities(label_map).ravel(), expected, rtol=1e-9)


def targets_of(label_map: LabelMap, *, flipped: bool = False) -> TokenTargets:
    """Targets of a whole-image view on the map's own grid."""
    view = flip_view(torch.tensor([flipped]))
    return sample_targets(PaletteMaps.from_label_maps([label_map]), view, label_map.grid)


def test_targets_of_the_whole_image_are_drawn_like_its_map(without_names: None):
    label_map = sure_map([[3, 3, 7], [9, 9, 7], [9, 9, 7]])
    colours = draw.colours_of(label_map)
    photo = grey_photo(90, 90)
    of_map = draw.draw_label_map(photo, label_map, NAMES, longest_px=90)
    of_targets = draw.draw_token_targets(
        photo, targets_of(label_map), 0, (3, 3), NAMES, colours=colours, longest_px=90
    )
    assert [(e.name, e.num_cells) for e in of_map.legend] == [
        (e.name, e.num_cells) for e in of_targets.legend
    ]
    for x, y in np.ndindex(3, 3):
        at = ((x + 0.5) / 3, (y + 0.5) / 3)
        assert hue_at(of_map.image, *at) == hue_at(of_targets.image, *at)


def test_targets_of_a_flipped_view_are_drawn_mirrored(without_names: None):
    label_map = sure_map([[3, 3, 7], [9, 9, 11], [9, 9, 7]])
    colours = draw.colours_of(label_map)
    pictures = [
        draw.draw_token_targets(
            grey_photo(), targets_of(label_map, flipped=f), 0, (3, 3), NAMES, colours=colours
        ).image
        for f in (False, True)
    ]
    for x, y in np.ndindex(3, 3):
        left, right = ((x + 0.5) / 3, (y + 0.5) / 3), ((2.5 - x) / 3, (y + 0.5) / 3)
        assert hue_at(pictures[0], *left) == hue_at(pictures[1], *right)


def test_tokens_without_evidence_are_struck_through_and_not_coloured():
    label_map = sure_map([[3, 3], [3, 3]], window=(0.0, 0.0, 0.5, 1.0))
    maps = PaletteMaps.from_label_maps([label_map])
    targets = sample_targets(maps, crop_view(torch.tensor([[0.0, 0.0, 1.0, 1.0]])), (4, 4))
    drawing = draw.draw_token_targets(grey_photo(), targets, 0, (4, 4), NAMES, longest_px=80)
    assert [entry.num_cells for entry in drawing.legend] == [8]
    assert hue_at(drawing.image, 0.8, 0.8) == GREY
    middle_of_an_empty_token = drawing.image.getpixel((50, 50))
    assert isinstance(middle_of_an_empty_token, tuple)
    assert max(middle_of_an_empty_token) < 60


def test_names_are_written_on_sure_regions(monkeypatch: pytest.MonkeyPatch):
    label_map = sure_map([[3, 3, 7], [3, 3, 7]])
    with_names = draw.draw_label_map(grey_photo(200, 200), label_map, NAMES).image
    monkeypatch.setattr(draw, "_NAMED_CONFIDENCE", 2.0)
    without = draw.draw_label_map(grey_photo(200, 200), label_map, NAMES).image
    assert np.any(np.asarray(with_names) != np.asarray(without))


@pytest.mark.parametrize("size", [(1, 1), (3, 400), (400, 3)])
def test_odd_images_and_long_names_in_any_script_are_drawn(size: tuple[int, int]):
    names = ["Золотая рыбка — 金魚 " * 20] * 40
    drawing = draw.draw_label_map(grey_photo(*size), sure_map([[3, 7]]), names, longest_px=100)
    assert max(drawing.image.size) == 100
    assert draw.with_legend(drawing, photo=grey_photo(*size), title="x").width > 100


def test_the_sheet_holds_photo_and_drawing_side_by_side():
    photo = Image.new("RGB", (60, 40), (10, 200, 10))
    drawing = draw.draw_label_map(photo, sure_map([[3, 7]]), NAMES, longest_px=300)
    pixels = np.asarray(draw.with_legend(drawing, photo=photo, title="a photo"))
    green = np.argwhere((pixels == (10, 200, 10)).all(axis=2))
    assert len(green) == drawing.image.width * drawing.image.height
    top, left = green.min(axis=0)
    beside = pixels[top:, left + drawing.image.width + draw._MARGIN_PX :]
    drawn = np.asarray(drawing.image)
    np.testing.assert_array_equal(beside[: drawn.shape[0], : drawn.shape[1]], drawn)


def test_the_frame_of_a_view_stands_around_what_the_crop_shows():
    photo = Image.new("RGB", (200, 100), (90, 90, 90))
    view = crop_view(torch.tensor([[0.5, 0.2, 0.9, 0.6]]))[0]
    picture = np.asarray(draw.draw_view(photo, view, longest_px=200)).astype(int)
    frame = np.argwhere((picture == 255).all(axis=2))
    (top, left), (bottom, right) = frame.min(axis=0), frame.max(axis=0)
    assert np.abs(np.array([left, top, right, bottom]) - [100, 20, 180, 60]).max() <= 2
    assert (picture[40, 140] == 90).all()
    assert (picture[80, 140] < 50).all()


def test_colours_kept_from_another_picture_stay_and_new_classes_get_free_ones():
    first, second = (targets_of(sure_map([classes])) for classes in ([3, 3, 7], [9, 7, 7]))
    colours = draw.colours_of_targets(first, 0, most=2)
    more = draw.colours_of_targets(second, 0, keep=colours)
    assert list(colours) == [3, 7]
    assert {3: more[3], 7: more[7]} == colours
    assert 9 in more
    assert len(set(more.values())) == len(more)
