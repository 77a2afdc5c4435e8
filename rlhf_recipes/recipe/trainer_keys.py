"""The keys of `trainer:`, `peft:` and `quantization:`, with types, read from the source of the libraries.

This keeps `validate` and `show` fast: importing TRL takes seconds, because it loads torch.
"""

import ast
import importlib.util
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal, Optional, Union

from rlhf_recipes.recipe.schema import TRAINED

CONFIG_CLASSES = {stage: section.config_class for stage, section in TRAINED.items()}
"""Stage -> the configuration class behind its `trainer:`, as (file, class)."""

_OF_QUANTIZATION = {
    "llm_int8_skip_modules": list[str] | None,
    "bnb_4bit_compute_dtype": Literal["float32", "bfloat16", "float16", None],
    "bnb_4bit_quant_type": Literal["fp4", "nf4"],
    "bnb_4bit_quant_storage": Literal["float32", "bfloat16", "float16", "float64", "int8", "uint8", None],
}
"""Types of the arguments of `BitsAndBytesConfig` whose default does not show the type."""

_SUCCESSORS = {
    "STAGE.trainer.beta": "init_kl_coef kl_coef kl_loss_coef",
    "STAGE.trainer.kl_target": "target adap_kl_ctrl kl_ctrl",
    "STAGE.trainer.kl_horizon": "horizon",
    "STAGE.trainer.kl_estimator": "kl_penalty kl_loss_type",
    "STAGE.trainer.lr_kl_target": "target_kl early_stopping",
    "STAGE.trainer.epsilon": "cliprange clip_range clip_ratio eps_clip",
    "STAGE.trainer.cliprange_value": "value_clip vf_clip cliprange_vf",
    "STAGE.trainer.lam": "lambd gae_lambda",
    "STAGE.trainer.ent_coef": "entropy_coef entropy_coeff entropy_loss_coef",
    "STAGE.trainer.vf_coef": "value_loss_coef critic_loss_coef",
    "STAGE.trainer.value_warmup_steps": "freezing_actor_steps critic_warmup",
    "STAGE.trainer.normalize_scores": "use_score_scaling use_score_norm scale_reward normalize_reward ref_mean ref_std",
    "STAGE.trainer.normalize_advantages": "normalize_advantage",
    "STAGE.trainer.reward_clip_range": "score_clip cliprange_reward",
    "STAGE.trainer.num_iterations": "ppo_epochs num_ppo_epochs max_epochs",
    "STAGE.trainer.num_generations": "rloo_k n_samples_per_prompt",
    "STAGE.trainer.steps_per_generation": "num_mini_batches",
    "STAGE.trainer.generation_batch_size": "rollout_batch_size num_rollouts",
    "STAGE.trainer.sampling_batch_size": "local_rollout_forward_batch_size micro_rollout_batch_size chunk_size",
    "STAGE.trainer.per_device_train_batch_size": "batch_size mini_batch_size micro_train_batch_size",
    "STAGE.global_batch_size": "train_batch_size",
    "STAGE.trainer.max_completion_length": "response_length max_new_tokens generate_max_len",
    "STAGE.trainer.generation_kwargs": "gen_kwargs gen_experience_kwargs",
    "STAGE.trainer.learning_rate": "lr actor_learning_rate critic_learning_rate",
    "STAGE.trainer.num_train_epochs": "epochs num_epochs",
    "STAGE.trainer.max_length": "max_seq_length max_seq_len seq_length",
    "STAGE.trainer.max_steps": "total_steps",
    "STAGE.trainer.save_steps": "checkpoint_interval",
    "STAGE.trainer.report_to": "log_with tracker",
    "STAGE.trainer.adam_beta1 and adam_beta2": "adam_betas",
    "STAGE.trainer.weight_decay": "l2",
    "STAGE.policy": "model_name model_path model_name_or_path sft_model_path pretrain",
    "STAGE.value_model": "value_model value_model_path critic_pretrain num_value_layers_unfrozen",
    "STAGE.peft": "peft_config use_peft lora_rank lora_alpha lora_r",
    "reward_funcs": "reward_model reward_model_path reward_pretrain remote_rm_url",
    "missing_eos": "missing_eos_penalty non_eos_penalty",
    "episodes": "total_episodes num_episodes",
    "special_tokens": "stop_token stop_token_id",
    "data.path": "query_dataset dataset_name prompt_data",
    "data.max_prompt_tokens": "prompt_max_len max_prompt_length",
    "name": "exp_name",
}
"""Today's key -> names of the same setting in older PPO and RLOO trainers of TRL, in trlX, OpenRLHF and verl."""

_PARENTS = {
    "OnPolicyConfig": "rlhf_recipes/trainers/config.py",
    "RLOOConfig": "trl/trainer/rloo_config.py",
    "_BaseConfig": "trl/trainer/base_config.py",
    "TrainingArguments": "transformers/training_args.py",
    "PeftConfig": "peft/config.py",
    "PeftConfigMixin": "peft/config.py",
    "PushToHubMixin": None,
    "BaseConfig": "accelerate/commands/config/config_args.py",
}


class _ListOfAnything:
    """Stands for `tuple[...]` in an annotation, because YAML has only lists."""

    def __class_getitem__(cls, item: Any) -> Any:
        return list[Any]


@cache
def trainer_fields(stage: str) -> dict[str, Any]:
    """Keys of a stage's `trainer:`, with their types (`Any` for a library's own type).

    Raises:
        KeyError: `stage` has no trainer.
    """
    return _fields(*CONFIG_CLASSES[stage])


@cache
def trainer_defaults(stage: str) -> dict[str, Any]:
    """Keys of a stage's `trainer:` -> their defaults; only defaults that are plain values in the source.

    Raises:
        KeyError: `stage` has no trainer.
    """
    defaults = {}
    for name, node in _declarations(*CONFIG_CLASSES[stage]).items():
        value: Any = node.value
        if isinstance(value, ast.Call):
            value = next((keyword.value for keyword in value.keywords if keyword.arg == "default"), None)
        with suppress(ValueError):  # a computed default
            defaults[name] = ast.literal_eval(value)
    return defaults


@cache
def adapter_fields() -> dict[str, Any]:
    """Keys of `peft:`, with their types: those of `LoraConfig`."""
    return _fields("peft/tuners/lora/config.py", "LoraConfig")


@cache
def quantization_fields() -> dict[str, Any]:
    """Keys of `quantization:`, with their types: the arguments of `BitsAndBytesConfig`."""
    definition = _class("transformers/utils/quantization_config.py", "BitsAndBytesConfig")
    init = next(node for node in definition.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    names = [argument.arg for argument in init.args.args[1:]]
    defaults = [ast.literal_eval(default) for default in init.args.defaults]
    return {
        name: _OF_QUANTIZATION.get(name, Any if default is None else type(default))
        for name, default in zip(names, defaults, strict=True)
    }


@cache
def launch_fields() -> dict[str, Any]:
    """Keys of a configuration of accelerate, with their types."""
    return _fields("accelerate/commands/config/config_args.py", "ClusterConfig")


@cache
def launch_options() -> set[str]:
    """Options of `accelerate launch` without the dashes; they are the keys of a configuration's sections."""
    calls = [node for node in ast.walk(_source("accelerate/commands/launch.py")) if isinstance(node, ast.Call)]
    texts = [call.args[0].value for call in calls if call.args and isinstance(call.args[0], ast.Constant)]
    return {text.removeprefix("--") for text in texts if isinstance(text, str) and text.startswith("--")}


def successor(stage: str, key: str) -> str | None:
    """Today's key for a setting that another library, or an older TRL, has under this name; None: it is no such name."""
    new = next((new for new, old in _SUCCESSORS.items() if key in old.split()), "")
    place, _, name = new.rpartition(".")
    section = TRAINED[stage].model_fields
    known = {"STAGE.trainer": trainer_fields(stage), "STAGE": section}.get(place, [name] if "policy" in section else [])
    return new.replace("STAGE", stage) if name.partition(" ")[0] in known else None


def _source(file: str) -> ast.Module:
    package, rest = file.split("/", 1)
    # For a top-level name, find_spec locates the package without running it.
    spec: Any = importlib.util.find_spec(package)
    folder = Path(spec.submodule_search_locations[0])
    return ast.parse((folder / rest).read_text(encoding="utf-8"))


def _class(file: str, name: str) -> ast.ClassDef:
    return next(node for node in _source(file).body if isinstance(node, ast.ClassDef) and node.name == name)


@cache
def _declarations(file: str, class_name: str) -> dict[str, ast.AnnAssign]:
    """Name -> declaration of every field of a dataclass, with the fields of its parents."""
    definition = _class(file, class_name)
    found: dict[str, ast.AnnAssign] = {}
    for base in definition.bases:
        parent = ast.unparse(base).rpartition(".")[2]
        if source := _PARENTS[parent]:
            found |= _declarations(source, parent)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and not ast.unparse(node.annotation).startswith("ClassVar"):
            found[ast.unparse(node.target)] = node
    return found


def _fields(file: str, class_name: str) -> dict[str, Any]:
    return {name: _type(ast.unparse(node.annotation)) for name, node in _declarations(file, class_name).items()}


def _type(annotation: str) -> Any:
    known = {"Any": Any, "Literal": Literal, "Optional": Optional, "Union": Union, "tuple": _ListOfAnything}
    try:
        return eval(annotation, {}, known)  # builtins and the names above; anything else is a library's own type
    except NameError:
        return Any
