"""Finds settings that differ between runs, and differences that make a comparison of algorithms invalid.

Compared is what was in effect: defaults are filled in, models and data are known by what they contain (the id of the run
that made a model, the commit of the Hub, the checksum of a file), not by the path under which a run found them.
"""

import json
from collections import defaultdict
from typing import Any

from rlhf_recipes.comparison.runs import TrainedRun
from rlhf_recipes.recipe.batch import rows_of_step
from rlhf_recipes.recipe.trainer_keys import trainer_defaults, trainer_fields

REFUSING = ("model", "data", "reward", "budget", "objective")
"""Kinds of differences that are none of the algorithm's."""

TRAINER_KINDS = {
    "data": ("shuffle_dataset", "data_seed", "train_sampling_strategy"),
    "reward": ("reward_clip_range",),
    "budget": (
        "max_completion_length",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "generation_kwargs",
    )
    + ("allow_truncated_sampling", "chat_template_kwargs", "mask_truncated_completions")
    + ("vllm_structured_outputs_regex",),
    "objective": ("beta", "kl_estimator", "kl_target", "kl_horizon", "normalize_scores", "disable_dropout")
    + ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    "machine": ("gradient_checkpointing", "activation_checkpointing", "bf16", "fp16", "tf32", "use_cpu", "use_vllm")
    + ("use_liger_kernel", "torch_compile", "sampling_batch_size", "deepspeed", "fsdp", "torch_empty_cache_steps"),
}
"""Kind -> keys of `trainer`; all others belong to the algorithm."""

NO_MATTER = ("logging_", "save_", "log_", "report_to", "hub_", "push_to_hub", "run_name", "output_dir", "disable_tqdm")
NO_MATTER += ("eval_", "dataloader_", "trackio_", "project", "ddp_", "vllm_", "per_device_eval_", "reward_timeout")
"""Beginnings of keys of `trainer` that change nothing of what is learned, but for those of `TRAINER_KINDS`."""

DURATION = ("max_steps", "num_train_epochs")
"""Keys of `trainer` that are compared by the episodes they led to."""

SAME_BUDGET = 0.02
"""Share by which episodes may differ, because both algorithms train for whole rollouts."""

NOT_THERE = None
"""Value of a key that a run does not have."""


def find_differences(runs: list[TrainedRun]) -> list[dict[str, Any]]:
    """Every key in which runs differ: `key`, `kind`, whether it `refuses` a comparison, and its `values` by run.

    Settings of an algorithm may differ from algorithm to algorithm, but not from seed to seed. What a run was built on
    (its SFT model, its reward model) may differ from seed to seed, if it is the same for all algorithms of each seed.

    Args:
        runs: Runs of this project; a plain Trainer's run has no settings to compare.
    """
    runs = [run for run in runs if run.manifest is not None]
    if len(runs) < 2:
        return []
    keys = written(runs)
    found = {run.name: effective_settings(run.manifest, keys) for run in runs}
    differences = []
    for key in sorted({key for settings in found.values() for key in settings}):
        values = {run.name: found[run.name].get(key, (NOT_THERE, NOT_THERE)) for run in runs}
        if len({_hashable(value) for value, _ in values.values()}) == 1:
            continue
        kind = _kind(key)
        differences.append(
            {
                "key": key,
                "kind": kind,
                "refuses": _refuses(key, kind, runs, {name: value for name, (value, _) in values.items()}),
                "values": {name: shown for name, (_, shown) in values.items()},
            }
        )
    return sorted(differences, key=lambda difference: not difference["refuses"])


def effective_settings(manifest: dict[str, Any], written: set[str] = frozenset()) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (what is compared, what is shown) of everything that may have had an influence on a run.

    Args:
        manifest: Of a run of ppo or rloo.
        written: Keys of `trainer` to fill in with their defaults.
    """
    stage, settings = manifest["stage"], manifest["settings"]
    section = settings[stage]
    trainer, fields, defaults = section["trainer"], trainer_fields(stage), trainer_defaults(stage)
    plain = _flat({key: value for key, value in settings.items() if key not in (stage, "seed", "trust_remote_code")})
    plain |= _flat({key: value for key, value in section.items() if key not in ("trainer", "peft", "quantization")})
    # As wholes: {} is LoRA with its defaults, and not the same as none.
    plain |= {key: section[key] for key in ("peft", "quantization") if section.get(key) is not None}
    plain |= {
        f"trainer.{key}": trainer.get(key, defaults.get(key))
        for key in written
        if key in fields
        and key not in DURATION
        and not (key.startswith(NO_MATTER) and _kind(f"trainer.{key}") == "algorithm")
    }
    episodes = manifest.get("results", {}).get("episodes")
    plain["episodes"] = episodes if episodes is not None else settings.get("episodes")
    processes = manifest.get("setup", {}).get("num_processes", 1)
    plain["global_batch_size"] = section.get("global_batch_size") or rows_of_step(defaults | trainer, processes)
    plain = {key: value for key, value in plain.items() if value is not None}
    found = {key: (value, value) for key, value in plain.items()}
    for key, source in manifest.get("sources", {}).items():
        key = key.removeprefix(f"{stage}.")
        found[key] = (identity(source), _shown(source))
        if source["revision"] is not None:
            found.pop(key.removesuffix("path") + "revision", None)  # a branch, of which this is the commit
    found |= {f"setup.{key}": (value, value) for key, value in manifest.get("setup", {}).items() if value is not None}
    hardware = describe_hardware(manifest)
    found["hardware"] = (hardware, hardware)
    versions = manifest.get("versions", {}) | {"git_commit": manifest.get("git_commit")}
    found |= {f"versions.{key}": (value, value) for key, value in versions.items() if value is not None}
    return found


def describe_hardware(manifest: dict[str, Any]) -> str:
    hardware = manifest.get("hardware", {})
    if gpus := hardware.get("gpus"):
        return ", ".join(f"{gpus.count(gpu)} x {gpu}" for gpu in dict.fromkeys(gpus))
    # What is left of the memory differs by a few MB from start to start of the same machine.
    memory = f", {hardware['memory_gib']:.0f} GiB" if "memory_gib" in hardware else ""
    return f"{hardware.get('cores', '?')} CPU cores ({hardware.get('machine', 'unknown')}){memory}"


def identity(source: dict[str, Any]) -> str:
    """Identity of a source's content, as far as it is known: sources with the same identity are equal."""
    if "sha256" in source:
        return f"sha256 {source['sha256']}"
    if source["revision"] is not None:
        return f"revision {source['revision']}"
    if "bytes" in source:
        return f"{source['bytes']} bytes of {source['modified']}"
    # The folder of an installed package is another one in each environment.
    return source["reference"] if source["reference"].startswith("package:") else source["path"]


def _shown(source: dict[str, Any]) -> str:
    known = source.get("sha256") or source["revision"]
    return source["reference"] + (f" ({known[:8]})" if known else "")


def written(runs: list[TrainedRun]) -> set[str]:
    """Keys that stand under `trainer` in the recipe of any of these runs."""
    return {key for run in runs for key in run.manifest["settings"][run.manifest["stage"]]["trainer"]}


def _flat(values: Any, key: str = "") -> dict[str, Any]:
    """Dotted key -> every leaf of nested mappings and of lists of mappings; empty ones have none."""
    if isinstance(values, list) and values and all(isinstance(value, dict) for value in values):
        values = dict(enumerate(values))
    if not isinstance(values, dict):
        return {key: values}
    return {k: v for name, value in values.items() for k, v in _flat(value, f"{key}.{name}".lstrip(".")).items()}


def _kind(key: str) -> str:
    first, _, rest = key.partition(".")
    if first == "trainer":
        return next((kind for kind, keys in TRAINER_KINDS.items() if rest in keys), "algorithm")
    if first in ("reward_funcs", "missing_eos"):
        return "machine" if key.endswith(".timeout") else "reward"
    kinds = {"data": "data", "special_tokens": "model", "policy": "model", "peft": "model", "quantization": "model"}
    kinds |= {"episodes": "budget", "setup": "machine", "hardware": "machine", "versions": "version"}
    return kinds.get(first, "algorithm")


def _refuses(key: str, kind: str, runs: list[TrainedRun], values: dict[str, Any]) -> bool:
    if kind in ("machine", "version"):
        return False
    if key == "episodes" and all(isinstance(value, int) for value in values.values()):
        return max(values.values()) - min(values.values()) > SAME_BUDGET * max(values.values())
    by_label, by_seed, of_seed = defaultdict(set), defaultdict(set), defaultdict(set)
    for run in runs:
        by_label[run.label].add(_hashable(values[run.name]))
        by_seed[run.seed].add(_hashable(values[run.name]))
        of_seed[run.seed].add(run.label)
    if key in _models(runs):
        made_for_each_seed = all(len(of_one) == 1 for of_one in by_seed.values())
        if made_for_each_seed and any(labels == set(by_label) for labels in of_seed.values()):
            return False
    if kind == "algorithm":
        return any(len(of_one) > 1 for of_one in by_label.values())
    return True


def _models(runs: list[TrainedRun]) -> set[str]:
    """Keys of the models that runs were built on: sources that are neither data nor code of the user's own."""
    keys = {key.removeprefix(f"{r.manifest['stage']}.") for r in runs for key in r.manifest.get("sources", {})}
    return {key for key in keys if not key.startswith("data.") and not key.endswith(".name")}


def _hashable(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
