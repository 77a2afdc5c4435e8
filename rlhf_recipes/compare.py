"""Stage compare: compares the finished runs of a recipe, and says which algorithm is better.

    python -m rlhf_recipes.compare --recipe imdb_tiny

Reads the folders of `ppo`, `rloo` and `eval`; writes `comparison.json`, `report.html`, `report.md` and pictures to
`<runs_dir>/<recipe>/compare/`.
"""

from rlhf_recipes.comparison.build import build_comparison
from rlhf_recipes.comparison.runs import read_runs
from rlhf_recipes.comparison.write import notes_on, write_comparison
from rlhf_recipes.pages.tables import verdict_line
from rlhf_recipes.runs.files import require_stage, run_path
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.runs.trackers import log_comparison
from rlhf_recipes.stage import stage_command


def main(run: Run) -> str:
    recipe = run.recipe
    trained = recipe.on_policy_stages()
    paths = [str(require_stage(recipe, stage, "compare")) for stage in trained]
    title = f"{recipe.name}: {' and '.join(stage.upper() for stage in trained)}"
    notes = notes_on(run_path(recipe, "sft"), run_path(recipe, "reward"))
    runs, failed = read_runs(paths)
    comparison = build_comparison(runs, title, notes, failed)
    write_comparison(run.path, comparison)
    log_comparison(recipe, "compare", run.path)
    return verdict_line(comparison)


if __name__ == "__main__":
    stage_command("compare", main)
