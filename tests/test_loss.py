"""The sparse path, label maps to gradients, against a slow dense one written from the paper."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_map
from torchvision.ops import roi_align

from tokenlabel.labeler.geometry import Fill, PaletteMaps, compose, crop_view, flip_view
from tokenlabel.labeler.label_map import LabelMap
from tokenlabel.trainer.loss import sparse_cross_entropy, token_label_loss
from tokenlabel.trainer.mix_token import MixBox
from tokenlabel.trainer.targets import batch_targets

NUM_CLASSES = 23


def dense_planes(label_map: LabelMap, fill: Fill) -> torch.Tensor:
    """Scatter the top-k into all classes, over the fill."""
    scores = torch.from_numpy(label_map.scores).double()
    planes = torch.zeros(NUM_CLASSES, *label_map.grid, dtype=torch.float64)
    if fill == "residual":
        assert label_map.log_normalizer is not None
        normalizer = torch.from_numpy(label_map.log_normalizer).double()
        rest = (1 - (scores - normalizer).exp().sum(0)).clamp(min=1e-4)
        planes += (rest / (NUM_CLASSES - label_map.k)).log() + normalizer
    return planes.scatter(0, torch.from_numpy(label_map.classes.astype(np.int64)), scores)


def dense_targets(maps, boxes, flipped, grid, fill: Fill, smoothing: float):
    """RoIAlign, mirror, softmax, smooth: (b, 1 + n, c), the pooled class target first."""
    targets = []
    for label_map, box, flip in zip(maps, boxes, flipped):
        rows, cols = label_map.grid
        roi = (box.double() * torch.tensor([cols, rows, cols, rows]))[None]
        planes = dense_planes(label_map, fill)[None]
        tokens = roi_align(planes, [roi], grid, sampling_ratio=2, aligned=True)[0]
        # One output cell with twice the grid's points a side: the same points, pooled.
        points = roi_align(
            planes, [roi], (2 * grid[0], 2 * grid[1]), sampling_ratio=1, aligned=True
        )
        tokens = tokens.flip(2) if flip else tokens
        both = torch.cat([points[0].mean((1, 2))[:, None], tokens.flatten(1)], 1)
        targets.append(both.T.softmax(1))
    return torch.stack(targets) * (1 - smoothing) + smoothing / NUM_CLASSES


@pytest.mark.parametrize("fill", ["residual", "zero"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("box", [None, MixBox(top=1, left=0, bottom=3, right=3, grid=(3, 4))])
def test_sparse_loss_and_gradients_equal_the_dense_reference(fill: Fill, smoothing: float, box):
    rng = np.random.default_rng(0)
    grid = (3, 4)
    maps = [
        random_map(rng, grid=g, num_classes=NUM_CLASSES)
        for g in [(6, 6), (5, 8), (7, 4), (6, 6), (4, 4)]
    ]
    corners = np.sort(rng.uniform(0, 1, (5, 2, 2)), axis=1).reshape(5, 4)
    boxes = torch.from_numpy(corners).float()
    flipped = torch.tensor([False, True, False, True, True])
    logits = torch.from_numpy(rng.standard_normal((5, 1 + 12, NUM_CLASSES)) * 2)

    target = dense_targets(maps, boxes, flipped, grid, fill, smoothing)
    dense = logits.clone().requires_grad_()
    class_target = target[:, 0]
    if box is not None:
        class_target = box.kept * class_target + (1 - box.kept) * class_target.flip(0)
    expected_class = F.cross_entropy(dense[:, 0], class_target)
    expected_dense = F.cross_entropy(dense[:, 1:].flatten(0, 1), target[:, 1:].flatten(0, 1))
    (expected_class + 0.5 * expected_dense).backward()

    targets = batch_targets(
        PaletteMaps.from_label_maps(maps),
        compose(crop_view(boxes), flip_view(flipped)),
        torch.zeros(5, dtype=torch.int64),
        grid,
        num_classes=NUM_CLASSES,
        smoothing=smoothing,
        fill=fill,
    )
    sparse = logits.float().requires_grad_()
    loss = token_label_loss(sparse[:, 0], sparse[:, 1:], targets, box=box, dense_weight=0.5)
    loss.total.backward()

    assert loss.class_loss.item() == pytest.approx(expected_class.item(), abs=1e-5)
    assert loss.dense_loss.item() == pytest.approx(expected_dense.item(), abs=1e-5)
    assert sparse.grad is not None and dense.grad is not None
    torch.testing.assert_close(sparse.grad.double(), dense.grad, atol=1e-5, rtol=0)


def test_a_batch_of_one_has_a_loss():
    maps = [random_map(np.random.default_rng(1), num_classes=NUM_CLASSES)]
    views = crop_view(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    targets = batch_targets(
        PaletteMaps.from_label_maps(maps),
        views,
        torch.tensor([3]),
        (2, 2),
        num_classes=NUM_CLASSES,
    )
    loss = token_label_loss(torch.zeros(1, NUM_CLASSES), torch.zeros(1, 4, NUM_CLASSES), targets)
    assert loss.class_loss.item() == pytest.approx(np.log(NUM_CLASSES), abs=1e-5)
    assert loss.dense_loss.item() == pytest.approx(np.log(NUM_CLASSES), abs=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_maps_the_loss_is_torchs_smoothed_cross_entropy_of_the_class_token(smoothing):
    rng = np.random.default_rng(2)
    logits = torch.from_numpy(rng.standard_normal((4, NUM_CLASSES))).float()
    aux = torch.from_numpy(rng.standard_normal((4, 6, NUM_CLASSES))).float().requires_grad_()
    labels = torch.tensor([0, 5, 22, 5])
    views = crop_view(torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(4, 1))
    targets = batch_targets(
        None, views, labels, (2, 3), num_classes=NUM_CLASSES, smoothing=smoothing
    )
    loss = token_label_loss(logits, aux, targets)
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    assert loss.class_loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert loss.dense_loss.item() == 0


def test_label_as_class_target_leaves_the_tokens_alone_on_or_off_the_palette():
    rng = np.random.default_rng(3)
    maps = [random_map(rng, num_classes=NUM_CLASSES, grid=(2, 2)) for _ in range(2)]
    on_palette = int(maps[0].classes[0, 0, 0])
    off_palette = int(np.setdiff1d(np.arange(NUM_CLASSES), maps[1].classes)[0])
    labels = torch.tensor([on_palette, off_palette])
    views = crop_view(torch.tensor([[0.1, 0.0, 0.9, 1.0]]).repeat(2, 1))
    batch = PaletteMaps.from_label_maps(maps)

    def build(class_target):
        return batch_targets(
            batch, views, labels, (2, 2), num_classes=NUM_CLASSES, class_target=class_target
        )

    pooled, labelled = build("pooled"), build("label")
    torch.testing.assert_close(labelled.dense_tokens(), pooled.dense_tokens())
    expected = F.one_hot(labels, NUM_CLASSES).float() * 0.9 + 0.1 / NUM_CLASSES
    torch.testing.assert_close(labelled.dense_view(), expected)
    logits = torch.from_numpy(rng.standard_normal((2, NUM_CLASSES))).float()
    aux = torch.from_numpy(rng.standard_normal((2, 4, NUM_CLASSES))).float()
    loss = token_label_loss(logits, aux, labelled)
    assert loss.class_loss.item() == pytest.approx(
        F.cross_entropy(logits, labels, label_smoothing=0.1).item(), abs=1e-5
    )
    assert loss.dense_loss.item() == pytest.approx(
        token_label_loss(logits, aux, pooled).dense_loss.item(), abs=1e-6
    )


def test_tokens_without_evidence_add_neither_loss_nor_gradient():
    label_map = random_map(
        np.random.default_rng(4), num_classes=NUM_CLASSES, window=(0.0, 0.0, 0.5, 1.0)
    )
    views = crop_view(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    targets = batch_targets(
        PaletteMaps.from_label_maps([label_map]),
        views,
        torch.tensor([0]),
        (1, 4),
        num_classes=NUM_CLASSES,
    )
    aux = torch.randn(1, 4, NUM_CLASSES, requires_grad=True)
    token_label_loss(torch.zeros(1, NUM_CLASSES), aux, targets).total.backward()
    assert aux.grad is not None
    moved = aux.grad[0].abs().sum(1) > 0
    assert moved.tolist() == [True, True, False, False]


def test_two_halves_of_a_batch_average_to_the_whole():
    """What gradient averaging over processes relies on, tokens outside the window included."""
    rng = np.random.default_rng(5)
    windows = [(0.0, 0.0, 0.3, 1.0), (0.0, 0.0, 1.0, 1.0)] * 2
    maps = [random_map(rng, num_classes=NUM_CLASSES, window=w) for w in windows]
    views = crop_view(torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(4, 1))
    logits = torch.from_numpy(rng.standard_normal((4, 5, NUM_CLASSES))).float()

    def loss_of(part: slice) -> float:
        targets = batch_targets(
            PaletteMaps.from_label_maps(maps[part]),
            views[part],
            torch.zeros(4, dtype=torch.int64)[part],
            (2, 2),
            num_classes=NUM_CLASSES,
        )
        return token_label_loss(logits[part, 0], logits[part, 1:], targets).total.item()

    halves = (loss_of(slice(0, 2)) + loss_of(slice(2, 4))) / 2
    assert halves == pytest.approx(loss_of(slice(0, 4)), abs=1e-5)


def test_class_counts_that_differ_are_refused_with_both_numbers():
    maps = [random_map(np.random.default_rng(6), num_classes=NUM_CLASSES)]
    views = crop_view(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    with pytest.raises(ValueError, match="label maps have 23 classes and the model 10"):
        batch_targets(
            PaletteMaps.from_label_maps(maps),
            views,
            torch.tensor([0]),
            (2, 2),
            num_classes=10,
        )


def sparse_case(seed: int, num_classes: int) -> tuple[torch.Tensor, ...]:
    """Logits and a random target of each token, on palettes with padding at the end."""
    rng = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(3, 5, num_classes, generator=rng)
    palette = torch.stack([torch.randperm(num_classes, generator=rng)[:7] for _ in range(3)])
    masses = torch.rand(3, 5, 8, generator=rng)
    masses[:, :, 5:7] = 0
    masses /= masses.sum(2, keepdim=True)
    background = masses[..., 7] / (num_classes - 5)
    probabilities = masses[..., :7].clone()
    probabilities[..., 5:] = background[..., None]
    palette[:, 5:] = palette[:, :1]
    return logits, palette, probabilities, background, torch.rand(3, 5, generator=rng)


def test_the_gradient_is_that_of_autograd_in_every_precision_and_scaled_by_what_follows():
    logits, palette, probabilities, background, weights = sparse_case(0, 11)
    target = background[..., None].repeat(1, 1, 11)
    target.scatter_(2, palette[:, None].expand(3, 5, 7), probabilities)
    target.scatter_(2, palette[:, None, :1].expand(3, 5, 1), probabilities[..., :1])
    exact = logits.double().requires_grad_()
    (-3 * (target * exact.log_softmax(2)).sum(2) * weights).sum().backward()
    assert exact.grad is not None
    for dtype, atol in ((torch.float32, 1e-6), (torch.bfloat16, 0.02)):
        ours = logits.clone().to(dtype).requires_grad_()
        loss = sparse_cross_entropy(ours, palette, probabilities, background, weights)
        (3 * loss).backward()
        assert ours.grad is not None and ours.grad.dtype == dtype
        torch.testing.assert_close(ours.grad.double(), exact.grad, atol=atol, rtol=0)
        with torch.no_grad():
            again = sparse_cross_entropy(ours, palette, probabilities, background, weights)
        torch.testing.assert_close(again, loss)


def test_the_gradient_can_be_fetched_once():
    logits, *rest = sparse_case(1, 11)
    loss = sparse_cross_entropy(logits.requires_grad_(), *rest)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss anew"):
        loss.backward()


KERNEL = """
import torch
from test_loss import sparse_case
from tokenlabel.trainer.loss import sparse_cross_entropy
from tokenlabel.trainer.loss_kernel import sparse_cross_entropies
for num_classes, dtype, atol in ((11, torch.float32, 1e-6), (40, torch.bfloat16, 0.02)):
    logits, palette, probabilities, background, weights = sparse_case(num_classes, num_classes)
    plain = logits.to(dtype).requires_grad_()
    loss = sparse_cross_entropy(plain, palette, probabilities, background, weights)
    loss.backward()
    gradient = torch.full_like(plain, 7.0, requires_grad=False)
    given = (plain.detach(), palette, probabilities, background, weights)
    losses = sparse_cross_entropies(*given, gradient)
    torch.testing.assert_close(losses.sum(), loss.detach())
    torch.testing.assert_close(gradient.float(), plain.grad.float(), atol=atol, rtol=0)
    torch.testing.assert_close(sparse_cross_entropies(*given, None), losses)
"""


def test_the_kernel_equals_the_plain_loss_and_gradient():
    pytest.importorskip("triton")
    # In a process of its own: Triton decides at its import whether it interprets.
    done = subprocess.run(
        [sys.executable, "-c", KERNEL],
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_on_a_gpu_the_loss_and_gradient_are_those_of_the_cpu():
    logits, *rest = sparse_case(2, 1000)
    results = []
    for device in ("cpu", "cuda"):
        x = logits.to(device).requires_grad_()
        loss = 2 * sparse_cross_entropy(x, *(tensor.to(device) for tensor in rest))
        loss.backward()
        assert x.grad is not None
        results.append((loss.detach().cpu(), x.grad.cpu()))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
