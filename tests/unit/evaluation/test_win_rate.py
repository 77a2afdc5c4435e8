"""Win rates: hand-computed cases, and what must hold when the two sides change places."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_recipes.evaluation.judge.win_rate import (
    _fit,
    agreement,
    length_controlled_win_rate,
    log_length_ratio,
    win_rate,
    win_rate_by_length,
)

PAIRS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=40
)
"""Outcome, words of a, words of b."""


def columns(pairs):
    return [outcome for outcome, _, _ in pairs], [log_length_ratio("w " * a, "w " * b) for _, a, b in pairs]


def swapped(outcomes, ratios):
    return [1 - outcome for outcome in outcomes], [-ratio for ratio in ratios]


def made_up(n, strength, slope, mean_ratio, seed=0):
    """Outcomes of a judge with a known strength of a and a known liking for length."""
    draw = random.Random(seed)
    ratios = [draw.gauss(mean_ratio, 0.5) for _ in range(n)]
    return [float(draw.random() < 1 / (1 + math.exp(-strength - slope * ratio))) for ratio in ratios], ratios


def test_length_ratio():
    assert log_length_ratio("one two three", "one") == pytest.approx(math.log(2))
    assert log_length_ratio("", "one") == pytest.approx(-math.log(2))
    assert log_length_ratio("a b", "a b c d e") == log_length_ratio("a", "a b c") == -log_length_ratio("a b c", "a")


def test_win_rate_by_hand():
    found = win_rate([1, 1, 0.5, 0])
    assert found["win_rate"] == 0.625
    assert found["interval"][0] < 0.625 < found["interval"][1]
    assert win_rate([1.0]) == {"win_rate": 1.0, "interval": None}
    assert win_rate([]) == {"win_rate": None, "interval": None}


def test_interval_holds_what_is_true_as_often_as_it_says():
    draw = random.Random(1)
    held = 0
    for _ in range(100):
        low, high = win_rate([float(draw.random() < 0.7) for _ in range(60)])["interval"]
        held += low <= 0.7 <= high
    assert 88 <= held <= 100


@given(PAIRS)
def test_bins_are_mirrored_when_sides_change(pairs):
    outcomes, ratios = columns(pairs)
    bins, mirrored = win_rate_by_length(outcomes, ratios), win_rate_by_length(*swapped(outcomes, ratios))
    assert len(bins) == len(mirrored)
    for one, other in zip(bins, reversed(mirrored), strict=True):
        assert (one["from"], one["to"], one["prompts"]) == (-other["to"], -other["from"], other["prompts"])
        assert one["win_rate"] == pytest.approx(1 - other["win_rate"], abs=1e-12)


@given(PAIRS)
def test_bins_hold_every_pair_once_in_order(pairs):
    outcomes, ratios = columns(pairs)
    bins = win_rate_by_length(outcomes, ratios)
    assert 1 <= len(bins) <= 10
    assert sum(part["prompts"] for part in bins) == len(pairs)
    assert sum(part["prompts"] * part["win_rate"] for part in bins) == pytest.approx(sum(outcomes))
    assert all(one["to"] <= next_one["from"] for one, next_one in itertools.pairwise(bins))


def test_bins_by_hand():
    ratios = [float(i) for i in range(20)]
    bins = win_rate_by_length([float(i % 4 == 0) for i in range(20)], ratios)
    assert [(part["from"], part["to"], part["prompts"]) for part in bins] == [(2 * i, 2 * i + 1, 2) for i in range(10)]
    assert [part["win_rate"] for part in bins] == [0.5, 0.0] * 5
    # Equal ratios stay together; the bins that they would have filled are left out.
    together = win_rate_by_length([1.0] * 8 + [0.0, 0.0], [0.0] * 8 + [1.0, 2.0])
    assert [(part["from"], part["prompts"]) for part in together] == [(0.0, 8), (1.0, 1), (2.0, 1)]
    assert win_rate_by_length([], []) == []


@given(PAIRS)
@settings(deadline=None)
def test_fit_changes_sign_when_sides_change(pairs):
    outcomes, ratios = columns(pairs)
    strength, slope = _fit(outcomes, ratios)
    assert math.isfinite(strength) and math.isfinite(slope)
    assert _fit(*swapped(outcomes, ratios)) == pytest.approx((-strength, slope), abs=1e-6)


def test_all_of_it_is_mirrored_when_sides_change():
    outcomes, ratios = made_up(60, 0.4, 1.0, 0.5)
    for one, other in (
        (win_rate(outcomes), win_rate(swapped(outcomes, ratios)[0])),
        (length_controlled_win_rate(outcomes, ratios), length_controlled_win_rate(*swapped(outcomes, ratios))),
    ):
        low, high = other["interval"]
        assert one["win_rate"] == pytest.approx(1 - other["win_rate"])
        assert one["interval"] == pytest.approx((1 - high, 1 - low))


def test_fit_of_two_groups_is_the_mean_of_their_log_odds():
    # 80 % wins at ratio 1, 40 % at -1: strength = (logit(0.8) + logit(0.4)) / 2, slope the half of their difference.
    outcomes = [1.0] * 800 + [0.0] * 200 + [1.0] * 400 + [0.0] * 600
    ratios = [1.0] * 1000 + [-1.0] * 1000
    strength, slope = _fit(outcomes, ratios)
    assert strength == pytest.approx((math.log(4) + math.log(2 / 3)) / 2, abs=1e-3)
    assert slope == pytest.approx((math.log(4) - math.log(2 / 3)) / 2, abs=1e-3)


def test_a_judge_of_length_alone_has_no_favourite_at_equal_lengths():
    outcomes, ratios = made_up(400, 0.0, 3.0, 0.6)
    raw, controlled = win_rate(outcomes), length_controlled_win_rate(outcomes, ratios)
    assert raw["interval"][0] > 0.7
    assert controlled["interval"][0] < 0.5 < controlled["interval"][1]
    assert abs(controlled["win_rate"] - 0.5) < 0.1
    assert controlled["slope"] == pytest.approx(3, abs=0.8)
    assert not controlled["extrapolated"]


def test_a_better_side_that_writes_shorter_wins_more_at_equal_lengths():
    outcomes, ratios = made_up(400, 1.5, 3.0, -0.5, seed=1)
    assert win_rate(outcomes)["interval"][1] < 0.7 < length_controlled_win_rate(outcomes, ratios)["interval"][0]


def test_without_differences_in_length_it_is_the_win_rate():
    outcomes = [1.0] * 60 + [0.5] * 10 + [0.0] * 30
    assert length_controlled_win_rate(outcomes, [0.0] * 100)["win_rate"] == pytest.approx(0.65, abs=1e-3)


def test_wins_alone_are_fitted_to_a_finite_number():
    found = length_controlled_win_rate([1.0] * 30, [0.1, -0.1] * 15)
    assert 0.99 < found["win_rate"] < 1
    # Longer always wins, shorter never: a steep slope, and nothing for either side.
    separated = length_controlled_win_rate([1.0] * 20 + [0.0] * 20, [0.5] * 20 + [-0.5] * 20)
    assert separated["win_rate"] == pytest.approx(0.5) and 5 < separated["slope"] < 50


def test_a_side_that_is_always_longer_is_an_extrapolation():
    assert length_controlled_win_rate([1.0, 0.0, 1.0], [0.5, 0.6, 0.7])["extrapolated"]
    assert length_controlled_win_rate([], [])["win_rate"] is None


def test_agreement_by_hand():
    found = agreement([1, 1, 0, 0, 0.5, 1, 0], [2.0, -1.0, -3.0, -0.1, 9.0, None, 0.0])
    assert (found["share"], found["pairs"]) == (0.75, 4)
    assert agreement([0.5, 1], [1.0, None]) is None


@given(PAIRS)
@settings(deadline=None, max_examples=20)
def test_agreement_does_not_depend_on_which_side_is_a(pairs):
    outcomes, differences = columns(pairs)
    assert agreement(outcomes, differences) == agreement(*swapped(outcomes, differences))
