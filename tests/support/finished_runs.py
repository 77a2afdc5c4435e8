"""Folders of finished runs without training: manifests come from real recipes, numbers are given."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rlhf_recipes.experiments.jobs
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.runs.folder import Run
from support.texts import write_jsonl


def trained(
    folder: Path, stage: str, seed: int = 42, score: float = 0.5, overrides: tuple[str, ...] = (), **manifest: Any
) -> Path:
    """A run of imdb_tiny with four logged rollouts, the last of which has this score.

    Args:
        folder: Where the run's own folder, named like the stage, goes.
        stage: ppo or rloo.
        seed: The recipe's.
        score: Of the last rollout; the ones before rise to it.
        overrides: Of the recipe.
        manifest: Entries to replace; `sources` are added to.
    """
    recipe = load_recipe("imdb_tiny", [f"seed={seed}", *overrides])
    path = folder / stage
    path.mkdir(parents=True)
    sources = {
        "data.path": {
            "reference": recipe.data.path,
            "revision": None,
            "path": f"{folder}/site/m.csv",
            "sha256": "da7a",
        },
        f"{stage}.policy": {"reference": "stage:sft", "revision": "5f7", "path": f"{folder}/sft"},
    }
    values = {
        "recipe": "imdb_tiny",
        "stage": stage,
        "status": "finished",
        "id": f"{stage}-{seed}-{score}",
        "settings": json.loads(json.dumps(Run(recipe, stage).settings)),
        "inputs": {"sft": "5f7"},
        "seed": seed,
        "versions": {"trl": "1.16.0"},
        "git_commit": "c0ffee",
        "hardware": {"machine": "x86_64", "cores": 2, "memory_gib": 23.5, "gpus": []},
        "setup": {"num_processes": 1, "mixed_precision": "no"},
        "results": {"episodes": recipe.episodes},
        "wall_seconds": 12.0,
        "peak_memory_gib": 0.7,
        "peak_gpu_memory_gib": None,
    }
    values |= manifest | {"sources": sources | manifest.get("sources", {})}
    (path / "manifest.json").write_text(json.dumps(values))
    last = values["results"].get("episodes") or 4096
    write_jsonl(
        path / "metrics.jsonl",
        [
            {
                "step": 2 * i,
                "seconds": 3.0 * i,
                "episodes": last * i // 4,
                "tokens": 100.0 * last * i / 4,
                "score_mean": score * i / 4,
                "kl": 2.0 * i,
                "entropy": None,
                "score/vader_sentiment": score * i / 4,
            }
            for i in range(1, 5)
        ],
    )
    return path


def stand_in(monkeypatch, entry: Callable, outcome_of: Callable, leave: Callable) -> list[tuple]:
    """Put something that only writes what a stage leaves in the place of the processes of sweeps and duels.

    Args:
        monkeypatch: pytest's.
        entry: Of a stage and its recipe: how it is noted down.
        outcome_of: Of an entry: an exit code (an int; 1 fails with an error), or what the stage comes to.
        leave: Writes the files of a run that finishes; called with run, recipe and outcome.

    Returns:
        Entries of what ran, so far.
    """
    ran = []

    def launch(stage, file, overrides, overwrite, config):
        recipe = load_recipe(file)
        run = Run(recipe, stage)
        assert not run.is_done(overwrite)
        ran.append(entry(stage, recipe))
        run.start()
        outcome = outcome_of(ran[-1])
        if isinstance(outcome, int):
            if outcome == 1:
                run.fail(RuntimeError("no luck\nat all"))
            return outcome
        leave(run, recipe, outcome)
        run.finish()
        return 0

    monkeypatch.setattr(rlhf_recipes.experiments.jobs, "launch_stage", launch)
    return ran


def evaluated(folder: Path, runs: dict[str, Path], metrics: dict[str, dict[str, float]], **more: Any) -> Path:
    """An eval of some runs.

    Args:
        folder: Where its own folder, `eval`, goes.
        runs: Name of a model -> the run's folder.
        metrics: Name of a model -> what was measured.
        more: `prompts`, or entries of the manifest to replace.
    """
    path = folder / "eval"
    path.mkdir(parents=True)
    prompts = more.pop("prompts", ["the film", "a movie", "<script>alert(1)</script>"])
    recipe = load_recipe("imdb_tiny")
    settings = json.loads(json.dumps(Run(recipe, "eval").settings))
    paths = {"sft": "stage:sft"} | {name: str(run) for name, run in runs.items()}
    ids = {str(run): json.loads((run / "manifest.json").read_text())["id"] for run in runs.values()}
    manifest = {
        "stage": "eval",
        "status": "finished",
        "id": "e7a1",
        "seed": 42,
        "settings": settings | {"models": paths},
        "inputs": ids,
        "sources": {
            "eval.held_out_funcs.0.args.model": {"reference": "stage:reward", "revision": "4d", "path": "reward"}
        },
    }
    (path / "manifest.json").write_text(json.dumps(manifest | more))
    lines = [
        {"prompt": prompt, "models": {name: {"completion": " is good .", "score": 0.5} for name in paths}}
        for prompt in prompts
    ]
    write_jsonl(path / "completions.jsonl", lines)
    models = {"sft": {"score_mean": 0.1, "kl": 0.0}} | metrics
    content = {"recipe": "imdb_tiny", "num_prompts": len(prompts), "seed": 42, "paths": paths, "models": models}
    (path / "eval.json").write_text(json.dumps(content | {"samples": lines}))
    return path


FEW = [
    "data.max_rows=1500",
    "sft.trainer.max_steps=3",
    "reward.trainer.max_steps=5",
    "episodes=128",
    "ppo.trainer.per_device_train_batch_size=32",
    "rloo.trainer.per_device_train_batch_size=32",
    "eval.num_prompts=32",
]
"""Overrides for a few steps of imdb_tiny: every stage and file, without learning."""
