"""Pictures as PNG: curves, score over KL, lengths, sweeps."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rlhf_recipes.pages.metrics import TRAINING, tabled

CURVES = {name: metric.title for name, metric in tabled(TRAINING).items()}
"""Metric of `metrics.jsonl` that is drawn over episodes -> title of its plot."""

COLORS = {"ppo": "#d1495b", "rloo": "#00798c", "sft": "#8d96a3"}
OTHER_COLORS = ("#b07d12", "#5b5f97", "#66a182", "#b56576")
DASHES = {"ppo": "-", "rloo": (0, (6, 3)), "sft": (0, (2, 2))}
OTHER_DASHES = ((0, (9, 3, 2, 3)), (0, (12, 3)), (0, (4, 2, 1, 2)), (0, (1, 2)))


def slots(algorithms: list[str]) -> dict[str, str]:
    """Name -> style class: `ppo` and `rloo` for these two, `other-0` to `other-3` in turn for all other names."""
    others = [name for name in algorithms if name not in ("ppo", "rloo")]
    found = {name: f"other-{i % len(OTHER_COLORS)}" for i, name in enumerate(others)}
    return {name: found.get(name, name) for name in algorithms}


def algorithm_of(model: str, algorithms: list[str]) -> str | None:
    """The algorithm that trained a model of the evaluation, such as ppo for `ppo-seed_42`; None if no run did."""
    found = [name for name in algorithms if model == name or model.startswith((f"{name}-", f"{name} "))]
    return max(found, key=len, default=None)


def draw_comparison(comparison: dict[str, Any], folder: Path) -> None:
    """Draw a comparison for papers: `curves.png`, `frontier.png`, and `lengths.png` where models were evaluated.

    Args:
        comparison: The content of `comparison.json`.
        folder: An existing folder for the pictures.
    """
    # A name may hold dollar signs, and matplotlib would read the text between two of them as a formula.
    with _pyplot().rc_context({"text.parse_math": False}):
        _draw_curves(comparison, folder / "curves.png")
        _draw_frontier(comparison, folder / "frontier.png")
        measured = comparison["evaluation"]
        if measured and measured.get("length_histograms"):
            _draw_lengths(measured["length_histograms"], comparison["algorithms"], folder / "lengths.png")


def _draw_curves(comparison: dict[str, Any], file: Path) -> None:
    """Draw every metric of `CURVES`: bold means with bands over seeds, thin lines of the runs."""
    runs = comparison["runs"]
    episodes_known = all(any(x is not None for x in run["curves"].get("episodes", ())) for run in runs)
    axis_name = "episodes" if episodes_known else "step"
    bands = comparison["bands"].get(axis_name, {})
    looks = _looks(comparison["algorithms"])
    rows = -(-len(CURVES) // 2)
    figure, axes = _pyplot().subplots(rows, 2, figsize=(10, 3 * rows), constrained_layout=True)
    for axis, (metric, title) in zip(axes.flat, CURVES.items(), strict=False):
        for run in runs:
            known = _known(zip(run["curves"].get(axis_name, ()), run["curves"].get(metric, ()), strict=False))
            if known:
                x, y = zip(*known, strict=True)
                alone = sum(other["algorithm"] == run["algorithm"] for other in runs) == 1
                look = looks[run["algorithm"]] | ({"label": run["algorithm"]} if alone else {"linestyle": "-"})
                axis.plot(x, _smooth(y), linewidth=2 if alone else 0.8, alpha=1 if alone else 0.35, **look)
        for algorithm, band in bands.get(metric, {}).items():
            if band["seeds"] > 1:
                _band(axis, band, looks[algorithm], f"{algorithm}, mean of {band['seeds']} seeds")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(axis_name, fontsize=9)
        _tidy(axis)
    for axis in axes.flat[len(CURVES) :]:
        axis.remove()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    if handles:
        axes.flat[0].legend(handles, labels, frameon=False)
    _save(figure, file)


def _known(points: Iterable[Sequence[float | None]]) -> list[tuple[float, float]]:
    """The points (x, y) that have both numbers."""
    return [(x, y) for x, y in points if x is not None and y is not None]


def _band(axis: Any, band: dict[str, Any], look: dict[str, Any], label: str) -> None:
    rows = [i for i, value in enumerate(band["mean"]) if value is not None]
    if not rows:
        return
    x = [band["x"][i] for i in rows]
    axis.plot(x, _smooth(tuple(band["mean"][i] for i in rows)), linewidth=2.2, label=label, **look)
    if band["low"] and band["high"]:
        ends = (
            [band[end][i] if band[end][i] is not None else band["mean"][i] for i in rows] for end in ("low", "high")
        )
        low, high = (_smooth(tuple(values)) for values in ends)
        axis.fill_between(x, low, high, color=look["color"], alpha=0.18, linewidth=0)


def _draw_frontier(comparison: dict[str, Any], file: Path) -> None:
    """Draw score over KL of every run: the path of training, and the finished model on held-out prompts."""
    figure, axis = _pyplot().subplots(figsize=(7, 5), constrained_layout=True)
    looks = _looks(comparison["algorithms"])
    named = set()
    for run in comparison["frontier"]:
        look = looks[run["algorithm"]]
        label = {} if run["algorithm"] in named else {"label": run["algorithm"]}
        named.add(run["algorithm"])
        known = _known(run["training"])
        if known:
            x, y = zip(*known, strict=True)
            axis.plot(_smooth(x), _smooth(y), linewidth=1.2, alpha=0.7, **look, **label)
        if run["held_out"]:
            mark = "D" if run["algorithm"] == "rloo" else "o"  # tells the two apart without colours
            axis.plot(*run["held_out"], marker=mark, markersize=9, markeredgecolor="white", color=look["color"])
    axis.set_title("lines: training, smoothed; marks: held-out prompts", fontsize=10)
    axis.set_xlabel(CURVES["kl"], fontsize=9)
    axis.set_ylabel("score", fontsize=9)
    _tidy(axis)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False)
    _save(figure, file)


def _draw_lengths(histograms: dict[str, Any], algorithms: list[str], file: Path) -> None:
    """Draw one histogram of completion lengths for each model, over the same bins."""
    edges, counts = histograms["edges"], histograms["counts"]
    looks = _looks(algorithms)
    figure, axes = _pyplot().subplots(
        max(len(counts), 1),
        1,
        sharex=True,
        sharey=True,
        squeeze=False,
        figsize=(10, 1 + 1.2 * len(counts)),
        constrained_layout=True,
    )
    for axis, (name, heights) in zip(axes.flat, counts.items(), strict=False):
        shares = [height / max(sum(heights), 1) for height in heights]
        algorithm = algorithm_of(name, algorithms)
        axis.stairs(shares, edges, fill=True, color=looks[algorithm]["color"] if algorithm else COLORS["sft"])
        axis.set_title(name, fontsize=10, loc="left")
        axis.yaxis.set_major_formatter("{x:.0%}")
        _tidy(axis)
    axes.flat[-1].set_xlabel("completion length, tokens", fontsize=9)
    _save(figure, file)


def _looks(algorithms: list[str]) -> dict[str, dict[str, Any]]:
    colors = COLORS | {f"other-{i}": color for i, color in enumerate(OTHER_COLORS)}
    dashes = DASHES | {f"other-{i}": dash for i, dash in enumerate(OTHER_DASHES)}
    return {name: {"color": colors[slot], "linestyle": dashes[slot]} for name, slot in slots(algorithms).items()}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")  # draws to files, without a screen
    from matplotlib import pyplot

    return pyplot


def _tidy(axis: Any) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=130)
    _pyplot().close(figure)


def draw_sweep(curves: dict[str, list[list[dict[str, Any]]]], file: Path) -> None:
    """Draw mean and deviation over the seeds of each row: the score over episodes, for sft and reward the loss over steps.

    Args:
        curves: Label of a row -> the lines of `metrics.jsonl` of each of its finished runs.
        file: PNG to write.
    """
    pyplot = _pyplot()
    panels: dict[tuple[str, str], dict[str, Any]] = {}
    for label, runs in curves.items():
        on_policy = any("score_mean" in line for lines in runs for line in lines)
        x, y = ("episodes", "score_mean") if on_policy else ("step", "loss")
        panels.setdefault((x, y), {})[label] = [
            {line[x]: line[y] for line in lines if isinstance(line.get(y), (int, float))} for lines in runs
        ]
    panels = panels or {("episodes", "score_mean"): {}}
    size = (8 * len(panels), 5)
    figure, all_axes = pyplot.subplots(1, len(panels), figsize=size, constrained_layout=True, squeeze=False)
    for axis, ((x, y), rows) in zip(all_axes.flat, sorted(panels.items()), strict=True):
        colors = pyplot.get_cmap("tab10" if len(rows) <= 10 else "tab20").colors
        for i, (label, runs) in enumerate(rows.items()):
            shared = sorted(set.intersection(*(set(run) for run in runs)))
            if not shared:
                continue
            smooth = [_smooth(tuple(run[at] for at in shared)) for run in runs]
            means = [fmean(values) for values in zip(*smooth, strict=True)]
            seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
            color = colors[i % len(colors)]
            axis.plot(shared, means, color=color, linewidth=2, label=f"{label} ({seeds})")
            if len(runs) > 1:
                spread = [stdev(values) for values in zip(*smooth, strict=True)]
                low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
                axis.fill_between(shared, low, high, color=color, alpha=0.15, linewidth=0)
        axis.set_title(f"{y}, smoothed: mean and standard deviation over seeds", fontsize=10)
        axis.set_xlabel(x, fontsize=9)
        _tidy(axis)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    _save(figure, file)


def _smooth(values: tuple[float, ...], weight: float = 0.8) -> list[float]:
    """Exponential moving average that starts at the first value."""
    smoothed, last = [], values[0]
    for value in values:
        last = weight * last + (1 - weight) * value
        smoothed.append(last)
    return smoothed
