"""Which of two algorithms is better, in words with numbers; pure functions of numbers.

What decides is Student's t interval of the difference, at 95 %: it is right for three seeds, where the bootstrap interval,
which is given beside it, excludes 0 in one of four duels between equals.
"""

import math
from collections import defaultdict
from statistics import fmean
from typing import Any

from rlhf_recipes.intervals import bootstrap_difference, bootstrap_interval, student_interval, welch_interval

Values = list[tuple[int | None, float | None]]
"""(seed, value) of every run of one algorithm; without a seed each run counts as one, without a value as none."""

WHERE = {
    "held_out": "on held-out prompts",
    "step": "in training, at equal steps",
    "episodes": "in training, at equal episodes",
    "tokens": "in training, at equal tokens",
    "seconds": "in training, at equal seconds",
}
"""View -> how a sentence says where the numbers come from."""

METRICS = {"score_mean": "score", "judge_mean": "judge", "kl": "KL"}
"""Metric -> how a sentence calls it."""

MUCH_KL = 1.5
"""A winner that is this many times as far from the reference has bought its score with KL; it is said."""

LITTLE_KL = 1.0
"""Nats by which it must be farther at least."""


def view_of(
    view: str, metric: str, values: dict[str, Values], at: float | None = None, unit: str = ""
) -> dict[str, Any]:
    """One metric of two algorithms, side by side: means, difference, intervals, and what follows from them.

    Args:
        view: One of `WHERE`.
        metric: What `values` are of; more of it is better.
        values: Of both algorithms.
        at: Budget at which they were taken.
        unit: Of `at`.
    """
    (first, of_first), (second, of_second) = ((label, _by_seed(found)) for label, found in values.items())
    both = sorted(of_first.keys() & of_second.keys(), key=str)
    paired = len(both) >= 2
    if paired:
        of_first, of_second = ({seed: of_one[seed] for seed in both} for of_one in (of_first, of_second))
    x, y = list(of_first.values()), list(of_second.values())
    found = {
        "view": view,
        "metric": metric,
        "at": at,
        "unit": unit,
        "paired": paired,
        "seeds": {first: len(x), second: len(y)},
        "means": {first: fmean(x) if x else None, second: fmean(y) if y else None},
        "difference": fmean(x) - fmean(y) if x and y else None,
        "interval": None,
        "bootstrap": None,
    }
    if paired:
        differences = [a - b for a, b in zip(x, y, strict=True)]
        found["interval"], found["bootstrap"] = student_interval(differences), bootstrap_interval(differences)
    elif len(x) > 1 and len(y) > 1:
        found["interval"], found["bootstrap"] = welch_interval(x, y), bootstrap_difference(x, y)
    winner, why_none = _winner(found)
    return found | {
        "winner": winner,
        "label": f"{name_of(winner)} better" if winner else "inconclusive",
        "sentence": _sentence(found, winner, why_none),
    }


def void(view: dict[str, Any], why: str) -> dict[str, Any]:
    """A view whose numbers stand, but say nothing about the algorithms."""
    return view | {
        "winner": None,
        "label": "not comparable",
        "sentence": f"not comparable {WHERE[view['view']]}: {why}",
    }


def name_of(label: str) -> str:
    return label.upper() if label in ("ppo", "rloo") else label


def decide(
    views: list[dict[str, Any]],
    labels: list[str],
    refusing: list[str],
    unknown: str = "",
    kl: dict[str, float] | None = None,
) -> dict[str, Any]:
    """The verdict: `winner`, `label` and `sentence`.

    The first view decides; the others only add what has to be said about a win.

    Args:
        views: The one that decides comes first.
        labels: Of the algorithms.
        refusing: Keys whose difference forbids a verdict.
        unknown: Why it is not known whether the runs can be compared.
        kl: How far each algorithm went from the reference, where that is known of both.
    """
    if len(labels) != 2:
        found = f"all runs are of {name_of(labels[0])}" if len(labels) == 1 else f"there are {len(labels)}"
        hint = "; name two, such as a=PATH b=PATH" if len(labels) == 1 else ": " + ", ".join(map(name_of, labels))
        return _verdict(
            None, "nothing to compare", f"nothing to compare: a verdict is on two algorithms, and {found}{hint}."
        )
    if refusing:
        keys = f"{', '.join(refusing[:6])}{' and more' if len(refusing) > 6 else ''}"
        return _verdict(None, "not comparable", f"not comparable: the runs differ in more than the algorithm: {keys}.")
    if not views:
        return _verdict(None, "nothing to compare", "nothing to compare: not all runs have a score.")
    decisive = views[0]
    if unknown:
        seen = f"As far as can be seen: {decisive['sentence']}"
        return _verdict(None, "not comparable", f"not comparable, as far as can be checked: {unknown}. {seen}")
    return _verdict(decisive["winner"], decisive["label"], decisive["sentence"] + _price(views, kl))


def _verdict(winner: str | None, label: str, sentence: str) -> dict[str, Any]:
    return {"winner": winner, "label": label, "sentence": sentence}


def _by_seed(values: Values) -> dict[Any, float]:
    """Seed -> mean of its runs' values: what ran twice with one seed is no second seed."""
    found = defaultdict(list)
    for seed, value in values:
        if value is not None and math.isfinite(value):
            found[object() if seed is None else seed].append(
                value
            )  # an object equals no other, so that nothing is paired
    return {key: fmean(of_one) for key, of_one in found.items()}


def _winner(view: dict[str, Any]) -> tuple[str | None, str]:
    """The label of the better one, or None and the reason."""
    first, second = view["seeds"]
    if view["difference"] is None:
        return None, f"{name_of(first if view['means'][first] is None else second)} has no value"
    if view["interval"] is None:
        single = [name_of(label) for label, seeds in view["seeds"].items() if seeds == 1]
        return None, "one seed each" if len(single) == 2 else f"{single[0]} has one seed"
    low, high = view["interval"]
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        return None, "the seeds made no difference, so that they show nothing about chance"
    if low > 0:
        return first, ""
    return (second, "") if high < 0 else (None, "the interval holds 0")


def _sentence(view: dict[str, Any], winner: str | None, why_none: str) -> str:
    where = WHERE[view["view"]] + (f" ({view['at']:,.0f} {view['unit']})" if view["at"] is not None else "")
    head = f"{name_of(winner)} better {where}:" if winner else f"inconclusive: {why_none}; {where}"
    means = [f"{name_of(label)} {_digits(mean)}" for label, mean in view["means"].items() if mean is not None]
    sentence = f"{head} {METRICS.get(view['metric'], view['metric'])} {' against '.join(means)}" if means else head
    if view["difference"] is None:
        return sentence + "."
    sentence += f", a difference of {view['difference']:+.3g}"
    if view["interval"] is not None:
        n = list(view["seeds"].values())
        seeds = f"{n[0]} seeds" + (", paired" if view["paired"] else " each" if n[0] == n[1] else f" and {n[1]} seeds")
        sentence += f" (95 % interval {_span(view['interval'])} over {seeds}; by bootstrap {_span(view['bootstrap'])})"
    return sentence + "."


def _price(views: list[dict[str, Any]], kl: dict[str, float] | None) -> str:
    """What a winner lost elsewhere, as further sentences."""
    winner, said = views[0]["winner"], ""
    if winner is None:
        return said
    judged = next((view for view in views[1:] if view["metric"] == "judge_mean"), None)
    if judged is not None and judged["difference"] is not None:
        loser = next(label for label in judged["means"] if label != winner)
        theirs, other = judged["means"][winner], judged["means"][loser]
        if judged["winner"] == loser:
            said += f" But the judge, which training did not see, prefers {name_of(loser)}"
        elif theirs < other:
            said += " The judge, which training did not see, does not confirm it"
        said += f": {_digits(theirs)} against {_digits(other)}." if theirs < other else ""
    if kl is not None:
        theirs = kl[winner]
        other = next(value for label, value in kl.items() if label != winner)
        if theirs > MUCH_KL * other and theirs - other > LITTLE_KL:
            said += (
                f" It went much farther from the reference for it: KL {_digits(theirs)} against {_digits(other)} nats."
            )
    return said


def _digits(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _span(interval: tuple[float, float]) -> str:
    return f"{interval[0]:+.3g} to {interval[1]:+.3g}"
