"""Reads the logs of trained runs, of this project and of plain TRL, as columns of equal length under one set of names."""

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_recipes.pages.metrics import FROM_TRL, our_name
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.runs.files import read_manifest, read_metrics
from rlhf_recipes.system.files import checkpoints

TRAINER_STATE = "trainer_state.json"

AXES = ("step", "episodes", "tokens", "seconds")
"""Columns every run has; None where the run did not log one. They measure progress in training."""


@dataclass
class TrainedRun:
    """One run that can be compared.

    Attributes:
        label: What its algorithm is called; runs of one label are its seeds.
        manifest: Of a run of this project; None for a plain Trainer's run, which keeps no settings.
        curves: Metric -> its values, one for each logged step; None where it was not logged.
    """

    label: str
    path: Path
    manifest: dict[str, Any] | None
    curves: dict[str, list[float | None]]
    name: str = field(default="", init=False)

    @property
    def seed(self) -> int | None:
        return None if self.manifest is None else self.manifest["seed"]


def read_runs(arguments: list[str]) -> list[TrainedRun]:
    """Read runs as the command line names them, and give each a name of its own.

    Args:
        arguments: `PATH` of a run folder of ours, or `LABEL=PATH` of that or of a plain Trainer's output.

    Raises:
        RecipeError: One is no finished run of ppo or rloo, has logged no score, or is there twice; every finding.
    """
    runs, findings = [], []
    for argument in arguments:
        try:
            runs.append(_read(argument))
        except RecipeError as error:
            findings.append(str(error))
    places = [(run.path if run.manifest else _trainer_state(run.path)).resolve() for run in runs]
    findings += [f"the same run twice: {path}." for path in dict.fromkeys(places) if places.count(path) > 1]
    if findings:
        raise RecipeError("\n".join(findings))
    for i, run in enumerate(runs):
        name = f"{run.label} seed {run.seed}" if run.seed is not None else run.label
        same = [other.label == run.label and other.seed == run.seed for other in runs]
        run.name = name if sum(same) == 1 else f"{name} #{sum(same[: i + 1])}"
    return runs


def _read(argument: str) -> TrainedRun:
    label, path = _split(argument)
    if not path.exists():
        raise RecipeError(f"{path}: no such run (looked from {Path.cwd()}).")
    manifest = read_manifest(path)
    if isinstance(manifest, dict) and manifest.keys() >= {"stage", "status", "settings"}:  # one of ours
        stage, status = manifest["stage"], manifest["status"]
        if stage not in ("ppo", "rloo"):
            raise RecipeError(f"{path}: not a finished run of ppo or rloo, but stage {stage}; name one of those.")
        if status != "finished":
            raise RecipeError(
                f"{path}: not a finished run (stage {stage}, {status}); first: rlhf-recipes {stage} {manifest['recipe']}"
            )
        try:
            return TrainedRun(label or stage, path, manifest, columns(read_metrics(path)))
        except (OSError, ValueError) as error:
            raise RecipeError(f"{path}: its metrics.jsonl cannot be read ({error}); run the stage again.") from error
    state = _trainer_state(path)
    if state is None:
        raise RecipeError(
            f"{path}: not a finished run of ppo or rloo: there is neither a manifest.json of ours nor a "
            f"{TRAINER_STATE} of a Trainer's; name a folder such as runs/imdb_tiny/ppo."
        )
    if label is None:
        raise RecipeError(f"{path}: a plain Trainer's run does not say what it is; write ppo={path}, or what it was.")
    try:
        log = json.loads(state.read_text(encoding="utf-8"))["log_history"]
        curves = columns(_our_names(log))
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # no JSON, or of another form
        raise RecipeError(f"{state}: no {TRAINER_STATE} of a Trainer's ({error!r:.100}); name another run.") from error
    if not any(value is not None for value in curves.get("score_mean", [])):
        raise RecipeError(f"{state}: no reward in its log, so it is no run of PPO, RLOO or GRPO of TRL's.")
    return TrainedRun(label, path, None, curves)


def _split(argument: str) -> tuple[str | None, Path]:
    label, equals, path = argument.partition("=")
    if equals and not Path(argument).exists() and re.fullmatch(r"\w[\w .+-]*", label):
        return label, Path(path)
    return None, Path(argument)


def _trainer_state(path: Path) -> Path | None:
    """The file itself, the one in a folder, or that of its newest checkpoint."""
    if path.is_file():
        return path if path.name == TRAINER_STATE else None
    folders = [path, *reversed(checkpoints(path))]
    return next((folder / TRAINER_STATE for folder in folders if (folder / TRAINER_STATE).is_file()), None)


def _our_names(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of a Trainer's `log_history` about training, under our names; those of our own trainers stay as they are."""
    lines = []
    for entry in log:
        if "train_runtime" in entry or any(key.startswith("eval_") for key in entry):
            continue
        line = dict(entry)
        if "score_mean" not in entry:
            line = {our_name(key, FROM_TRL) or key: value for key, value in entry.items()}
            if isinstance(cut_off := entry.get("completions/clipped_ratio"), (int, float)):
                line["eos_rate"] = 1 - cut_off
        lines.append(line)
    return lines


def columns(lines: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Every numeric metric of some logged lines as a list as long as they are many; None where it is missing, or no number."""
    names = [*AXES, *(key for line in lines for key in line if _number(line[key]) is not None)]
    return {name: [_number(line.get(name)) for line in lines] for name in dict.fromkeys(names)}


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and abs(value) <= sys.float_info.max else None


def points(curves: dict[str, list[float | None]], axis: str, metric: str) -> list[tuple[float, float]]:
    """(x, y) of the logged steps at which both are known."""
    pairs = zip(curves.get(axis, []), curves.get(metric, []), strict=False)
    return [(x, y) for x, y in pairs if x is not None and y is not None]
