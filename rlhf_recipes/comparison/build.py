"""A comparison of trained runs as one dictionary: curves, bands over seeds, differences, held-out numbers, verdict.

`docs/comparison.md` says what is compared and how the verdict is made. Files and pages are made of this dictionary alone.
"""

from datetime import UTC, datetime
from statistics import fmean
from typing import Any

from rlhf_recipes.comparison.differences import describe_hardware, effective_settings, find_differences, written
from rlhf_recipes.comparison.held_out import Measured, find_held_out, read_samples
from rlhf_recipes.comparison.runs import TrainedRun, points
from rlhf_recipes.comparison.verdict import decide, view_of, void
from rlhf_recipes.evaluation.intervals import bootstrap_band, bootstrap_interval
from rlhf_recipes.pages.metrics import TRAINING
from rlhf_recipes.runs.files import read_audit
from rlhf_recipes.system.files import read_json

UNITS = {"episodes": "episodes", "step": "steps", "tokens": "tokens", "seconds": "seconds"}
"""Axis -> the unit of a budget on it. Steps stand in for episodes where these are not known."""

SMOOTHED = 0.1
"""A view by budget takes the mean score of this last share of it: single rollouts are noisy."""

GRID = 400
"""Points of a band at most."""

FRONTIER = 100
"""Points at most of a run's way from the reference."""

BANDED = [name for name, metric in TRAINING.items() if metric.banded]
"""Metrics that get a band; those of single reward functions get one too."""

UNKNOWN = "Plain Trainer runs do not store their settings, so models, data, rewards and budgets may differ."


def build_comparison(runs: list[TrainedRun], title: str, notes: list[str]) -> dict[str, Any]:
    """Compare runs; see the module.

    Args:
        runs: Those of one label are seeds of one algorithm.
        title: Heading of the page.
        notes: Sentences to put before those of the comparison itself.
    """
    labels = list(dict.fromkeys(run.label for run in runs))
    differences = find_differences(runs)
    refusing = [difference["key"] for difference in differences if difference["refuses"]]
    measured, found_notes = find_held_out(runs)
    unknown = UNKNOWN if any(run.manifest is None for run in runs) else ""
    machines = [d["key"] for d in differences if d["kind"] == "machine"]
    views = _views(runs, labels, measured, machines) if len(labels) == 2 else []
    if refusing:
        views = [void(view, "The runs differ in more than the algorithm.") for view in views]
    verdict = decide(views, labels, refusing, unknown, _kl(runs, labels, measured))
    comparison = {
        "title": title,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "algorithms": labels,
        "runs": [_run_entry(run) for run in runs],
        "comparable": not refusing and not unknown,
        "single_seed": any(
            len({r.name if r.seed is None else r.seed for r in runs if r.label == label}) == 1 for label in labels
        ),
        "differences": differences,
        "verdict": verdict,
        "views": views,
        "held_out": _held_out(runs, labels, measured),
        "bands": _bands(runs, labels),
        "frontier": [_frontier(run, measured.get(run.name)) for run in runs],
        "cost": {label: _cost([run for run in runs if run.label == label]) for label in labels},
        "evaluation": _evaluation(measured),
        "samples": read_samples(measured),
        "judge": _judge_files(measured),
        "audit": {run.name: found for run in runs if (found := read_audit(run.path)) is not None},
        "notes": [*notes, *found_notes, *_score_note(runs, measured), *_machine_note(machines)],
    }
    return _plain(comparison)


def _views(
    runs: list[TrainedRun], labels: list[str], measured: dict[str, Measured], machines: list[str]
) -> list[dict[str, Any]]:
    """The one that decides first: held-out scores where all runs have them, or else the training score by budgets."""

    def side_by_side(
        view: str, metric: str, values: dict[str, float | None], at: float | None = None
    ) -> dict[str, Any]:
        of_label = {label: [(run.seed, values[run.name]) for run in runs if run.label == label] for label in labels}
        return view_of(view, metric, of_label, at, UNITS.get(view, ""))

    views = []
    for metric in ("score_mean", "held_out_mean") if measured else ():
        scores = {run.name: measured[run.name].metrics.get(metric) for run in runs}
        if None in scores.values():
            break  # without its score, the held-out score alone does not decide
        views.append(side_by_side("held_out", metric, scores))
    for axis in UNITS:
        reached = [max((x for x, _ in points(run.curves, axis, "score_mean")), default=None) for run in runs]
        if None in reached or (axis == "step" and any(view["view"] == "episodes" for view in views)):
            continue
        at = min(reached)
        view = side_by_side(axis, "score_mean", {run.name: value_at(run, axis, at, "score_mean") for run in runs}, at)
        if axis == "seconds" and machines:
            view = void(view, f"The runs were not made on the same machine in the same setup ({', '.join(machines)}).")
        views.append(view)
    return views


def value_at(run: TrainedRun, axis: str, budget: float, metric: str) -> float | None:
    """Mean of what was logged in the last tenth of a budget; of the last line before it where that tenth has none."""
    before = [(x, y) for x, y in points(run.curves, axis, metric) if x <= budget]
    last = [y for x, y in before if x > (1 - SMOOTHED) * budget] or [y for _, y in before[-1:]]
    return fmean(last) if last else None


def _kl(runs: list[TrainedRun], labels: list[str], measured: dict[str, Measured]) -> dict[str, float] | None:
    found = {}
    for label in labels:
        own = [run for run in runs if run.label == label]
        if measured:
            values = [measured[run.name].metrics.get("kl") for run in own]
        else:
            values = [value_at(run, "step", max(filter(None, run.curves["step"]), default=0), "kl") for run in own]
        if None in values:
            return None
        found[label] = fmean(values)
    return found


def _run_entry(run: TrainedRun) -> dict[str, Any]:
    manifest = run.manifest or {}
    settings = effective_settings(manifest, written([run])) if manifest else {}
    return {
        "name": run.name,
        "algorithm": run.label,
        "seed": run.seed,
        "path": str(run.path),
        "source": "rlhf_recipes" if manifest else "trainer_state",
        "results": manifest.get("results", {}),
        **{axis: _last(run, axis) for axis in ("episodes", "tokens", "seconds")},
        **{key: manifest.get(key) for key in ("wall_seconds", "peak_memory_gib", "peak_gpu_memory_gib")},
        "episodes_per_second": _speed(run),
        "settings": {
            key: shown
            for key, (_, shown) in settings.items()
            if not key.startswith(("versions.", "setup.", "hardware"))
        },
        "hardware": describe_hardware(manifest) if manifest else "unknown",
        "versions": manifest.get("versions", {}),
        "curves": run.curves,
    }


def _last(run: TrainedRun, metric: str) -> float | None:
    return next((value for value in reversed(run.curves.get(metric, [])) if value is not None), None)


def _speed(run: TrainedRun) -> float | None:
    episodes, seconds = _last(run, "episodes"), _last(run, "seconds")
    return episodes / seconds if episodes and seconds else None


def _held_out(runs: list[TrainedRun], labels: list[str], measured: dict[str, Measured]) -> dict[str, Any] | None:
    if not measured:
        return None
    metrics: dict[str, Any] = {}
    for metric in dict.fromkeys(key for found in measured.values() for key in found.metrics):
        for label in labels:
            values = [measured[run.name].metrics.get(metric) for run in runs if run.label == label]
            there = [value for value in values if isinstance(value, (int, float))]
            if there:
                metrics.setdefault(metric, {})[label] = _spread(there) | {"values": values}
    return {"metrics": metrics, "prompts": next(iter(measured.values())).content["num_prompts"]}


def _spread(values: list[float]) -> dict[str, Any]:
    low, high = bootstrap_interval(values) or (None, None)
    return {"mean": fmean(values), "low": low, "high": high}


def _bands(runs: list[TrainedRun], labels: list[str]) -> dict[str, Any]:
    """Mean and bootstrap interval over seeds of every metric, on one grid per axis that ends where the first run does."""
    import numpy

    metrics = [*BANDED, *{m: 0 for run in runs for m in run.curves if m.startswith("score/") and "/std" not in m}]
    bands: dict[str, Any] = {}
    for axis in UNITS:
        lines = {
            (run.name, metric): found
            for run in runs
            for metric in metrics
            if (found := points(run.curves, axis, metric))
        }
        scored = [lines.get((run.name, "score_mean")) for run in runs]
        if not all(scored) or (axis == "step" and "episodes" in bands):
            continue
        low, high = max(found[0][0] for found in scored), min(found[-1][0] for found in scored)
        if low > high:
            continue
        grid = numpy.linspace(low, high, 1 if low == high else min(GRID, *map(len, scored)))
        bands[axis] = {}
        for metric in metrics:
            of_metric = {
                label: [
                    _on_grid(lines[r.name, metric], grid)
                    for r in runs
                    if r.label == label and (r.name, metric) in lines
                ]
                for label in labels
            }
            bands[axis][metric] = {label: _band(grid, curves) for label, curves in of_metric.items() if curves}
        bands[axis] = {metric: found for metric, found in bands[axis].items() if found}
    return bands


def _band(grid: Any, curves: list[Any]) -> dict[str, Any]:
    low, high = bootstrap_band(curves) or (None, None)
    mean = sum(curves) / len(curves)
    return {"x": grid.tolist(), "mean": mean.tolist(), "low": low, "high": high, "seeds": len(curves)}


def _on_grid(line: list[tuple[float, float]], grid: Any) -> Any:
    """At each point of the grid the mean of what lies nearest to it; between points where nothing does, interpolated."""
    import numpy

    x, y = (numpy.asarray(column, dtype=float) for column in zip(*line, strict=True))
    values = numpy.interp(grid, x, y)
    if len(grid) > 1:
        inside = (x >= grid[0]) & (x <= grid[-1])
        nearest = numpy.rint((x[inside] - grid[0]) / (grid[1] - grid[0])).astype(int)
        counts = numpy.bincount(nearest, minlength=len(grid))
        sums = numpy.bincount(nearest, weights=y[inside], minlength=len(grid))
        values = numpy.where(counts > 0, sums / numpy.maximum(counts, 1), values)
    return values


def _frontier(run: TrainedRun, measured: Measured | None) -> dict[str, Any]:
    """How much score for how much KL: means of consecutive logged steps, and on held-out prompts."""
    way = points(run.curves, "kl", "score_mean")
    size = -(-len(way) // FRONTIER)
    chunks = [way[i : i + size] for i in range(0, len(way), size)] if way else []
    at_end = [measured.metrics.get("kl"), measured.metrics.get("score_mean")] if measured else [None]
    return {
        "run": run.name,
        "algorithm": run.label,
        "seed": run.seed,
        "training": [[fmean(kl for kl, _ in chunk), fmean(score for _, score in chunk)] for chunk in chunks],
        "held_out": None if None in at_end else at_end,
    }


def _cost(runs: list[TrainedRun]) -> dict[str, Any]:
    costs = [_cost_of(run) for run in runs]
    there = {key: [cost[key] for cost in costs if cost[key] is not None] for key in costs[0]}
    return {key: _spread(values) for key, values in there.items() if values}


def _cost_of(run: TrainedRun) -> dict[str, float | None]:
    of_process = {key: (run.manifest or {}).get(key) for key in ("peak_memory_gib", "peak_gpu_memory_gib")}
    last = {"seconds": _last(run, "seconds"), "tokens": _last(run, "tokens")}
    return last | of_process | {"episodes_per_second": _speed(run)}


def _evaluation(measured: dict[str, Measured]) -> dict[str, Any] | None:
    if not measured:
        return None
    return {key: value for key, value in next(iter(measured.values())).content.items() if key != "samples"}


def _judge_files(measured: dict[str, Measured]) -> list[dict[str, Any]]:
    """Judges' results for these evals, without results of earlier evals in their folders."""
    found = []
    for folder, manifest in {measure.folder: measure.manifest for measure in measured.values()}.items():
        for file in sorted((folder.parent / "judge").glob("*-vs-*.json")):
            content = read_json(file)
            found += [content] if content.get("eval") == manifest["id"] else []
    return found


def _score_note(runs: list[TrainedRun], measured: dict[str, Measured]) -> list[str]:
    without = [run.name for run in runs if measured and measured[run.name].metrics.get("score_mean") is None]
    return [f"Scores on held-out prompts are not compared: {', '.join(without)} has none."] if without else []


def _machine_note(machines: list[str]) -> list[str]:
    if not machines:
        return []
    return [f"Times and memory cannot be compared: the runs differ in {', '.join(machines)}."]


def _plain(value: Any) -> Any:
    """As JSON has it: numbers that are none become null, and the others keep six digits."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else None
    return value
