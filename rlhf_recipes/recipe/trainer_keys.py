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
