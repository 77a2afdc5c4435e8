"""The rows of text that the page and the markdown show, and the format of their numbers."""

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from rlhf_recipes.pages.metrics import COST
from rlhf_recipes.pages.plots import algorithm_of
from rlhf_recipes.pages.tables import COLUMNS
from rlhf_recipes.system.files import without_nan

ABSENT = "–"

VIEWS = {
    "held_out": "on held-out prompts",
    "episodes": "at equal episodes",
    "tokens": "at equal tokens",
    "seconds": "at equal time",
    "step": "at equal steps",
}

LONG, SMALL = 1e12, 0.01
"""Larger numbers get an exponent, smaller ones keep their first digits: a run may diverge, a score's scale be small."""

NEGATIVE_ZERO = re.compile(r"^-(?=[0.]+%?$)")

HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, marks that change the direction of the text behind them, halves of surrogate pairs."""


def clean(value: Any) -> Any:
    """A copy that a page can hold: invisible characters are written as ⟨U+202E⟩; NaN and infinity become None."""
    if isinstance(value, str):
        return HIDDEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", value.replace("\r\n", "\n"))
    if isinstance(value, dict):
        return {clean(str(key)): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    return without_nan(value)


def number(value: float | None, form: str | None = None) -> str:
    """A number in its metric's `form`, or else with three digits and separated thousands."""
    if value is None:
        return ABSENT
    if abs(value) >= LONG:
        text = f"{value:.3g}"
    elif form is not None:
        text = form.format(value)
    elif float(value).is_integer() or abs(value) >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.3g}"
    text = NEGATIVE_ZERO.sub("", text)
    return text.replace("-", "−", 1) if text.startswith("-") else text


def signed(value: float | None) -> str:
    """A difference, always with its sign."""
    if value is None:
        return ABSENT
    size = abs(value)
    form = "+.3g" if size >= LONG else "+,.0f" if size >= 1000 else "+.1f" if size >= 10 else "+.3f"
    text = format(value, form if size >= SMALL or not value else "+.2g")
    return text.replace("-", "−")


def spread(found: dict[str, Any] | None, show: Callable[[float | None], str] = number) -> tuple[str, str]:
    """A mean and its interval; "" if there is no interval."""
    if found is None or found.get("mean") is None:
        return ABSENT, ""
    if found.get("low") is None or found.get("high") is None:
        return show(found["mean"]), ""
    return show(found["mean"]), f"{show(found['low'])} to {show(found['high'])}"


def setting(value: Any) -> str:
    """The value of a setting as it stands in a recipe."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def template_values(comparison: dict[str, Any]) -> dict[str, Any]:
    """The values that the templates of the page and the markdown share."""
    columns, held_out = held_out_rows(comparison)
    return {
        "comparison": comparison,
        "algorithms": comparison["algorithms"],
        "views": view_rows(comparison),
        "held_out_columns": columns,
        "held_out": held_out,
        "cost": cost_rows(comparison),
        "audits": audit_rows(comparison),
        "findings": finding_rows(comparison),
        "differences": difference_rows(comparison),
        "number": number,
    }


def view_rows(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each view: heading, means, difference, interval."""
    rows = []
    for view in comparison["views"]:
        low, high = view["interval"] or (None, None)
        metric = COLUMNS[view["metric"]].heading if view["metric"] in COLUMNS else view["metric"]
        unit = " s" if view["view"] == "seconds" else ""
        at = "" if view["at"] is None else f" ({number(view['at'])}{unit})"
        rows.append(
            view
            | {
                "heading": f"{metric} {VIEWS.get(view['view'], view['view'])}{at}",
                "cells": [_mean(view["means"].get(name)) for name in comparison["algorithms"]],
                "signed": signed(view["difference"]),
                "range": "" if low is None else f"{signed(low)} to {signed(high)}",
                "drawn": "" if not view["bootstrap"] else " to ".join(map(signed, view["bootstrap"])),
            }
        )
    return rows


def _mean(value: float | None) -> str:
    return number(value, None if value is not None and abs(value) < SMALL else "{:.3f}")


def held_out_rows(comparison: dict[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns (algorithms, then models that no algorithm trained) and one row for each metric."""
    measured, held_out = comparison["evaluation"], comparison["held_out"]
    models = measured["models"] if measured else {}
    metrics = held_out["metrics"] if held_out else {}
    algorithms = [name for name in comparison["algorithms"] if any(name in row for row in metrics.values())]
    others = [name for name in models if not held_out or algorithm_of(name, comparison["algorithms"]) is None]
    known = {**metrics, **dict.fromkeys(key for row in models.values() for key in row)}
    rows = []
    for key in sorted(known, key=lambda key: list(COLUMNS).index(key) if key in COLUMNS else len(COLUMNS)):
        metric = COLUMNS.get(key)
        heading, form, meaning = (metric.heading, metric.form, metric.meaning) if metric else (key, None, "")
        show = partial(number, form=form)
        cells = [spread(metrics.get(key, {}).get(name), show) for name in algorithms]
        cells += [(show(models[name].get(key)), "") for name in others]
        if any(cell != (ABSENT, "") for cell in cells):
            rows.append({"key": key, "heading": heading, "meaning": meaning, "main": key in COLUMNS, "cells": cells})
    return algorithms + others, rows


def cost_rows(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each measure; `shares` are the lengths of the bars, in percent of the longest."""
    rows = []
    for key, metric in COST.items():
        found = [comparison["cost"].get(name, {}).get(key) for name in comparison["algorithms"]]
        means = [item["mean"] if item and item.get("mean") is not None else 0.0 for item in found]
        if any(item for item in means):
            shares = [100 * item / max(means) for item in means]
            rows.append(
                {"heading": metric.heading, "unit": metric.unit, "cells": [*map(spread, found)], "shares": shares}
            )
    return rows


def difference_rows(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """Each difference with its values and their runs; differences that forbid a verdict come first."""
    rows = [item | {"values": _by_value(item["values"])} for item in comparison["differences"]]
    return sorted(rows, key=lambda row: not row["refuses"])


def setting_rows(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """Every setting of the runs with its values and their runs; `all` says whether every run has it."""
    keys = sorted({key for run in comparison["runs"] for key in run["settings"]})
    rows = []
    for key in keys:
        values = {run["name"]: run["settings"][key] for run in comparison["runs"] if key in run["settings"]}
        rows.append({"key": key, "values": _by_value(values), "all": len(values) == len(comparison["runs"])})
    return rows


def audit_rows(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each run: its number of signs of reward hacking, and the place of its highest held-out score."""
    rows = []
    for run, found in comparison["audit"].items():
        peak, at = found["peak"], ABSENT
        if peak is not None:
            place = (
                f"at {peak['checkpoint']}" if peak["by"] == "checkpoints" else f"about step {peak['step']} of the log"
            )
            at = f"{place} ({number(peak['held_out'], '{:.2f}')})"
            if peak["checkpoint"] != "final":
                at += ", above the end" if peak.get("above_end") else ", within noise of the end"
        rows.append({"run": run, "signs": found["signs"], "peak": at})
    return rows


def finding_rows(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """Each finding of the audits once, with its runs; signs of reward hacking come first."""
    rows: dict[tuple[bool, str], list[str]] = {}
    for run, found in comparison["audit"].items():
        for i, finding in enumerate(found["findings"]):
            rows.setdefault((i < found["signs"], finding), []).append(run)
    found_in = [{"sign": sign, "finding": finding, "runs": runs} for (sign, finding), runs in rows.items()]
    return sorted(found_in, key=lambda row: not row["sign"])


def _by_value(values: dict[str, Any]) -> list[tuple[str, list[str]]]:
    groups: dict[str, list[str]] = {}
    for run, value in values.items():
        groups.setdefault(ABSENT if value is None else setting(value), []).append(run)
    return list(groups.items())
