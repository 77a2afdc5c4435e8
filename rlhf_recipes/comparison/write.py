"""Writes a comparison to files: data, pictures, page and markdown."""

import json
from pathlib import Path
from typing import Any

from rlhf_recipes.comparison.build import build_comparison
from rlhf_recipes.comparison.runs import read_runs
from rlhf_recipes.comparison.verdict import name_of
from rlhf_recipes.pages.html import write_page
from rlhf_recipes.pages.markdown import write_markdown
from rlhf_recipes.pages.plots import draw_comparison
from rlhf_recipes.pages.tables import print_comparison
from rlhf_recipes.runs.files import read_manifest
from rlhf_recipes.system.files import write_whole, writing


def compare_runs(arguments: list[str], folder: Path) -> bool:
    """Compares the runs that the command line names, then writes and prints the comparison.

    Args:
        arguments: See `read_runs`.
        folder: Gets the files.

    Returns:
        Whether the runs are comparable.
    """
    runs, failed = read_runs(arguments)
    title = "Comparison: " + " and ".join(dict.fromkeys(name_of(run.label) for run in runs))
    comparison = build_comparison(runs, title, [], failed)
    with writing("the comparison", folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_comparison(folder, comparison)
    print_comparison(comparison, folder / "report.html")
    return comparison["comparable"]


def write_comparison(folder: Path, comparison: dict[str, Any]) -> None:
    """Writes `comparison.json`, pictures, `report.html` and `report.md` to an existing folder."""
    write_whole(folder / "comparison.json", json.dumps(comparison, ensure_ascii=False))
    draw_comparison(comparison, folder)
    write_page(folder / "report.html", comparison)
    write_markdown(comparison, folder / "report.md")


def notes_on(sft_path: Path, reward_path: Path) -> list[str]:
    """Sentences about the quality of the SFT model and the reward model in these folders, if there are any."""
    sft, reward = (read_manifest(path) or {} for path in (sft_path, reward_path))
    notes = []
    if sft.get("status") == "finished":
        results = sft["results"]
        rouge = f", ROUGE-L {results['rougeL']:.3f} on held-out prompts" if "rougeL" in results else ""
        notes.append(f"SFT model: perplexity {results['eval_perplexity']:.1f} on held-out texts{rouge}.")
    if reward.get("status") == "finished":
        results = reward["results"]
        ece = f", expected calibration error {results['eval_ece']:.3f}" if "eval_ece" in results else ""
        notes.append(
            f"Reward model: right on {results['eval_accuracy']:.1%} of {results['eval_pairs']} held-out pairs{ece} "
            f"(trained on {results['train_pairs']})."
        )
    return notes
