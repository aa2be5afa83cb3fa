"""The scenes of benchmarks/scenes.py are what their labels say."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


def load_benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


scenes = load_benchmark("scenes")


@pytest.fixture(scope="module")
def digits():
    return scenes.load_digits()


@pytest.fixture(scope="module")
def composed(digits):
    return list(scenes.compose_scenes(digits[0], 60, seed=5, config=scenes.SceneConfig()))


def test_held_out_digits_are_none_of_the_training_digits(digits):
    train, held_out = ({(glyph.shape, glyph.tobytes()) for glyph in part.glyphs} for part in digits)
    assert len(train) == 4000 and len(held_out) == 1000
    assert not train & held_out


def test_both_parts_have_as_many_digits_of_each_class(digits):
    for part, per_class in zip(digits, (400, 100)):
        assert np.bincount(part.classes).tolist() == [per_class] * scenes.NUM_CLASSES


def test_the_label_is_the_largest_digit_by_a_clear_margin(composed):
    for scene in composed:
        largest, *others = (max(x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes(scene))
        assert scene.label == scene.digits[0].digit
        assert others and max(others) <= 0.6 * largest


def test_digits_of_a_scene_are_of_different_classes_and_do_not_overlap(composed):
    for scene in composed:
        assert len({digit.digit for digit in scene.digits}) == len(scene.digits)
        covered = np.zeros_like(scene.class_map, int)
        for x0, y0, x1, y1 in boxes(scene):
            assert 0 <= x0 < x1 <= covered.shape[1] and 0 <= y0 < y1 <= covered.shape[0]
            covered[y0:y1, x0:x1] += 1
        assert covered.max() == 1


def test_the_class_map_shows_each_digit_inside_its_box_and_nothing_elsewhere(composed):
    for scene in composed:
        outside = np.ones_like(scene.class_map, bool)
        for digit in scene.digits:
            x0, y0, x1, y1 = digit.box
            inside = scene.class_map[y0:y1, x0:x1]
            assert set(np.unique(inside)) == {digit.digit, scenes.BACKGROUND}
            outside[y0:y1, x0:x1] = False
        assert (scene.class_map[outside] == scenes.BACKGROUND).all()


def test_ink_is_brighter_than_the_background(composed):
    for scene in composed:
        brightness = scene.pixels.mean(2)
        is_ink = scene.class_map != scenes.BACKGROUND
        assert brightness[is_ink].mean() > brightness[~is_ink].mean() + 50


def test_a_scene_depends_on_the_seed_and_its_number_alone(digits):
    few, more = (
        list(scenes.compose_scenes(digits[0], num, seed=7, config=scenes.SceneConfig()))
        for num in (2, 4)
    )
    assert all((a.pixels == b.pixels).all() for a, b in zip(few, more))
    other = next(scenes.compose_scenes(digits[0], 1, seed=8, config=scenes.SceneConfig()))
    assert (other.pixels != few[0].pixels).any()


def test_a_digit_as_large_as_its_scene_fits(digits):
    config = replace(
        scenes.SceneConfig(), sides_px=(40, 40), num_digits=(1, 1), largest_px=(40, 40)
    )
    for scene in scenes.compose_scenes(digits[0], 40, seed=0, config=config):
        (x0, y0, x1, y1) = scene.digits[0].box
        assert max(x1 - x0, y1 - y0) == 40


def test_oblong_scenes_lie_and_stand_and_have_digits_everywhere(digits):
    config = replace(scenes.SceneConfig(), sides_px=(64, 96), num_digits=(3, 6))
    made = list(scenes.compose_scenes(digits[0], 60, seed=3, config=config))
    lying = [scene for scene in made if scene.pixels.shape == (64, 96, 3)]
    standing = [scene for scene in made if scene.pixels.shape == (96, 64, 3)]
    assert len(lying) + len(standing) == len(made) and min(len(lying), len(standing)) > 15
    for long_side, few in ((0, lying), (1, standing)):
        ends = np.array([box[long_side + 2] for scene in few for box in boxes(scene)])
        assert (ends > 80).any() and (ends < 40).any()


def test_a_scene_without_digits_is_background(digits):
    config = replace(scenes.SceneConfig(), num_digits=(0, 0))
    (scene,) = scenes.compose_scenes(digits[0], 1, seed=0, config=config)
    assert scene.label == scenes.BACKGROUND and not scene.digits
    assert (scene.class_map == scenes.BACKGROUND).all()


def test_image_folders_hold_the_scenes_by_label(digits, tmp_path):
    config = scenes.SceneConfig()
    scenes.write_image_folder(digits[1], tmp_path, 12, seed=3, config=config)
    expected = list(scenes.compose_scenes(digits[1], 12, seed=3, config=config))
    assert len(list(tmp_path.iterdir())) == scenes.NUM_CLASSES
    paths = sorted(tmp_path.glob("*/*.jpg"), key=lambda path: path.name)
    for path, scene in zip(paths, expected, strict=True):
        assert path.parent.name == f"digit-{scene.label}"
        with Image.open(path) as image:
            difference = np.abs(np.asarray(image).astype(int) - scene.pixels.astype(int))
        assert difference.mean() < 12


def boxes(scene) -> list[tuple[int, int, int, int]]:
    return [digit.box for digit in scene.digits]
