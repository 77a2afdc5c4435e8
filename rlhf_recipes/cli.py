"""The command line, `rlhf-recipes`. Nothing here imports torch before a stage has to run."""

import inspect
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import typer

from rlhf_recipes.experiments.sweep import plan_sweep, run_sweep
from rlhf_recipes.launch.configs import config_files, kind, launchable, purpose, read_config
from rlhf_recipes.launch.start import STOPPED, TRAINED, USER_ERROR, launch_stage
from rlhf_recipes.pages.tables import print_models
from rlhf_recipes.recipe.graph import stages_to_run
from rlhf_recipes.recipe.load import load_recipe, recipe_files, to_yaml
from rlhf_recipes.recipe.schema import Expected, Recipe, RecipeError
from rlhf_recipes.rewards.registry import REWARD_FUNCS
from rlhf_recipes.runs.files import run_path
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.stage import load_checked
from rlhf_recipes.system.files import read_json
from rlhf_recipes.system.terminal import complain, log_to, print_table, say

app = typer.Typer(
    help="PPO or RLOO, on your task? Recipes for RLHF on Hugging Face TRL.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(asked: bool) -> None:
    if asked:
        say(metadata.version("rlhf-recipes"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


Name = Annotated[str, typer.Argument(metavar="NAME", help="name of a recipe, or path of a YAML file")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="such as ppo.trainer.beta=0.1")]
Config = Annotated[
    str | None,
    typer.Option(
        "--accelerate-config", metavar="NAME", help="train as several processes: see `configs`; or path of a YAML file"
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace runs with other settings; they are moved aside")]


@app.command("list")
def list_recipes(
    markdown: Annotated[bool, typer.Option("--markdown", help="the table of the README")] = False,
) -> None:
    """List the recipes, with their stages, hardware and minutes."""
    if markdown:
        say(recipe_table())
        return
    rows = []
    for name in recipe_files():
        recipe = load_recipe(name)
        minutes = "" if recipe.about.minutes is None else f"{recipe.about.minutes:g}"
        rows.append((name, " ".join(recipe.stages()), recipe.about.hardware or "", minutes, recipe.description))
    headings = ("recipe", "stages", "hardware", "minutes", "")
    print_table(headings, rows, left=headings, wrap=True)


def recipe_table() -> str:
    """Markdown table of all recipes that have a name."""
    rows = ["| recipe | what | hardware | minutes | expected | source |", "|---|---|---|---|---|---|"]
    for name in recipe_files():
        recipe = load_recipe(name)
        about = recipe.about
        minutes = "not measured" if about.minutes is None else f"{about.minutes:g}"
        expected = "; ".join(map(_expectation, about.expected)) or "not measured"
        source = (about.source or "").partition(";")[0]
        cells = [recipe.description, about.hardware or "not known", minutes, expected, source]
        rows.append(" | ".join([f"| `{name}`", *(cell.replace("|", "\\|") for cell in cells)]) + " |")
    return "\n".join(rows)


def _expectation(expected: Expected) -> str:
    end = " to ".join(f"{value:g}" for value in expected.end) if isinstance(expected.end, list) else f"{expected.end:g}"
    start = "" if expected.start is None else f"{expected.start:g} -> "
    return f"{expected.stage + ' ' if expected.stage else ''}{expected.metric} {start}{end} ({expected.by})"


@app.command()
def show(name: Name, overrides: Overrides = None) -> None:
    """Print a recipe as it would run: parents merged, overrides applied, defaults filled in."""
    print(to_yaml(load_recipe(name, overrides or [])), end="")


@app.command()
def validate(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="default: all")] = None,
) -> None:
    """Check recipes: every key, every trainer argument, every reward function."""
    errors = 0
    for name in names or recipe_files():
        try:
            load_checked(name, [])
            say(f"ok     {name}")
        except RecipeError as error:
            complain(str(error))
            errors += 1
    raise typer.Exit(USER_ERROR if errors else 0)


@app.command()
def rewards() -> None:
    """List the reward functions, with their arguments."""
    for name, factory in REWARD_FUNCS.items():
        say(f"{name}: {inspect.getdoc(factory).splitlines()[0]}")
        lines = (inspect.getdoc(factory).split("Args:\n") + [""])[1].splitlines()
        parameters = inspect.signature(factory).parameters
        for line in lines:
            argument, _, meaning = line.strip().partition(": ")
            if argument in parameters:
                default = parameters[argument].default
                shown = "required" if default is inspect.Parameter.empty else f"default {default!r}"
                say(f"    {argument}  {meaning} ({shown})")
    say("Your own: name: module:function or path/to/file.py:function")


@app.command()
def configs() -> None:
    """List accelerate's configurations: what `--accelerate-config` takes."""
    rows = []
    for name, path in config_files().items():
        try:
            values = read_config(path)
            rows.append((name, str(values.get("num_processes", 1)), kind(values), purpose(path)))
        except RecipeError as error:
            rows.append((name, "", "cannot be used", str(error).splitlines()[0]))
    headings = ("configuration", "processes", "type", "")
    print_table(headings, rows, left=headings, wrap=True)


@app.command()
def run(
    name: Name, overrides: Overrides = None, accelerate_config: Config = None, overwrite: Overwrite = False
) -> None:
    """Run a recipe from its first needed stage to the report, a process each; what has finished before is reused."""
    recipe = load_checked(name, overrides or [])
    config = accelerate_config and launchable(accelerate_config)
    stages = stages_to_run(recipe)
    for stage in stages:
        stage_run = Run(recipe, stage)
        if stage_run.is_done(overwrite):
            say(f"{stage:<8} reused: finished before   {stage_run.path}")
            continue
        code = launch_stage(stage, name, overrides or [], overwrite, config)
        if code not in (0, STOPPED):
            complain(
                f"stage {stage} did not finish; {stage_run.path / 'log.txt'} has the details. What is done is kept."
            )
        if code != 0:
            raise typer.Exit(code)
    if "compare" in stages:
        _show_measured(recipe)
        say(f"\nreport: {run_path(recipe, 'compare') / 'report.html'}")


def _show_measured(recipe: Recipe) -> None:
    measured = read_json(run_path(recipe, "eval") / "eval.json")
    say()
    print_models(measured["models"], measured["notes"])


def _stage_command(stage: str, doc: str) -> None:
    def command(name: Name, overrides: Overrides = None, overwrite: Overwrite = False) -> None:
        raise typer.Exit(launch_stage(stage, name, overrides or [], overwrite))

    def spread(
        name: Name, overrides: Overrides = None, accelerate_config: Config = None, overwrite: Overwrite = False
    ) -> None:
        config = accelerate_config and launchable(accelerate_config)
        if config is not None:
            load_checked(name, overrides or [])  # or each process would say what is wrong
        raise typer.Exit(launch_stage(stage, name, overrides or [], overwrite, config))

    chosen = spread if stage in TRAINED else command
    chosen.__doc__ = doc
    app.command(stage)(chosen)


_stage_command("sft", "Run stage sft: fine-tune, or train from scratch, a language model.")
_stage_command("reward", "Run stage reward: train a reward model on pairs.")
_stage_command("ppo", "Run stage ppo: train the policy with PPO.")
_stage_command("rloo", "Run stage rloo: train the policy with RLOO.")


@app.command("eval")
def evaluate(name: Name, overrides: Overrides = None, overwrite: Overwrite = False) -> None:
    """Run stage eval: measure the models on held-out prompts, and print the table.

    The same command goes on with what was stopped.
    """
    code = launch_stage("eval", name, overrides or [], overwrite)
    if code == 0:
        _show_measured(load_checked(name, overrides or []))
    raise typer.Exit(code)


@app.command()
def sweep(
    name: Name,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value[,value]...]...",
            help="several values: each is run, with each of the other keys'; key,key=value,value: keys that change "
            "together; one value: holds for all. Commas inside of brackets, braces and quotes belong to a value",
        ),
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option("--stage", help="sft, reward, ppo or rloo; may be repeated, or ppo,rloo (default: ppo and rloo)"),
    ] = None,
    seeds: Annotated[
        str, typer.Option("--seeds", help="how many, from the recipe's seed on (3), or which (42,43,44)")
    ] = "1",
    no_eval: Annotated[bool, typer.Option("--no-eval", help="only train: no numbers on held-out prompts")] = False,
    accelerate_config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Run a stage with every combination of some keys' values and several seeds; table and plot at the end.

    The same command goes on with what was stopped, and skips what has finished.
    """
    planned = plan_sweep(name, overrides or [], stage or [], seeds, not no_eval, overwrite)
    raise typer.Exit(run_sweep(planned, overwrite, accelerate_config and launchable(accelerate_config)))


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="folders such as runs/imdb_tiny/ppo; or LABEL=PATH, for one of a plain Trainer's with a "
            "trainer_state.json, or to compare two settings of one algorithm. Runs of one label are its seeds",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="folder of the report")] = Path("comparison"),
) -> None:
    """Compare finished runs of ppo and rloo: a verdict, its numbers, and one HTML page.

    Exit code 1 when they differ in more than the algorithm, so that there is no verdict.
    """
    from rlhf_recipes.comparison.write import compare_runs

    raise typer.Exit(0 if compare_runs(runs, out) else 1)


@app.command()
def duel(
    name: Name,
    overrides: Overrides = None,
    seeds: Annotated[
        str, typer.Option("--seeds", help="how many, from the recipe's seed on (4), or which (42,43,44)")
    ] = "4",
    episodes: Annotated[
        int | None, typer.Option("--episodes", min=1, help="completions that each run samples (default: the recipe's)")
    ] = None,
    accelerate_config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Train PPO and RLOO from the same SFT model, with several seeds, and say which is better.

    The same command goes on with what was stopped, and skips what has finished. Exit code 1 when a run failed; the
    others are compared all the same.
    """
    from rlhf_recipes.experiments.duel import plan_duel, run_duel

    config = accelerate_config and launchable(accelerate_config)
    processes = read_config(config).get("num_processes", 1) if config else 1
    planned = plan_duel(name, overrides or [], seeds, episodes, overwrite, processes)
    raise typer.Exit(run_duel(planned, overwrite, config))


@app.command("wandb")
def wandb_view(
    name: Name,
    overrides: Overrides = None,
    group: Annotated[
        str | None, typer.Option("--group", help="of W&B, such as a duel's (default: the recipe's name)")
    ] = None,
) -> None:
    """Save a view in W&B in which the recipe's runs of ppo and rloo are overlaid, and print its address."""
    log_to(None)
    from rlhf_recipes.runs.workspace import save_view

    say(save_view(load_checked(name, overrides or []), group))


@app.command()
def audit(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders such as runs/imdb_tiny/ppo")],
    prompts: Annotated[
        int, typer.Option("--prompts", min=0, help="held-out prompts for every checkpoint; 0: read the log only")
    ] = 256,
) -> None:
    """Look for reward hacking in runs of ppo and rloo: trained against held-out score, length, copying, repetition."""
    from rlhf_recipes.evaluation.audit.audit import audit_runs, print_audit

    for found in audit_runs(runs, prompts).values():
        print_audit(found)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a finished run, such as runs/imdb_tiny/ppo")],
    merge: Annotated[bool, typer.Option("--merge", help="an adapter and its base as one whole model")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="new folder (default: export-<stage> beside the run)")
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None, typer.Option("--dtype", help="of weights (default: as saved)")
    ] = None,
) -> None:
    """Write a finished run's model to a folder that travels: weights, tokenizer, model card; no logs, no checkpoints."""
    from rlhf_recipes.deploy.export import export_run

    export_run(run, out, merge, dtype)


@app.command()
def plan(
    name: Name,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="8xH100-80, 1xRTX3060-12, 2x24, cpu; default: what is here")
    ] = None,
    accelerate_config: Annotated[
        str | None, typer.Option("--accelerate-config", help="name or file of a configuration of accelerate's")
    ] = None,
    throughput: Annotated[
        float | None, typer.Option("--throughput", min=1e-9, help="texts, pairs or episodes a second, for times")
    ] = None,
) -> None:
    """Predict memory, steps and time of every stage, and what makes it fit; exit code 1 if one does not."""
    log_to(None)  # what is imported next has things to say
    from rlhf_recipes.planning.plan import run_plan

    fits = run_plan(name, overrides or [], gpu, accelerate_config, throughput)
    raise typer.Exit(0 if fits else 1)


@app.command()
def score(
    name: Name,
    overrides: Overrides = None,
    text: Annotated[list[str] | None, typer.Option("--text", help="a text to score; may be repeated")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="texts, one a line; or .jsonl with prompt and completion, or text")
    ] = None,
) -> None:
    """Try a recipe's reward functions on texts, before a GPU is spent on them."""
    from rlhf_recipes.rewards.try_out import score_texts

    recipe = load_checked(name, overrides or [])
    score_texts(recipe, text or [], file)


@app.command()
def judge(
    name: Name,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say how much would be asked, and its cost")] = False,
    folder: Annotated[
        Path | None, typer.Option("--eval", help="folder of a finished eval (default: this recipe's)")
    ] = None,
) -> None:
    """Ask a judge which of two models' completions are better; settings: judge.backend, judge.model and more."""
    from rlhf_recipes.evaluation.judge.ask import judge

    judge(load_checked(name, overrides or []), folder, dry_run)


def main() -> None:
    """Entry point: errors of the user's become one message and exit code 2."""
    try:
        app()
    except RecipeError as error:
        complain(str(error))
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
