"""Verdicts: intervals by hand, few errors among equals, symmetry, and cases without a winner."""

import math
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_recipes.comparison.verdict import decide, view_of, void
from rlhf_recipes.evaluation.intervals import (
    bootstrap_band,
    bootstrap_difference,
    bootstrap_interval,
    student_interval,
    welch_interval,
)


def view(ppo, rloo, metric="score_mean", where="held_out", seeds=range(42, 99)):
    values = {"ppo": list(zip(seeds, ppo, strict=False)), "rloo": list(zip(seeds, rloo, strict=False))}
    return view_of(where, metric, values)


def unpaired(ppo, rloo):
    return view_of("held_out", "score_mean", {"ppo": [(None, x) for x in ppo], "rloo": [(None, y) for y in rloo]})


def test_paired_interval_by_hand():
    found = view([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])  # differences 1, 2, 3: mean 2, deviation 1; t(0.975, 2) = 4.3027
    reach = 4.302652729911275 / math.sqrt(3)
    assert found["paired"] and found["seeds"] == {"ppo": 3, "rloo": 3} and found["means"] == {"ppo": 4.0, "rloo": 2.0}
    assert found["interval"] == pytest.approx((2 - reach, 2 + reach)) and found["winner"] is None
    assert found["bootstrap"] == pytest.approx((1.0, 3.0))  # the bootstrap interval alone would name a winner
    assert found["label"] == "inconclusive" and "either may be the better one" in found["sentence"]


def test_a_winner_is_named_with_its_numbers():
    found = view([1.10, 1.21, 1.30], [1.0, 1.1, 1.2])
    assert (found["winner"], found["label"]) == ("ppo", "PPO better") and found["difference"] == pytest.approx(0.31 / 3)
    assert found["sentence"] == (
        "On held-out prompts the mean score is 1.203 with PPO and 1.100 with RLOO: PPO minus RLOO is +0.103. Its 95 % "
        "interval is all on one side of 0 (+0.089 to +0.118 over 3 seeds, paired; by bootstrap +0.100 to +0.110)."
    )
    assert view([1.0, 1.1, 1.2], [1.10, 1.21, 1.30])["label"] == "RLOO better"


def test_unpaired_interval_by_hand():
    found = unpaired([1.0, 3.0], [10.0, 11.0, 12.0])  # variances 2 and 1: error^2 = 2/2 + 1/3
    error = math.sqrt(4 / 3)
    freedom = (4 / 3) ** 2 / (1.0 / 1 + (1 / 3) ** 2 / 2)
    assert not found["paired"] and found["difference"] == -9.0
    low, high = found["interval"]
    assert (low + high) / 2 == pytest.approx(-9.0) and freedom == pytest.approx(1.684, abs=1e-3)
    assert (high - low) / 2 / error == pytest.approx(5.19, abs=0.02)  # t(0.975, 1.684), between t(1) and t(2)
    assert found["winner"] == "rloo" and "2 seeds and 3 seeds" in found["sentence"]


NUMBERS = st.lists(st.floats(-5, 5), min_size=1, max_size=5)


@settings(deadline=None)  # scipy loads in the first example
@given(NUMBERS, NUMBERS, st.booleans())
def test_the_order_of_the_algorithms_does_not_matter(x, y, pair):
    forth, back = (view(x, y), view(y, x)) if pair else (unpaired(x, y), unpaired(y, x))
    other = {"ppo": "rloo", "rloo": "ppo", None: None}
    assert back["winner"] == other[forth["winner"]] and back["difference"] == pytest.approx(-forth["difference"])
    if forth["interval"] is not None:
        assert back["interval"] == pytest.approx((-forth["interval"][1], -forth["interval"][0]))


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=5), st.floats(-3, 3))
def test_a_shift_of_all_scores_changes_nothing(pairs, shift):
    (x, y), moved = zip(*pairs, strict=True), [(a + shift, b + shift) for a, b in pairs]
    found, other = view(x, y), view(*zip(*moved, strict=True))
    assert other["interval"] == pytest.approx(found["interval"], abs=1e-9)


@pytest.mark.parametrize("seeds", [2, 3, 4])
def test_the_verdict_names_a_winner_among_equals_in_one_of_twenty_duels(seeds):
    """The bootstrap interval, which does not decide, would in far more."""
    draw = random.Random(seeds)
    wins, by_bootstrap, duels = 0, 0, 1000
    for i in range(duels):
        x, y = ([draw.gauss(0.6, 0.05) for _ in range(seeds)] for _ in range(2))
        differences = [a - b for a, b in zip(x, y, strict=True)]
        low, high = student_interval(differences)
        wins += low > 0 or high < 0
        if i < 20:
            assert (view(x, y)["winner"] is not None) == (low > 0 or high < 0)
        if i < 200:
            low, high = bootstrap_interval(differences, resamples=199)
            by_bootstrap += low > 0 or high < 0
    assert wins / duels < 0.07
    assert by_bootstrap / 200 > {2: 0.4, 3: 0.17, 4: 0.08}[seeds]


def test_unpaired_duels_among_equals_rarely_have_a_winner():
    draw = random.Random(0)
    intervals = [
        welch_interval([draw.gauss(0, 1) for _ in range(3)], [draw.gauss(0, 3) for _ in range(3)]) for _ in range(1000)
    ]
    assert sum(low > 0 or high < 0 for low, high in intervals) / 1000 < 0.07


@pytest.mark.parametrize(
    ("ppo", "rloo", "why"),
    [
        ([0.9], [0.1], "With one seed each, this cannot be told from chance; run more seeds."),
        ([0.9], [0.1, 0.2, 0.3], "With one seed of PPO, this"),
        ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], "All seeds give the same difference"),
        ([0.7, 0.8, 0.9], [0.6, 0.7, 0.8], "All seeds give the same difference"),
        ([0.7, 0.8], [None, None], "there is no mean score of RLOO (0.750 with PPO)."),
        ([math.nan, math.nan], [0.7, 0.8], "there is no mean score of PPO (0.750 with RLOO)."),
        ([math.inf, 0.5], [0.7, 0.8], "With one seed of PPO"),
        ([], [0.7, 0.8], "there is no mean score of PPO (0.750 with RLOO)."),
        ([], [math.nan], "there is no mean score of PPO and RLOO."),
    ],
)
def test_where_there_is_no_winner(ppo, rloo, why):
    found = view(ppo, rloo)
    assert found["winner"] is None and found["label"] == "inconclusive" and why in found["sentence"]


@pytest.mark.parametrize(
    ("ppo", "rloo", "shown"),
    [
        ([0.1880, 0.1888], [0.1292, 0.1888], "-0.344 to +0.403"),
        ([-512.1, -480.3, -500.0], [-530.0, -510.5, -512.3], "is -497.5 with PPO and -517.6 with RLOO"),
        ([1e-4, 1.1e-4, 1.3e-4], [1e-5, 2e-5, 1e-5], "is 0.00011 with PPO and 0.00001 with RLOO"),
        ([0.5, 0.5], [0.5, 0.5001], "PPO minus RLOO is -0.0000"),
        ([0.5, 0.5], [0.5, 0.5], "PPO minus RLOO is 0.000."),
    ],
)
def test_all_numbers_of_a_sentence_have_as_many_decimals(ppo, rloo, shown):
    said = view(ppo, rloo)["sentence"]
    assert shown in said, said
    assert len({len(decimals) for decimals in re.findall(r"[0-9]\.([0-9]+)", said)}) == 1, said


@pytest.mark.parametrize(
    ("where", "at", "said"),
    [("episodes", 4096, "4,096 episodes"), ("tokens", 1e6, "1,000,000 tokens"), ("seconds", 5.76, "5.76 seconds")],
)
def test_the_sentence_names_the_budget(where, at, said):
    found = view_of(where, "score_mean", {"ppo": [(1, 0.5)], "rloo": [(1, 0.25)]}, at)
    assert found["sentence"].startswith(f"In training, after {said} each, the mean score is 0.500 with PPO")


def test_unmatched_seeds_are_left_out_if_two_match():
    found = view_of(
        "held_out", "score_mean", {"ppo": [(42, 1.0), (43, 2.0), (44, 99.0)], "rloo": [(43, 1.5), (42, 0.6)]}
    )
    assert found["paired"] and found["seeds"] == {"ppo": 2, "rloo": 2} and found["means"]["ppo"] == 1.5
    alone = view_of("held_out", "score_mean", {"ppo": [(42, 1.0), (43, 2.0)], "rloo": [(43, 1.5), (50, 0.6)]})
    assert not alone["paired"] and alone["seeds"] == {"ppo": 2, "rloo": 2}


def test_a_seed_that_ran_twice_is_one_seed():
    found = view_of("held_out", "score_mean", {"ppo": [(42, 1.0), (42, 2.0)], "rloo": [(42, 0.1), (42, 0.1)]})
    assert found["seeds"] == {"ppo": 1, "rloo": 1} and found["winner"] is None and found["means"]["ppo"] == 1.5


WIN = view([1.1, 1.2, 1.31], [0.1, 0.2, 0.3])


def test_the_verdict_says_that_the_held_out_score_disagrees():
    against = view([0.1, 0.2, 0.3], [1.1, 1.2, 1.31], metric="held_out_mean")
    weak = view([0.1, 0.2, 0.3], [0.2, 0.1, 0.9], metric="held_out_mean")
    with_it = view([1.1, 1.2, 1.3], [0.1, 0.2, 0.3], metric="held_out_mean")
    said = [decide([WIN, judged], ["ppo", "rloo"], [])["sentence"] for judged in (against, weak, with_it)]
    assert (
        "But the held-out score, which training does not see, prefers RLOO: 0.200 with PPO and 1.203 with RLOO."
        in said[0]
    )
    assert "does not confirm it: 0.200 with PPO and 0.400 with RLOO." in said[1] and "held-out score" not in said[2]


def test_the_verdict_says_that_the_winner_has_much_more_kl():
    near, far = {"ppo": 6.0, "rloo": 5.0}, {"ppo": 12.0, "rloo": 5.0}
    assert "KL" not in decide([WIN], ["ppo", "rloo"], [], kl=near)["sentence"]
    assert "farther" not in decide([WIN], ["ppo", "rloo"], [], kl={"ppo": 0.2, "rloo": 0.1})["sentence"]
    assert "KL 12.0 against 5.0 nats" in decide([WIN], ["ppo", "rloo"], [], kl=far)["sentence"]
    loser_far = {"ppo": 5.0, "rloo": 12.0}
    assert "farther" not in decide([WIN], ["ppo", "rloo"], [], kl=loser_far)["sentence"]


def test_runs_that_are_not_comparable_have_no_winner():
    refused = decide([WIN], ["ppo", "rloo"], ["trainer.beta", "policy"])
    assert refused["winner"] is None and refused["label"] == "not comparable"
    assert "trainer.beta, policy" in refused["sentence"]
    unknown = decide([WIN], ["ppo", "rloo"], [], unknown="Nothing is known.")
    assert unknown["winner"] is None and unknown["label"] == "not comparable"
    assert unknown["sentence"].startswith("Nothing is known. The numbers alone would say: PPO better. On held-out")
    for labels in (["ppo"], ["ppo", "rloo", "grpo"]):
        assert decide([], labels, [])["label"] == "nothing to compare"
    assert "all runs are of PPO; name two" in decide([], ["ppo"], [])["sentence"]
    assert decide([], ["ppo", "rloo"], [])["label"] == "nothing to compare"


def test_a_void_view_keeps_its_numbers_and_loses_its_winner():
    found = void(WIN, "Other machines.")
    assert found["means"] == WIN["means"] and found["winner"] is None and found["label"] == "not comparable"


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(-5, 5), min_size=3, max_size=3), min_size=2, max_size=4))
def test_bands_lie_around_the_mean_and_within_the_curves(rows):
    low, high = bootstrap_band(rows)
    for column, bottom, top in zip(zip(*rows, strict=True), low, high, strict=True):
        mean = sum(column) / len(column)
        assert min(column) - 1e-9 <= bottom <= mean + 1e-9 and mean - 1e-9 <= top <= max(column) + 1e-9


def test_the_same_numbers_give_the_same_intervals():
    assert bootstrap_difference([1, 2, 3], [2, 3, 5]) == bootstrap_difference([1, 2, 3], [2, 3, 5])
    assert bootstrap_difference([1], [2, 3]) is None and bootstrap_band([[1.0]]) is None
    assert welch_interval([2.0, 2.0], [1.0, 1.0]) == (1.0, 1.0) and welch_interval([1.0], [1.0, 2.0]) is None
