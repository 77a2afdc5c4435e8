"""Finds and reads YAML files that the user names: recipes and configurations of accelerate."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_recipes.recipe.schema import RecipeError


def find_file(name: str, files: dict[str, Path], what: str, command: str, option: str = "") -> Path:
    """The file that the user names.

    Args:
        name: A name in `files`, or a path that ends in .yaml or .yml.
        files: Name -> file.
        what: Kind of the files, for messages.
        command: Command of `rlhf-recipes` that lists them.
        option: Stands before the path in the message about a missing file.

    Raises:
        RecipeError: There is no such file.
    """
    if name.endswith((".yaml", ".yml")):
        if Path(name).is_file():
            return Path(name)
        raise RecipeError(f"{option}{name}: no such file.")
    if name in files:
        return files[name]
    near = difflib.get_close_matches(name, files, n=3, cutoff=0.4)
    raise RecipeError(
        f"there is no {what} named {name!r}. "
        + (f"Nearest: {', '.join(near)}. " if near else "")
        + f"`rlhf-recipes {command}` shows all; a path must end in .yaml."
    )


def read_file(path: Path, load: Callable[[str], Any], failure: type[Exception]) -> Any:
    """The content of a YAML file.

    Args:
        path: The file.
        load: Parses the text; recipes and accelerate use different versions of YAML.
        failure: The exception that `load` raises.

    Raises:
        RecipeError: The file cannot be read or parsed.
    """
    try:
        return load(path.read_text(encoding="utf-8"))
    except failure as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{path}{f', line {mark.line + 1}' if mark else ''}: {problem}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}.") from error
