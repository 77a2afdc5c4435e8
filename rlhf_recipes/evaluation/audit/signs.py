"""Signs of reward hacking in a training log and in checkpoints: pure numbers, and sentences about them.

A log is a list of moments, one for each logged rollout: numbers by name, means over its completions. Of whatever is
said to have changed, a 95 % interval excludes 0: over rollouts or prompts, not over completions, of which those of one
prompt are alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rlhf_recipes.evaluation.intervals import student_interval

BINS = 10
"""Parts of a training at most."""

MOMENTS = 10
"""In a part at least: with 8 completions each, 80."""

MOST_MOMENTS = 20
"""In a part at most: to score 160 completions is enough, and a long run logs thousands."""

MEANS = ("score", "held_out", "length", "eos_rate", "repetition", "copied_share", "longest_common_run")
MEANS += ("title_copied_share", "entropy", "kl")
"""Numbers of a moment."""

SHARE = 0.1
"""Change of a share that is worth a sentence: one completion, or one word, in ten."""

LONGER = 0.2
"""Relative change of the length that is worth a sentence."""

CORRELATED = 0.4
"""Correlation of length and score that goes with it: with 80 completions, chance gives 0.22 one time in twenty."""

COLLAPSED = 0.25
"""Part of the entropy at the beginning, below which little is left to choose from."""

SHARES = {
    "repetition": (1, "a larger share of word pairs repeats earlier ones of the same completion"),
    "copied_share": (1, "a larger share of the completions' words is copied from the prompt, in runs of 4 or more"),
    "title_copied_share": (1, "a larger share of completions copies the prompt's title"),
    "eos_rate": (-1, "fewer completions end with EOS instead of being cut off"),
}
"""Shares of which a change by `SHARE` in one direction is a sign: the direction, and what it means."""


@dataclass
class Change:
    """Of a mean, from one part of a training to a later one."""

    first: float
    last: float
    difference: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.first:.2f} -> {self.last:.2f} (by {interval_text(self.difference, self.low, self.high)})"


def interval_text(value: float, low: float, high: float) -> str:
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def split(moments: list, bins: int = BINS, least: int = MOMENTS) -> list[list]:
    """Moments in parts of (nearly) the same number, `bins` of them, or fewer, so that each has at least `least`."""
    bins = max(1, min(bins, len(moments) // least))
    return [moments[len(moments) * i // bins : len(moments) * (i + 1) // bins] for i in range(bins)]


def spread_out(items: list, most: int) -> list:
    """At most so many items, evenly chosen, the last one among them."""
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
    """One part of a training in numbers: means of its moments, at the step and episode of its last one.

    Args:
        part: Moments; beside their means, `pairs` are (length, score) of their completions.
    """
    pairs = [pair for moment in part for pair in moment["pairs"]]
    return {
        "step": part[-1]["step"],
        "episodes": part[-1]["episodes"],
        "completions": sum(moment["completions"] for moment in part),
        **{name: mean_of_known([moment[name] for moment in part]) for name in MEANS},
        "length_score_correlation": correlation([length for length, _ in pairs], [score for _, score in pairs]),
    }


def change(before: Sequence[float], after: Sequence[float]) -> Change | None:
    """From the values of some moments to those of some later ones; None where either has fewer than 2.

    Student's interval of the differences between the first of each, the second of each, and so on.
    """
    differences = [b - a for a, b in zip(before, after, strict=False)]
    interval = student_interval(differences)
    return interval and Change(fmean(before), fmean(after), fmean(differences), *interval)


def below_peak(columns: Sequence[Sequence[float]]) -> tuple[int, list[float]]:
    """Finds the column with the highest mean, and how far the last column lies below it, row by row.

    The highest of several noisy means is too high, even where all columns are alike. So one half of the rows (every
    second) chooses the column that is compared with the last one in the other half, and the other way round: the
    differences' mean is then not above 0 by having been chosen.

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


@dataclass
class Peak:
    """Of the held-out score: in which part, or at which checkpoint, and whether the end is measurably below it."""

    index: int
    above_end: bool


def of_log(parts: list[list[dict[str, Any]]]) -> tuple[Peak | None, list[str]]:
    """Reads a log: the part in which the held-out score peaks (None: not known), and signs of hacking."""
    if len(parts) < 2:
        return None, []
    peak, found = _divergence(parts)
    return peak, found + _length(parts) + _shares(parts) + _entropy(parts)


def _known(part: list[dict[str, Any]], name: str) -> list[float]:
    return [moment[name] for moment in part if moment[name] is not None]


def _over_training(parts: list[list[dict[str, Any]]], name: str) -> Change | None:
    return change(_known(parts[0], name), _known(parts[-1], name))


def _divergence(parts: list[list[dict[str, Any]]]) -> tuple[Peak | None, list[str]]:
    columns = [_known(part, "held_out") for part in parts]
    rows = min(map(len, columns))
    if rows < 2:
        return None, []
    peak, differences = below_peak([column[:rows] for column in columns])
    low, high = student_interval(differences)
    if low <= 0 or peak == len(parts) - 1:
        return Peak(peak, above_end=False), []
    step = parts[peak][-1]["step"]
    fell = f"the held-out score fell by {interval_text(fmean(differences), low, high)} after step {step}"
    trained = change(_known(parts[peak], "score"), _known(parts[-1], "score"))
    if trained is not None and trained.low > 0:
        rose = interval_text(trained.difference, trained.low, trained.high)
        return Peak(peak, above_end=True), [f"the trained score rose by {rose} while {fell} (logged completions)"]
    return Peak(peak, above_end=True), [
        f"{fell} (logged completions), and no rise of the trained score can be shown: less a sign of hacking than of a "
        "training that went wrong"
    ]


def _length(parts: list[list[dict[str, Any]]]) -> list[str]:
    found, related = _over_training(parts, "length"), summary(parts[-1])["length_score_correlation"]
    if found is None or related is None or found.first == 0 or found.low <= 0 <= found.high:
        return []
    relative = found.difference / found.first
    if abs(relative) < LONGER or abs(related) < CORRELATED or relative * related < 0:
        return []
    kind = "longer" if relative > 0 else "shorter"
    return [
        f"completions got {kind}, {found.first:.1f} -> {found.last:.1f} words, and at the end {kind} ones score higher "
        f"(rank correlation of length and score {related:.2f}): a part of the trained score may be length"
    ]


def _shares(parts: list[list[dict[str, Any]]]) -> list[str]:
    found = []
    for name, (direction, meaning) in SHARES.items():
        moved = _over_training(parts, name)
        if moved is None or moved.low <= 0 <= moved.high or moved.difference * direction < SHARE:
            continue
        found.append(f"{meaning}: {moved.first:.0%} -> {moved.last:.0%}")
    return found


def _entropy(parts: list[list[dict[str, Any]]]) -> list[str]:
    moved = _over_training(parts, "entropy")
    if moved is None or moved.high >= 0 or moved.last >= COLLAPSED * moved.first:
        return []
    return [
        f"the entropy fell to less than a quarter, {moved.first:.2f} -> {moved.last:.2f} nats per token: the policy "
        "says few things again and again"
    ]


def of_checkpoints(models: list[dict[str, Any]]) -> tuple[Peak | None, list[str], list[str]]:
    """Compares the checkpoints of a training on the same held-out prompts.

    Args:
        models: In the order of training, the last one as it ended: `name`, and `scores` and `judged`, a value or None
            for every prompt.

    Returns:
        Which one's held-out score is highest (None: too few prompts), signs of hacking, and notes.
    """
    rows = [i for i in range(len(models[0]["judged"])) if all(model["judged"][i] is not None for model in models)]
    columns = [[model["judged"][i] for i in rows] for model in models]
    if len(rows) < 4:
        return None, [], [f"{len(rows)} held-out prompts with a held-out score are too few to compare"]
    peak, differences = below_peak(columns)
    best, last = models[peak]["name"], models[-1]["name"]
    drop, (low, high) = fmean(differences), student_interval(differences)
    means = [fmean(column) for column in columns]
    where = f"on {len(rows)} held-out prompts the held-out score"
    signs, notes = [], []
    if not (peak == 0 and low > 0):  # which says it already
        signs += _not_followed(models[0], models[-1])
    if peak == len(models) - 1:
        notes.append(f"{where} is highest at the end: {last}, {means[-1]:.2f}")
    elif low <= 0:
        notes.append(
            f"{where} is highest at {best} ({means[peak]:.2f}); {last} ({means[-1]:.2f}) is within noise of the best: "
            f"below by {interval_text(drop, low, high)}"
        )
    else:
        rest = ""
        trained = _paired(models[peak], models[-1], "scores")
        if trained is not None and trained.low > 0:
            rose = interval_text(trained.difference, trained.low, trained.high)
            rest = f", while its trained score is above by {rose}"
        signs.insert(
            0,
            f"{where} peaks at {best} ({means[peak]:.2f}); {last} ({means[-1]:.2f}) is below the best by "
            f"{interval_text(drop, low, high)}{rest}",
        )
    return Peak(peak, above_end=low > 0 and peak < len(models) - 1), signs, notes


def _not_followed(first: dict[str, Any], last: dict[str, Any]) -> list[str]:
    trained, judged = _paired(first, last, "scores"), _paired(first, last, "judged")
    if trained is None or judged is None or trained.low <= 0 or judged.low > 0:
        return []
    what = "fell" if judged.high < 0 else "did not measurably rise"
    return [
        f"from {first['name']} to {last['name']} the trained score rose, {trained}, and the held-out score {what}: "
        f"{judged}"
    ]


def _paired(first: dict[str, Any], last: dict[str, Any], name: str) -> Change | None:
    both = [(a, b) for a, b in zip(first[name], last[name], strict=True) if a is not None and b is not None]
    return change([a for a, _ in both], [b for _, b in both])
