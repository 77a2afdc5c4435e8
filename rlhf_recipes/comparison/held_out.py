"""Reads eval's results of trained runs, if all were measured on the same prompts in the same way."""

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_recipes.comparison.differences import identity
from rlhf_recipes.comparison.runs import TrainedRun
from rlhf_recipes.runs.files import is_finished, read_manifest
from rlhf_recipes.system.files import read_json, read_lines

MOST_SAMPLES = 500
"""Prompts whose completions a comparison takes along."""

NO_MATTER = ("models", "reference", "perplexity_model", "batch_size", "num_samples")
"""Keys of `eval` that change no score."""


@dataclass
class Measured:
    """One run in one eval."""

    folder: Path
    name: str
    manifest: dict[str, Any]
    content: dict[str, Any]

    @property
    def metrics(self) -> dict[str, Any]:
        return self.content["models"][self.name]

    @property
    def prompts(self) -> str:
        """A checksum: evals with the same one asked for completions of the same prompts."""
        prompts = [json.dumps(line["prompt"]) for line in read_lines(self.folder / "completions.jsonl")]
        return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


def find_held_out(runs: list[TrainedRun]) -> tuple[dict[str, Measured], list[str]]:
    """Eval's results of every run, searched beside its folder and one folder up.

    Returns:
        Name of a run -> what was measured; {} where some run has none or they cannot be compared. And sentences on why.
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
    if why := _unequal(runs, found):
        return {}, [*notes, f"No numbers on held-out prompts are compared: {why}."]
    return found, notes


def read_samples(measured: dict[str, Measured]) -> list[dict[str, Any]]:
    """The first lines of the first eval's completions."""
    if not measured:
        return []
    lines = read_lines(next(iter(measured.values())).folder / "completions.jsonl", MOST_SAMPLES)
    return [line for line in lines if "models" in line]  # earlier versions wrote them in another form


def _find(run: TrainedRun) -> tuple[Measured | None, str]:
    if run.manifest is None:
        return None, ""
    why = ""
    for folder in (run.path.resolve().parent / "eval", run.path.resolve().parent.parent / "eval"):
        if not is_finished(folder):
            continue
        manifest = read_manifest(folder)
        content = read_json(folder / "eval.json")
        for name, reference in manifest["settings"]["models"].items():
            if name in content["models"] and _is_of(reference, folder, run.path.resolve()):
                if manifest["inputs"].get(reference.removeprefix("stage:")) in (None, run.manifest["id"]):
                    return Measured(folder, name, manifest, content), ""
                why = f"{folder} measured an earlier run of this folder; run eval again."
    return None, why


def _is_of(reference: str, folder: Path, run: Path) -> bool:
    """Whether a reference in an eval's settings means this run; the runs may have moved, with their eval."""
    if reference.startswith("stage:"):
        return folder.parent / reference.removeprefix("stage:") == run
    inside = run.relative_to(folder.parent).parts
    return Path(reference).resolve() == run or (len(inside) > 1 and Path(reference).parts[-len(inside) :] == inside)


def _unequal(runs: list[TrainedRun], found: dict[str, Measured]) -> str:
    """Why the evals of some runs do not ask the same; those of different seeds may have other prompts, if all have them."""
    if len({measured.folder for measured in found.values()}) == 1:
        return ""
    settings = {name: _settings(measured.manifest) for name, measured in found.items()}
    if len(set(settings.values())) > 1:
        return "the settings of their evals differ"
    asked = {name: (measured.prompts, _models(measured.manifest)) for name, measured in found.items()}
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
    settings = manifest["settings"]
    eval_settings = {key: value for key, value in settings["eval"].items() if key not in NO_MATTER}
    asked = {key: settings.get(key) for key in ("data", "reward_funcs", "special_tokens", "max_completion_length")} | {
        "eval": eval_settings
    }
    texts = json.dumps(asked, sort_keys=True)
    for key, source in manifest["sources"].items():  # known by what they contain, not by where they are
        if not key.startswith("eval.models."):
            texts = texts.replace(json.dumps(source["reference"]), '"source"')
    return texts


def _models(manifest: dict[str, Any]) -> tuple[str, ...]:
    sources = manifest["sources"].items()
    return tuple(f"{key} {identity(source)}" for key, source in sorted(sources) if not key.startswith("eval.models."))
