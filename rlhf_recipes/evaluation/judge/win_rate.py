"""Computes from a judge's answers: a win rate, a length-controlled win rate, and agreement with other scores.

An outcome is a number for one prompt: 1 where a won, 0 where b did, 1/2 where neither. A length ratio is
log((words of a + 1) / (words of b + 1)): words, since models may differ in their tokens.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

from rlhf_recipes.evaluation.intervals import bootstrap_interval

BINS = 10

RIDGE = 0.01
"""Weight of half the squared coefficients in the fit, which would be infinite where one side wins every time; against a
few dozen pairs it moves nothing: 100 pairs without lengths, of which 80 are wins, give 0.7999."""


def log_length_ratio(a: str, b: str) -> float:
    """Positive where a is longer; an empty text counts as one word, so that it has a ratio to any other."""
    words_a, words_b = len(a.split()) + 1, len(b.split()) + 1
    # Not a difference of logarithms: 2 to 4 and 3 to 6 must be the same number, and 4 to 2 its negative.
    return math.log(words_a / words_b) if words_a >= words_b else -math.log(words_b / words_a)


def win_rate(outcomes: Sequence[float]) -> dict[str, Any]:
    """Mean outcome and its 95 % interval over prompts; None where there are none."""
    if not outcomes:
        return {"win_rate": None, "interval": None}
    return {"win_rate": sum(outcomes) / len(outcomes), "interval": bootstrap_interval(outcomes)}


def length_controlled_win_rate(outcomes: Sequence[float], ratios: Sequence[float]) -> dict[str, Any]:
    """The win rate that a fit gives to completions of equal length, with its 95 % interval.

    P(a wins) = sigmoid(strength + slope * ratio), fitted to the outcomes by maximum likelihood with a small ridge; the
    result is sigmoid(strength).

    Source: Dubois et al. 2024 (2404.04475), simplified: no term for the difficulty of a prompt, which needs many
    models' answers, and the log ratio of lengths instead of tanh of their standardised difference.

    Args:
        outcomes: 1, 1/2 or 0, (n,).
        ratios: Log length ratios, (n,).

    Returns:
        `win_rate`, `interval`, `slope` (of the log odds, for a ratio of e), and whether it is `extrapolated`: one side
        is longer for every prompt, so that nothing was seen at equal length and the form of the fit decides.
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
    """Win rates in tenths of the log length ratio, shortest first; tenths that nothing falls into are left out.

    Equal ratios are never parted: all go where their middle rank lies; on the border of two tenths to the outer one,
    and in the very middle half to each, so that the bins of b against a are the mirror image.

    Returns:
        `from`, `to` (log length ratios), `prompts` (a half where the middle is parted) and `win_rate` of each.
    """
    n, ranked = len(ratios), sorted(ratios)
    bins: list[list[tuple[float, float, float]]] = [[] for _ in range(BINS)]  # weight, ratio, outcome
    for outcome, ratio in zip(outcomes, ratios, strict=True):
        middle = bisect_left(ranked, ratio) + bisect_right(ranked, ratio)  # twice its middle rank
        tenth, rest = divmod(BINS * middle, 2 * n)
        if rest:
            places = (tenth,)
        elif 2 * tenth == BINS:
            places = (tenth - 1, tenth)
        else:
            places = (tenth - 1,) if 2 * tenth < BINS else (tenth,)
        for place in places:
            bins[place].append((1 if len(places) == 1 else 0.5, ratio, outcome))
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
    """How often the higher score is the judge's winner, with its 95 % interval; None where nothing can be compared.

    Args:
        outcomes: Of the judge; those of 1/2 are left out, for it has no winner.
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
    """Strength and slope that minimise the ridge's loss: Newton's method, its steps halved where they go too far.

    Written out for two numbers, since an interval takes it 2,000 times.
    """
    import numpy
    from scipy.special import expit

    y, x = numpy.asarray(outcomes, dtype=float), numpy.asarray(ratios, dtype=float)

    def loss(strength, slope):
        logits = strength + slope * x
        return numpy.logaddexp(0, logits).sum() - y @ logits + RIDGE / 2 * (strength**2 + slope**2)

    strength = slope = 0.0
    lowest = loss(strength, slope)
    for _ in range(100):
        chances = expit(strength + slope * x)
        excess, curve = chances - y, chances * (1 - chances)
        gradient = excess.sum() + RIDGE * strength, excess @ x + RIDGE * slope
        curve_x = curve * x
        a, b, c = curve.sum() + RIDGE, curve_x.sum(), curve_x @ x + RIDGE  # second derivatives: [[a, b], [b, c]]
        scale = 1 / (a * c - b * b)
        step = (c * gradient[0] - b * gradient[1]) * scale, (a * gradient[1] - b * gradient[0]) * scale
        if max(map(abs, step)) < 1e-8:
            break
        part = 1.0
        while (there := loss(strength - part * step[0], slope - part * step[1])) > lowest and part > 1e-6:
            part /= 2
        strength, slope, lowest = strength - part * step[0], slope - part * step[1], there
    return float(strength), float(slope)


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))
