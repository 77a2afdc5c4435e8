"""The model card of an exported model: its origin, and how to load it."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from rlhf_recipes.runs.files import MERGED_BASE, SCORING, read_manifest
from rlhf_recipes.runs.references import is_hub_model

CARD = "README.md"

OF_THE_HUB = " of the Hub at commit "


def start_of(manifest: dict[str, Any]) -> str | None:
    """The model id that training started from; None: random weights."""
    section = manifest["settings"][manifest["stage"]]
    return section.get("model", section.get("policy"))


def _origin(run: Path, manifest: dict[str, Any]) -> list[str]:
    """The origin of a run's weights, stage by stage, back to a model that no stage trained."""
    stage, model_id = manifest["stage"], start_of(manifest)
    if model_id is None:
        return ["random weights (sft.scratch)"]
    if model_id.startswith("stage:"):
        name = model_id.removeprefix("stage:")
        step = f"stage {name} (run {manifest['inputs'][name]})"
        earlier = read_manifest(run.resolve().parent / name)
        if earlier is None or earlier["id"] != manifest["inputs"][name]:
            return [step]
        return [step, *_origin(run.resolve().parent / name, earlier)]
    key = f"{stage}.{'policy' if stage in ('ppo', 'rloo') else 'model'}"
    source = manifest.get("sources", {}).get(key, {})
    if source.get("revision") is not None:
        return [f"{model_id.partition('@')[0]}{OF_THE_HUB}{source['revision']}"]
    return [f"{source.get('path', model_id)} (a local folder, not of the Hub)"]


def model_card(run: Path, manifest: dict[str, Any], adapter: dict[str, Any] | None, notes: list[str]) -> str:
    """The text of the model card of a run, with notes: sentences that describe the export.

    `adapter` is the configuration of an exported adapter; None: the export is a whole model.
    """
    stage = manifest["stage"]
    origin = _origin(run, manifest)
    hub = [step.partition(OF_THE_HUB) for step in origin if OF_THE_HUB in step]
    auto = "AutoModelForSequenceClassification" if stage == "reward" else "AutoModelForCausalLM"
    more = ["num_labels=1"] if stage == "reward" and adapter is not None else []
    if start_of(manifest) in manifest["settings"].get("trust_remote_code", []):
        more.append("trust_remote_code=True")
    load = [f"from transformers import {auto}, AutoTokenizer", ""]
    if adapter is not None:  # without peft, transformers loads a DoRA adapter without its magnitudes
        beside = (run / MERGED_BASE).is_dir()
        base = f"FOLDER/{MERGED_BASE}" if beside else adapter["base_model_name_or_path"]
        if not beside and adapter.get("revision") is not None:
            more.append(f'revision="{adapter["revision"]}"')
        load = ["from peft import PeftModel", *load]
        load += [f"base = {auto}.from_pretrained({', '.join([json.dumps(base), *more])})"]
        load += ['model = PeftModel.from_pretrained(base, "FOLDER")']
    else:
        load += [f"model = {auto}.from_pretrained({', '.join([json.dumps('FOLDER'), *more])})"]
    versions = ", ".join(f"{name} {number}" for name, number in manifest["versions"].items() if number)
    rows = {
        "what it is": "; ".join(notes),
        "recipe": f"{manifest['recipe']}, stage {stage} (all of it: recipe.yaml)",
        "seed": manifest["seed"],
        "started from": ", which started from ".join(origin),
        "run": f"{manifest['id']}, started {manifest['started']}",
        "versions": versions,
        "results": json.dumps(manifest["results"]),
    }
    if adapter is not None and is_hub_model(adapter["base_model_name_or_path"] or ""):
        rows["base"] = f"{adapter['base_model_name_or_path']} at commit {adapter.get('revision')}"
    if (run / SCORING).is_file():
        rows["how it reads"] = (
            f"{SCORING}: whether to append EOS, the pad token, the center to subtract; the reward function reward_model "
            "of rlhf_recipes follows it"
        )
    data = ModelCardData(
        library_name="transformers" if adapter is None else "peft",
        base_model=hub[0][0] if hub else None,
        tags=["rlhf_recipes", "trl", stage],
    )
    template = (files("rlhf_recipes.deploy") / "card.md").read_text(encoding="utf-8")
    return ModelCard.from_template(
        data, template_str=template, recipe=manifest["recipe"], stage=stage, rows=rows, load="\n".join(load)
    ).content
