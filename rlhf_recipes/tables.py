"""Tables on the terminal: what eval measured, and what a sweep found."""

from pathlib import Path
from typing import Any

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


def print_table(models: dict[str, dict[str, Any]]) -> None:
    """Print the metrics of every model, one row each."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    columns = present(models)
    for heading, _, _ in columns.values():
        table.add_column(heading, justify="right")
    for name, metrics in models.items():
        table.add_row(name, *cells(metrics, columns))
    console = Console()
    # A narrow or unknown terminal must not cut numbers off.
    Console(width=max(console.width, 160)).print(table)


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
        at = "" if view["at"] is None else f"{view['at']:,.0f}"
        means = ["" if view["means"][label] is None else f"{view['means'][label]:.3f}" for label in labels]
        difference = "" if view["difference"] is None else f"{view['difference']:+.3f}"
        interval = "" if view["interval"] is None else " to ".join(f"{end:+.3f}" for end in view["interval"])
        seeds = " and ".join(str(n) for n in view["seeds"].values()) + (", paired" if view["paired"] else "")
        name = f"{view['view']} {view['metric']}".replace("_", " ")
        table.add_row(name, at, *means, difference, interval, seeds, view["label"])
    if comparison["views"]:
        console.print(table)
    for note in comparison["notes"]:
        console.print(note, style="dim", soft_wrap=True)
    console.print(f"\n{comparison['verdict']['sentence']}", soft_wrap=True)
    console.print(f"report: {page}", soft_wrap=True)
