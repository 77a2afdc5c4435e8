"""Finds and reads YAML files that the user names: recipes and configurations of accelerate."""

import difflib
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_recipes.recipe.schema import RecipeError

LARGEST, MOST_PARTS, DEEPEST = 100_000, 20_000, 50
"""Most characters, values and levels of a YAML file: a stranger's file must not take a minute or all memory."""

_announced: set[str] = set()


def announce(line: str) -> None:
    """Tell the user on stderr about a file that is used; once in a process, and only in the main one."""
    if line not in _announced and os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
    _announced.add(line)


def announce_hiding(found: Path, shipped: Path) -> None:
    """Say it if a file of the user's is taken in place of a shipped one of the same name."""
    hidden = next(shipped.rglob(found.name), found)
    if hidden.resolve() != found.resolve():
        announce(f"{found.resolve()} is used in place of the {found.name} that comes with rlhf_recipes")


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
        if os.path.isfile(name):
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


def read_file(path: Path, loader: Callable[[str], Any]) -> Any:
    """The content of a YAML file.

    Args:
        path: The file.
        loader: See `parse`.

    Raises:
        RecipeError: The file cannot be read or parsed.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST + 1).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: cannot be read: it is not UTF-8 ({error}); save it as UTF-8.") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error}.") from error
    return parse(text, str(path), loader)


def parse(text: str, where: str, loader: Callable[[str], Any]) -> Any:
    """The value of a YAML text. Parts that aliases share stay shared.

    Args:
        text: The text.
        where: Its place, for messages.
        loader: Makes PyYAML's or ruamel's loader of a text; recipes and accelerate use different versions of YAML.

    Raises:
        RecipeError: The text cannot be parsed, is nested too deep, or its aliases multiply it.
    """
    if len(text) > LARGEST:
        raise RecipeError(f"{where}: it has more than {LARGEST:,} characters; many values belong into data.")
    open_brackets = itertools.accumulate((c in "[{") - (c in "]}") for c in text)
    try:
        if max(open_brackets, default=0) > DEEPEST:  # the parsers take seconds for them
            raise RecursionError
        loading = loader(text)
        node = getattr(loading, "composer", loading).get_single_node()
        _check_size(node, where, {}, 0)
        return None if node is None else loading.construct_document(node)
    except RecipeError:
        raise
    except RecursionError:
        raise RecipeError(f"{where}: it is nested deeper than {DEEPEST} levels, or an alias contains itself.") from None
    except Exception as error:  # besides errors of YAML, any constructor's of a value, such as of the date 2026-99-99
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{where}{f', line {mark.line + 1}' if mark else ''}: {problem}.") from error


def _check_size(node: Any, where: str, sizes: dict[int, int], depth: int) -> int:
    """The number of a node's parts, with the parts of aliases at every place; each is counted once, so that it is fast."""
    if depth > DEEPEST:
        raise RecursionError
    if id(node) not in sizes:
        parts = node.value if isinstance(getattr(node, "value", None), list) else []
        each = [part for pair in parts for part in (pair if isinstance(pair, tuple) else [pair])]
        sizes[id(node)] = 1 + sum(_check_size(part, where, sizes, depth + 1) for part in each)
    if sizes[id(node)] > MOST_PARTS:
        raise RecipeError(f"{where}: with its aliases it has more than {MOST_PARTS:,} values.")
    return sizes[id(node)]
