"""Reads the logs of runs of this project and of plain TRL trainers, as columns with the same names."""

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_recipes.pages.metrics import FROM_TRL, our_name
from rlhf_recipes.recipe.schema import ON_POLICY, RecipeError
from rlhf_recipes.runs.files import METRICS, read_manifest, read_metrics
from rlhf_recipes.system.files import checkpoints

TRAINER_STATE = "trainer_state.json"

AXES = ("step", "episodes", "tokens", "seconds")
"""Columns every run has; None where the run did not log one. They measure progress in training."""

Curves = dict[str, list[float | None]]
"""Metric -> one value per logged line; None where the line does not have the metric."""


@dataclass
class TrainedRun:
    """One run that can be compared.

    Attributes:
        label: Name of its algorithm. Runs with the same label are seeds of one algorithm.
        path: Its folder, or the file of a plain Trainer's run.
        manifest: {} for a plain Trainer's run, which stores no settings.
        curves: What the run logged.
        name: Tells this run apart from all others in the comparison.
    """

    label: str
    path: Path
    manifest: dict[str, Any]
    curves: Curves
    name: str = field(default="", init=False)

    @property
    def seed(self) -> int | None:
        return self.manifest.get("seed")


class _Failed(RecipeError):
    """A run that has failed; the message is a sentence about it."""


def read_runs(arguments: list[str]) -> tuple[list[TrainedRun], list[str]]:
    """Reads the runs that the command line names, and gives each its own name.

    Args:
        arguments: `PATH` of a run of this project, or `LABEL=PATH` of such a run or of a plain Trainer's output.

    Returns:
        The finished runs, and a sentence for each failed one, which stays out of every number.

    Raises:
        RecipeError: A run is neither a finished nor a failed run of ppo or rloo, has logged no score, or is named twice; or
            all have failed. Lists every finding.
    """
    runs, failed, findings = [], [], []
    for argument in arguments:
        try:
            runs.append(_read(argument))
        except _Failed as error:
            failed.append(str(error))
        except RecipeError as error:
            findings.append(str(error))
    places = [(run.path if run.manifest else _trainer_state(run.path) or run.path).resolve() for run in runs]
    findings += [f"the same run twice: {path}." for path in dict.fromkeys(places) if places.count(path) > 1]
    if findings or not runs:
        raise RecipeError("\n".join(findings or failed))
    for i, run in enumerate(runs):
        name = f"{run.label} seed {run.seed}" if run.seed is not None else run.label
        same = [other.label == run.label and other.seed == run.seed for other in runs]
        run.name = name if sum(same) == 1 else f"{name} #{sum(same[: i + 1])}"
    return runs, failed


def _read(argument: str) -> TrainedRun:
    label, path = _split(argument)
    if not path.exists():
        raise RecipeError(f"{path}: no such run (looked from {Path.cwd()}).")
    state = _trainer_state(path)
    try:
        manifest = read_manifest(path)
    except RecipeError:
        if state is None or (path / METRICS).exists():
            raise
        manifest = None  # of another program, beside a plain Trainer's run
    if manifest is not None and manifest.keys() >= {"stage", "status", "settings"}:  # a run of this project
        stage, status = manifest["stage"], manifest["status"]
        if stage not in ON_POLICY:
            raise RecipeError(f"{path}: not a finished run of ppo or rloo, but stage {stage}; name one of those.")
        if status == "failed":
            seed = f" seed {manifest['seed']}" if "seed" in manifest else ""
            raise _Failed(f"{label or stage}{seed} failed: {manifest.get('error', 'no reason known')}   {path}")
        if status != "finished":
            raise RecipeError(
                f"{path}: not a finished run (stage {stage}, {status}); first: rlhf-recipes {stage} {manifest['recipe']}"
            )
        if not (lines := read_metrics(path)):
            raise RecipeError(f"{path}: its metrics.jsonl cannot be read: it has no whole line; run the stage again.")
        return TrainedRun(label or stage, path, manifest, columns(lines))
    if state is None:
        raise RecipeError(
            f"{path}: not a finished run of ppo or rloo: it has neither a manifest.json of rlhf-recipes nor a "
            f"{TRAINER_STATE} of a Trainer; name a folder such as runs/imdb_tiny/ppo."
        )
    if label is None:
        raise RecipeError(f"{path}: a plain Trainer's run does not say which algorithm made it; write ppo={path}.")
    try:
        log = json.loads(state.read_text(encoding="utf-8"))["log_history"]
        curves = columns(_training_lines(log))
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # no JSON, or other content
        raise RecipeError(
            f"{state}: not the {TRAINER_STATE} of a Trainer ({error!r:.100}); name another run."
        ) from error
    if not any(value is not None for value in curves.get("score_mean", [])):
        raise RecipeError(f"{state}: its log has no reward, so it is no run of TRL's PPO, RLOO or GRPO.")
    return TrainedRun(label, path, {}, curves)


def _split(argument: str) -> tuple[str | None, Path]:
    label, equals, path = argument.partition("=")
    if equals and not Path(argument).exists() and re.fullmatch(r"\w[\w .+-]*", label):
        return label, Path(path)
    return None, Path(argument)


def _trainer_state(path: Path) -> Path | None:
    """The file itself, the one in a folder, or the one in its newest checkpoint."""
    if path.is_file():
        return path if path.name == TRAINER_STATE else None
    folders = [path, *reversed(checkpoints(path))]
    return next((folder / TRAINER_STATE for folder in folders if (folder / TRAINER_STATE).is_file()), None)


def _training_lines(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a `log_history` that are about training, with this project's names of the metrics."""
    lines = []
    for entry in log:
        if "train_runtime" in entry or any(key.startswith("eval_") for key in entry):
            continue
        line = dict(entry)
        if "score_mean" not in entry:  # not logged by a trainer of this project
            line = {our_name(key, FROM_TRL) or key: value for key, value in entry.items()}
            if isinstance(cut_off := entry.get("completions/clipped_ratio"), (int, float)):
                line["eos_rate"] = 1 - cut_off
        lines.append(line)
    return lines


def columns(lines: list[dict[str, Any]]) -> Curves:
    """All numeric metrics of logged lines. A value that is no finite number becomes None."""
    names = [*AXES, *(key for line in lines for key in line if _number(line[key]) is not None)]
    return {name: [_number(line.get(name)) for line in lines] for name in dict.fromkeys(names)}


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and abs(value) <= sys.float_info.max else None


def points(curves: Curves, axis: str, metric: str) -> list[tuple[float, float]]:
    """(x, y) of the logged lines that have both."""
    pairs = zip(curves.get(axis, []), curves.get(metric, []), strict=False)
    return [(x, y) for x, y in pairs if x is not None and y is not None]
