"""tl-seg demo: stickers in scenes, the report, and first weights that suit few steps."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from scipy.stats import ttest_rel

from tokenlabel.cli import segment as tl_seg
from tokenlabel.segmenter.class_sets import class_set_of
from tokenlabel.segmenter.demo import (
    NAMES,
    SCRATCH,
    TOKEN_LABELLED,
    DemoConfig,
    DemoReport,
)
from tokenlabel.segmenter.loss import seg_loss
from tokenlabel.segmenter.recipe import load_recipe
from tokenlabel.segmenter.scenes import (
    BACKGROUND,
    Digits,
    Scene,
    SceneConfig,
    compose_scene,
)
from tokenlabel.segmenter.sheet import Compared, draw_comparison, draw_sheet
from tokenlabel.segmenter.uper_net import UperNet, create_model


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def digits() -> Digits:
    """A bar for each class, of other proportions."""
    glyphs = [np.ones((20, 4 + i), np.float32) for i in range(10)]
    return Digits(glyphs, np.arange(10))


def scene_of(digits: Digits, rim_px: int) -> Scene:
    config = SceneConfig(num_digits=(1, 1), num_scraps=0, largest_px=(20, 20), rim_px=rim_px)
    return compose_scene(digits, np.random.default_rng(3), config)


@pytest.mark.parametrize("rim_px", [1, 3])
def test_a_sticker_reaches_as_far_around_the_ink_as_its_rim(digits, rim_px):
    (sticker,) = scene_of(digits, rim_px).digits
    width = 4 + sticker.digit
    left, top, right, bottom = sticker.box
    assert (right - left, bottom - top) == (width + 2 * rim_px, 20 + 2 * rim_px)
    mask = scene_of(digits, rim_px).class_map[top:bottom, left:right] == sticker.digit
    for y, x in np.ndindex(*mask.shape):
        dy = max(rim_px - y, 0, y - (rim_px + 19))
        dx = max(rim_px - x, 0, x - (rim_px + width - 1))
        assert mask[y, x] == (dy * dy + dx * dx <= rim_px * rim_px)
    assert (scene_of(digits, rim_px).class_map != BACKGROUND).sum() == mask.sum()


def test_ink_is_dark_on_a_sticker_and_bright_without_one(digits):
    for rim_px, is_brighter in ((0, True), (3, False)):
        scene = scene_of(digits, rim_px)
        left, top, right, bottom = scene.digits[0].box
        grey = scene.pixels.mean(2)
        ink = grey[top + rim_px : bottom - rim_px, left + rim_px : right - rim_px].mean()
        around = grey[top:bottom, left].mean() if rim_px else grey[0].mean()
        assert (ink > around + 40) if is_brighter else (ink < around - 40)


def test_the_demo_reports_classes_seeds_and_the_paired_interval():
    miou = {TOKEN_LABELLED: [30.0, 34.0, 35.0], SCRATCH: [20.0, 30.0, 28.0]}
    class_iou = {arm: dict.fromkeys(NAMES, sum(v) / 3) for arm, v in miou.items()}
    report = DemoReport(config=DemoConfig(), miou=miou, class_iou=class_iou, secs=1.0, out="x")
    assert report.gains == [10.0, 4.0, 7.0]
    test: Any = ttest_rel(miou[TOKEN_LABELLED], miou[SCRATCH])
    low, high = test.confidence_interval(0.95)
    assert report.gain_within == pytest.approx((high - low) / 2)
    table = report.as_table()
    assert "token-labelled              33.0   30.0, 34.0, 35.0" in table
    assert table.endswith(
        "mIoU on 200 scenes of unseen digits, 3 seeds: token-labelled 33.0 %, from-scratch 26.0 %, "
        f"gain 7.0 ± {report.gain_within:.1f} (95 %)"
    )
    assert "digit 9                             33.0            26.0" in table
    assert report.to_json()["gain"] == 7.0
    alone = replace(report, miou={arm: values[:1] for arm, values in miou.items()})
    assert alone.gain_within is None and "±" not in alone.as_table()


def test_a_comparison_shows_the_predictions_of_each_model_beside_one_mask():
    mask = torch.zeros(40, 40, dtype=torch.int64)
    pixels = torch.zeros(3, 40, 40, dtype=torch.uint8)
    image = Compared("a", pixels, mask, torch.ones_like(mask))
    classes = class_set_of(["one", "two"])
    alone = draw_sheet([image, image], classes, ignore_index=255)
    several = draw_comparison({"x": [image] * 2, "y": [image] * 2}, classes, ignore_index=255)
    assert several.height == alone.height and several.width > alone.width + 350
    with pytest.raises(ValueError, match="shorter"):
        draw_comparison({"x": [image], "y": []}, classes, ignore_index=255)


# ---------------------------------------------------------------------- a start for few steps


def small_model(head_std: int | float) -> UperNet:
    recipe = load_recipe("demo")
    torch.manual_seed(0)
    kwargs = recipe.model.kwargs | dict(
        embed_dim=32, num_heads=2, stem_width=8, head_dim=16, deep_dim=32, head_std=head_std
    )
    return create_model(replace(recipe.model, num_classes=3, kwargs=kwargs, head_drop=0.0))


def first_gradient(model: UperNet) -> float:
    """Norm of the gradient before the last layers, at the first step."""
    images = torch.randn(4, 3, 64, 64)
    masks = torch.randint(0, 3, (4, 64, 64))
    logits, aux_logits = model.train()(images)
    seg_loss(logits, aux_logits, masks).total.backward()
    before = [p.grad for n, p in model.named_parameters() if "conv_seg" not in n]
    return torch.nn.utils.get_total_norm([g for g in before if g is not None]).item()


def test_larger_first_weights_of_the_last_layers_let_the_gradient_through():
    published, larger = small_model(0.01), small_model(0.1)
    for head in (published.decode_head, published.auxiliary_head):
        assert head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.3)
        assert not head.state_dict()["conv_seg.bias"].any()
    assert larger.decode_head.conv_seg.weight.std().item() == pytest.approx(0.1, rel=0.3)
    assert first_gradient(larger) > 4 * first_gradient(published)
    with pytest.raises(ValueError, match="head_std = 0; allowed: > 0"):
        small_model(0)


@pytest.mark.slow
def test_the_demo_runs_from_digits_to_a_picture(tmp_path):
    done = CliRunner().invoke(tl_seg, ["demo", "--out", str(tmp_path / "demo"), "--quick"])
    assert done.exit_code == 0, done.output
    assert "from-scratch" in done.output and "digit 9" in done.output
    with Image.open(tmp_path / "demo" / "demo.png") as sheet:
        assert sheet.width > 4 * 384
    result = json.loads((tmp_path / "demo" / "result.json").read_text())
    assert len(result["miou"]["from-scratch"]) == 1
    assert set(result["class_iou"]["token-labelled"]) == set(NAMES)
    again = CliRunner().invoke(tl_seg, ["demo", "--out", str(tmp_path / "demo"), "--quick"])
    assert again.exit_code == 2 and "is not empty; give another --out" in again.output
