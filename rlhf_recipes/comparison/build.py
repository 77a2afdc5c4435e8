"""Builds a comparison of trained runs: one dictionary, from which all files and pages are made.

It holds curves, bands over seeds, differences of settings, held-out numbers and the verdict. `docs/comparison.md` says what
is compared and how the verdict is made.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

from rlhf_recipes.comparison.curves import bands, frontier, value_at
from rlhf_recipes.comparison.differences import (
    describe_hardware,
    effective_settings,
    find_differences,
    written_trainer_keys,
)
from rlhf_recipes.comparison.held_out import Measured, find_held_out, read_samples
from rlhf_recipes.comparison.runs import TrainedRun, points
from rlhf_recipes.comparison.verdict import UNITS, decide, view_of, void, without_winner
from rlhf_recipes.evaluation.intervals import bootstrap_interval
from rlhf_recipes.runs.files import read_audit
from rlhf_recipes.system.files import read_json, without_nan

UNKNOWN = "Plain Trainer runs do not store their settings, so models, data, rewards and budgets may differ."


def build_comparison(
    runs: list[TrainedRun], title: str, notes: list[str], failed: Sequence[str] = ()
) -> dict[str, Any]:
    """Compares runs.

    Args:
        runs: Finished runs; runs with the same label are seeds of one algorithm.
        title: Heading of the page.
        notes: Sentences to show before those of the comparison itself.
        failed: A sentence for each run that failed. With any, no winner is named.
    """
    labels = list(dict.fromkeys(run.label for run in runs))
    differences = find_differences(runs)
    refusing = [difference["key"] for difference in differences if difference["refuses"]]
    measured, found_notes = find_held_out(runs)
    unknown = "" if all(run.manifest for run in runs) else UNKNOWN
    machines = [difference["key"] for difference in differences if difference["kind"] == "machine"]
    views = _views(runs, labels, measured, machines) if len(labels) == 2 else []
    if refusing:
        views = [void(view, "The runs differ in more than the algorithm.") for view in views]
    failures = f"{len(failed)} of {len(runs) + len(failed)} runs failed" if failed else ""
    if failed:
        views = [without_winner(view, failures) for view in views]
    seeds = {label: {r.name if r.seed is None else r.seed for r in runs if r.label == label} for label in labels}
    evaluation = next(iter(measured.values())).content if measured else None
    comparison = {
        "title": title,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "algorithms": labels,
        "runs": [_run_entry(run) for run in runs],
        "comparable": not refusing and not unknown,
        "single_seed": any(len(of_label) == 1 for of_label in seeds.values()),
        "differences": differences,
        "verdict": decide(views, labels, refusing, unknown, _kl(runs, labels, measured), failures),
        "views": views,
        "held_out": _held_out(runs, labels, measured),
        "bands": bands(runs, labels),
        "frontier": [_frontier_entry(run, measured.get(run.name)) for run in runs],
        "cost": {label: _cost([run for run in runs if run.label == label]) for label in labels},
        "evaluation": evaluation and {key: value for key, value in evaluation.items() if key != "samples"},
        "samples": read_samples(measured),
        "judge": _judge_files(measured),
        "audit": {run.name: found for run in runs if (found := read_audit(run.path)) is not None},
        "failed": list(failed),
        "notes": [*failed, *notes, *found_notes, *_own_notes(measured, machines), *_findings(runs)],
    }
    return _plain(comparison)


def _views(
    runs: list[TrainedRun], labels: list[str], measured: dict[str, Measured], machines: list[str]
) -> list[dict[str, Any]]:
    """The views of two algorithms. The first one decides: held-out scores if all runs have them, else training scores."""

    def view(name: str, metric: str, values: list[float | None], at: float | None = None) -> dict[str, Any]:
        seeds_and_values = [(run.label, (run.seed, value)) for run, value in zip(runs, values, strict=True)]
        return view_of(
            name, metric, {of: [pair for label, pair in seeds_and_values if label == of] for of in labels}, at
        )

    views = []
    for metric in ("score_mean", "held_out_mean") if measured else ():
        values = [measured[run.name].metrics.get(metric) for run in runs]
        if None in values:
            break  # without the score, the held-out score does not decide either
        views.append(view("held_out", metric, values))
    for axis in UNITS:
        scored = [points(run.curves, axis, "score_mean") for run in runs]
        if not all(scored) or (axis == "step" and any(view["view"] == "episodes" for view in views)):
            continue
        at = min(max(x for x, _ in line) for line in scored)
        views.append(view(axis, "score_mean", [value_at(run, axis, at, "score_mean") for run in runs], at))
        if axis == "seconds" and machines:
            why = f"The runs were not made on the same machine in the same setup ({', '.join(machines)})."
            views[-1] = void(views[-1], why)
    return views


def _kl(runs: list[TrainedRun], labels: list[str], measured: dict[str, Measured]) -> dict[str, float] | None:
    """Algorithm -> mean KL of its runs at the end; None if one is unknown."""
    found: dict[str, list[float]] = {label: [] for label in labels}
    for run in runs:
        if measured:
            kl = measured[run.name].metrics.get("kl")
        else:
            kl = value_at(run, "step", _last(run, "step") or 0, "kl")
        if kl is None:
            return None
        found[run.label].append(kl)
    return {label: fmean(values) for label, values in found.items()}


def _run_entry(run: TrainedRun) -> dict[str, Any]:
    manifest = run.manifest
    settings = effective_settings(manifest, written_trainer_keys([run])) if manifest else {}
    return {
        "name": run.name,
        "algorithm": run.label,
        "seed": run.seed,
        "path": str(run.path),
        "source": "rlhf_recipes" if manifest else "trainer_state",
        "results": manifest.get("results", {}),
        "episodes": _last(run, "episodes"),
        "wall_seconds": manifest.get("wall_seconds"),
        **_costs(run),
        "settings": {
            key: shown
            for key, (_, shown) in settings.items()
            if not key.startswith(("versions.", "setup.", "hardware"))
        },
        "hardware": describe_hardware(manifest) if manifest else "unknown",
        "versions": manifest.get("versions", {}),
        "curves": run.curves,
    }


def _costs(run: TrainedRun) -> dict[str, float | None]:
    episodes, seconds = _last(run, "episodes"), _last(run, "seconds")
    return {
        "seconds": seconds,
        "tokens": _last(run, "tokens"),
        "peak_memory_gib": run.manifest.get("peak_memory_gib"),
        "peak_gpu_memory_gib": run.manifest.get("peak_gpu_memory_gib"),
        "episodes_per_second": episodes / seconds if episodes and seconds else None,
    }


def _cost(runs: list[TrainedRun]) -> dict[str, Any]:
    """The costs of one algorithm, over its runs."""
    costs = [_costs(run) for run in runs]
    known = {key: [value for cost in costs if (value := cost[key]) is not None] for key in costs[0]}
    return {key: _spread(values) for key, values in known.items() if values}


def _last(run: TrainedRun, metric: str) -> float | None:
    return next((value for value in reversed(run.curves.get(metric, [])) if value is not None), None)


def _held_out(runs: list[TrainedRun], labels: list[str], measured: dict[str, Measured]) -> dict[str, Any] | None:
    if not measured:
        return None
    metrics: dict[str, Any] = {}
    for metric in dict.fromkeys(key for found in measured.values() for key in found.metrics):
        for label in labels:
            values = [measured[run.name].metrics.get(metric) for run in runs if run.label == label]
            known = [value for value in values if isinstance(value, (int, float))]
            if known:
                metrics.setdefault(metric, {})[label] = _spread(known) | {"values": values}
    return {"metrics": metrics, "prompts": next(iter(measured.values())).content["num_prompts"]}


def _spread(values: list[float]) -> dict[str, Any]:
    low, high = bootstrap_interval(values) or (None, None)
    return {"mean": fmean(values), "low": low, "high": high}


def _frontier_entry(run: TrainedRun, measured: Measured | None) -> dict[str, Any]:
    """Score against KL, during training and on held-out prompts."""
    at_end = [measured.metrics.get("kl"), measured.metrics.get("score_mean")] if measured else [None]
    held_out = None if None in at_end else at_end
    of_run = {"run": run.name, "algorithm": run.label, "seed": run.seed}
    return of_run | {"training": frontier(run), "held_out": held_out}


def _judge_files(measured: dict[str, Measured]) -> list[dict[str, Any]]:
    """The judge's results for these evals, without those for earlier evals in the same folders."""
    found = []
    for folder, eval_id in {found.folder: found.manifest["id"] for found in measured.values()}.items():
        contents = [read_json(file) for file in sorted((folder.parent / "judge").glob("*-vs-*.json"))]
        found += [content for content in contents if content.get("eval") == eval_id]
    return found


def _own_notes(measured: dict[str, Measured], machines: list[str]) -> list[str]:
    notes = []
    if without := [name for name, found in measured.items() if found.metrics.get("score_mean") is None]:
        notes.append(f"Scores on held-out prompts are not compared: {', '.join(without)} has none.")
    if machines:
        notes.append(f"Times and memory cannot be compared: the runs differ in {', '.join(machines)}.")
    return notes


def _findings(runs: list[TrainedRun]) -> list[str]:
    return [f"{run.name}: {finding}." for run in runs for finding in run.manifest.get("findings", [])]


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: NaN and infinity become None, other numbers keep six digits."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return without_nan(float(f"{value:.6g}"))
    return value
