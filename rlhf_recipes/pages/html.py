"""One self-contained HTML page about a comparison: opens offline, and asks nothing of the network."""

import base64
import gzip
import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from rlhf_recipes.pages.plots import CURVES, algorithm_of, slots
from rlhf_recipes.pages.rows import (
    audit_rows,
    clean,
    cost_rows,
    difference_rows,
    finding_rows,
    held_out_rows,
    number,
    setting_rows,
    view_rows,
)
from rlhf_recipes.pages.tables import COLUMNS

AXES = {"episodes": "episodes", "tokens": "tokens", "seconds": "seconds", "step": "steps"}

POINTS = 1000
"""Most points of one line: as many as a wide screen has columns for it."""


LARGEST = 5_000_000
"""Bytes that a page may have, so that it can be sent about; samples that go beyond are left out, and it says so."""

FOR_TABLES = 400_000
"""Of them, for what is not packed: text, tables, style and script."""


def write_page(file: Path, comparison: dict[str, Any]) -> None:
    """Write the page.

    Args:
        file: Where to.
        comparison: What `comparison.json` holds. All text in it is a stranger's: the page escapes it, and its script
            handles it as text only.
    """
    from plotly.offline import get_plotlyjs

    comparison = clean(comparison)
    context = _context(comparison)
    script, plotly = _template_text("report.js"), get_plotlyjs()
    packed_plotly = _pack(plotly)
    data, shown = _fitting(_data(comparison, context["slots"]), LARGEST - FOR_TABLES - len(packed_plotly))
    page = (
        Environment(loader=PackageLoader("rlhf_recipes.pages"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .get_template("report.html")
        .render(
            context,
            policy=f"default-src 'none'; script-src {_hash(script)} {_hash(plotly)}; style-src 'unsafe-inline'; "
            "img-src data: blob:; base-uri 'none'; form-action 'none'",
            style=Markup(_template_text("report.css")),
            script=Markup(script),
            plotly=packed_plotly,
            data=data,
            shown=shown,
        )
    )
    # The policy's hashes are of these very characters: no system may write other line ends.
    file.write_text(page, encoding="utf-8", newline="\n")


def _context(comparison: dict[str, Any]) -> dict[str, Any]:
    """What the template shows, as text."""
    algorithms = comparison["algorithms"]
    measured = comparison["evaluation"]
    sampled = (name for line in comparison["samples"] for name in line["models"])
    models = list(dict.fromkeys([*(measured["models"] if measured else ()), *sampled]))
    models.sort(key=lambda name: _place(name, algorithms))
    columns, held_out = held_out_rows(comparison)
    lengths = [len(run["curves"]["step"]) for run in comparison["runs"]]
    return {
        "comparison": comparison,
        "slots": _slots(comparison, models),
        "views": _forest(view_rows(comparison)),
        "axes": _axes(comparison),
        "metrics": {key: CURVES.get(key, key) for key in _metrics(comparison)},
        "small_curves": list(CURVES)[1:],
        "seeds": list(dict.fromkeys(run["seed"] for run in comparison["runs"] if run["seed"] is not None)),
        "thinned": max(lengths, default=0) if max(lengths, default=0) > POINTS else None,
        "held_out_columns": columns,
        "held_out": held_out,
        "model_rows": measured["models"] if measured else {},
        "lengths": _length_groups(measured, algorithms),
        "cost": cost_rows(comparison),
        "audits": audit_rows(comparison),
        "findings": finding_rows(comparison),
        "models": models,
        "differences": difference_rows(comparison),
        "settings": setting_rows(comparison),
        "algorithms": algorithms,
        "meanings": {column.heading: column.meaning for column in COLUMNS.values()},
        "number": number,
    }


def _slots(comparison: dict[str, Any], models: list[str]) -> dict[str, str]:
    """Name of an algorithm, run or model -> the class that colours it."""
    algorithms = comparison["algorithms"]
    others = [name for name in models if algorithm_of(name, algorithms) is None and name != "sft"]
    of_algorithm = slots([*algorithms, *others])
    of_model = {name: of_algorithm.get(algorithm_of(name, algorithms) or name, "sft") for name in models}
    return of_model | {run["name"]: of_algorithm[run["algorithm"]] for run in comparison["runs"]} | of_algorithm


def _length_groups(measured: dict[str, Any] | None, algorithms: list[str]) -> list[str]:
    """Whose lengths are drawn: an algorithm's models together, every other model alone."""
    counts = ((measured or {}).get("length_histograms") or {}).get("counts", {})
    return list(dict.fromkeys(algorithm_of(name, algorithms) or name for name in counts))


def _forest(views: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where dots and intervals stand, in percent of a track whose middle is 0.

    Views of training share one scale. Held-out means are of many more completions: on it they would be a dot.
    """
    reach: dict[tuple[bool, str], float] = {}
    for view in views:
        ends = [abs(end) for end in (view["difference"], *(view["interval"] or ())) if end is not None]
        scale = view["view"] == "held_out", view["metric"]
        reach[scale] = max(reach.get(scale, 0), *ends, 0)
    for view in views:
        of_one = 50 / (1.1 * reach[view["view"] == "held_out", view["metric"]] or 1)
        view["dot"] = None if view["difference"] is None else round(50 + of_one * view["difference"], 2)
        view["bar"] = None if view["interval"] is None else [round(50 + of_one * end, 2) for end in view["interval"]]
    return views


def _axes(comparison: dict[str, Any]) -> dict[str, str]:
    """What curves can be drawn over: what every run has."""
    runs = [run["curves"] for run in comparison["runs"]]
    return {key: title for key, title in AXES.items() if runs and all(_any_number(run.get(key)) for run in runs)}


def _metrics(comparison: dict[str, Any]) -> list[str]:
    found = dict.fromkeys(CURVES)
    for run in comparison["runs"]:
        found |= dict.fromkeys(run["curves"])
    curves = [run["curves"] for run in comparison["runs"]]
    return [key for key in found if key not in AXES and any(_any_number(run.get(key)) for run in curves)]


def _any_number(values: list[float | None] | None) -> bool:
    return values is not None and any(value is not None for value in values)


def _fitting(data: dict[str, Any], room: int) -> tuple[str, int]:
    """What the script draws, packed, with as many samples as there is room for; and their number."""
    number = len(data["samples"])
    while True:
        kept = data | {"samples": data["samples"][:number]}
        packed = _pack(json.dumps(kept, separators=(",", ":")))
        if len(packed) <= room or number == 0:
            return packed, number
        number = min(number - 1, int(number * room / len(packed)))


def _data(comparison: dict[str, Any], slots: dict[str, str]) -> dict[str, Any]:
    """What the page's script draws."""
    algorithms, measured = comparison["algorithms"], comparison["evaluation"]
    runs = [
        {"name": run["name"], "algorithm": run["algorithm"], "seed": run["seed"], "slot": slots[run["name"]]}
        | {"curves": _thin(run["curves"])}
        for run in comparison["runs"]
    ]
    frontier = [
        run | {"slot": slots[run["algorithm"]], "training": run["training"][:: 1 + len(run["training"]) // POINTS]}
        for run in comparison["frontier"]
    ]
    return _short(
        {
            "algorithms": algorithms,
            "axes": AXES,
            "titles": CURVES,
            "slots": slots,
            "owners": {name: algorithm_of(name, algorithms) for name in slots},
            "runs": runs,
            "bands": comparison["bands"],
            "frontier": frontier,
            "lengths": measured.get("length_histograms") if measured else None,
            "audit": {name: {"bins": found["bins"]} for name, found in comparison["audit"].items()},
            "samples": [_sample(line, algorithms) for line in comparison["samples"]],
        }
    )


def _sample(line: dict[str, Any], algorithms: list[str]) -> dict[str, Any]:
    models = {
        name: {
            "algorithm": algorithm_of(name, algorithms),
            "completion": _text(found["completion"]),
            "score": found.get("score"),
            "held_out": found.get("held_out"),
            "tokens": found.get("tokens"),
            "finished": found.get("finished"),
        }
        for name, found in sorted(line["models"].items(), key=lambda item: _place(item[0], algorithms))
    }
    sample = {"prompt": _text(line["prompt"]), "models": models}
    if line.get("reference") is not None:
        sample["reference"] = _text(line["reference"])
    return sample


def _place(model: str, algorithms: list[str]) -> int:
    """What training started from comes first, then the runs of one algorithm after the other."""
    return [None, *algorithms].index(algorithm_of(model, algorithms))


def _text(value: Any) -> str:
    """A text, or the messages of a chat, one after the other."""
    if not isinstance(value, list):
        return str(value)
    said = [(message.get("role", ""), message.get("content")) for message in value]
    texts = [content if isinstance(content, str) else json.dumps(content, ensure_ascii=False) for _, content in said]
    if len(said) == 1:
        return texts[0]
    return "\n\n".join(f"{role}: {text}" for (role, _), text in zip(said, texts, strict=True))


def _thin(curves: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """At most `POINTS` points: of each stretch of steps the smallest and the largest value, in their order."""
    steps = len(curves["step"])
    if steps <= POINTS:
        return curves
    size = -(-steps // (POINTS // 2))
    thinned: dict[str, list[Any]] = {}
    for key, values in curves.items():
        kept = thinned[key] = []
        for start in range(0, steps, size):
            part = values[start : start + size]
            known = [i for i, value in enumerate(part) if value is not None]
            if key in AXES:
                kept += [part[0], part[-1]]
            elif not known:
                kept += [None, None]
            else:
                ends = min(known, key=part.__getitem__), max(known, key=part.__getitem__)
                kept += [part[i] for i in sorted(ends)]
    return thinned


def _short(value: Any) -> Any:
    """Numbers to five digits: more than a screen shows."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() else float(f"{value:.5g}")
    return value


def _template_text(name: str) -> str:
    return (files("rlhf_recipes.pages") / "templates" / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """A script as the page's policy names it: no other runs, whatever text finds its way into the page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _pack(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
