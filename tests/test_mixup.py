"""Mixup and CutMix: timm's draws and pixels, and targets against a slow dense reference."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loop_runs import fixed_data, tiny_recipe
from PIL import Image
from timm.data.mixup import Mixup, cutmix_bbox_and_lam
from torch import Tensor

from tokenlabel.labeler.geometry import TokenTargets
from tokenlabel.trainer import loop, run_log
from tokenlabel.trainer.checkpoint import read
from tokenlabel.trainer.distributed import Place
from tokenlabel.trainer.loss import token_label_loss
from tokenlabel.trainer.mix_token import MixBox, sample_box
from tokenlabel.trainer.mixup import PixelMix, draw_mix, mix_pixels, mix_targets, sample_mix
from tokenlabel.trainer.recipe import AugmentConfig, load_recipe
from tokenlabel.trainer.targets import batch_targets, pick

GRID, IMAGE_HW = (3, 4), (24, 40)
NUM_CLASSES = 12
MIXUP = PixelMix(box=MixBox(0, 0, *IMAGE_HW, IMAGE_HW), kept_inside=0.3, tokens=GRID)
CUTMIX = PixelMix(box=MixBox(5, 7, 20, 35, IMAGE_HW), kept_inside=0.0, tokens=GRID)
NOTHING = PixelMix(box=MixBox(9, 9, 9, 9, IMAGE_HW), kept_inside=0.0, tokens=GRID)
MIXES = [MIXUP, CUTMIX, NOTHING]


def random_targets(b: int = 5, u: int = 4) -> TokenTargets:
    """Targets whose palettes overlap, and have one entry of padding; some tokens have weight 0."""
    rng = np.random.default_rng(0)
    palette = np.stack([rng.choice(NUM_CLASSES, u, replace=False) for _ in range(b)])
    palette[:, -1] = palette[:, 0]

    def distributions(*shape: int) -> tuple[Tensor, Tensor]:
        parts = rng.random((*shape, u))  # the last one is what the background shares
        parts /= parts.sum(-1, keepdims=True)
        background = parts[..., -1:] / (NUM_CLASSES - u + 1)
        parts[..., -1:] = background
        return torch.from_numpy(parts).float(), torch.from_numpy(background[..., 0]).float()

    n = math.prod(GRID)
    tokens, token_background = distributions(b, n)
    view, view_background = distributions(b)
    return TokenTargets(
        palette=torch.from_numpy(palette),
        tokens=tokens,
        token_background=token_background,
        token_weight=torch.from_numpy(rng.integers(0, 2, (b, n))).float(),
        view=view,
        view_background=view_background,
        view_weight=torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0]),
        num_classes=NUM_CLASSES,
    )


def mirrored(targets: TokenTargets) -> TokenTargets:
    return pick(targets, torch.arange(len(targets.view) - 1, -1, -1))


def shown(mix: PixelMix) -> np.ndarray:
    """Share of each pixel, and so of what it shows, that is the own image's."""
    own = np.ones(IMAGE_HW)
    for row in range(mix.box.top, mix.box.bottom):
        for col in range(mix.box.left, mix.box.right):
            own[row, col] = mix.kept_inside
    return own


# ----------------------------------------------------------------------------------- draws


def test_mixes_are_drawn_as_timms():
    count, image_hw = 4000, (50, 70)
    config = AugmentConfig(mixup=0.8, cutmix=1.0, mix_prob=0.7, mix_switch_prob=0.4)
    rng = np.random.default_rng(0)
    ours: dict[str, list[float]] = {"none": [], "mixup": [], "cutmix": []}
    theirs: dict[str, list[float]] = {"none": [], "mixup": [], "cutmix": []}
    boxes: list[list[tuple[float, ...]]] = [[], []]
    for _ in range(count):
        mix = sample_mix(config, image_hw, GRID, rng)
        kind = "none" if mix is None else "cutmix" if mix.kept_inside == 0 else "mixup"
        ours[kind].append(1.0 if mix is None else mix.kept)
        if mix is not None and kind == "cutmix":
            box = mix.box
            boxes[0].append((box.top, box.left, box.bottom - box.top, box.right - box.left))
    np.random.seed(0)  # noqa: NPY002 - timm draws from it
    reference = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, prob=0.7, switch_prob=0.4)
    for _ in range(count):
        kept, is_cutmix = reference._params_per_batch()
        kind = "none" if kept == 1 else "cutmix" if is_cutmix else "mixup"
        if is_cutmix:
            (top, bottom, left, right), kept = cutmix_bbox_and_lam((3, *image_hw), kept)
            boxes[1].append((top, left, bottom - top, right - left))
        theirs[kind].append(kept)
    for kind in ours:
        assert abs(len(ours[kind]) - len(theirs[kind])) < 4.5 * math.sqrt(count / 2)
    for kind in ("mixup", "cutmix"):
        assert largest_gap(ours[kind], theirs[kind]) < 1  # at a level of 1e-5
    for side in zip(*(zip(*each) for each in boxes)):
        assert largest_gap(*side) < 1


def largest_gap(a: Any, b: Any) -> float:
    """Kolmogorov and Smirnov's distance of two samples, over what one of 100,000 pairs exceeds."""
    places = np.union1d(a, b)
    ranks = (np.searchsorted(np.sort(x), places, "right") / len(x) for x in (a, b))
    return float(np.abs(np.subtract(*ranks)).max() / (2.47 * math.sqrt(1 / len(a) + 1 / len(b))))


def test_one_of_the_two_alone_is_always_that_one():
    rng = np.random.default_rng(0)
    for mixup, cutmix in ((0.8, 0.0), (0.0, 1.0)):
        config = AugmentConfig(mixup=mixup, cutmix=cutmix)
        for _ in range(50):
            mix = sample_mix(config, IMAGE_HW, GRID, rng)
            assert mix is not None
            assert (mix.kept_inside == 0) == (mixup == 0)
    assert sample_mix(AugmentConfig(), IMAGE_HW, GRID, rng) is None


def test_a_steps_mix_depends_on_seed_and_step_alone():
    recipe = tiny_recipe("model.mix_token=false", "augment.mixup=0.8", "augment.cutmix=1")
    assert [draw_mix(recipe, GRID, step) for step in range(9)] == [
        draw_mix(recipe, GRID, step) for step in range(9)
    ]
    assert draw_mix(recipe, GRID, 3) != draw_mix(recipe, GRID, 4)
    assert draw_mix(tiny_recipe("model.mix_token=false"), GRID, 0) is None
    box = sample_box(GRID, np.random.default_rng([0, 5]))
    assert draw_mix(tiny_recipe(), GRID, 5) == box


@pytest.mark.parametrize("key", ["mixup", "cutmix"])
def test_mixing_twice_is_refused_and_how_to_choose_is_said(key):
    message = f"augment.{key} = 0.8; allowed: 0 beside model.mix_token, .* model.mix_token = false"
    with pytest.raises(ValueError, match=message):
        load_recipe("lvvit_s_224", [f"augment.{key}=0.8"])
    load_recipe("lvvit_s_224", [f"augment.{key}=0.8", "model.mix_token=false"])
    with pytest.raises(ValueError, match=f"augment.{key} = -1.0; allowed: >= 0; 0 is off"):
        replace(AugmentConfig(), **{key: -1.0})
    with pytest.raises(ValueError, match="augment.mix_prob = 1.5; allowed: 0 to 1"):
        AugmentConfig(mix_prob=1.5)


# ----------------------------------------------------------------------- pixels and targets


@pytest.mark.parametrize("mix", MIXES)
def test_pixels_are_timms(mix, monkeypatch):
    images = torch.randn(6, 3, *IMAGE_HW)
    before = images.clone()
    found = mix_pixels(images, images.flip(0), mix)
    assert torch.equal(images, before)

    box = mix.box
    edges = (box.top, box.bottom, box.left, box.right)
    is_cutmix = mix.kept_inside == 0
    reference = Mixup(mixup_alpha=1.0, cutmix_alpha=1.0)
    monkeypatch.setattr(reference, "_params_per_batch", lambda: (mix.kept_inside, is_cutmix))
    monkeypatch.setattr("timm.data.mixup.cutmix_bbox_and_lam", lambda *_, **__: (edges, mix.kept))
    expected = before.clone()
    kept = reference._mix_batch(expected)
    torch.testing.assert_close(found, expected)
    assert kept == pytest.approx(mix.kept)


@pytest.mark.parametrize("mix", MIXES)
def test_shares_are_means_over_the_pixels_of_each_token(mix):
    own = shown(mix).reshape(GRID[0], IMAGE_HW[0] // GRID[0], GRID[1], IMAGE_HW[1] // GRID[1])
    found = mix.kept_by_tokens(torch.device("cpu"))
    np.testing.assert_allclose(found.numpy(), own.mean((1, 3)).flatten(), atol=1e-6)
    assert mix.kept == pytest.approx(own.mean())
    if mix is CUTMIX:
        assert len(set(found.tolist())) > 4  # whole ones, and parts of several sizes


@pytest.mark.parametrize("mix", MIXES)
def test_loss_and_gradients_equal_those_of_dense_targets_mixed_one_by_one(mix):
    targets = random_targets()
    b, n, c = len(targets.view), math.prod(GRID), NUM_CLASSES
    own = mix.kept_by_tokens(torch.device("cpu")).tolist()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(b, 1 + n, c, generator=generator)

    dense, dense_view = targets.dense_tokens().double(), targets.dense_view().double()
    slow = logits.double().requires_grad_()
    class_loss = dense_loss = torch.zeros((), dtype=torch.float64)
    for i in range(b):
        for image, share in ((i, mix.kept), (b - 1 - i, 1 - mix.kept)):
            loss = F.cross_entropy(slow[i, 0], dense_view[image])
            class_loss = class_loss + share * targets.view_weight[image] * loss / b
        for t in range(n):
            for image, share in ((i, own[t]), (b - 1 - i, 1 - own[t])):
                loss = F.cross_entropy(slow[i, 1 + t], dense[image, t])
                weight = share * targets.token_weight[image, t]
                dense_loss = dense_loss + weight * loss / (b * n)
    (class_loss + 0.5 * dense_loss).backward()

    mixed = mix_targets(targets, mirrored(targets), mix)
    fast = logits.clone().requires_grad_()
    found = token_label_loss(fast[:, 0], fast[:, 1:], mixed, dense_weight=0.5)
    found.total.backward()
    assert found.class_loss.item() == pytest.approx(class_loss.item(), rel=1e-5)
    assert found.dense_loss.item() == pytest.approx(dense_loss.item(), rel=1e-5)
    assert fast.grad is not None and slow.grad is not None
    torch.testing.assert_close(fast.grad.double(), slow.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mixed.dense_tokens().sum(2), torch.ones(b, n))
    torch.testing.assert_close(mixed.dense_view().sum(1), torch.ones(b))


def test_no_class_of_mixed_targets_is_told_twice():
    # The GPU's kernel writes each class of a palette once.
    labels = torch.tensor([3, 3, 5, 3])
    batch = next(fixed_data().open_train(None, 0))
    targets = batch_targets(
        batch.maps, batch.views, labels, GRID, num_classes=40, class_target="label"
    )
    mixed = mix_targets(targets, mirrored(targets), MIXUP)
    for values, background in (
        (mixed.tokens, mixed.token_background),
        (mixed.view[:, None], mixed.view_background[:, None]),
    ):
        told = values != background[..., None]
        for i, palette in enumerate(mixed.palette):
            for row in told[i]:
                classes = palette[row].tolist()
                assert len(set(classes)) == len(classes)
    assert mixed.dense_view()[0, 3].item() == pytest.approx(0.9 + 0.1 / 40)  # of both images


def test_class_labels_alone_mix_to_timms_targets():
    labels = torch.tensor([0, 3, 3, 1, 2, 0])
    views = torch.eye(2, 3).repeat(6, 1, 1)
    targets = batch_targets(None, views, labels, GRID, num_classes=5, smoothing=0.1)
    reference = Mixup(mixup_alpha=1.0, label_smoothing=0.1, num_classes=5)
    reference._params_per_batch = lambda: (MIXUP.kept, False)
    _, expected = reference(torch.zeros(6, 3, 8, 8), labels)
    mixed = mix_targets(targets, mirrored(targets), MIXUP)
    torch.testing.assert_close(mixed.dense_view(), expected)
    assert not mixed.token_weight.any()


# ------------------------------------------------------------------------------ in training


def test_a_resumed_run_mixes_as_one_that_was_not_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "draw_curves", lambda *_: None)
    monkeypatch.setattr(loop, "draw_crops", lambda *_, **options: Image.new("RGB", (8, 8)))
    mixing = ["augment.mixup=0.8", "augment.cutmix=1"]

    def train(out: Path, *overrides: str, die_at: int = 99, **options: Any) -> dict[str, Tensor]:
        def spoil(batch: object, number: int) -> None:
            if number == die_at:
                raise OSError("the power is gone")

        given = ["model.mix_token=false", "schedule.duration=3 steps", "schedule.warmup=1 steps"]
        recipe = tiny_recipe(*given, *overrides)
        loop.fit(recipe, fixed_data(spoil=spoil), out, Place(device=torch.device("cpu")), **options)
        return read(out / "checkpoints" / "last.pt").model

    with pytest.raises(OSError, match="the power is gone"):
        train(tmp_path / "killed", *mixing, die_at=5)
    resumed = train(tmp_path / "killed", *mixing, resume=True)
    whole, unmixed = train(tmp_path / "whole", *mixing), train(tmp_path / "unmixed")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert not all(torch.equal(unmixed[name], whole[name]) for name in whole)
