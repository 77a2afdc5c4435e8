"""Tables on the terminal: what eval measured, and what a sweep found."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

COLUMNS = {
    "score_mean": ("score", "{:.2f}", "mean of the score that PPO and RLOO were trained on"),
    "score_std": ("std", "{:.2f}", "standard deviation of that score over the completions"),
    "positive_share": ("positive", "{:.0%}", "share of completions whose score is above the threshold"),
    "held_out_mean": ("held out", "{:.2f}", "mean score of reward functions that training does not see"),
    "kl": ("KL", "{:.1f}", "nats per completion between the model and the reference, on the model's own samples"),
    "kl_per_token": ("KL/token", "{:.3f}", "the same over all tokens of the samples"),
    "perplexity": ("perplexity", "{:.1f}", "of the samples under the reference: lower is more like its language"),
    "perplexity_other": (
        "other perplexity",
        "{:.1f}",
        "of the samples' texts under another model, per token of its own",
    ),
    "rouge1": ("ROUGE-1", "{:.3f}", "F1 of the words that a completion shares with the data's own"),
    "rouge2": ("ROUGE-2", "{:.3f}", "the same for pairs of words"),
    "rougeL": ("ROUGE-L", "{:.3f}", "the same for the longest common subsequence of words"),
    "length_mean": ("length", "{:.1f}", "tokens per completion, EOS not counted"),
    "eos_rate": ("EOS", "{:.0%}", "share of completions that ended before they were cut off"),
    "empty_share": ("empty", "{:.0%}", "share of completions without a word"),
    "distinct_1": ("distinct-1", "{:.2f}", "different tokens over all tokens of the samples"),
    "distinct_2": ("distinct-2", "{:.2f}", "the same for pairs of tokens"),
    "distinct_3": ("distinct-3", "{:.2f}", "the same for three tokens in a row"),
    "unique_token_ratio": ("unique", "{:.2f}", "different tokens over all tokens of a completion, mean"),
    "repetition": ("repeated", "{:.1%}", "share of a completion's 4-token sequences that it had said before, mean"),
}
"""Metrics of `eval.json` that tables show: heading, format, meaning."""

TEXT = (
    "length_mean",
    "eos_rate",
    "empty_share",
    "distinct_1",
    "distinct_2",
    "distinct_3",
    "unique_token_ratio",
    "repetition",
)
"""Those that say what the texts are like; they stand in a table of their own."""

SWEEP_COLUMNS = {
    "score_last": ("training score", "{:.2f}"),
    **{
        f"eval/{key}": COLUMNS[key][:2]
        for key in ("score_mean", "positive_share", "held_out_mean", "kl", "length_mean")
    },
    "eval_perplexity": ("perplexity", "{:.1f}"),
    "eval_accuracy": ("accuracy", "{:.1%}"),
}
"""Numbers that a sweep's table shows, where its runs have them: heading, format."""


def print_table(models: dict[str, dict[str, Any]], notes: Sequence[str] = ()) -> None:
    """Print the metrics of every model, one row each: how good it is, then what its texts are like.

    Where the terminal is too narrow, columns that do not fit stand in further tables: no number is cut off.

    Args:
        models: Those of `eval.json`.
        notes: Sentences under the tables.
    """
    console = Console(highlight=False)
    for i, columns in enumerate(part for group in _groups(models) for part in _fitting(models, group, console.width)):
        if i:
            console.print()
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("", *(heading for heading, _, _ in columns.values())):
            table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
        for name, metrics in models.items():
            table.add_row(Text(name), *cells(metrics, columns))
        # Wider than the terminal only where one name and one number do not fit: better wrapped than cut off.
        Console(width=max(console.width, Console(width=1000).measure(table).maximum), highlight=False).print(table)
    for note in notes:
        console.print(Text(note, style="dim"))


def _groups(models: dict[str, dict[str, Any]]) -> list[dict[str, tuple[str, str, str]]]:
    columns = present(models)
    groups = [{key: column for key, column in columns.items() if (key in TEXT) == of_text} for of_text in (False, True)]
    return [group for group in groups if group]


def _fitting(
    models: dict[str, dict[str, Any]], columns: dict[str, tuple[str, str, str]], width: int
) -> list[dict[str, tuple[str, str, str]]]:
    """Columns in as few parts as fit into a width, each beside the models' names."""
    names = max(map(cell_len, models), default=0)
    parts, used = [], width
    for key, column in columns.items():
        texts = [column[0], *(cells(metrics, {key: column})[0] for metrics in models.values())]
        needed = 2 + max(map(cell_len, texts))
        if not parts or used + needed > width:
            parts.append({})
            used = names
        parts[-1][key] = column
        used += needed
    return parts


def markdown_tables(models: dict[str, dict[str, Any]], notes: Sequence[str] = ()) -> str:
    """The tables of `print_table` in markdown, with what their columns mean."""
    lines = []
    for columns in _groups(models):
        rows = [["", *(heading for heading, _, _ in columns.values())], ["---", *["---:"] * len(columns)]]
        rows += [[_escaped(name), *cells(metrics, columns)] for name, metrics in models.items()]
        lines += [*(f"| {' | '.join(row)} |" for row in rows), ""]
        lines += [*(f"- {heading}: {meaning}" for heading, _, meaning in columns.values()), ""]
    return "\n".join([*lines, *(f"{_escaped(note)}\n" for note in notes)])


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))


def present(models: dict[str, dict[str, Any]]) -> dict[str, tuple[str, str, str]]:
    return {key: column for key, column in COLUMNS.items() if any(key in metrics for metrics in models.values())}


def cells(metrics: dict[str, Any], columns: dict[str, tuple[str, str, str]]) -> list[str]:
    values = [metrics.get(key) for key in columns]
    return [
        "" if value is None else form.format(value)
        for value, (_, form, _) in zip(values, columns.values(), strict=True)
    ]


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
        texts = [_mean_and_deviation(row["numbers"].get(key), form, whole) for key, (_, form) in columns.items()]
        table.add_row(row["label"], seeds, *texts)
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


def verdict_line(comparison: dict[str, Any]) -> str:
    """The verdict where only one line is shown."""
    return f"{comparison['verdict']['label']}: {comparison['verdict']['sentence']}"


def print_comparison(comparison: dict[str, Any], page: Path) -> None:
    """Print what refuses a comparison, its views, what was noted, and last the verdict and where the page is."""
    console = Console()
    console = Console(width=max(console.width, 140), highlight=False, markup=False)
    for difference in comparison["differences"]:
        if difference["refuses"]:
            found = ", ".join(f"{name}: {value}" for name, value in difference["values"].items())
            console.print(f"differs ({difference['kind']}): {difference['key']}: {found}", soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    labels = comparison["algorithms"]
    for heading in ("", "at", *labels, "difference", "95 % interval", "seeds", ""):
        table.add_column(heading, justify="right" if heading else "left")
    for view in comparison["views"]:
        at = "" if view["at"] is None else f"{view['at']:,.0f}" if view["at"] >= 100 else f"{view['at']:.3g}"
        means = ["" if view["means"][label] is None else f"{view['means'][label]:.3f}" for label in labels]
        difference = "" if view["difference"] is None else f"{view['difference']:+.3f}"
        interval = "" if view["interval"] is None else " to ".join(f"{end:+.3f}" for end in view["interval"])
        seeds = " and ".join(str(n) for n in view["seeds"].values()) + (", paired" if view["paired"] else "")
        parts = [view["metric"]] if view["metric"].startswith(view["view"]) else [view["view"], view["metric"]]
        name = " ".join(parts).replace("_", " ")
        table.add_row(name, at, *means, difference, interval, seeds, view["label"])
    if comparison["views"]:
        console.print(table)
    for note in comparison["notes"]:
        console.print(note, style="dim", soft_wrap=True)
    console.print(f"\n{verdict_line(comparison)}", soft_wrap=True)
    console.print(f"report: {page}", soft_wrap=True)
