"""Sample statistics by hand."""

import math
import random

import pytest

from rlhf_recipes.evaluation.metrics import (
    accuracy_by_margin,
    calibration,
    distinct_n,
    length_histograms,
    mean_and_std,
    ngram_repetition,
    pair_accuracy,
    perplexity,
    repeated_share,
    rouge,
    unique_token_ratio,
)


def test_distinct_n():
    rows = [["a", "b", "a"], ["a", "b"]]
    assert distinct_n(rows, 1) == pytest.approx(2 / 5)
    assert distinct_n(rows, 2) == pytest.approx(2 / 3)  # ab, ba, ab
    assert distinct_n(rows, 3) == 1.0  # aba
    assert distinct_n([list("abab"), list("babc")], 3) == pytest.approx(3 / 4)  # aba bab, bab abc
    assert distinct_n([["a"], []], 2) == 0.0


def test_unique_token_ratio():
    assert unique_token_ratio([list("aaab"), ["c"], []]) == pytest.approx((0.5 + 1) / 2)
    assert unique_token_ratio([[], []]) is None


def test_the_repeated_share_is_of_ngrams():
    assert repeated_share("great great great great".split(), 2) == pytest.approx(2 / 3)  # 3 pairs, 1 of its own
    assert repeated_share("a b a c".split(), 2) == 0  # a word again, no pair
    assert repeated_share(["a"], 2) == repeated_share([], 2) == 0
    assert repeated_share("a b c a b c".split(), 3) == 1 / 4


def test_ngram_repetition_tells_loops_from_common_tokens():
    assert ngram_repetition([list("abcdabcd")]) == pytest.approx(1 / 5)  # abcd bcda cdab dabc abcd
    assert ngram_repetition([list("aaaaaaa"), list("abc"), []]) == pytest.approx((3 / 4 + 0 + 0) / 3)
    assert ngram_repetition([list("abacada")]) == 0.0 < 1 - unique_token_ratio([list("abacada")])
    assert ngram_repetition([list("abab")], n=2) == pytest.approx(1 / 3)


def test_perplexity():
    assert perplexity([math.log(1 / 4), math.log(1 / 16)], tokens=3) == pytest.approx(4)
    assert perplexity([0.0], tokens=5) == 1.0
    assert perplexity([], tokens=0) is None
    assert (
        perplexity([-math.inf, -1.0], 2) is None and perplexity([math.nan], 1) is None and perplexity([-1e4], 1) is None
    )


def test_mean_and_std():
    assert mean_and_std([1.0, 3.0]) == (2.0, 1.0)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_length_histograms_have_the_same_bins_for_every_model():
    made = length_histograms({"sft": [0, 1, 2, 9], "ppo": [9, 9]}, longest=9, bins=5)
    assert made == {"edges": [0, 2, 4, 6, 8, 10], "counts": {"sft": [2, 1, 0, 0, 1], "ppo": [0, 0, 0, 0, 2]}}
    short = length_histograms({"a": [0, 3]}, longest=3)  # fewer lengths than bins: one bin a length
    assert short == {"edges": [0, 1, 2, 3, 4], "counts": {"a": [1, 0, 0, 1]}}
    for longest in range(1, 130):
        made = length_histograms({"a": range(longest + 1)}, longest)
        assert sum(made["counts"]["a"]) == longest + 1 and len(made["edges"]) <= 21


def test_rouge_by_hand():
    assert rouge(["the cat sat"], ["the cat sat"]) == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    assert rouge([""], ["the cat"]) == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    # 3 of 3 words and 3 of 5; 1 of 2 word pairs (the cat) and 1 of 4; longest common subsequence: the cat, 2 words.
    found = rouge(["the cat on"], ["on the cat sat down"])
    assert found["rouge1"] == pytest.approx(2 * 1 * 0.6 / 1.6)
    assert found["rouge2"] == pytest.approx(2 * 0.5 * 0.25 / 0.75)
    assert found["rougeL"] == pytest.approx(2 * (2 / 3) * 0.4 / (2 / 3 + 0.4))
    assert rouge(["the cat sat", ""], ["the cat sat", "the cat"])["rouge1"] == 0.5
    assert rouge(["cats running"], ["cat runs"])["rouge1"] == 0.0  # no stemming


def test_pair_accuracy_counts_a_tie_as_wrong():
    assert pair_accuracy([0.5, -1.0, 0.0, 2.0]) == 0.5


def test_accuracy_by_margin():
    margins = [3.0, -0.1, 0.2, -2.0, 0.3, 4.0]
    assert accuracy_by_margin(margins, bins=2) == [
        {"from": 0.1, "to": 0.3, "pairs": 3, "accuracy": pytest.approx(2 / 3)},
        {"from": 2.0, "to": 4.0, "pairs": 3, "accuracy": pytest.approx(2 / 3)},
    ]
    assert [part["pairs"] for part in accuracy_by_margin([1.0] * 12)] == [2, 2, 3, 2, 3]
    assert accuracy_by_margin([-1.0, 2.0]) == [
        {"from": 1.0, "to": 1.0, "pairs": 1, "accuracy": 0.0},
        {"from": 2.0, "to": 2.0, "pairs": 1, "accuracy": 1.0},
    ]


def test_calibration_by_hand():
    # Two confidences: 0.6 (right once in two) and 0.88 (right three times in four).
    found = calibration([logit(0.6), -logit(0.6), *[logit(0.88)] * 3, -logit(0.88)], bins=5)
    assert found["ece"] == pytest.approx(2 / 6 * 0.1 + 4 / 6 * 0.13)
    assert found["brier"] == pytest.approx((0.4**2 + 0.6**2 + 3 * 0.12**2 + 0.88**2) / 6)
    low, high = found["bins"]
    assert (low["pairs"], low["accuracy"], high["pairs"], high["accuracy"]) == (2, 0.5, 4, 0.75)
    assert low["from"] <= low["confidence"] == pytest.approx(0.6) and low["to"] <= high["from"]
    assert high["confidence"] == pytest.approx(0.88) and high["from"] < 0.88 < high["to"]


def test_calibration_of_extremes():
    certain = calibration([1000.0, 1000.0])
    assert certain["ece"] == certain["brier"] == 0 and certain["bins"][0]["to"] == 1
    assert calibration([-1000.0])["ece"] == calibration([-1000.0])["brier"] == 1
    ties = calibration([0.0, 0.0])  # each is wrong, at confidence 0.5
    assert ties["ece"] == 0.5 and ties["brier"] == 0.25


def test_a_model_that_draws_by_its_own_probabilities_is_calibrated():
    dice = random.Random(0)
    sizes = [abs(dice.gauss(0, 2)) for _ in range(20_000)]
    margins = [m if dice.random() < 1 / (1 + math.exp(-m)) else -m for m in sizes]
    assert calibration(margins)["ece"] < 0.02
    assert calibration([3 * m for m in margins])["ece"] > 0.08  # the same answers, too sure of them


def test_calibration_is_that_of_both_orders_of_every_pair():
    """Guo et al.'s error for the binary question "is the first text better?", asked in both orders."""
    dice = random.Random(1)
    margins = [dice.gauss(0.5, 2) for _ in range(500)]
    asked = [(1 / (1 + math.exp(-m)), 1) for m in margins] + [(1 / (1 + math.exp(m)), 0) for m in margins]
    error = 0.0
    for i in range(20):
        part = [(p, y) for p, y in asked if i / 20 <= p < (i + 1) / 20]
        error += abs(sum(y for _, y in part) - sum(p for p, _ in part)) / len(asked)
    assert calibration(margins, bins=10)["ece"] == pytest.approx(error)
