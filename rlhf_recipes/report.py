"""From plain dicts to what a person looks at: a table on the terminal, curves, and one HTML page."""

import base64
import io
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from jinja2 import Environment, PackageLoader
from rich.console import Console
from rich.table import Table

COLUMNS = {
    "score_mean": ("score", "{:.2f}", "mean of the score that PPO and RLOO were trained on"),
    "positive_share": ("positive", "{:.0%}", "share of completions whose score is above the threshold"),
    "judge_mean": ("judge", "{:.2f}", "mean score of a judge that training did not see"),
    "kl": ("KL", "{:.1f}", "nats per completion between the model and the SFT model, on the model's own samples"),
    "rouge1": ("ROUGE-1", "{:.3f}", "F1 of the words that a completion shares with the data's own"),
    "rouge2": ("ROUGE-2", "{:.3f}", "the same for pairs of words"),
    "rougeL": ("ROUGE-L", "{:.3f}", "the same for the longest common subsequence of words"),
    "length_mean": ("length", "{:.1f}", "tokens per completion, EOS not counted"),
    "distinct_1": ("distinct-1", "{:.2f}", "different words over all words of the samples"),
    "distinct_2": ("distinct-2", "{:.2f}", "different word pairs over all word pairs of the samples"),
    "repetition": ("repetition", "{:.2f}", "mean share of a completion's tokens that it had said before"),
    "perplexity": ("perplexity", "{:.1f}", "of the samples under the SFT model: lower is more like its language"),
}
"""Metrics of `eval.json` that the table shows: heading, format, meaning."""

SWEEP_COLUMNS = {
    "score_last": ("training score", "{:.2f}"),
    **{f"eval/{key}": COLUMNS[key][:2] for key in ("score_mean", "positive_share", "judge_mean", "kl", "length_mean")},
    "eval_perplexity": ("perplexity", "{:.1f}"),
    "eval_accuracy": ("accuracy", "{:.1%}"),
}
"""Numbers that a sweep's table shows, where its runs have them: heading, format."""

CURVES = {
    "score_mean": "score (mean of a rollout)",
    "kl": "KL to the reference, nats per completion",
    "entropy": "entropy, nats per token",
    "length_mean": "completion length, tokens",
}
"""Metrics of `metrics.jsonl` that are drawn over episodes."""

COLORS = {"ppo": "#d1495b", "rloo": "#00798c", "sft": "#8d96a3"}
OTHER_COLORS = ("#edae49", "#66a182", "#5b5f97", "#b56576")


def print_table(models: dict[str, dict[str, Any]]) -> None:
    """Print the metrics of every model, one row each."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    columns = _present(models)
    for heading, _, _ in columns.values():
        table.add_column(heading, justify="right")
    for name, metrics in models.items():
        table.add_row(name, *_cells(metrics, columns))
    console = Console()
    # A narrow or unknown terminal must not cut numbers off.
    Console(width=max(console.width, 160)).print(table)


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


def print_sweep(rows: list[dict[str, Any]]) -> None:
    """Print a sweep's table: a row per setting, numbers as mean and standard deviation over its seeds.

    Args:
        rows: Those of `sweep.json`.
    """
    columns = {key: column for key, column in SWEEP_COLUMNS.items() if any(key in row["numbers"] for row in rows)}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", "seeds", *(heading for heading, _ in columns.values())):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        failed = sum("error" in run for run in row["runs"])
        seeds = f"{len(row['runs'])}" + (f", {failed} failed" if failed else "")
        whole = len(row["runs"]) - failed
        cells = [_mean_and_deviation(row["numbers"].get(key), form, whole) for key, (_, form) in columns.items()]
        table.add_row(row["label"], seeds, *cells)
    console = Console()
    Console(width=max(console.width, 140), highlight=False).print(table)
    several = any(numbers["n"] > 1 for row in rows for numbers in row["numbers"].values())
    note = "mean ± standard deviation over seeds" if several else "one seed each: no deviation is known"
    console.print(note, style="dim")
    if "score_last" in columns:
        held_out = "; all else: on held-out prompts" if len(columns) > 1 else ""
        console.print(f"training score: of the last tenth of the rollouts{held_out}", style="dim")


def _mean_and_deviation(numbers: dict[str, Any] | None, form: str, whole: int) -> str:
    if numbers is None:
        return ""
    deviation = "" if numbers["std"] is None else f" ± {form.format(numbers['std'])}"
    fewer_or_more = "" if numbers["n"] == whole else f" ({numbers['n']} seeds)"
    return form.format(numbers["mean"]) + deviation + fewer_or_more


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


def write_page(
    file: Path,
    title: str,
    picture: str,
    lengths: str | None,
    measured: dict[str, Any] | None,
    runs: dict[str, dict[str, Any]],
    notes: list[str],
) -> None:
    """Write one self-contained HTML page.

    Args:
        file: Where to.
        title: Heading.
        picture: Data URI of the curves.
        lengths: Data URI of the lengths' histograms; None when nothing was evaluated.
        measured: What `eval.json` holds; None when nothing was evaluated.
        runs: Name -> manifest.
        notes: Sentences about what the runs started from.
    """
    models = measured["models"] if measured else {}
    columns = _present(models)
    page = (
        _templates()
        .get_template("report.html")
        .render(
            title=title,
            picture=picture,
            lengths=lengths,
            columns=columns,
            rows={name: _cells(metrics, columns) for name, metrics in models.items()},
            measured=measured,
            samples=measured["samples"] if measured else [],
            names=list(models),
            runs=runs,
            notes=notes,
        )
    )
    file.write_text(page, encoding="utf-8")


def _templates() -> Environment:
    # Completions are data: whatever a model writes is escaped.
    return Environment(loader=PackageLoader("rlhf_recipes"), autoescape=True, trim_blocks=True, lstrip_blocks=True)


def _present(models: dict[str, dict[str, Any]]) -> dict[str, tuple[str, str, str]]:
    return {key: column for key, column in COLUMNS.items() if any(key in metrics for metrics in models.values())}


def _cells(metrics: dict[str, Any], columns: dict[str, tuple[str, str, str]]) -> list[str]:
    values = [metrics.get(key) for key in columns]
    return [
        "" if value is None else form.format(value)
        for value, (_, form, _) in zip(values, columns.values(), strict=True)
    ]


def _smooth(values: tuple[float, ...], weight: float = 0.8) -> list[float]:
    """Exponential moving average, started at the first value."""
    smoothed, last = [], values[0]
    for value in values:
        last = weight * last + (1 - weight) * value
        smoothed.append(last)
    return smoothed
