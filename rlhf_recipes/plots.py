"""Pictures for papers and pages: curves, lengths, sweeps."""

import base64
import io
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

CURVES = {
    "score_mean": "score (mean of a rollout)",
    "kl": "KL to the reference, nats per completion",
    "entropy": "entropy, nats per token",
    "length_mean": "completion length, tokens",
}
"""Metrics of `metrics.jsonl` that are drawn over episodes."""

COLORS = {"ppo": "#d1495b", "rloo": "#00798c", "sft": "#8d96a3"}
OTHER_COLORS = ("#edae49", "#66a182", "#5b5f97", "#b56576")


def draw_curves(runs: dict[str, list[dict[str, Any]]], file: Path) -> str:
    """Draw every metric of `CURVES` over episodes, one line a run.

    Args:
        runs: Name -> lines of its `metrics.jsonl`.
        file: PNG to write.

    Returns:
        The same picture as a data URI, for the page.
    """
    figure, axes = _pyplot().subplots(2, 2, figsize=(10, 6), constrained_layout=True)
    for axis, (metric, title) in zip(axes.flat, CURVES.items(), strict=True):
        for i, (name, lines) in enumerate(runs.items()):
            points = [
                (line["episodes"], line[metric])
                for line in lines
                if isinstance(line.get(metric), (int, float)) and "episodes" in line
            ]
            if points:
                x, y = zip(*points, strict=True)
                color = _color(name, i)
                axis.plot(x, y, color=color, alpha=0.3, linewidth=1)
                axis.plot(x, _smooth(y), color=color, linewidth=2, label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("episodes", fontsize=9)
        _tidy(axis)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    if handles:
        axes.flat[0].legend(handles, labels, frameon=False)
    return _save(figure, file)


def draw_comparison(comparison: dict[str, Any], folder: Path) -> None:
    """Write a comparison's pictures to a folder."""
    runs = {run["name"]: run["curves"] for run in comparison["runs"]}
    lines = {
        name: [dict(zip(c, row, strict=True)) for row in zip(*c.values(), strict=True)] for name, c in runs.items()
    }
    for rows in lines.values():
        for row in rows:
            row["episodes"] = row["step"] if row["episodes"] is None else row["episodes"]
    draw_curves(lines, folder / "curves.png")


def draw_lengths(histograms: dict[str, Any], file: Path) -> str:
    """Draw how long every model's completions are, one histogram a model, over the same bins.

    Args:
        histograms: What `metrics.length_histograms` returns.
        file: PNG to write.

    Returns:
        The same picture as a data URI, for the page.
    """
    edges, counts = histograms["edges"], histograms["counts"]
    figure, axes = _pyplot().subplots(
        len(counts),
        1,
        sharex=True,
        sharey=True,
        squeeze=False,
        figsize=(10, 1 + 1.6 * len(counts)),
        constrained_layout=True,
    )
    for i, (axis, (name, heights)) in enumerate(zip(axes.flat, counts.items(), strict=True)):
        shares = [height / max(sum(heights), 1) for height in heights]
        axis.stairs(shares, edges, fill=True, color=_color(name, i))
        axis.set_title(name, fontsize=10, loc="left")
        axis.yaxis.set_major_formatter("{x:.0%}")
        _tidy(axis)
    axes.flat[-1].set_xlabel("completion length, tokens", fontsize=9)
    return _save(figure, file)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")  # to files only: there need not be a screen
    from matplotlib import pyplot

    return pyplot


def _color(name: str, i: int) -> str:
    return COLORS.get(name, OTHER_COLORS[i % len(OTHER_COLORS)])


def _tidy(axis: Any) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, file: Path) -> str:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    _pyplot().close(figure)
    file.write_bytes(picture.getvalue())
    return "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()


def draw_sweep(curves: dict[str, list[list[dict[str, Any]]]], file: Path) -> None:
    """Draw the score over episodes (of sft and reward the loss over steps): mean and deviation over seeds of each row.

    Args:
        curves: Label of a row -> lines of `metrics.jsonl` of each of its finished runs.
        file: PNG to write.
    """
    pyplot = _pyplot()
    panels = {("episodes", "score_mean"): {}, ("step", "loss"): {}}
    for label, runs in curves.items():
        on_policy = any("score_mean" in line for lines in runs for line in lines)
        x, y = ("episodes", "score_mean") if on_policy else ("step", "loss")
        panels[x, y][label] = [
            {line[x]: line[y] for line in lines if isinstance(line.get(y), (int, float))} for lines in runs
        ]
    drawn = {axes: rows for axes, rows in panels.items() if rows} or {("episodes", "score_mean"): {}}
    size = (8 * len(drawn), 5)
    figure, all_axes = pyplot.subplots(1, len(drawn), figsize=size, constrained_layout=True, squeeze=False)
    for axis, ((x, y), rows) in zip(all_axes.flat, drawn.items(), strict=True):
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
    """Exponential moving average, started at the first value."""
    smoothed, last = [], values[0]
    for value in values:
        last = weight * last + (1 - weight) * value
        smoothed.append(last)
    return smoothed
