"""Commands on several runs: sweep, compare, duel, and a view of runs in W&B."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_recipes.commands.options import Config, Name, Overrides, Overwrite
from rlhf_recipes.launch.configs import read_config
from rlhf_recipes.stage import load_checked
from rlhf_recipes.system.terminal import log_to, say

app = typer.Typer()


@app.command()
def sweep(
    name: Name,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value[,value]...]...",
            help="key=value,value: runs with each value, in every combination with the other keys; "
            "key,key=value,value: the keys change together; key=value: holds for all runs. A comma inside brackets, "
            "braces or quotes belongs to a value",
        ),
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option("--stage", help="sft, reward, ppo or rloo; may be repeated, or ppo,rloo (default: ppo and rloo)"),
    ] = None,
    seeds: Annotated[
        str, typer.Option("--seeds", help="how many seeds, from the recipe's seed on (3), or which (42,43,44)")
    ] = "1",
    no_eval: Annotated[bool, typer.Option("--no-eval", help="only train: no numbers on held-out prompts")] = False,
    accelerate_config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Run a stage with every combination of some keys' values and several seeds; ends with a table and a plot.

    The same command resumes a stopped sweep, and skips finished runs.
    """
    from rlhf_recipes.experiments.sweep import plan_sweep, run_sweep

    planned = plan_sweep(name, overrides or [], stage or [], seeds, not no_eval, overwrite)
    raise typer.Exit(run_sweep(planned, overwrite, accelerate_config))


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="folders such as runs/imdb_tiny/ppo; or LABEL=PATH, for the folder of a plain Trainer with a "
            "trainer_state.json, or to compare two settings of one algorithm. Runs with the same label are its seeds",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="folder of the report")] = Path("comparison"),
) -> None:
    """Compare finished runs of ppo and rloo: a verdict, its numbers, and one HTML page.

    Exit code 1 if the runs differ in more than the algorithm: then there is no verdict.
    """
    from rlhf_recipes.comparison.write import compare_runs

    raise typer.Exit(0 if compare_runs(runs, out) else 1)


@app.command()
def duel(
    name: Name,
    overrides: Overrides,
    seeds: Annotated[
        str, typer.Option("--seeds", help="how many seeds, from the recipe's seed on (4), or which (42,43,44)")
    ] = "4",
    episodes: Annotated[
        int | None, typer.Option("--episodes", min=1, help="completions that each run samples (default: the recipe's)")
    ] = None,
    accelerate_config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Train PPO and RLOO from the same SFT model, with several seeds, and say which is better.

    The same command resumes a stopped duel, and skips finished runs. Exit code 1 if a run failed; the other runs are
    still compared.
    """
    from rlhf_recipes.experiments.duel import plan_duel, run_duel

    processes = read_config(accelerate_config).get("num_processes", 1) if accelerate_config else 1
    planned = plan_duel(name, overrides, seeds, episodes, overwrite, processes)
    raise typer.Exit(run_duel(planned, overwrite, accelerate_config))


@app.command("wandb")
def wandb_view(
    name: Name,
    overrides: Overrides,
    group: Annotated[
        str | None, typer.Option("--group", help="group in W&B, such as a duel's (default: the recipe's name)")
    ] = None,
) -> None:
    """Save a view in W&B that overlays the recipe's runs of ppo and rloo, and print its address."""
    log_to(None)
    from rlhf_recipes.runs.workspace import save_view

    say(save_view(load_checked(name, overrides), group))
