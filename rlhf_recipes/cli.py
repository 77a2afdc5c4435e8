"""The command line, `rlhf-recipes`. Nothing here imports torch before a stage has to run."""

import os
import sys
from importlib import metadata
from typing import Annotated

import typer

from rlhf_recipes.commands import experiments, recipes, stages, tools
from rlhf_recipes.launch.start import USER_ERROR
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.system.errors import explain
from rlhf_recipes.system.terminal import complain, say

app = typer.Typer(
    help="PPO or RLOO, on your task? Recipes for RLHF on Hugging Face TRL.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for commands in (recipes, stages, experiments, tools):
    app.add_typer(commands.app)


def _print_version(asked: bool) -> None:
    if asked:
        say(metadata.version("rlhf-recipes"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: an error becomes one message and exit code 2."""
    try:
        app()
    except (RecipeError, OSError) as error:  # such as a path that is longer than the system allows
        complain(str(error))
        sys.exit(USER_ERROR)
    except Exception as error:
        if "RLHF_RECIPES_TRACEBACK" in os.environ:
            raise
        complain(f"{explain(error, 'rlhf-recipes', {})} (set RLHF_RECIPES_TRACEBACK=1 to see where)")
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
