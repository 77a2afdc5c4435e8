"""YAML files that are found by name or path, recipes and configurations of accelerate: one way to look, one to complain."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_recipes.recipe.schema import RecipeError


def find_file(name: str, files: dict[str, Path], what: str, command: str, option: str = "") -> Path:
    """The file that a name or a path ending in .yaml stands for.

    Args:
        name: As the user gave it.
        files: Name -> file of all that have a name.
        what: They are, for messages.
        command: Of ours, that lists them.
        option: In front of a path that is not there.

    Raises:
        RecipeError: There is none.
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
    """What a file holds.

    Args:
        path: The file.
        load: Reads YAML; recipes and accelerate do so by different rules.
        failure: What `load` raises.

    Raises:
        RecipeError: It cannot be read, or is no YAML.
    """
    try:
        return load(path.read_text(encoding="utf-8"))
    except failure as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{path}{f', line {mark.line + 1}' if mark else ''}: {problem}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}.") from error
