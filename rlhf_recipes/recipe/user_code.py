"""Finds the user's functions that a recipe names: `module:function`, or `path/to/file.py:function`.

A path starts from the folder of the recipe, or from the current folder.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_recipes.recipe.load import code_file
from rlhf_recipes.recipe.schema import RecipeError


def find_function(name: str, what: str) -> Callable:
    """The function behind `module:function` or `path/to/file.py:function`.

    Args:
        name: `module:function` or `path/to/file.py:function`.
        what: Purpose of the function, for messages: "reward function".

    Raises:
        RecipeError: The module cannot be imported, or has no such function.
    """
    module_name, _, attribute = name.rpartition(":")
    with running_user_code(f"{what} {name!r}: {module_name or 'the module'} cannot be imported"):
        is_file = module_name.endswith(".py")
        module = _module_from_file(module_name, what) if is_file else importlib.import_module(module_name)
    function = getattr(module, attribute, None)
    if not callable(function):
        there = [
            n for n, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        raise RecipeError(
            f"{what} {name!r}: no function {attribute!r} in {module_name}; it has: {', '.join(there) or 'none'}."
        )
    return function


@contextmanager
def running_user_code(failure: str) -> Iterator[None]:
    """Turn any exception of the user's code into a `RecipeError` that begins with `failure`."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise RecipeError(f"{failure}: {type(error).__name__}: {error}") from error


def _module_from_file(file: str, what: str):
    path = code_file(file)
    if not path.is_file():
        raise RecipeError(f"{what}: {file} does not exist (looked from {Path.cwd()}).")
    name = f"rlhf_recipes_user_{path.stem}"
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
