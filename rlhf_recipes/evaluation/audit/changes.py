"""Statistics of a training's log: its parts, their means, and changes with 95 % intervals.

A log is a list of rollouts, each with numbers by name: means over its completions. Intervals are over rollouts or
prompts, not over completions, because completions of one prompt are alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rlhf_recipes.evaluation.intervals import student_interval
from rlhf_recipes.evaluation.metrics import equal_parts

BINS = 10
"""At most so many parts of a training."""

MIN_ROLLOUTS = 10
"""In a part; with 8 completions each, 80."""

MAX_ROLLOUTS = 20
"""In a part: scoring 160 completions is enough, and a long run logs thousands."""

MEANS = (
    "score held_out length eos_rate repetition copied_share longest_common_run title_copied_share entropy kl".split()
)
"""Numbers of a rollout."""


@dataclass
class Change:
    """Of a mean, from one part of a training to a later one."""

    first: float
    last: float
    difference: float
    low: float
    high: float

    @property
    def by(self) -> str:
        return f"{self.difference:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def __str__(self) -> str:
        return f"{self.first:.2f} -> {self.last:.2f} (by {self.by})"


def mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def split(rollouts: list, bins: int = BINS, least: int = MIN_ROLLOUTS) -> list[list]:
    """Rollouts in `bins` parts of (nearly) the same number, or in fewer, so that each part has at least `least`."""
    return equal_parts(rollouts, min(bins, len(rollouts) // least))


def spread_out(items: list, most: int) -> list:
    """At most so many items, evenly chosen, with the last one among them."""
    if len(items) <= most:
        return items
    return [items[len(items) * (i + 1) // most - 1] for i in range(most)]


def correlation(lengths: Sequence[float], scores: Sequence[float]) -> float | None:
    """Spearman's rank correlation, which one very long or very good completion does not decide.

    None where one of the two is constant, or where there are fewer than 3.
    """
    from scipy.stats import spearmanr

    if len(lengths) < 3 or len(set(lengths)) == 1 or len(set(scores)) == 1:
        return None
    return float(spearmanr(lengths, scores).statistic)


def summary(part: list[dict[str, Any]]) -> dict[str, Any]:
    """One part of a training in numbers: means of its rollouts, at the step and episode of its last one.

    Args:
        part: Rollouts; beside their means, `pairs` are (length, score) of their completions.
    """
    pairs = [pair for rollout in part for pair in rollout["pairs"]]
    return {
        "step": part[-1]["step"],
        "episodes": part[-1]["episodes"],
        "completions": sum(rollout["completions"] for rollout in part),
        **{name: mean_of_known([rollout[name] for rollout in part]) for name in MEANS},
        "length_score_correlation": correlation([length for length, _ in pairs], [score for _, score in pairs]),
    }


def change(before: Sequence[float], after: Sequence[float]) -> Change | None:
    """The change from some values to later ones; None where either has fewer than 2.

    Student's interval of the differences between the first of each, the second of each, and so on.
    """
    differences = [b - a for a, b in zip(before, after, strict=False)]
    interval = student_interval(differences)
    return interval and Change(fmean(before), fmean(after), fmean(differences), *interval)


def below_peak(columns: Sequence[Sequence[float]]) -> tuple[int, list[float]]:
    """Finds the column with the highest mean, and how far the last column lies below it, row by row.

    The highest of several noisy means is too high, even where all columns are alike. Therefore one half of the rows
    (every second) chooses the column that the last one is compared with in the other half, and the other way round:
    the choice does not raise the mean of the differences.

    Args:
        columns: Values of checkpoints or parts, in the order of training; all have the same rows.

    Returns:
        Index of the highest (of equal ones the last), and a difference for every row.
    """
    differences = [0.0] * len(columns[-1])
    for choosing, measuring in ((0, 1), (1, 0)):
        best = columns[_highest([column[choosing::2] for column in columns])]
        for row in range(measuring, len(differences), 2):
            differences[row] = best[row] - columns[-1][row]
    return _highest(columns), differences


def _highest(columns: Sequence[Sequence[float]]) -> int:
    return max(range(len(columns)), key=lambda i: (fmean(columns[i]), i))
