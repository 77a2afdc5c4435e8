"""The table of overridden methods in `rlhf_recipes/trainers/__init__.py` is the code's own list."""

import ast
import re
from pathlib import Path

import trl

from rlhf_recipes import PPOTrainer, RLOOTrainer, trainers
from rlhf_recipes.runs import checkpoints
from rlhf_recipes.trainers.on_policy import OnPolicyTrainer


def overridden() -> set[tuple[str, str]]:
    inherited = {name for parent in trl.RLOOTrainer.__mro__[:-1] for name in vars(parent)}
    return {
        (name, of.__name__)
        for of in (checkpoints.Resumable, OnPolicyTrainer, PPOTrainer, RLOOTrainer)
        for name, value in vars(of).items()
        if name in inherited and callable(value)
    }


def patched() -> set[tuple[str, str]]:
    """Private attributes that our trainers assign on objects which are not their own."""
    found = set()
    for path in [*Path(trainers.__file__).parent.glob("*.py"), Path(checkpoints.__file__)]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for target in node.targets if isinstance(node, ast.Assign) else ():
                private = isinstance(target, ast.Attribute) and target.attr.startswith("_")
                if private and not ast.unparse(target.value).startswith("self"):
                    found.add((target.attr, "patch"))
    return found


def test_every_override_and_patch_is_in_the_table_with_a_reason():
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.+) \|$", trainers.__doc__, re.MULTILINE)
    listed = [(name, where) for name, where, reason in rows if reason.strip()]
    assert len(listed) == len(set(listed))
    assert set(listed) == overridden() | patched()
