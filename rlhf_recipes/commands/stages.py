"""Commands that run a recipe, or one of its stages."""

import typer

from rlhf_recipes.commands.options import Config, Name, Overrides, Overwrite, Push
from rlhf_recipes.launch.start import STOP_CODES, launch_stage
from rlhf_recipes.pages.tables import print_models
from rlhf_recipes.recipe.graph import stages_to_run
from rlhf_recipes.recipe.schema import ON_POLICY, Recipe
from rlhf_recipes.recipe.trust import refuse_uploads
from rlhf_recipes.runs.files import exit_code, run_path
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.stage import load_checked
from rlhf_recipes.system.files import read_json
from rlhf_recipes.system.terminal import complain, say

app = typer.Typer()


@app.command()
def run(
    name: Name,
    overrides: Overrides,
    accelerate_config: Config = None,
    overwrite: Overwrite = False,
    push: Push = False,
) -> None:
    """Run a recipe from its first needed stage to the report, each stage as a process; finished stages are reused."""
    recipe = load_checked(name, overrides)
    stages = stages_to_run(recipe)
    refuse_uploads(recipe, stages, push)
    for stage in stages:
        stage_run = Run(recipe, stage)
        if stage_run.is_done(overwrite):
            say(f"{stage:<8} reused: finished before   {stage_run.path}")
            continue
        code = exit_code(launch_stage(stage, name, overrides, overwrite, accelerate_config, push), stage_run.path)
        if code not in (0, *STOP_CODES):
            log = stage_run.path / "log.txt"
            complain(f"stage {stage} did not finish; {log} has the details. Finished stages are kept.")
        if code != 0:
            raise typer.Exit(code)
    if "compare" in stages:
        _show_measured(recipe)
        say(f"\nreport: {run_path(recipe, 'compare') / 'report.html'}")


def _show_measured(recipe: Recipe) -> None:
    measured = read_json(run_path(recipe, "eval") / "eval.json")
    say()
    print_models(measured["models"], measured["notes"])


def _add_stage(stage: str, doc: str) -> None:
    def command(
        name: Name,
        overrides: Overrides,
        accelerate_config: Config = None,
        overwrite: Overwrite = False,
        push: Push = False,
    ) -> None:
        recipe = load_checked(name, overrides)  # here, or every process would report the same error
        refuse_uploads(recipe, [stage], push)
        code = launch_stage(stage, name, overrides, overwrite, accelerate_config, push)
        raise typer.Exit(exit_code(code, run_path(recipe, stage)))

    command.__doc__ = f"Run stage {stage}: {doc}"
    app.command(stage)(command)


_add_stage("sft", "fine-tune, or train from scratch, a language model.")
_add_stage("reward", "train a reward model on pairs.")
for algorithm in ON_POLICY:
    _add_stage(algorithm, f"train the policy with {algorithm.upper()}.")


@app.command("eval")
def evaluate(name: Name, overrides: Overrides, overwrite: Overwrite = False) -> None:
    """Run stage eval: measure the models on held-out prompts, and print the table.

    The same command resumes a stopped eval.
    """
    recipe = load_checked(name, overrides)
    code = exit_code(launch_stage("eval", name, overrides, overwrite), run_path(recipe, "eval"))
    if code == 0:
        _show_measured(recipe)
    raise typer.Exit(code)
