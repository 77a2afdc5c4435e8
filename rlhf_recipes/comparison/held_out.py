"""Finds the results of stage eval for runs, and checks that all runs answered the same prompts in the same way."""

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_recipes.comparison.differences import identity
from rlhf_recipes.comparison.runs import TrainedRun
from rlhf_recipes.runs.files import COMPLETIONS, read_manifest
from rlhf_recipes.system.files import read_json, read_log

MOST_SAMPLES = 500
"""Prompts whose completions a comparison contains."""

WITHOUT_EFFECT = ("models", "reference", "perplexity_model", "batch_size", "num_samples")
"""Keys of `eval` that change no score."""


@dataclass
class Measured:
    """The results of one run in one eval.

    Attributes:
        folder: The folder of the eval.
        name: The eval's name of the run.
        manifest: That of the eval.
        content: Its `eval.json`.
    """

    folder: Path
    name: str
    manifest: dict[str, Any]
    content: dict[str, Any]

    @property
    def metrics(self) -> dict[str, Any]:
        return self.content["models"][self.name]

    @property
    def prompts_sha256(self) -> str:
        prompts = [json.dumps(line["prompt"]) for line in read_log(self.folder / COMPLETIONS, needed=("prompt",))]
        return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


def find_held_out(runs: list[TrainedRun]) -> tuple[dict[str, Measured], list[str]]:
    """Finds the eval of every run, in the folder that holds the run's folder or one folder above.

    Returns:
        Name of a run -> its results, and notes. If a run has no results, or they cannot be compared, the first is {} and
        the notes say why.
    """
    found, notes = {}, []
    for run in runs:
        measured, why = _find(run)
        if measured is not None:
            found[run.name] = measured
        notes += [f"{run.name}: {why}"] if why else []
    if missing := [run.name for run in runs if run.name not in found]:
        if found:
            notes.append(f"No numbers on held-out prompts are compared: {', '.join(missing)} has none.")
        return {}, notes
    if why := _why_unequal(runs, found):
        return {}, [*notes, f"No numbers on held-out prompts are compared: {why}."]
    return found, notes


def read_samples(measured: dict[str, Measured]) -> list[dict[str, Any]]:
    """The first lines of the first eval's completions."""
    if not measured:
        return []
    lines = read_log(next(iter(measured.values())).folder / COMPLETIONS, ("prompt",), MOST_SAMPLES)
    return [line for line in lines if "models" in line]  # earlier versions wrote another form


def _find(run: TrainedRun) -> tuple[Measured | None, str]:
    why = ""
    if not run.manifest:
        return None, why
    path = run.path.resolve()
    for folder in (path.parent / "eval", path.parent.parent / "eval"):
        manifest = read_manifest(folder)
        if manifest is None or manifest["status"] != "finished":
            continue
        content = read_json(folder / "eval.json")
        for name, model_id in manifest["settings"]["models"].items():
            if name in content["models"] and _refers_to(model_id, folder, path):
                if manifest["inputs"].get(model_id.removeprefix("stage:")) in (None, run.manifest["id"]):
                    return Measured(folder, name, manifest, content), ""
                why = f"{folder} measured an earlier run of this folder; run eval again."
    return None, why


def _refers_to(model_id: str, folder: Path, run: Path) -> bool:
    """Whether a model id in an eval's settings means this run, even if the run was moved together with the eval."""
    if model_id.startswith("stage:"):
        return folder.parent / model_id.removeprefix("stage:") == run
    inside = run.relative_to(folder.parent).parts
    return Path(model_id).resolve() == run or (len(inside) > 1 and Path(model_id).parts[-len(inside) :] == inside)


def _why_unequal(runs: list[TrainedRun], found: dict[str, Measured]) -> str:
    """Why the evals of the runs cannot be compared; "" if they can.

    Prompts may differ from seed to seed, if all algorithms of a seed answered the same.
    """
    if len({measured.folder for measured in found.values()}) == 1:
        return ""
    if len({_settings(measured.manifest) for measured in found.values()}) > 1:
        return "the settings of their evals differ"
    asked = {name: (measured.prompts_sha256, _scoring_models(measured.manifest)) for name, measured in found.items()}
    if len(set(asked.values())) == 1:
        return ""
    by_seed, labels = defaultdict(set), defaultdict(set)
    for run in runs:
        by_seed[run.seed].add(asked[run.name])
        labels[run.seed].add(run.label)
    paired = [seed for seed in labels if labels[seed] == {run.label for run in runs}]
    if None in labels or len(paired) < 2 or any(len(by_seed[seed]) > 1 for seed in paired):
        return "their evals had other prompts, or other models that score"
    return ""


def _settings(manifest: dict[str, Any]) -> str:
    """The settings of an eval that change scores, as a text. Sources are left out, because their content counts."""
    settings = manifest["settings"]
    keys = ("data", "reward_funcs", "special_tokens", "chat_template_kwargs", "max_completion_length")
    asked = {key: settings.get(key) for key in keys}
    asked["eval"] = {key: value for key, value in settings["eval"].items() if key not in WITHOUT_EFFECT}
    text = json.dumps(asked, sort_keys=True)
    for key, source in manifest["sources"].items():
        if not key.startswith("eval.models."):
            text = text.replace(json.dumps(source["reference"]), '"source"')
    return text


def _scoring_models(manifest: dict[str, Any]) -> tuple[str, ...]:
    """The content of the eval's data, and of the models and functions that score."""
    sources = manifest["sources"].items()
    return tuple(f"{key} {identity(source)}" for key, source in sorted(sources) if not key.startswith("eval.models."))
