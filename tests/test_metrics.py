"""Sample statistics by hand."""

import pytest

from rlhf_recipes.metrics import distinct_n, mean_and_std, repetition_rate


def test_distinct_n():
    rows = [["a", "b", "a"], ["a", "b"]]
    assert distinct_n(rows, 1) == pytest.approx(2 / 5)
    assert distinct_n(rows, 2) == pytest.approx(2 / 3)  # ab, ba, ab
    assert distinct_n([["a"], []], 2) == 0.0


def test_repetition_rate():
    assert repetition_rate([["a", "a", "a", "b"], ["c"], []]) == pytest.approx((0.5 + 0 + 0) / 3)


def test_mean_and_std():
    assert mean_and_std([1.0, 3.0]) == (2.0, 1.0)
