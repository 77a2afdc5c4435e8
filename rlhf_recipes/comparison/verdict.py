"""Says which of two algorithms is better, as a sentence with numbers.

Student's t interval of the difference, at 95 %, decides. Between two equal algorithms with three seeds it names a winner in
one of twenty duels. The bootstrap interval would in one of four; it is shown beside the other and decides nothing.
"""

import math
from collections import defaultdict
from statistics import fmean
from typing import Any

from rlhf_recipes.evaluation.intervals import bootstrap_difference, bootstrap_interval, student_interval, welch_interval
from rlhf_recipes.pages.metrics import EVAL
from rlhf_recipes.recipe.schema import ON_POLICY

Values = list[tuple[int | None, float | None]]
"""(seed, value) of every run of one algorithm. A run whose seed is None counts as a seed of its own."""

UNITS = {"episodes": "episodes", "step": "steps", "tokens": "tokens", "seconds": "seconds"}
"""View of a training budget -> the budget's unit. Steps replace episodes if these are unknown."""

MUCH_KL = 1.5
"""A verdict mentions the KL of a winner if it is this many times that of the loser, and by `LITTLE_KL` larger."""

LITTLE_KL = 1.0
"""In nats."""


def view_of(view: str, metric: str, values: dict[str, Values], at: float | None = None) -> dict[str, Any]:
    """One metric of two algorithms, side by side: means, difference, intervals and winner.

    Args:
        view: `held_out`, or a key of `UNITS`.
        metric: The metric that the values are of. More of it is better.
        values: Algorithm -> its values.
        at: Training budget at which the values were taken.
    """
    (first, of_first), (second, of_second) = ((label, _by_seed(found)) for label, found in values.items())
    both = sorted(of_first.keys() & of_second.keys(), key=str)
    paired = len(both) >= 2
    if paired:
        of_first, of_second = ({seed: of_one[seed] for seed in both} for of_one in (of_first, of_second))
    x, y = list(of_first.values()), list(of_second.values())
    found: dict[str, Any] = {
        "view": view,
        "metric": metric,
        "at": at,
        "unit": UNITS.get(view, ""),
        "paired": paired,
        "seeds": {first: len(x), second: len(y)},
        "means": {first: fmean(x) if x else None, second: fmean(y) if y else None},
        "difference": fmean(x) - fmean(y) if x and y else None,
        "interval": None,
        "bootstrap": None,
    }
    if paired:
        differences = [a - b for a, b in zip(x, y, strict=True)]
        found |= {"interval": student_interval(differences), "bootstrap": bootstrap_interval(differences)}
    elif len(x) > 1 and len(y) > 1:
        found |= {"interval": welch_interval(x, y), "bootstrap": bootstrap_difference(x, y)}
    winner, why = _winner(found)
    label = f"{name_of(winner)} better" if winner else "inconclusive"
    return found | {"winner": winner, "label": label, "sentence": f"{_numbers(found)} {why}".strip()}


def void(view: dict[str, Any], why: str, label: str = "not comparable") -> dict[str, Any]:
    """The view with its numbers but no winner; the sentence `why` replaces its own."""
    return view | {"winner": None, "label": label, "sentence": why}


def without_winner(view: dict[str, Any], failures: str) -> dict[str, Any]:
    """The view of the runs that finished, in which no algorithm wins: those that failed have no numbers.

    Args:
        view: From `view_of`.
        failures: A clause such as `1 of 6 runs failed`.
    """
    return void(view, f"{_numbers(view)} {failures}, so nobody wins.", failures)


def name_of(label: str) -> str:
    return label.upper() if label in ON_POLICY else label


def decide(
    views: list[dict[str, Any]],
    labels: list[str],
    refusing: list[str],
    unknown: str = "",
    kl: dict[str, float] | None = None,
    failures: str = "",
) -> dict[str, Any]:
    """The verdict: `winner`, `label` and `sentence`, which follows the label.

    Args:
        views: The first one decides. The others can add a reservation to a win.
        labels: The algorithms.
        refusing: Keys whose difference makes the comparison invalid.
        unknown: A sentence that says why nobody can know whether the runs are comparable; "" if they are.
        kl: Algorithm -> its KL to the reference, if all are known.
        failures: A clause such as `1 of 6 runs failed`; "" if none did.
    """
    if failures and len(labels) != 2:
        return _verdict(None, failures, f"All runs that finished are of {', '.join(map(name_of, labels))}.")
    if len(labels) != 2:
        found = f"there are {len(labels)}: {', '.join(map(name_of, labels))}"
        if len(labels) == 1:
            found = f"all runs are of {name_of(labels[0])}; name two, such as a=PATH b=PATH"
        return _verdict(None, "nothing to compare", f"A verdict compares two algorithms, and {found}.")
    if refusing:
        keys = f"{', '.join(refusing[:6])}{' and more' if len(refusing) > 6 else ''}"
        return _verdict(None, "not comparable", f"The runs differ in more than the algorithm: {keys}.")
    if not views:
        return _verdict(None, "nothing to compare", "Not all runs have a score.")
    winner, label, sentence = (views[0][key] for key in ("winner", "label", "sentence"))
    if unknown:
        return _verdict(None, "not comparable", f"{unknown} The numbers alone would say: {label}. {sentence}")
    return _verdict(winner, label, sentence + (_reservations(winner, views, kl) if winner else ""))


def _verdict(winner: str | None, label: str, sentence: str) -> dict[str, Any]:
    return {"winner": winner, "label": label, "sentence": sentence}


def _by_seed(values: Values) -> dict[Any, float]:
    """Seed -> mean of its runs' values: two runs with one seed are no two seeds."""
    found = defaultdict(list)
    for seed, value in values:
        if value is not None and math.isfinite(value):
            # A new object equals no other key, so a run without a seed is never paired.
            found[object() if seed is None else seed].append(value)
    return {seed: fmean(of_seed) for seed, of_seed in found.items()}


def _winner(view: dict[str, Any]) -> tuple[str | None, str]:
    """The label of the better algorithm, or None; and a sentence that says why."""
    if view["difference"] is None:
        return None, ""
    if view["interval"] is None:
        single = [name_of(label) for label, seeds in view["seeds"].items() if seeds == 1]
        which = "one seed each" if len(single) == 2 else f"one seed of {single[0]}"
        return None, f"With {which}, this cannot be told from chance; run more seeds."
    low, high = view["interval"]
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        return None, "All seeds give the same difference, so they show nothing about chance."
    n, decimals = list(view["seeds"].values()), _decimals(view)
    seeds = f"{n[0]} seeds" + (", paired" if view["paired"] else " each" if n[0] == n[1] else f" and {n[1]} seeds")
    spans = f"{_span(view['interval'], decimals)} over {seeds}; by bootstrap {_span(view['bootstrap'], decimals)}"
    if low <= 0 <= high:
        return None, f"Its 95 % interval has 0 in it, so either may be the better one ({spans})."
    return list(view["means"])[high < 0], f"Its 95 % interval is all on one side of 0 ({spans})."


def _numbers(view: dict[str, Any]) -> str:
    """A sentence with the means and their difference."""
    where, metric, at = "On held-out prompts", EVAL[view["metric"]].phrase, view["at"]
    if at is not None:
        where = f"In training, after {f'{at:,.0f}' if at >= 100 else f'{at:.3g}'} {view['unit']} each,"
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


def _reservations(winner: str, views: list[dict[str, Any]], kl: dict[str, float] | None) -> str:
    """Sentences about the held-out score and the KL, if the winner is worse in them."""
    loser = next(label for label in views[0]["means"] if label != winner)
    found = ""
    for view in views[1:]:
        if view["metric"] != "held_out_mean" or view["difference"] is None:
            continue
        means, decimals = view["means"], _decimals(view)
        if means[winner] < means[loser]:
            verb = f"prefers {name_of(loser)}" if view["winner"] == loser else "does not confirm it"
            numbers = " and ".join(
                f"{_digits(means[label], decimals)} with {name_of(label)}" for label in (winner, loser)
            )
            found += f" But the held-out score, which training does not see, {verb}: {numbers}."
    if kl is not None and kl[winner] > MUCH_KL * kl[loser] and kl[winner] - kl[loser] > LITTLE_KL:
        found += f" Its policy is much farther from the reference: KL {kl[winner]:.1f} against {kl[loser]:.1f} nats."
    return found


def _decimals(view: dict[str, Any]) -> int:
    """Decimals of all numbers of a view: enough for two digits of the largest difference, usually three."""
    largest = max(map(abs, [view["difference"] or 0, *(view["interval"] or ())]))
    if largest == 0 or 0.01 <= largest < 10:
        return 3
    return min(max(1 - math.floor(math.log10(largest)), 1), 6)


def _digits(value: float, decimals: int, sign: str = "") -> str:
    value = round(value, decimals)
    return f"{value + 0:{sign if value else ''}.{decimals}f}"  # a zero gets no sign


def _span(interval: tuple[float, float], decimals: int) -> str:
    return " to ".join(_digits(end, decimals, "+") for end in interval)
