"""Reads a recipe: finds its file, follows `extends:`, applies `key=value` overrides and checks every key."""

import io
import json
import os
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from rlhf_recipes.recipe.checks import check_recipe
from rlhf_recipes.recipe.named_files import DEEPEST, announce_hiding, find_file, parse, read_file
from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.recipe.secrets import HANDED_ON, redacted

FORWARDED = ("trainer", "args", "config", "peft", "quantization")
"""Sections that are passed on to a library unchanged; in them, null is a value."""


DATA_FILES = (".jsonl", ".json", ".csv", ".parquet")
"""File name endings of data."""

RECIPE_FOLDERS = "RLHF_RECIPES_FOLDERS"
"""Environment variable with the folders of the recipes that the user named, for the processes of a sweep: code beside a
recipe may run (`user_code`)."""


def named_folders() -> list[str]:
    """The folders in `RECIPE_FOLDERS`."""
    return [folder for folder in os.environ.get(RECIPE_FOLDERS, "").split(os.pathsep) if folder]


def shipped_recipes() -> Path:
    package = Path(__file__).parents[1]
    return package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"


def recipe_folders() -> list[Path]:
    """Folders of recipes, first match first: `./recipes`, then the shipped recipes."""
    return [Path("recipes"), shipped_recipes()]


def named_file(name: str) -> Path:
    """The file of code or data that a recipe names, in the current folder or in `recipe_folders`; it may not exist."""
    places = (folder / os.path.expanduser(name) for folder in (Path(), *recipe_folders()))
    found = Path(os.path.abspath(next((path for path in places if os.path.isfile(path)), Path(name))))
    if os.path.isfile(found) and not os.path.isabs(name):
        announce_hiding(found, shipped_recipes())
    return found


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
    os.environ[RECIPE_FOLDERS] = os.pathsep.join(dict.fromkeys([*named_folders(), str(path.parent.resolve())]))
    values = _read_with_parents(path, seen=())
    handed_on = json.loads(os.environ.get(HANDED_ON, "{}"))
    for override in (*overrides, *(f"{key}={json.dumps(value)}" for key, value in handed_on.items())):
        _apply(values, override)
    values.setdefault("name", path.stem)
    return check_recipe(_without_nulls(values), where=str(path))


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, from which `load_recipe` makes an equal recipe; unset optional keys and secrets are left out."""
    buffer = io.StringIO()
    _yaml().dump(redacted(recipe.model_dump(exclude_none=True)), buffer)
    return buffer.getvalue()


def _yaml() -> YAML:
    # YAML 1.2 (1e-6 is a number, `no` a string); the safe pure loader refuses duplicate keys.
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    return yaml


def _loader(text: str) -> Any:
    return _yaml().get_constructor_parser(text)[0]


def _find(name: str) -> Path:
    parents = [folder / f"{name}.yaml" for folder in recipe_folders() if name.startswith("_")]
    found = next((path for path in parents if os.path.isfile(path)), None)
    found = found or find_file(name, recipe_files(), "recipe", "list")
    if not name.endswith((".yaml", ".yml")):
        announce_hiding(found, shipped_recipes())
    return found


def _read(path: Path) -> dict:
    values = read_file(path, _loader)
    if not isinstance(values, dict):
        raise RecipeError(
            f"{path}: a recipe is a mapping of keys to values, but this file contains {type(values).__name__}."
        )
    return _with_files_beside(_unshared(values, str(path)), path.parent)


def _with_files_beside(values: Any, folder: Path) -> Any:
    """The values of a recipe's file, in which data and `file.py:function` are full paths if only its folder has the file.

    A file in `recipe_folders` keeps its short name, which is the same on every machine.
    """
    if isinstance(values, dict):
        return {key: _with_files_beside(value, folder) for key, value in values.items()}
    if isinstance(values, list):
        return [_with_files_beside(item, folder) for item in values]
    if not isinstance(values, str):
        return values
    file, colon, function = (values, "", "") if values.endswith(DATA_FILES) else values.rpartition(":")
    beside = Path(os.path.abspath(folder / file))
    if file.endswith((".py", *DATA_FILES)) and os.path.isfile(beside) and named_file(file) != beside:
        return f"{beside}{colon}{function}"
    return values


def _unshared(values: Any, where: str) -> Any:
    """A copy without the shared parts of YAML's aliases, so that an override changes one place.

    Raises:
        RecipeError: A value is no text, number, list or mapping.
    """
    if isinstance(values, dict):
        return {key: _unshared(value, f"{where}: {key}") for key, value in values.items()}
    if isinstance(values, list):
        return [_unshared(item, where) for item in values]
    if not isinstance(values, (str, int, float, type(None))):
        raise RecipeError(f"{where}: YAML reads {values!r} as a {type(values).__name__}; write it in quotes.")
    return values


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
        parent_path = beside if os.path.isfile(beside) else _find(parent)
    except RecipeError as error:
        raise RecipeError(f"{path}: extends: {error}") from error
    announce_hiding(parent_path, shipped_recipes())
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
    value = _unshared(parse(text, f"override {key}: the value is no valid YAML", _loader), key)
    for name in value if isinstance(value, dict) else ():
        if value[name] is None and ":" in str(name):
            raise RecipeError(f"override {override!r}: in {{key: value}}, YAML needs a blank behind the colon.")
    *parents, last = key.split(".", DEEPEST)
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
