"""Stage compare: put finished runs next to each other.

    python -m rlhf_recipes.compare --recipe imdb_tiny

Reads the folders of `ppo`, `rloo` and `eval`; writes `report.html`, `curves.png` and `lengths.png` to
`<runs_dir>/<recipe>/compare/`.
"""

import json
from pathlib import Path
from typing import Any

from rlhf_recipes.config import Recipe, RecipeError
from rlhf_recipes.entry import stage_command
from rlhf_recipes.plots import draw_curves, draw_lengths
from rlhf_recipes.report import write_page
from rlhf_recipes.run import Run, is_finished, read_manifest, read_metrics, require_stage, run_path


def main(run: Run) -> str:
    recipe = run.recipe
    trained = [stage for stage in ("ppo", "rloo") if getattr(recipe, stage) is not None]
    paths = [require_stage(recipe, stage, "compare") for stage in trained]
    evaluated = run_path(recipe, "eval")
    measured = json.loads((evaluated / "eval.json").read_text(encoding="utf-8")) if is_finished(evaluated) else None
    title = f"{recipe.name}: {' and '.join(stage.upper() for stage in trained)}"
    write_report(run.path, title, paths, measured, _notes(recipe))
    return str(run.path / "report.html")


def _notes(recipe: Recipe) -> list[str]:
    """What the recipe's own SFT and reward model are worth, where it has them."""
    sft, reward = (read_manifest(run_path(recipe, stage)) or {} for stage in ("sft", "reward"))
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


def write_report(
    folder: Path, title: str, paths: list[Path], measured: dict[str, Any] | None, notes: list[str]
) -> Path:
    """Write the page and its pictures for some finished runs of `ppo` or `rloo`.

    Args:
        folder: Where to; it must exist.
        title: Heading of the page.
        paths: Run folders.
        measured: What `eval.json` holds about them; None when nothing was evaluated.
        notes: Sentences about what the runs started from.

    Returns:
        Path of the page.

    Raises:
        RecipeError: A folder is no finished run with metrics.
    """
    names = _names(paths)
    runs = {name: _read_run(path) for name, path in zip(names, paths, strict=True)}
    picture = draw_curves({name: lines for name, (_, lines) in runs.items()}, folder / "curves.png")
    lengths = None
    if measured is not None and "length_histograms" in measured:
        lengths = draw_lengths(measured["length_histograms"], folder / "lengths.png")
    page = folder / "report.html"
    write_page(page, title, picture, lengths, measured, {name: manifest for name, (manifest, _) in runs.items()}, notes)
    return page


def _read_run(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    manifest = read_manifest(path)
    if manifest is None or manifest["status"] != "finished" or manifest["stage"] not in ("ppo", "rloo"):
        found = "no run" if manifest is None else f"stage {manifest['stage']}, {manifest['status']}"
        raise RecipeError(f"{path}: not a finished run of ppo or rloo ({found}).")
    return manifest, read_metrics(path)


def _names(paths: list[Path]) -> list[str]:
    """The last part of each path, and as much before it as tells them apart."""
    for depth in range(1, 10):
        names = ["/".join(path.resolve().parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise RecipeError(f"the same run twice: {', '.join(map(str, paths))}.")


if __name__ == "__main__":
    stage_command("compare", main)
