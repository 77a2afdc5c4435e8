"""The table of overridden methods in `rlhf_recipes/trainers/__init__.py` is the code's own list."""

import ast
import inspect
import re
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import get_args

import trl

from rlhf_recipes import PPOTrainer, RLOOTrainer, trainers
from rlhf_recipes.recipe.schema import Recipe
from rlhf_recipes.recipe.sections import Section
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


ELSEWHERE = {
    "ds3_gather_for_generation": "under ZeRO-3 the parent samples",
    "fp16": "the dtype of TRL's autocast; accelerate's own has it",
    "pad_to_multiple_of": "the parent pads the rollout; sampling needs no such padding",
    "chat_template_kwargs": "data/tokenizer.py applies the template of prompts; a reward model has a template of its own",
}
"""Setting of TRL that one of its replaced methods reads and ours does not -> why it still has its effect."""


def attributes(source: str) -> set[str]:
    return {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}


def calls_parent(method) -> bool:
    return "super(" in inspect.getsource(method)


def test_a_setting_that_a_replaced_method_of_trl_reads_is_read_by_ours_too():
    settings = {field.name for field in fields(trl.RLOOConfig)}
    ours = set()
    for path in Path(trainers.__file__).parent.glob("*.py"):
        ours |= attributes(path.read_text(encoding="utf-8"))
    replaced = 0
    for of in (checkpoints.Resumable, OnPolicyTrainer, PPOTrainer, RLOOTrainer):
        for name, method in vars(of).items():
            theirs = getattr(trl.RLOOTrainer, name, None)
            if name.startswith("__") or not inspect.isfunction(theirs) or not inspect.isfunction(method):
                continue
            replaced += not calls_parent(method)
            # A method that calls its parent in some cases must read in the others what the parent reads.
            read = attributes(textwrap.dedent(inspect.getsource(theirs))) & settings
            if not calls_parent(method) or name == "_generate_single_turn":
                assert read - ours - ELSEWHERE.keys() == set(), name
    assert replaced >= 5


def test_every_key_of_a_recipe_is_read_outside_the_schema():
    """A key that nothing reads would be ignored in silence."""
    package = Path(trainers.__file__).parents[1]
    read = set()
    for path in package.rglob("*.py"):
        if path.parent.name != "recipe" or path.name in ("batch.py", "graph.py"):
            text = path.read_text(encoding="utf-8")
            read |= attributes(text) | set(re.findall(r'"(\w+)"', text))
    sections = [Recipe]
    for section in sections:
        for name, field in section.model_fields.items():
            assert name in read, f"{section.__name__}.{name}"
            for kind in (field.annotation, *get_args(field.annotation)):
                if isinstance(kind, type) and issubclass(kind, Section) and kind not in sections:
                    sections.append(kind)
    assert len(sections) >= 10
