"""Commands around a run: forecast, scores of texts, audit, judge, export."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from rlhf_recipes.commands.options import Name, Overrides
from rlhf_recipes.stage import load_checked
from rlhf_recipes.system.terminal import log_to

app = typer.Typer()


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
    merge: Annotated[bool, typer.Option("--merge", help="merge an adapter into its base model")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="new folder (default: export-<stage> beside the run)")
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option("--dtype", help="type of the weights (default: as saved)"),
    ] = None,
) -> None:
    """Write a finished run's model to a folder of its own: weights, tokenizer, model card; no logs, no checkpoints."""
    from rlhf_recipes.deploy.export import export_run

    export_run(run, out, merge, dtype)


@app.command()
def plan(
    name: Name,
    overrides: Overrides,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="8xH100-80, 1xRTX3060-12, 2x24, cpu (default: this machine)")
    ] = None,
    accelerate_config: Annotated[
        str | None, typer.Option("--accelerate-config", help="name or file of an accelerate configuration")
    ] = None,
    throughput: Annotated[
        float | None, typer.Option("--throughput", min=1e-9, help="texts, pairs or episodes per second: predicts times")
    ] = None,
) -> None:
    """Predict memory, steps and time of every stage, and what makes it fit; exit code 1 if a stage does not fit."""
    log_to(None)  # the next imports log messages
    from rlhf_recipes.planning.plan import run_plan

    fits = run_plan(name, overrides, gpu, accelerate_config, throughput)
    raise typer.Exit(0 if fits else 1)


@app.command()
def score(
    name: Name,
    overrides: Overrides,
    text: Annotated[list[str] | None, typer.Option("--text", help="a text to score; may be repeated")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="texts, one per line; or .jsonl with prompt and completion, or text")
    ] = None,
) -> None:
    """Try a recipe's reward functions on texts, before a GPU trains on them."""
    from rlhf_recipes.rewards.try_out import score_texts

    score_texts(load_checked(name, overrides), text or [], file)


@app.command()
def judge(
    name: Name,
    overrides: Overrides,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="only print the number of questions, and their cost")
    ] = False,
    folder: Annotated[
        Path | None, typer.Option("--eval", help="folder of a finished eval (default: this recipe's)")
    ] = None,
) -> None:
    """Ask a judge which of two models' completions are better; settings: judge.backend, judge.model and more."""
    from rlhf_recipes.evaluation.judge.ask import judge

    judge(load_checked(name, overrides), folder, dry_run)
