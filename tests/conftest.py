"""Fixtures that several test files share."""

from pathlib import Path

from tokenlabel.labeler.cpu import wait_briefly

wait_briefly()  # as the commands do, before torch is loaded

import hypothesis
import numpy as np
import pytest
import torch

from tokenlabel.labeler.label_map import LabelMap

# The same examples in every run: what was green stays green until the code changes.
# `pytest --hypothesis-profile=new` looks for others.
hypothesis.settings.register_profile("seeded", derandomize=True, deadline=None)
hypothesis.settings.register_profile("new", deadline=None)
hypothesis.settings.load_profile("seeded")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _few_threads():
    # The suite shares two cores with DALI's threads; tiny tensors gain nothing from more.
    torch.set_num_threads(2)


def random_map(
    rng: np.random.Generator,
    *,
    grid: tuple[int, int] = (6, 7),
    k: int = 5,
    num_classes: int = 40,
    window: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
    normalizer: bool = True,
    spread: float = 3.0,
) -> LabelMap:
    """Top-k of random logits: a label map whose full logits nobody needs."""
    label_map, _ = random_map_and_logits(
        rng, grid=grid, k=k, num_classes=num_classes, window=window, spread=spread
    )
    if normalizer:
        return label_map
    return LabelMap(
        scores=label_map.scores,
        classes=label_map.classes,
        num_classes=num_classes,
        window=window,
    )


def random_map_and_logits(
    rng: np.random.Generator,
    *,
    grid: tuple[int, int],
    k: int,
    num_classes: int,
    window: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
    spread: float = 3.0,
) -> tuple[LabelMap, np.ndarray]:
    """A label map and the (classes, rows, cols) float16 logits it was made from."""
    logits = (rng.standard_normal((num_classes, *grid)) * spread).astype(np.float16)
    order = np.argsort(-logits, axis=0, kind="stable")[:k]
    full = logits.astype(np.float64)
    normalizer = np.log(np.exp(full).sum(0)).astype(np.float16)
    label_map = LabelMap(
        scores=np.take_along_axis(logits, order, 0),
        classes=order.astype(np.uint32),
        num_classes=num_classes,
        log_normalizer=normalizer,
        window=window,
    )
    return label_map, logits


@pytest.fixture
def docs_folder() -> Path:
    """The documentation of the checkout the tests stand in."""
    return Path(__file__).parent.parent / "docs"
