"""Which keys `trainer:` may hold, and of which types, read off the source of TRL's configuration classes.

Reading instead of importing keeps `validate` and `show` fast: importing TRL takes seconds, because it loads torch.
"""

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any, Literal

CONFIG_CLASSES = {
    "sft": ("trl/trainer/sft_config.py", "SFTConfig"),
    "reward": ("trl/trainer/reward_config.py", "RewardConfig"),
    "rloo": ("rlhf_recipes/rloo_trainer.py", "RLOOConfig"),
    "ppo": ("rlhf_recipes/ppo_trainer.py", "PPOConfig"),
}
"""Stage -> the configuration class behind its `trainer:`, as (file, class)."""

_PARENTS = {
    "OnPolicyConfig": "rlhf_recipes/on_policy_config.py",
    "RLOOConfig": "trl/trainer/rloo_config.py",
    "_BaseConfig": "trl/trainer/base_config.py",
    "TrainingArguments": "transformers/training_args.py",
}


class _ListOfAnything:
    """`tuple[...]` in an annotation: YAML has lists only."""

    def __class_getitem__(cls, item: Any) -> Any:
        return list[Any]


@cache
def trainer_fields(stage: str) -> dict[str, Any]:
    """Keys that the `trainer:` of a stage may hold, with their types (`Any` where the source names a library's own).

    Raises:
        KeyError: `stage` has no trainer.
    """
    return _fields(*CONFIG_CLASSES[stage])


def _fields(file: str, class_name: str) -> dict[str, Any]:
    package, rest = file.split("/", 1)
    # For a top-level name, find_spec locates the package without running it.
    folder = Path(importlib.util.find_spec(package).submodule_search_locations[0])
    tree = ast.parse((folder / rest).read_text(encoding="utf-8"))
    definition = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    fields = {}
    for base in definition.bases:
        parent = ast.unparse(base).rpartition(".")[2]
        fields |= _fields(_PARENTS[parent], parent)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and not ast.unparse(node.annotation).startswith("ClassVar"):
            fields[node.target.id] = _type(ast.unparse(node.annotation))
    return fields


def _type(annotation: str) -> Any:
    known = {"Any": Any, "Literal": Literal, "tuple": _ListOfAnything}
    try:
        return eval(annotation, {}, known)  # builtins and the names above; anything else is a library's own type
    except NameError:
        return Any
