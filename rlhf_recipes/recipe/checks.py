"""Checks the values of a recipe: its own keys, and the keys that it passes on to a library.

Every check returns its findings, so that the user sees all of them at once.
"""

import difflib
from collections.abc import Collection, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from rlhf_recipes.recipe.ranges import out_of_range
from rlhf_recipes.recipe.schema import ON_POLICY, Recipe, RecipeError
from rlhf_recipes.recipe.secrets import learn
from rlhf_recipes.recipe.trainer_keys import (
    CONFIG_CLASSES,
    adapter_fields,
    quantization_fields,
    successor,
    trainer_fields,
)

OURS = {
    "output_dir": "runs_dir",
    "seed": "seed",
    "run_name": "name",
    "reward_weights": "reward_funcs[].weight",
    "reward_timeout": "reward_funcs[].timeout",
    "chat_template_kwargs": "chat_template_kwargs, beside data: all stages and eval then have the same prompts",
    "missing_eos": "missing_eos, beside reward_funcs: it is the same for ppo and rloo",
    "baseline": "rloo.baseline",
    "resume_from_checkpoint": "nothing: the same command goes on from the last checkpoint",
    "disable_tqdm": "nothing: each stage has its own progress bar",
    "trust_remote_code": "trust_remote_code of the recipe, which lists models by name",
}
"""Keys of TRL that the recipe decides -> the key to set instead."""

OURS_OF_PEFT = dict.fromkeys(
    ("task_type", "peft_type", "inference_mode", "auto_mapping", "peft_version"), "nothing: it follows from the stage"
) | dict.fromkeys(("base_model_name_or_path", "revision"), "the stage's model or policy")
"""Keys of peft that the recipe decides -> the key to set instead."""

RENAMED = {"eval.judge_funcs": "eval.held_out_funcs"}
"""Old name of a key -> its new name."""

MOST_SHOWN = 40
"""Keys that a message lists at most."""


def check_recipe(values: dict, where: str) -> Recipe:
    """The recipe that merged values make.

    Args:
        values: Keys and values of a recipe.
        where: Stands before every finding.

    Raises:
        RecipeError: Every finding, one per line.
    """
    learn(values)
    findings = []
    recipe: Recipe
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        findings += [_describe(finding) for finding in error.errors()]
    for stage, (_, class_name) in CONFIG_CLASSES.items():
        section = values.get(stage)
        if isinstance(section, dict):
            if isinstance(trainer := section.get("trainer"), dict):
                known = trainer_fields(stage)
                old = {key: new for key in trainer if key not in known and (new := successor(stage, str(key)))}
                findings += check_keys(trainer, class_name, known, f"{stage}.trainer.", OURS | old)
                findings += _check_evaluation(stage, trainer)
                findings += [f"{stage}.trainer.{finding}" for finding in out_of_range(trainer)]
            findings += _check_adapter(stage, section)
    if findings:
        raise RecipeError("\n".join(f"{where}: {finding}" for finding in findings))
    return recipe


def check_keys(
    values: dict, library: str, fields: Mapping[str, Any], prefix: str = "", ours: Mapping[str, str] | None = None
) -> list[str]:
    """Findings about keys that are passed on to a library.

    Args:
        values: Keys and values as the user wrote them.
        library: The library's class or file, for messages.
        fields: Key -> type of every key that the library has.
        prefix: Stands before each key in messages, such as `ppo.trainer.`.
        ours: Keys that the recipe decides -> the key to set instead.
    """
    findings = []
    for key, value in values.items():
        if ours and key in ours:
            findings.append(f"{prefix}{key}: not set here; set {ours[key]}.")
        elif key not in fields:
            findings.append(f"{prefix}{key}: unknown key of {library}{_nearest(str(key), fields)}")
        else:
            try:
                TypeAdapter(fields[key], config=ConfigDict(strict=True)).validate_python(value)
            except ValidationError as error:
                expected = " or ".join(sorted({found["msg"].split("Input should be ")[-1] for found in error.errors()}))
                findings.append(f"{prefix}{key}: should be {expected}, not {value!r}.")
    return findings


def refuse_unknown(where: str, given: Collection[str], known: Collection[str], library: str) -> None:
    """Refuses keys that a library's class or function does not have, such as a typing error that it would ignore.

    Args:
        where: The section, such as `sft.scratch.config`.
        given: The user's keys.
        known: Those of the library.
        library: Its class or function, for the message.

    Raises:
        RecipeError: With the nearest known keys.
    """
    if wrong := [key for key in given if key not in known]:
        raise RecipeError(f"{where}.{wrong[0]}: unknown key of {library}{_nearest(wrong[0], known)}")


def _check_evaluation(stage: str, trainer: dict) -> list[str]:
    """Findings about settings of a training that evaluates, which follow from other keys in ppo and rloo."""
    asked = {"eval_strategy": ("no", False), "eval_on_start": (False,), "load_best_model_at_end": (False,)}
    found = [key for key, off in asked.items() if stage in ON_POLICY and trainer.get(key, off[0]) not in off]
    found += ["save_strategy"] if stage in ON_POLICY and trainer.get("save_strategy") == "best" else []
    return [
        f"{stage}.trainer.{key}: leave it out; {stage} evaluates while it trains only for {stage}.keep_best and "
        f"{stage}.stop_when. Stage eval measures the models."
        for key in found
    ]


def _check_adapter(stage: str, section: dict) -> list[str]:
    findings = []
    peft, quantization = section.get("peft"), section.get("quantization")
    if isinstance(peft, dict):
        findings += check_keys(peft, "LoraConfig", adapter_fields(), f"{stage}.peft.", OURS_OF_PEFT)
        if section.get("scratch") is not None:
            findings.append(
                f"{stage}.peft: a model from scratch has nothing to adapt; take peft out, or set {stage}.model."
            )
    if isinstance(quantization, dict):
        findings += check_keys(quantization, "BitsAndBytesConfig", quantization_fields(), f"{stage}.quantization.")
        if sum(quantization.get(key) is True for key in ("load_in_4bit", "load_in_8bit")) != 1:
            findings.append(f"{stage}.quantization: set exactly one of load_in_4bit and load_in_8bit to true.")
    return findings


def _describe(finding: Mapping[str, Any]) -> str:
    """One of pydantic's findings as a sentence that begins with the key."""
    key = ".".join(str(part) for part in finding["loc"])
    if key in RENAMED:
        return f"{key}: unknown key; it is called {RENAMED[key]}."
    if finding["type"] == "extra_forbidden":
        section, last = str(finding["loc"][0]), str(finding["loc"][-1])
        if section in CONFIG_CLASSES and len(finding["loc"]) == 2 and (new := successor(section, last)):
            return f"{key}: not set here; set {new}."
        return f"{key}: unknown key{_nearest(str(finding['loc'][-1]), _known_keys(finding['loc'][:-1]))}"
    if finding["type"] == "missing":
        return f"{key}: this key is missing."
    message = finding["msg"].removeprefix("Value error, ")
    shown = "" if finding["type"] == "value_error" else f", not {finding['input']!r}"
    return f"{key}: {message[0].lower()}{message[1:]}{shown}." if key else message


def _known_keys(location: tuple) -> list[str]:
    """Keys of the section at a location in the recipe."""
    model: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        candidates += [inner for outer in candidates for inner in get_args(outer)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)


def _nearest(key: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=3, cutoff=0.5)
    if near:
        return f"; nearest: {', '.join(near)}."
    return f"; known: {', '.join(sorted(known))}." if len(known) <= MOST_SHOWN else "."
