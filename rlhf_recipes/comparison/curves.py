"""Makes comparable curves of training logs: values at a budget, bands over seeds, score against KL."""

from statistics import fmean
from typing import Any

from rlhf_recipes.comparison.runs import TrainedRun, points
from rlhf_recipes.comparison.verdict import UNITS
from rlhf_recipes.evaluation.intervals import bootstrap_band
from rlhf_recipes.pages.metrics import TRAINING

LAST_SHARE = 0.1
"""Share of a budget, at its end, whose mean is the value at that budget: single rollouts are noisy."""

MAX_BAND_POINTS = 400

MAX_FRONTIER_POINTS = 100

BANDED = [name for name, metric in TRAINING.items() if metric.banded]
"""Metrics that get a band. The metrics of single reward functions get one too."""


def value_at(run: TrainedRun, axis: str, budget: float, metric: str) -> float | None:
    """Mean of the lines logged in the last tenth of a budget. If there are none, the last line before it."""
    before = [(x, y) for x, y in points(run.curves, axis, metric) if x <= budget]
    last = [y for x, y in before if x > (1 - LAST_SHARE) * budget] or [y for _, y in before[-1:]]
    return fmean(last) if last else None


def bands(runs: list[TrainedRun], labels: list[str]) -> dict[str, Any]:
    """Axis -> metric -> algorithm -> mean and bootstrap interval over seeds.

    All curves of an axis have one grid. It begins where the last run begins, and ends where the first run ends.
    """
    import numpy

    metrics = [*BANDED, *{m: 0 for run in runs for m in run.curves if m.startswith("score/") and "/std" not in m}]
    found: dict[str, Any] = {}
    for axis in UNITS:
        scored = [points(run.curves, axis, "score_mean") for run in runs]
        if not all(scored) or (axis == "step" and "episodes" in found):
            continue
        low, high = max(line[0][0] for line in scored), min(line[-1][0] for line in scored)
        if low > high:
            continue
        grid = numpy.linspace(low, high, 1 if low == high else min(MAX_BAND_POINTS, *map(len, scored)))
        found[axis] = {}
        for metric in metrics:
            of_metric = {}
            for label in labels:
                own = [points(run.curves, axis, metric) for run in runs if run.label == label]
                if lines := [line for line in own if line]:
                    of_metric[label] = _band(grid, lines)
            if of_metric:
                found[axis][metric] = of_metric
    return found


def _band(grid: Any, lines: list[list[tuple[float, float]]]) -> dict[str, Any]:
    curves = [_on_grid(line, grid) for line in lines]
    low, high = bootstrap_band(curves) or (None, None)
    mean = sum(curves) / len(curves)
    return {"x": grid.tolist(), "mean": mean.tolist(), "low": low, "high": high, "seeds": len(curves)}


def _on_grid(line: list[tuple[float, float]], grid: Any) -> Any:
    """At each point of the grid, the mean of the logged points nearest to it. Interpolates where there are none."""
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


def frontier(run: TrainedRun) -> list[list[float]]:
    """(KL, score) during training, each the mean of consecutive logged lines."""
    way = points(run.curves, "kl", "score_mean")
    size = max(-(-len(way) // MAX_FRONTIER_POINTS), 1)
    chunks = [way[start : start + size] for start in range(0, len(way), size)]
    return [[fmean(kl for kl, _ in chunk), fmean(score for _, score in chunk)] for chunk in chunks]
