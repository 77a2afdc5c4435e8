"""A comparison as one HTML file that opens offline and makes no request to the network."""

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
from rlhf_recipes.pages.rows import clean, setting_rows, template_values
from rlhf_recipes.pages.tables import COLUMNS
from rlhf_recipes.recipe.messages import as_text, with_roles

AXES = {"episodes": "episodes", "tokens": "tokens", "seconds": "seconds", "step": "steps"}

POINTS = 1000
"""Most points of one line. A wide screen has about as many columns for it."""

MAX_BYTES = 5_000_000
"""Size limit of a page, so that it can be sent by mail. The page leaves out the samples beyond it, and says so."""

BYTES_FOR_TABLES = 400_000
"""Share of `MAX_BYTES` kept for the parts that are not packed: text, tables, style and script."""


def write_page(file: Path, comparison: dict[str, Any]) -> None:
    """Write the page.

    Args:
        file: HTML file to write.
        comparison: The content of `comparison.json`. Models and data wrote its texts: the page escapes them, and its script
            handles them as text only.
    """
    from plotly.offline import get_plotlyjs

    comparison = clean(comparison)
    context = _context(comparison)
    script, plotly = _template_text("report.js"), get_plotlyjs()
    packed_plotly = _pack(plotly)
    room = MAX_BYTES - BYTES_FOR_TABLES - len(packed_plotly)
    data, shown = _pack_with_samples(_data(comparison, context["slots"]), room)
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
    # The policy holds hashes of these characters, so that line ends must be the same on every system.
    file.write_text(page, encoding="utf-8", newline="\n")


def _context(comparison: dict[str, Any]) -> dict[str, Any]:
    """The values of the template."""
    algorithms = comparison["algorithms"]
    measured = comparison["evaluation"]
    sampled = (name for line in comparison["samples"] for name in line["models"])
    models = list(dict.fromkeys([*(measured["models"] if measured else ()), *sampled]))
    models.sort(key=lambda name: _place(name, algorithms))
    points = max((len(run["curves"]["step"]) for run in comparison["runs"]), default=0)
    values = template_values(comparison)
    _add_places(values["views"])
    return values | {
        "slots": _slots(comparison, models),
        "axes": _axes(comparison),
        "metrics": {key: CURVES.get(key, key) for key in _metrics(comparison)},
        "small_curves": list(CURVES)[1:],
        "seeds": list(dict.fromkeys(run["seed"] for run in comparison["runs"] if run["seed"] is not None)),
        "thinned": points if points > POINTS else None,
        "model_rows": measured["models"] if measured else {},
        "lengths": _length_groups(measured, algorithms),
        "models": models,
        "settings": setting_rows(comparison),
        "meanings": {column.heading: column.meaning for column in COLUMNS.values()},
    }


def _slots(comparison: dict[str, Any], models: list[str]) -> dict[str, str]:
    """Name of an algorithm, run or model -> the style class that gives its colour."""
    algorithms = comparison["algorithms"]
    others = [name for name in models if algorithm_of(name, algorithms) is None and name != "sft"]
    of_algorithm = slots([*algorithms, *others])
    of_model = {name: of_algorithm.get(algorithm_of(name, algorithms) or name, "sft") for name in models}
    return of_model | {run["name"]: of_algorithm[run["algorithm"]] for run in comparison["runs"]} | of_algorithm


def _length_groups(measured: dict[str, Any] | None, algorithms: list[str]) -> list[str]:
    """Names of the lines in the plot of lengths: one for all models of an algorithm, one for each other model."""
    counts = ((measured or {}).get("length_histograms") or {}).get("counts", {})
    return list(dict.fromkeys(algorithm_of(name, algorithms) or name for name in counts))


def _add_places(views: list[dict[str, Any]]) -> None:
    """Add to each view the places of its dot and its interval, in percent of a track whose middle is 0.

    Views of training share one scale. Held-out means are over many more completions: they need a finer scale.
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


def _axes(comparison: dict[str, Any]) -> dict[str, str]:
    """The axes that every run has numbers for."""
    curves = [run["curves"] for run in comparison["runs"]]
    return {key: title for key, title in AXES.items() if curves and all(_any_number(run.get(key)) for run in curves)}


def _metrics(comparison: dict[str, Any]) -> list[str]:
    """The metrics that some run has numbers for; those of `CURVES` come first."""
    curves = [run["curves"] for run in comparison["runs"]]
    found = dict.fromkeys([*CURVES, *(key for run in curves for key in run)])
    return [key for key in found if key not in AXES and any(_any_number(run.get(key)) for run in curves)]


def _any_number(values: list[float | None] | None) -> bool:
    return values is not None and any(value is not None for value in values)


def _pack_with_samples(data: dict[str, Any], room: int) -> tuple[str, int]:
    """Pack the script's data with as many samples as fit into `room` bytes; also returns their number."""
    number = len(data["samples"])
    while True:
        kept = data | {"samples": data["samples"][:number]}
        packed = _pack(json.dumps(kept, separators=(",", ":")))
        if len(packed) <= room or number == 0:
            return packed, number
        number = min(number - 1, int(number * room / len(packed)))


def _data(comparison: dict[str, Any], slots: dict[str, str]) -> dict[str, Any]:
    """The data that the page's script draws."""
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
    return _round_numbers(
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
        name: {"algorithm": algorithm_of(name, algorithms), "completion": _text(found["completion"])}
        | {key: found.get(key) for key in ("score", "held_out", "tokens", "finished")}
        for name, found in sorted(line["models"].items(), key=lambda item: _place(item[0], algorithms))
    }
    gold = line.get("gold")
    return {"prompt": _text(line["prompt"]), "models": models, "gold": gold and _text(gold)}


def _place(model: str, algorithms: list[str]) -> int:
    """Sorting key of a model: the models that training started from, then the models of each algorithm."""
    return [None, *algorithms].index(algorithm_of(model, algorithms))


def _text(value: str | list[dict]) -> str:
    """A text, or the messages of a chat, each with its role if there are several."""
    if isinstance(value, str) or len(value) == 1:
        return as_text(value)
    return with_roles(value, between="\n\n")


def _thin(curves: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """At most `POINTS` points: the smallest and the largest value of each stretch of steps, in their order."""
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


def _round_numbers(value: Any) -> Any:
    """A copy with all numbers rounded to five digits; a screen shows fewer."""
    if isinstance(value, dict):
        return {key: _round_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_round_numbers(item) for item in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() else float(f"{value:.5g}")
    return value


def _template_text(name: str) -> str:
    return (files("rlhf_recipes.pages") / "templates" / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """The name of a script in the page's policy. A browser runs only the scripts that the policy names."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _pack(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
