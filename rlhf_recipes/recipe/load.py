"""Reads a recipe: finds its file, follows `extends:`, applies `key=value` overrides and checks every key."""

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from rlhf_recipes.recipe.checks import check_recipe
from rlhf_recipes.recipe.named_files import find_file, read_file
from rlhf_recipes.recipe.schema import Recipe, RecipeError

FORWARDED = ("trainer", "args", "config", "peft", "quantization")
"""Sections that are passed on to a library unchanged; in them, null is a value."""


def recipe_folders() -> list[Path]:
    """Folders of recipes, first match first: `./recipes`, then the shipped recipes."""
    package = Path(__file__).parents[1]
    shipped = package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"
    return [Path("recipes"), shipped]


def code_file(name: str) -> Path:
    """The Python file that a recipe names, in the current folder or in `recipe_folders`; it may not exist."""
    places = (folder / Path(name).expanduser() for folder in (Path(), *recipe_folders()))
    return next((path for path in places if path.is_file()), Path(name)).resolve()


def recipe_files() -> dict[str, Path]:
    """Name -> file of every recipe that can run by name; a file `_*.yaml` is only a parent of others."""
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
        overrides: `dotted.key=value` each; the values are YAML.

    Raises:
        RecipeError: Every finding about the recipe, with file, dotted key and correction.
    """
    path = _find(name)
    values = _read_with_parents(path, seen=())
    for override in overrides:
        _apply(values, override)
    values.setdefault("name", path.stem)
    return check_recipe(_without_nulls(values), where=str(path))


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, from which `load_recipe` makes an equal recipe; unset optional keys are left out."""
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
            f"{path}: a recipe is a mapping of keys to values, but this file contains {type(values).__name__}."
        )
    return _with_code_beside(_unshared(values), path.parent)


def _with_code_beside(values: Any, folder: Path) -> Any:
    """The values of a recipe's file, in which `file.py:function` is a full path if only the recipe's folder has the file.

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
    """A copy without the shared parts of YAML's aliases, so that an override changes one place."""
    if isinstance(values, dict):
        return {key: _unshared(value) for key, value in values.items()}
    return [_unshared(item) for item in values] if isinstance(values, list) else values


def _read_with_parents(path: Path, seen: tuple[Path, ...]) -> dict:
    if path.resolve() in seen:
        chain = " -> ".join(p.name for p in (*seen, path))
        raise RecipeError(f"{path}: `extends` forms a circle: {chain}.")
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
    for own in ("name", "about"):  # they describe one recipe only
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
    """The values without `key: null`, which replaces a parent's value by the default."""
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
            raise RecipeError(f"override {override!r}: in {{key: value}}, YAML needs a blank behind the colon.")
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
