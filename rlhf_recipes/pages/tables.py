"""Tables of evaluations, sweeps and comparisons, on the terminal and in markdown."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from rlhf_recipes.pages.metrics import EVAL, RESULTS, Metric, tabled
from rlhf_recipes.system.terminal import print_table

COLUMNS = tabled(EVAL)
"""The metrics of `eval.json` that tables show."""

SWEEP_COLUMNS = RESULTS | {f"eval/{key}": metric for key, metric in EVAL.items() if metric.swept}
"""Numbers that the table of a sweep shows, where its runs have them."""


def print_models(models: dict[str, dict[str, Any]], notes: Sequence[str] = ()) -> None:
    """Print one row for each model: first the metrics of its quality, then those that describe its texts.

    On a narrow terminal, columns that do not fit go into further tables, so that no number is cut off.

    Args:
        models: The models of `eval.json`.
        notes: Sentences under the tables.
    """
    console = Console(highlight=False)
    for i, columns in enumerate(part for group in _groups(models) for part in _fitting(models, group, console.width)):
        if i:
            console.print()
        headings = ["", *(column.heading for column in columns.values())]
        print_table(headings, [[name, *cells(metrics, columns)] for name, metrics in models.items()])
    for note in notes:
        console.print(Text(note, style="dim"))


def _groups(models: dict[str, dict[str, Any]]) -> list[dict[str, Metric]]:
    columns = present(models)
    groups = [
        {key: column for key, column in columns.items() if column.of_text == of_text} for of_text in (False, True)
    ]
    return [group for group in groups if group]


def _fitting(models: dict[str, dict[str, Any]], columns: dict[str, Metric], width: int) -> list[dict[str, Metric]]:
    """Split columns into as few tables as possible that fit into a width beside the models' names."""
    names = max(map(cell_len, models), default=0)
    parts: list[dict[str, Metric]] = []
    used = width
    for key, column in columns.items():
        texts = [column.heading, *(cells(metrics, {key: column})[0] for metrics in models.values())]
        needed = 2 + max(map(cell_len, texts))
        if not parts or used + needed > width:
            parts.append({})
            used = names
        parts[-1][key] = column
        used += needed
    return parts


def markdown_tables(models: dict[str, dict[str, Any]], notes: Sequence[str] = ()) -> str:
    """The tables of `print_models` in markdown, and the meaning of each column."""
    lines = []
    for columns in _groups(models):
        rows = [["", *(column.heading for column in columns.values())], ["---", *["---:"] * len(columns)]]
        rows += [[_escaped(name), *cells(metrics, columns)] for name, metrics in models.items()]
        lines += [*(f"| {' | '.join(row)} |" for row in rows), ""]
        lines += [*(f"- {column.heading}: {column.meaning}" for column in columns.values()), ""]
    return "\n".join([*lines, *(f"{_escaped(note)}\n" for note in notes)])


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))


def present(models: dict[str, dict[str, Any]]) -> dict[str, Metric]:
    return {key: column for key, column in COLUMNS.items() if any(key in metrics for metrics in models.values())}


def cells(metrics: dict[str, Any], columns: dict[str, Metric]) -> list[str]:
    """One row of a table: metrics as text; "" for a number that is missing."""
    values = {key: metrics.get(key) for key in columns}
    return ["" if value is None else columns[key].form.format(value) for key, value in values.items()]


def print_sweep(rows: list[dict[str, Any]]) -> None:
    """Print one row for each setting of a sweep: means and standard deviations over its seeds.

    Args:
        rows: The rows of `sweep.json`.
    """
    columns = {key: column for key, column in SWEEP_COLUMNS.items() if any(key in row["numbers"] for row in rows)}
    shown = []
    for row in rows:
        failed = sum("error" in run for run in row["runs"])
        seeds = f"{len(row['runs'])}" + (f", {failed} failed" if failed else "")
        whole = len(row["runs"]) - failed
        texts = [_mean_and_deviation(row["numbers"].get(key), of.form, whole) for key, of in columns.items()]
        shown.append([row["label"], seeds, *texts])
    print_table(["", "seeds", *(column.heading for column in columns.values())], shown)
    console = Console()
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


def verdict_line(comparison: dict[str, Any]) -> str:
    """The verdict in one line."""
    return f"{comparison['verdict']['label']}: {comparison['verdict']['sentence']}"


def print_comparison(comparison: dict[str, Any], page: Path) -> None:
    """Print the differences that forbid a verdict, the views, the notes, the verdict, and the path of the page."""
    console = Console(highlight=False, markup=False)
    for difference in comparison["differences"]:
        if difference["refuses"]:
            found = ", ".join(f"{name}: {value}" for name, value in difference["values"].items())
            console.print(f"differs ({difference['kind']}): {difference['key']}: {found}", soft_wrap=True)
    labels, rows = comparison["algorithms"], []
    for view in comparison["views"]:
        at = "" if view["at"] is None else f"{view['at']:,.0f}" if view["at"] >= 100 else f"{view['at']:.3g}"
        means = ["" if view["means"][label] is None else f"{view['means'][label]:.3f}" for label in labels]
        difference = "" if view["difference"] is None else f"{view['difference']:+.3f}"
        interval = "" if view["interval"] is None else " to ".join(f"{end:+.3f}" for end in view["interval"])
        seeds = " and ".join(str(n) for n in view["seeds"].values()) + (", paired" if view["paired"] else "")
        name = f"{view['view']} {view['metric']}".replace("_", " ")
        rows.append([name, at, *means, difference, interval, seeds, view["label"]])
    if rows:
        print_table(["", "at", *labels, "difference", "95 % interval", "seeds", ""], rows)
    for note in comparison["notes"]:
        console.print(note, style="dim", soft_wrap=True)
    console.print(f"\n{verdict_line(comparison)}", soft_wrap=True)
    console.print(f"report: {page}", soft_wrap=True)
