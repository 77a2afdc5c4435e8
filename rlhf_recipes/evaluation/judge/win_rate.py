"""Rates computed from a judge's outcomes: win rate, length-controlled win rate, and agreement with other scores.

An outcome is a number for one prompt: 1 where a won, 0 where b won, 1/2 where neither did. A length ratio is
log((words of a + 1) / (words of b + 1)), in words because models may differ in their tokens.
"""

import math
from collections.abc import Sequence
from typing import Any

from rlhf_recipes.evaluation.intervals import bootstrap_interval

BINS = 10

RIDGE = 0.01
"""Weight of half the squared coefficients. Without it the fit is infinite where one side wins every time. It barely moves
a fit of a few dozen pairs: 100 pairs of equal lengths, of which 80 are wins, give 0.7999."""


def log_length_ratio(a: str, b: str) -> float:
    """Positive where a is longer; one word is added to each text, so that empty texts have a ratio too."""
    words_a, words_b = len(a.split()) + 1, len(b.split()) + 1
    # Not a difference of logarithms: 2 to 4 and 3 to 6 must give the same number, and 4 to 2 its negative.
    return math.log(words_a / words_b) if words_a >= words_b else -math.log(words_b / words_a)


def win_rate(outcomes: Sequence[float]) -> dict[str, Any]:
    """Mean outcome and its 95 % interval over prompts; None where there are none."""
    if not outcomes:
        return {"win_rate": None, "interval": None}
    return {"win_rate": sum(outcomes) / len(outcomes), "interval": bootstrap_interval(outcomes)}


def length_controlled_win_rate(outcomes: Sequence[float], ratios: Sequence[float]) -> dict[str, Any]:
    """The win rate at equal lengths, with its 95 % interval.

    Fits P(a wins) = sigmoid(strength + slope * ratio) to the outcomes by maximum likelihood with a small ridge; the
    win rate is sigmoid(strength).

    Source: Dubois et al. 2024 (2404.04475), simplified: no term for the difficulty of a prompt, which needs many
    models' answers, and the log ratio of lengths instead of tanh of their standardised difference.

    Args:
        outcomes: 1, 1/2 or 0, (n,).
        ratios: Log length ratios, (n,).

    Returns:
        `win_rate`, `interval`, `slope` (of the log odds, for a ratio of e) and `extrapolated`: whether one side is
        longer for every prompt, so that the form of the fit decides instead of pairs of equal length.
    """
    if not outcomes:
        return {"win_rate": None, "interval": None, "slope": None, "extrapolated": None}
    strength, slope = _fit(outcomes, ratios)
    return {
        "win_rate": _sigmoid(strength),
        "interval": bootstrap_interval(outcomes, ratios, statistic=lambda y, x: _sigmoid(_fit(y, x)[0])),
        "slope": slope,
        "extrapolated": min(ratios) > 0 or max(ratios) < 0,
    }


def win_rate_by_length(outcomes: Sequence[float], ratios: Sequence[float]) -> list[dict[str, Any]]:
    """Win rates in tenths of the log length ratio, shortest first, without empty tenths.

    Equal ratios stay together: all go to the tenth of their middle rank. On the border of two tenths they go to the
    outer one, and in the very middle half to each, so that the bins of b against a are the mirror image.

    Returns:
        `from`, `to` (log length ratios), `prompts` (with a half where the middle is shared) and `win_rate` of each.
    """
    from scipy.stats import rankdata

    bins: list[list[tuple[float, float, float]]] = [[] for _ in range(BINS)]  # weight, ratio, outcome
    positions = (rankdata(ratios) - 0.5) * BINS / max(1, len(ratios))  # whole numbers are borders of tenths
    for outcome, ratio, position in zip(outcomes, ratios, positions.tolist(), strict=True):
        below, above = math.ceil(position) - 1, math.floor(position)
        places = {below} if 2 * position < BINS else {above} if 2 * position > BINS else {below, above}
        for place in places:
            bins[place].append((1 / len(places), ratio, outcome))
    return [
        {
            "from": min(ratio for _, ratio, _ in rows),
            "to": max(ratio for _, ratio, _ in rows),
            "prompts": sum(weight for weight, _, _ in rows),
            "win_rate": sum(weight * outcome for weight, _, outcome in rows) / sum(weight for weight, _, _ in rows),
        }
        for rows in bins
        if rows
    ]


def agreement(outcomes: Sequence[float], differences: Sequence[float | None]) -> dict[str, Any] | None:
    """How often the judge's winner has the higher score, with its 95 % interval; None where nothing can be compared.

    Args:
        outcomes: Of the judge; those of 1/2 are left out, because they have no winner.
        differences: Score of a minus score of b; 0 and None are left out.
    """
    agreed = [
        float((difference > 0) == (outcome == 1))
        for outcome, difference in zip(outcomes, differences, strict=True)
        if outcome in (0, 1) and difference
    ]
    if not agreed:
        return None
    return {"share": sum(agreed) / len(agreed), "pairs": len(agreed), "interval": bootstrap_interval(agreed)}


def _fit(outcomes: Sequence[float], ratios: Sequence[float]) -> tuple[float, float]:
    """Strength and slope that minimise the ridge's loss, which is convex: its gradient is 0 there and nowhere else.

    An interval takes 2,000 fits: finding the gradient's root takes a seventh of the time that minimising the loss does.
    """
    import numpy
    from scipy.optimize import root
    from scipy.special import expit

    y = numpy.asarray(outcomes, dtype=float)
    x = numpy.stack([numpy.ones(len(y)), numpy.asarray(ratios, dtype=float)])  # (2, n)

    def gradient(weights):
        return x @ (expit(weights @ x) - y) + RIDGE * weights

    def second_derivatives(weights):
        chances = expit(weights @ x)
        return (x * (chances * (1 - chances))) @ x.T + RIDGE * numpy.eye(2)

    strength, slope = root(gradient, numpy.zeros(2), jac=second_derivatives).x
    return float(strength), float(slope)


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))
