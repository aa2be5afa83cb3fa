"""Predictions made up for tests."""

import numpy as np

from tokenlabel.evaluator.predictions import HeadScores, Predictions

NAMES = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay", "koi", "lynx"]


def answers(probs: np.ndarray, classes: np.ndarray) -> HeadScores:
    """Keep what a head keeps of whole rows of probabilities."""
    order = np.argsort(-probs, axis=1, kind="stable")[:, :5]
    with np.errstate(divide="ignore"):
        true = np.log(probs[np.arange(len(probs)), classes].astype(np.float64))
    return HeadScores(
        top_classes=order.astype(np.int64),
        top_probs=np.take_along_axis(probs, order, axis=1).astype(np.float32),
        true_log_probs=np.where(classes >= 0, true, np.nan),
    )


def predictions(
    probs: np.ndarray,
    classes: np.ndarray,
    *,
    heads: int = 1,
    valid: list[tuple[int, ...]] | None = None,
) -> Predictions:
    """Give images the keys photo/0, photo/1, …; heads beyond the first see classes rotated."""
    names = ["model", *(f"head{i}" for i in range(1, heads))]
    return Predictions(
        keys=[f"photo/{i}" for i in range(len(classes))],
        classes=classes.astype(np.int64),
        heads={name: answers(np.roll(probs, i, 1), classes) for i, name in enumerate(names)},
        num_classes=probs.shape[1],
        class_names=NAMES[: probs.shape[1]],
        valid=valid,
        facts={"model": "made up", "data": "photos"},
    )


def some_answers(
    num_images: int = 60, num_classes: int = 8, *, seed: int = 0, skill: float = 2.0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw probabilities, and classes that depend on the number of images alone."""
    classes = np.random.default_rng(num_images).integers(0, num_classes, num_images)
    logits = np.random.default_rng(seed).standard_normal((num_images, num_classes)) * 2
    logits[np.arange(num_images), classes] += skill
    probs = np.exp(logits)
    return probs / probs.sum(1, keepdims=True), classes


def shuffled(one: Predictions, seed: int = 1) -> Predictions:
    """Put the same images into another order."""
    order = np.random.default_rng(seed).permutation(len(one))
    return one.select([one.keys[i] for i in order])
