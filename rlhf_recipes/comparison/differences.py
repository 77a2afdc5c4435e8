"""Finds settings that differ between runs, and differences that make a comparison of algorithms invalid.

It compares the settings in effect, defaults included. It identifies models and data by their content (the id of the run
that made a model, the commit on the Hub, the checksum of a file), not by the path at which a run found them.
"""

import json
from collections import defaultdict
from collections.abc import Collection
from typing import Any

from rlhf_recipes.comparison.runs import TrainedRun
from rlhf_recipes.recipe.batch import rows_of_step
from rlhf_recipes.recipe.trainer_keys import trainer_defaults, trainer_fields
from rlhf_recipes.runs.references import PLACES

KINDS = {
    "model": "policy peft quantization special_tokens chat_template_kwargs",
    "data": "data shuffle_dataset data_seed train_sampling_strategy",
    "reward": "reward_funcs missing_eos reward_clip_range",
    "budget": "episodes max_completion_length temperature top_p top_k min_p repetition_penalty generation_kwargs "
    "allow_truncated_sampling mask_truncated_completions vllm_structured_outputs_regex",
    "objective": "beta kl_estimator kl_target kl_horizon normalize_scores disable_dropout sync_ref_model "
    "ref_model_mixup_alpha ref_model_sync_steps",
    "machine": "setup hardware gradient_checkpointing activation_checkpointing bf16 fp16 tf32 use_cpu use_vllm "
    "use_liger_kernel torch_compile sampling_batch_size deepspeed fsdp torch_empty_cache_steps",
    "version": "versions",
}
"""Kind -> names of settings, also of those under `trainer`. All other settings belong to the algorithm."""

KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}

WITHOUT_EFFECT = (
    *("logging_", "save_", "log_", "report_to", "hub_", "push_to_hub", "run_name", "output_dir", "disable_tqdm"),
    *("eval_", "dataloader_", "trackio_", "project", "ddp_", "vllm_", "per_device_eval_", "reward_timeout"),
)
"""Beginnings of keys of `trainer` that do not change what is learned, except for the names in `KINDS`."""

DURATION = ("max_steps", "num_train_epochs")
"""Keys of `trainer` that are not compared: the episodes that follow from them are."""

SAME_BUDGET = 0.02
"""Share by which episodes may differ, because both algorithms train for whole rollouts."""


def find_differences(runs: list[TrainedRun]) -> list[dict[str, Any]]:
    """Every key in which runs differ: `key`, `kind`, whether it `refuses` a comparison, and its `values` by run.

    Settings of an algorithm may differ from algorithm to algorithm, but not from seed to seed. Models that a run starts
    from (its SFT model, its reward model) may differ from seed to seed, if all algorithms of a seed have the same.

    Args:
        runs: Plain Trainer's runs among them are ignored, because their settings are unknown.
    """
    runs = [run for run in runs if run.manifest]
    if len(runs) < 2:
        return []
    keys = written_trainer_keys(runs)
    settings = {run.name: effective_settings(run.manifest, keys) for run in runs}
    differences = []
    for key in sorted({key for of_run in settings.values() for key in of_run}):
        compared, shown = ({run.name: settings[run.name].get(key, (None, None))[i] for run in runs} for i in (0, 1))
        if len(set(map(_as_json, compared.values()))) > 1:
            kind = _kind(key)
            refuses = _refuses(key, kind, runs, compared)
            differences.append({"key": key, "kind": kind, "refuses": refuses, "values": shown})
    return sorted(differences, key=lambda difference: not difference["refuses"])


def effective_settings(manifest: dict[str, Any], trainer_keys: Collection[str]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value to compare, value to show) of everything that can influence a run.

    Args:
        manifest: Of a run of ppo or rloo.
        trainer_keys: Keys of `trainer` to include, with their defaults.
    """
    setup = manifest.get("setup", {})
    values = _recipe_settings(manifest, trainer_keys)
    values |= {f"setup.{key}": value for key, value in setup.items()} | {"hardware": describe_hardware(manifest)}
    values |= {f"versions.{key}": value for key, value in manifest.get("versions", {}).items()}
    values |= {"versions.git_commit": manifest.get("git_commit")}
    found = {key: (value, value) for key, value in values.items() if value is not None}
    for key, source in manifest.get("sources", {}).items():
        key = key.removeprefix(f"{manifest['stage']}.")
        checksum = source.get("sha256") or source["revision"]
        found[key] = (identity(source), source["reference"] + (f" ({checksum[:8]})" if checksum else ""))
        if source["revision"] is not None:  # the commit of the branch that `revision` names
            found.pop(key.removesuffix("path") + "revision", None)
    return found


def _recipe_settings(manifest: dict[str, Any], trainer_keys: Collection[str]) -> dict[str, Any]:
    stage, settings = manifest["stage"], manifest["settings"]
    section = settings[stage]
    trainer, fields, defaults = section["trainer"], trainer_fields(stage), trainer_defaults(stage)
    values = _flat({key: value for key, value in settings.items() if key not in (stage, "seed", "trust_remote_code")})
    values |= _flat({key: value for key, value in section.items() if key not in ("trainer", "peft", "quantization")})
    values |= {key: section.get(key) for key in ("peft", "quantization")}  # not flat: {} is LoRA with its defaults
    values |= {
        f"trainer.{key}": trainer.get(key, defaults.get(key))
        for key in trainer_keys
        if key in fields and key not in DURATION and (key in KIND_OF or not key.startswith(WITHOUT_EFFECT))
    }
    episodes = manifest.get("results", {}).get("episodes")
    values["episodes"] = episodes if episodes is not None else settings.get("episodes")
    processes = manifest.get("setup", {}).get("num_processes", 1)
    values["global_batch_size"] = section.get("global_batch_size") or rows_of_step(defaults | trainer, processes)
    return values


def describe_hardware(manifest: dict[str, Any]) -> str:
    hardware = manifest.get("hardware", {})
    if gpus := hardware.get("gpus"):
        return ", ".join(f"{gpus.count(gpu)} x {gpu}" for gpu in dict.fromkeys(gpus))
    # Rounded, because the memory that a machine reports differs by a few MB from start to start.
    memory = f", {hardware['memory_gib']:.0f} GiB" if "memory_gib" in hardware else ""
    return f"{hardware.get('cores', '?')} CPU cores ({hardware.get('machine', 'unknown')}){memory}"


def identity(source: dict[str, Any]) -> str:
    """Identifies the content of a source. Sources with the same identity have the same content."""
    if "sha256" in source:
        return f"sha256 {source['sha256']}"
    if source["revision"] is not None:
        return f"revision {source['revision']}"
    if "bytes" in source:
        return f"{source['bytes']} bytes of {source['modified']}"
    # Each environment has another folder of an installed package, and of a fetched model.
    return source["reference"] if source["reference"].startswith(PLACES) else source["path"]


def written_trainer_keys(runs: list[TrainedRun]) -> set[str]:
    """Keys under `trainer` in the recipe of any of these runs."""
    return {key for run in runs for key in run.manifest["settings"][run.manifest["stage"]]["trainer"]}


def _flat(values: Any, key: str = "") -> dict[str, Any]:
    """Dotted key -> every leaf of nested mappings and of lists of mappings. An empty mapping has no leaf."""
    if isinstance(values, list) and values and all(isinstance(value, dict) for value in values):
        values = dict(enumerate(values))
    if not isinstance(values, dict):
        return {key: values}
    return {k: v for name, value in values.items() for k, v in _flat(value, f"{key}.{name}".lstrip(".")).items()}


def _kind(key: str) -> str:
    first, _, rest = key.partition(".")
    if first == "reward_funcs" and key.endswith(".timeout"):
        return "machine"
    return KIND_OF.get(rest if first == "trainer" else first, "algorithm")


def _refuses(key: str, kind: str, runs: list[TrainedRun], values: dict[str, Any]) -> bool:
    """Whether a key with these values, by run, makes a comparison invalid."""
    if kind in ("machine", "version"):
        return False
    if key == "episodes" and all(isinstance(value, int) for value in values.values()):
        return max(values.values()) - min(values.values()) > SAME_BUDGET * max(values.values())
    values_of_label, values_of_seed, labels_of_seed = defaultdict(set), defaultdict(set), defaultdict(set)
    for run in runs:
        values_of_label[run.label].add(_as_json(values[run.name]))
        values_of_seed[run.seed].add(_as_json(values[run.name]))
        labels_of_seed[run.seed].add(run.label)
    if key in _model_keys(runs):
        same_in_each_seed = all(len(of_seed) == 1 for of_seed in values_of_seed.values())
        if same_in_each_seed and any(labels == set(values_of_label) for labels in labels_of_seed.values()):
            return False
    return kind != "algorithm" or any(len(of_label) > 1 for of_label in values_of_label.values())


def _model_keys(runs: list[TrainedRun]) -> set[str]:
    """Keys of the models that runs start from: the sources that are neither data nor a user's code."""
    keys = {key.removeprefix(f"{r.manifest['stage']}.") for r in runs for key in r.manifest.get("sources", {})}
    return {key for key in keys if not key.startswith("data.") and not key.endswith(".name")}


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
