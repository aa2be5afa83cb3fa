"""Two models on the same images: what is luck, and what is not."""

import json
import math
from dataclasses import replace
from fractions import Fraction
from math import comb

import numpy as np
import pytest
import torch
from predicted import NAMES, predictions, shuffled, some_answers

from tokenlabel.evaluator import metrics
from tokenlabel.evaluator.compare import MOST_EXACT, compare, mcnemar
from tokenlabel.evaluator.predictions import Predictions


def pair(num_images: int = 80) -> tuple[Predictions, Predictions]:
    a, b = (
        predictions(*some_answers(num_images, seed=seed, skill=skill))
        for seed, skill in ((1, 1.5), (2, 3.0))
    )
    return a, b


# ---------------------------------------------------------------------------------------- test


@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (3, 9), (10, 10), (25, 4), (0, 30)])
def test_few_differences_are_counted_out_exactly(counts):
    total = sum(counts)
    as_unequal = [
        Fraction(comb(total, i), 2**total)
        for i in range(total + 1)
        if abs(2 * i - total) >= abs(counts[0] - counts[1])
    ]
    assert mcnemar(*counts) == (pytest.approx(float(sum(as_unequal))), True)


def test_a_published_example_gives_its_p_value():
    """Agresti, Categorical Data Analysis, table 10.1, approval of a prime minister: 86 and 150."""
    p_value, is_exact = mcnemar(86, 150)
    assert is_exact and p_value == pytest.approx(3.7e-5, rel=0.03)


def test_many_differences_follow_chi2_with_correction():
    for only_a, only_b in [(480, 560), (5200, 5100), (600, 600)]:
        p_value, is_exact = mcnemar(only_a, only_b)
        chi2 = max(abs(only_a - only_b) - 1, 0) ** 2 / (only_a + only_b)
        expected = torch.special.gammaincc(torch.tensor(0.5), torch.tensor(chi2 / 2))
        assert not is_exact and p_value == pytest.approx(float(expected), rel=1e-4)


def test_the_two_ways_meet_where_one_gives_way_to_the_other():
    half = MOST_EXACT // 2
    for gap in (5, 20, 40):
        exact, is_exact = mcnemar(half - gap, half + gap)
        near, is_near_exact = mcnemar(half - gap, half + gap + 1)
        assert is_exact and not is_near_exact
        assert near == pytest.approx(exact, rel=0.2)


# -------------------------------------------------------------------------------------- compare


def test_the_four_counts_are_those_of_a_loop():
    a, b = pair()
    found = compare(a, b)
    right = [
        [bool(one.heads["model"].top_classes[i, 0] == one.classes[i]) for one in (a, b)]
        for i in range(80)
    ]
    assert found.num_both == right.count([True, True]) > 0
    assert found.num_neither == right.count([False, False]) > 0
    assert set(found.only_a) == {f"photo/{i}" for i in range(80) if right[i] == [True, False]}
    assert set(found.only_b) == {f"photo/{i}" for i in range(80) if right[i] == [False, True]}
    assert (found.p_value, found.is_exact) == mcnemar(len(found.only_a), len(found.only_b))
    same = [
        one == other
        for one, other in zip(
            a.heads["model"].top_classes[:, 0], b.heads["model"].top_classes[:, 0]
        )
    ]
    assert found.agreement.value == pytest.approx(100 * np.mean(same))
    assert found.p_value < 0.05 and len(found.only_b) > len(found.only_a)


def test_each_side_has_the_numbers_that_it_has_alone():
    a, b = pair()
    found = compare(a, b)
    assert found.a == metrics.measure(a).heads["model"]
    assert found.b == metrics.measure(b).heads["model"]
    for name, difference in found.differences.items():
        gap = getattr(found.b, name).value - getattr(found.a, name).value
        assert difference.value == pytest.approx(gap)
        assert difference.low <= difference.high


def test_differences_are_resampled_in_pairs():
    """Shifting every loss by the same amount leaves no doubt about the difference."""
    a, _ = pair()
    head = a.heads["model"]
    b = replace(a, heads={"model": replace(head, true_log_probs=head.true_log_probs - 0.5)})
    difference = compare(a, b).differences["loss"]
    assert difference == pytest.approx((0.5, 0.5, 0.5))
    assert compare(a, b).a.loss.high - compare(a, b).a.loss.low > 0.2


def test_the_paired_interval_of_top1_is_that_of_the_differing_images():
    a, b = pair(400)
    found = compare(a, b, num_resamples=4000)
    first, second = len(found.only_a) / 400, len(found.only_b) / 400
    deviation = math.sqrt((first + second - (second - first) ** 2) / 400)
    value, low, high = found.differences["top1"]
    assert value == pytest.approx(100 * (second - first))
    assert (high - low) / 2 == pytest.approx(196 * deviation, rel=0.06)


def test_exchanging_the_two_turns_every_sign():
    a, b = pair()
    there, back = compare(a, b), compare(b, a)
    assert (there.a, there.b, there.p_value) == (back.b, back.a, back.p_value)
    assert (there.only_a, there.only_b) == (back.only_b, back.only_a)
    for name, (value, low, high) in there.differences.items():
        assert back.differences[name] == pytest.approx((-value, -high, -low))


def test_the_order_of_images_changes_nothing():
    a, b = pair()
    assert compare(a, b) == compare(shuffled(a, 1), shuffled(b, 2))


def test_a_model_does_not_differ_from_itself():
    a, _ = pair()
    found = compare(a, a)
    assert (found.p_value, found.only_a, found.only_b, found.classes) == (1, [], [], [])
    assert found.agreement.value == 100
    assert set(found.differences.values()) == {(0, 0, 0)}


def test_heads_of_one_model_can_be_compared():
    one = predictions(*some_answers(40), heads=2)
    found = compare(one, one, head_b="head1")
    assert found.b == metrics.measure(one).heads["head1"]
    with pytest.raises(ValueError, match="B has no head 'dense'; it has model, head1"):
        compare(one, one, head_b="dense")


def test_the_surest_disagreements_come_first():
    a, b = pair()
    found = compare(a, b)
    product = {
        key: float(a.heads["model"].top_probs[i, 0]) * float(b.heads["model"].top_probs[i, 0])
        for i, key in enumerate(a.keys)
    }
    for keys in (found.only_a, found.only_b):
        assert len(keys) > 3
        assert [product[key] for key in keys] == sorted(product[key] for key in keys)[::-1]


def test_classes_that_change_are_named_with_both_shares():
    a, b = pair()
    found = compare(a, b)
    shares = [{row.index: row.top1.value for row in metrics.per_class(one)} for one in (a, b)]
    changed = {i for i in shares[0] if shares[0][i] != shares[1][i]}
    assert {change.index for change in found.classes} == changed
    for change in found.classes:
        assert change.name == NAMES[change.index]
        assert change.top1_a == pytest.approx(shares[0][change.index])
        assert change.top1_b == pytest.approx(shares[1][change.index])
    gaps = [abs(round(each.num_images * (each.top1_b - each.top1_a))) for each in found.classes]
    assert gaps == sorted(gaps)[::-1]


def test_only_images_that_both_have_are_compared():
    a, b = pair()
    found = compare(a.select(a.keys[:50]), b.select(b.keys[10:]))
    assert (found.num_images, found.num_left_out) == (40, 40)
    assert found.a == metrics.measure(a.select(a.keys[10:50])).heads["model"]


def test_several_right_classes_are_honoured():
    probs, classes = some_answers(40)
    best = probs.argsort(1)[:, ::-1]
    valid = [(int(c), int(top[0])) for c, top in zip(classes, best)]
    a = predictions(probs, classes, valid=valid)
    assert compare(a, a).num_both == 40
    with pytest.raises(ValueError, match="count different classes as right"):
        compare(a, predictions(probs, classes))


def test_other_images_other_classes_and_other_labels_are_refused():
    a, _ = pair()
    renamed = replace(a, keys=[f"other/{i}" for i in range(80)])
    with pytest.raises(ValueError, match="A has 'photo/0', B has 'other/0'; both must be"):
        compare(a, renamed)
    classes = a.classes.copy()
    classes[7] = (classes[7] + 1) % 8
    with pytest.raises(ValueError, match=r"class of photo/7 is \d in A, but \d in B"):
        compare(a, replace(a, classes=classes))
    with pytest.raises(ValueError, match="A has 8 classes, B 9"):
        compare(a, predictions(*some_answers(80, 9)))


def test_the_result_is_plain_json():
    a, b = pair()
    plain = json.loads(json.dumps(compare(a, b).to_json(), allow_nan=False))
    assert plain["differences"]["top1"] == list(compare(a, b).differences["top1"])
    assert plain["a"]["top1"] == compare(a, b).a.top1.value
    assert plain["num_images"] == 80 and len(plain["only_a"]) + len(plain["only_b"]) > 0
