"""Finds the user's functions that a recipe names: `module:function`, or `path/to/file.py:function`.

A path starts from the folder of the recipe, or from the current folder. Files are found and parsed without running them, and
a file runs only if the user trusts it (`docs/security.md`): a recipe alone must not run code.
"""

import ast
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, Literal

from rlhf_recipes.recipe.load import named_file, shipped_recipes
from rlhf_recipes.recipe.named_files import announce
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.recipe.trust import how_to_trust, is_trusted, may_run, own_folders


def find_function(name: str, what: str, is_announced: bool = False) -> Callable:
    """The function behind `module:function` or `path/to/file.py:function`; its module runs if it has not run yet.

    Args:
        name: `module:function` or `path/to/file.py:function`.
        what: Purpose of the function, for messages: "reward function".
        is_announced: True in a process whose parent has said that this code runs.

    Raises:
        RecipeError: The module is not trusted, cannot be imported, or has no such function.
    """
    module_name, _, attribute = name.rpartition(":")
    path = _located(name, what)
    _signature_in(path, name, what)
    if path is None or not path.resolve().is_relative_to(shipped_recipes().resolve()):
        if not is_announced:
            announce(f"your code runs: {path or module_name} ({what} {name})")
        sys.path += [folder for folder in own_folders() if folder not in sys.path]  # for what it imports itself
    with running_user_code(f"{what} {name!r}: {module_name} cannot be imported"):
        is_file = module_name.endswith(".py")
        module = _module_from_file(path) if path and is_file else importlib.import_module(module_name)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise RecipeError(f"{what} {name!r}: {module_name} has no function {attribute!r}.")
    return function


def signature_of(name: str, what: str) -> inspect.Signature | None:
    """The signature of a user's function, read from the source; nothing runs. None: the source does not tell it.

    Raises:
        RecipeError: As `find_function`, as far as the source shows.
    """
    return _signature_in(_located(name, what), name, what)


def _signature_in(path: Path | None, name: str, what: str) -> inspect.Signature | None:
    """`signature_of` a function whose file is known."""
    module_name, _, attribute = name.rpartition(":")
    if path is None or path.suffix != ".py":
        return None
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        raise RecipeError(f"{what} {name!r}: {path} cannot be imported: {type(error).__name__}: {error}") from error
    defined = dict(_defined(tree))
    if attribute in defined:
        return _signature(defined[attribute])
    if is_trusted(module_name):  # it may make its functions while it runs, or import them
        return None
    functions = [n for n, node in defined.items() if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    raise RecipeError(
        f"{what} {name!r}: no function {attribute!r} in {module_name}; it has: {', '.join(functions) or 'none'}. (One "
        "that it imports is named by the file that defines it.)"
    )


@contextmanager
def running_user_code(failure: str) -> Iterator[None]:
    """Turn any exception of the user's code into a `RecipeError` that begins with `failure`.

    Also SystemExit, which would end the run as if it had succeeded; a signal that ends this process passes.
    """
    try:
        yield
    except RecipeError:
        raise
    except BaseException as error:  # the user's code may raise anything
        if ends_process(error):
            raise
        raise RecipeError(f"{failure}: {type(error).__name__}: {error}") from error


def ends_process(error: BaseException) -> bool:
    """Whether an exception is Ctrl-C, or the exit of a process that has got another signal."""
    is_exit = isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128
    return is_exit or isinstance(error, (KeyboardInterrupt, GeneratorExit))


def _located(name: str, what: str) -> Path | None:
    """The file with the function; None if a trusted module has no file.

    Raises:
        RecipeError: There is no such file, or the user does not trust it.
    """
    module_name = name.rpartition(":")[0]
    is_file = module_name.endswith(".py")
    if is_file:
        path: Path | None = named_file(module_name)
        if path is None or not os.path.isfile(path):
            raise RecipeError(f"{what}: {module_name} does not exist (looked from {Path.cwd()}).")
    else:
        spec = _module_spec(module_name)
        if spec is None:
            raise RecipeError(f"{what} {name!r}: {module_name or 'it'} cannot be imported: there is no such module.")
        path = Path(os.path.abspath(spec.origin)) if spec.has_location and spec.origin else None
    if (path is None or not may_run(path)) and (is_file or not is_trusted(module_name)):
        entry = path if is_file else module_name.partition(".")[0]
        raise RecipeError(f"{what} {name!r}: this is {path or 'a part of Python'}, and {how_to_trust(entry)}")
    return path


def _module_spec(module_name: str) -> ModuleSpec | None:
    """The place from which an import would load a module. Nothing runs, while `find_spec("a.b")` would run `a`."""
    top, *inner = module_name.split(".")
    if not all(part.isidentifier() for part in (top, *inner)):
        return None
    spec = None
    with suppress(ValueError):  # __main__ has no place
        spec = importlib.util.find_spec(top)
    spec = spec or PathFinder.find_spec(top, own_folders())  # last, as in `find_function`
    for part in inner:
        folders = spec and spec.submodule_search_locations
        spec = PathFinder.find_spec(part, list(folders)) if folders else None
    return spec


def _module_from_file(path: Path) -> Any:
    name = f"rlhf_recipes_user_{path.stem}"
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _defined(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Name and definition of everything that a module defines itself; imported names are not among them."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, node
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                yield name, node
            case ast.If() | ast.Try() | ast.With() | ast.ExceptHandler():
                yield from _defined(node)


def _signature(node: ast.AST) -> inspect.Signature | None:
    """The named parameters of a plain function; None for anything else, whose parameters only running it tells."""
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or node.decorator_list:
        return None
    given, kinds = node.args, inspect.Parameter
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    required = len(named) - len(given.kwonlyargs) - len(given.defaults)
    defaults = [*[None] * required, *given.defaults, *given.kw_defaults]
    listed = [
        kinds(each.arg, kinds.KEYWORD_ONLY, default=default or kinds.empty, annotation=_choices(each.annotation))
        for each, default in zip(named, defaults, strict=True)
    ]
    listed += [kinds(given.kwarg.arg, kinds.VAR_KEYWORD)] if given.kwarg else []
    return inspect.Signature(listed)


def _choices(annotation: ast.expr | None) -> Any:
    """The annotation of a parameter if it is a `Literal` of constants; otherwise none."""
    match annotation:
        case ast.Subscript(value=ast.Name(id="Literal") | ast.Attribute(attr="Literal"), slice=inside):
            with suppress(ValueError):
                return Literal.__getitem__(ast.literal_eval(inside))
    return inspect.Parameter.empty
