"""Says which of two algorithms is better, in words with numbers; pure functions of numbers.

What decides is Student's t interval of the difference, at 95 %: it is right for three seeds, where the bootstrap interval,
which is given beside it, excludes 0 in one of four duels between equals.
"""

import math
from collections import defaultdict
from statistics import fmean
from typing import Any

from rlhf_recipes.evaluation.intervals import bootstrap_difference, bootstrap_interval, student_interval, welch_interval
from rlhf_recipes.pages.metrics import EVAL

Values = list[tuple[int | None, float | None]]
"""(seed, value) of every run of one algorithm; without a seed each run counts as one, without a value as none."""

WHERE = {
    "held_out": "On held-out prompts",
    "step": "In training, after {} steps each,",
    "episodes": "In training, after {} episodes each,",
    "tokens": "In training, after {} tokens each,",
    "seconds": "In training, after {} seconds each,",
}
"""View -> how a sentence says where the numbers come from; the budget goes into the braces."""

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
    winner, why = _winner(found)
    return found | {
        "winner": winner,
        "label": f"{name_of(winner)} better" if winner else "inconclusive",
        "sentence": f"{_numbers(found)} {why}".strip(),
    }


def void(view: dict[str, Any], why: str) -> dict[str, Any]:
    """A view whose numbers stand, but say nothing about the algorithms; why, as a sentence."""
    return view | {"winner": None, "label": "not comparable", "sentence": why}


def name_of(label: str) -> str:
    return label.upper() if label in ("ppo", "rloo") else label


def decide(
    views: list[dict[str, Any]],
    labels: list[str],
    refusing: list[str],
    unknown: str = "",
    kl: dict[str, float] | None = None,
) -> dict[str, Any]:
    """The verdict: `winner`, `label` and `sentence`, which is to be read after the label.

    The first view decides; the others only add what has to be said about a win.

    Args:
        views: The one that decides comes first.
        labels: Of the algorithms.
        refusing: Keys whose difference forbids a verdict.
        unknown: Why it is not known whether the runs can be compared, as a sentence.
        kl: How far each algorithm went from the reference, where that is known of both.
    """
    if len(labels) == 1:
        found = f"all runs are of {name_of(labels[0])}; name two, such as a=PATH b=PATH"
    else:
        found = f"there are {len(labels)}: {', '.join(map(name_of, labels))}"
    if len(labels) != 2:
        return _verdict(None, "nothing to compare", f"A verdict is on two algorithms, and {found}.")
    if refusing:
        keys = f"{', '.join(refusing[:6])}{' and more' if len(refusing) > 6 else ''}"
        return _verdict(None, "not comparable", f"The runs differ in more than the algorithm: {keys}.")
    if not views:
        return _verdict(None, "nothing to compare", "Not all runs have a score.")
    decisive = views[0]
    if unknown:
        seen = f"The numbers alone would say: {decisive['label']}. {decisive['sentence']}"
        return _verdict(None, "not comparable", f"{unknown} {seen}")
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
    """The label of the better one, or None; and why, as a sentence."""
    if view["difference"] is None:
        return None, ""
    if view["interval"] is None:
        single = [name_of(label) for label, seeds in view["seeds"].items() if seeds == 1]
        which = "one seed each" if len(single) == 2 else f"one seed of {single[0]}"
        return None, f"With {which}, this cannot be told from chance; run more seeds."
    low, high = view["interval"]
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        return None, "The seeds made no difference to it, so they show nothing about chance."
    n, decimals = list(view["seeds"].values()), _decimals(view)
    seeds = f"{n[0]} seeds" + (", paired" if view["paired"] else " each" if n[0] == n[1] else f" and {n[1]} seeds")
    spans = f"{_span(view['interval'], decimals)} over {seeds}; by bootstrap {_span(view['bootstrap'], decimals)}"
    if low <= 0 <= high:
        return None, f"Its 95 % interval has 0 in it, so either may be the better one ({spans})."
    return list(view["means"])[high < 0], f"Its 95 % interval is all on one side of 0 ({spans})."


def _numbers(view: dict[str, Any]) -> str:
    """The means and their difference, as a sentence or two."""
    at = "" if view["at"] is None else f"{view['at']:,.0f}" if view["at"] >= 100 else f"{view['at']:.3g}"
    where, metric = WHERE[view["view"]].format(at), EVAL[view["metric"]].phrase
    decimals = _decimals(view)
    means = [
        f"{_digits(mean, decimals)} with {name_of(label)}" for label, mean in view["means"].items() if mean is not None
    ]
    if view["difference"] is None:
        missing = " and ".join(name_of(label) for label, mean in view["means"].items() if mean is None)
        found = f" ({means[0]})" if means else ""
        return f"{where} there is no {metric} of {missing}{found}."
    first, second = map(name_of, view["means"])
    difference = _digits(view["difference"], decimals, "+")
    return f"{where} the {metric} is {' and '.join(means)}: {first} minus {second} is {difference}."


def _price(views: list[dict[str, Any]], kl: dict[str, float] | None) -> str:
    """Sentences about the metrics in which the winner is worse."""
    winner, said = views[0]["winner"], ""
    if winner is None:
        return said
    loser = next(label for label in views[0]["means"] if label != winner)
    held_out = next((view for view in views[1:] if view["metric"] == "held_out_mean"), None)
    if (
        held_out is not None
        and held_out["difference"] is not None
        and held_out["means"][winner] < held_out["means"][loser]
    ):
        of_loser = held_out["winner"] == loser
        said += " But the held-out score, which training does not see, "
        said += f"prefers {name_of(loser)}: " if of_loser else "does not confirm it: "
        theirs, other = (_digits(held_out["means"][label], _decimals(held_out)) for label in (winner, loser))
        said += f"{theirs} with {name_of(winner)} and {other} with {name_of(loser)}."
    if kl is not None and kl[winner] > MUCH_KL * kl[loser] and kl[winner] - kl[loser] > LITTLE_KL:
        said += f" It went much farther from the reference for it: KL {kl[winner]:.1f} against {kl[loser]:.1f} nats."
    return said


def _decimals(view: dict[str, Any]) -> int:
    """One number of decimals for all numbers of a view: two digits of the largest of its differences, usually three."""
    largest = max(map(abs, [view["difference"] or 0, *(view["interval"] or ())]))
    if largest == 0 or 0.01 <= largest < 10:
        return 3
    return min(max(1 - math.floor(math.log10(largest)), 1), 6)


def _digits(value: float, decimals: int, sign: str = "") -> str:
    value = round(value, decimals)
    return f"{value + 0:{sign if value else ''}.{decimals}f}"  # no sign before a zero


def _span(interval: tuple[float, float], decimals: int) -> str:
    return " to ".join(_digits(end, decimals, "+") for end in interval)
