"""Find a recipe, follow `extends:`, apply `key=value` overrides and check every key: YAML in, `Recipe` out."""

import difflib
import io
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from rlhf_recipes.recipe.named_files import find_file, read_file
from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.recipe.trainer_keys import CONFIG_CLASSES, adapter_fields, quantization_fields, trainer_fields

OURS = {
    "output_dir": "runs_dir",
    "seed": "seed",
    "run_name": "name",
    "reward_weights": "reward_funcs[].weight",
    "reward_timeout": "reward_funcs[].timeout",
    "missing_eos": "missing_eos, beside reward_funcs: it is the same for ppo and rloo",
    "baseline": "rloo.baseline",
    "disable_tqdm": "nothing: each stage has its own progress bar",
    "trust_remote_code": "trust_remote_code of the recipe, which lists models by name",
}
"""Keys of TRL that the recipe decides -> what to set instead."""

OURS_OF_PEFT = dict.fromkeys(
    ("task_type", "peft_type", "inference_mode", "auto_mapping", "peft_version"), "nothing: it follows from the stage"
) | dict.fromkeys(("base_model_name_or_path", "revision"), "the stage's model or policy")
"""The same for keys of peft."""

RENAMED = {"eval.judge_funcs": "eval.held_out_funcs"}
"""Old name of a key -> its name."""

FORWARDED = ("trainer", "args", "config", "peft", "quantization")
"""Sections that are handed on as they are: there, null is a value."""


def recipe_folders() -> list[Path]:
    """Where names of recipes are looked up, first match first: `./recipes`, then the recipes that came with us."""
    package = Path(__file__).parents[1]
    shipped = package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"
    return [Path("recipes"), shipped]


def code_file(name: str) -> Path:
    """The Python file that a recipe names, seen from the current folder, or else from `recipe_folders`; it may not exist."""
    places = (folder / Path(name).expanduser() for folder in (Path(), *recipe_folders()))
    return next((path for path in places if path.is_file()), Path(name)).resolve()


def recipe_files() -> dict[str, Path]:
    """Name -> file of every recipe that can be run by name; files named `_*.yaml` exist only to be extended."""
    files = {}
    for folder in reversed(recipe_folders()):
        for path in sorted(folder.rglob("*.yaml")):
            if not path.name.startswith("_"):
                files[path.stem] = path
    return dict(sorted(files.items()))


def load_recipe(name: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read, merge and check one recipe.

    Args:
        name: Name of a recipe, or path of a YAML file.
        overrides: `dotted.key=value` each; values are read by YAML's rules.

    Raises:
        RecipeError: Anything wrong with the recipe: every finding, each with file, dotted key and what to do.
    """
    path = _find(name)
    values = _read_with_parents(path, seen=())
    for override in overrides:
        _apply(values, override)
    values.setdefault("name", path.stem)
    return check(_without_nulls(values), where=str(path))


def check(values: dict, where: str) -> Recipe:
    """Validate merged values; `where` stands in front of every finding."""
    findings = []
    recipe: Recipe
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        findings += [_describe(finding) for finding in error.errors()]
    for stage in CONFIG_CLASSES:
        section = values.get(stage)
        trainer = section.get("trainer") if isinstance(section, dict) else None
        if isinstance(trainer, dict):
            findings += _check_trainer(stage, trainer)
        if isinstance(section, dict):
            findings += _check_adapter(stage, section)
    if findings:
        raise RecipeError("\n".join(f"{where}: {finding}" for finding in findings))
    return recipe


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back to an equal recipe; unset optional keys are left out."""
    buffer = io.StringIO()
    _yaml().dump(recipe.model_dump(exclude_none=True), buffer)
    return buffer.getvalue()


def _yaml() -> YAML:
    # YAML 1.2 (1e-6 is a number, `no` a string); the safe pure loader refuses duplicate keys.
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    return yaml


def _find(name: str) -> Path:
    for folder in recipe_folders():
        if name.startswith("_") and (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    return find_file(name, recipe_files(), "recipe", "list")


def _read(path: Path) -> dict:
    values = read_file(path, _yaml().load, YAMLError)
    if not isinstance(values, dict):
        raise RecipeError(
            f"{path}: a recipe is a mapping of keys to values, but this file holds {type(values).__name__}."
        )
    return _with_code_beside(_unshared(values), path.parent)


def _with_code_beside(values: Any, folder: Path) -> Any:
    """The values of a recipe's file, with `file.py:function` made a whole path where only the recipe's folder has that file.

    A file in `recipe_folders` keeps its short name, which is the same on every machine.
    """
    if isinstance(values, dict):
        return {key: _with_code_beside(value, folder) for key, value in values.items()}
    if isinstance(values, list):
        return [_with_code_beside(item, folder) for item in values]
    file, _, function = values.rpartition(":") if isinstance(values, str) else ("", "", "")
    beside = (folder / file).resolve()
    if file.endswith(".py") and beside.is_file() and code_file(file) != beside:
        return f"{beside}:{function}"
    return values


def _unshared(values: Any) -> Any:
    """A copy in which what YAML's aliases share is there once each: an override changes one place."""
    if isinstance(values, dict):
        return {key: _unshared(value) for key, value in values.items()}
    return [_unshared(item) for item in values] if isinstance(values, list) else values


def _read_with_parents(path: Path, seen: tuple[Path, ...]) -> dict:
    if path.resolve() in seen:
        chain = " -> ".join(p.name for p in (*seen, path))
        raise RecipeError(f"{path}: `extends` runs in a circle: {chain}.")
    values = _read(path)
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise RecipeError(f"{path}: extends: must name one recipe, not {parent!r}.")
    beside = path.parent / (parent if parent.endswith((".yaml", ".yml")) else f"{parent}.yaml")
    try:
        parent_path = beside if beside.is_file() else _find(parent)
    except RecipeError as error:
        raise RecipeError(f"{path}: extends: {error}") from error
    merged = _read_with_parents(parent_path, (*seen, path.resolve()))
    for own in ("name", "about"):  # they are true of one recipe only; the name decides the run folder
        merged.pop(own, None)
    return _merge(merged, values)


def _merge(base: dict, top: dict) -> dict:
    """Mappings merge key by key; scalars and lists of `top` replace those of `base`."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def _without_nulls(values: Any) -> Any:
    """`key: null` takes a parent's key away, so that its default holds."""
    if isinstance(values, dict):
        return {k: v if k in FORWARDED else _without_nulls(v) for k, v in values.items() if v is not None}
    return [_without_nulls(item) for item in values] if isinstance(values, list) else values


def _apply(values: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r}: write it as dotted.key=value, such as ppo.trainer.beta=0.1.")
    try:
        value: Any = _yaml().load(text) if text else None
    except YAMLError as error:
        raise RecipeError(
            f"override {override!r}: the value is no valid YAML: {getattr(error, 'problem', error)}."
        ) from error
    for name in value if isinstance(value, dict) else ():
        if value[name] is None and ":" in str(name):
            raise RecipeError(f"override {override!r}: in {{key: value}}, YAML wants a blank behind the colon.")
    *parents, last = key.split(".")
    section: Any = values
    for depth, parent in enumerate(parents):
        if isinstance(section, list):
            section = section[_index(override, parent, section)]
        else:
            if section.get(parent) is None:
                section[parent] = {}
            section = section[parent]
        if not isinstance(section, (dict, list)):
            raise RecipeError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section.")
    if isinstance(section, list):
        section[_index(override, last, section)] = value
    elif isinstance(value, dict) and isinstance(section.get(last), dict):
        section[last] = _merge(section[last], value)
    else:
        section[last] = value


def _index(override: str, text: str, items: list) -> int:
    if text.isdecimal() and int(text) < len(items):
        return int(text)
    raise RecipeError(f"override {override!r}: {text!r} is no position in a list of {len(items)} (the first is 0).")


def _describe(finding: Mapping[str, Any]) -> str:
    """One of pydantic's findings in our words."""
    key = ".".join(str(part) for part in finding["loc"])
    if key in RENAMED:
        return f"{key}: unknown key; it is called {RENAMED[key]}."
    if finding["type"] == "extra_forbidden":
        return f"{key}: unknown key{_nearest(str(finding['loc'][-1]), _known_keys(finding['loc'][:-1]))}"
    if finding["type"] == "missing":
        return f"{key}: this key is missing."
    message = finding["msg"].removeprefix("Value error, ")
    shown = "" if finding["type"] == "value_error" else f", not {finding['input']!r}"
    return f"{key}: {message[0].lower()}{message[1:]}{shown}." if key else message


def _known_keys(location: tuple) -> list[str]:
    model: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        candidates += [inner for outer in candidates for inner in get_args(outer)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)


def _nearest(key: str, known: Any) -> str:
    near = difflib.get_close_matches(key, list(known), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(near)}." if near else f"; known: {', '.join(sorted(known)[:40])}."


def _check_trainer(stage: str, trainer: dict) -> list[str]:
    if find_spec("trl") is None:
        return [
            f"{stage}.trainer: TRL is not installed (pip install 'trl>=1.16,<1.17'), so its keys cannot be checked."
        ]
    return _check_keys(f"{stage}.trainer", trainer, CONFIG_CLASSES[stage][1], trainer_fields(stage), OURS)


def _check_adapter(stage: str, section: dict) -> list[str]:
    findings = []
    peft, quantization = section.get("peft"), section.get("quantization")
    if isinstance(peft, dict):
        findings += _check_keys(f"{stage}.peft", peft, "LoraConfig", adapter_fields(), OURS_OF_PEFT)
        if section.get("scratch") is not None:
            findings.append(
                f"{stage}.peft: a model from scratch has nothing to adapt; take peft out, or set {stage}.model."
            )
    if isinstance(quantization, dict):
        findings += _check_keys(f"{stage}.quantization", quantization, "BitsAndBytesConfig", quantization_fields(), {})
        bits = [key for key in ("load_in_4bit", "load_in_8bit") if quantization.get(key) is True]
        if len(bits) != 1:
            findings.append(f"{stage}.quantization: set exactly one of load_in_4bit and load_in_8bit to true.")
    return findings


def _check_keys(where: str, values: dict, class_name: str, fields: dict[str, Any], ours: dict[str, str]) -> list[str]:
    """Findings about settings that are handed on to a library's class."""
    findings = []
    for key, value in values.items():
        if key in ours:
            findings.append(f"{where}.{key}: not set here; set {ours[key]}.")
        elif key not in fields:
            findings.append(f"{where}.{key}: unknown key of {class_name}{_nearest(str(key), fields)}")
        else:
            try:
                TypeAdapter(fields[key], config=ConfigDict(strict=True)).validate_python(value)
            except ValidationError as error:
                expected = " or ".join(sorted({found["msg"].split("Input should be ")[-1] for found in error.errors()}))
                findings.append(f"{where}.{key}: should be {expected}, not {value!r}.")
    return findings
