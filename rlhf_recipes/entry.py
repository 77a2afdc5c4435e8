"""What happens around every stage, whether started by the CLI or as `python -m rlhf_recipes.<stage>`."""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable

from rlhf_recipes.config import Recipe, RecipeError
from rlhf_recipes.hub import check_references
from rlhf_recipes.recipe import load_recipe
from rlhf_recipes.reward_funcs import check_reward_funcs
from rlhf_recipes.run import Run
from rlhf_recipes.terminal import complain, hush_libraries, log_to, say

USER_ERROR = 2
"""Exit code for everything that the user can mend."""


def stage_command(stage: str, main: Callable[[Run], str]) -> None:
    """Command line of one stage: `python -m rlhf_recipes.<stage> --recipe NAME [key=value ...]`; exits.

    Args:
        stage: One of `STAGES`.
        main: Does the work in a started run, and returns what the finished stage has to say, in one line.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m rlhf_recipes.{stage}", description=f"Run stage {stage} of a recipe."
    )
    parser.add_argument("--recipe", required=True, help="name of a recipe (rlhf-recipes list), or path of a YAML file")
    parser.add_argument("--overwrite", action="store_true", help="replace a run with other settings; it is moved aside")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as ppo.trainer.beta=0.1")
    given = parser.parse_intermixed_args()
    code = run_stage(stage, main, given.recipe, given.overrides, given.overwrite)
    if code == 0 and _is_distributed():
        from accelerate import PartialState

        PartialState().destroy_process_group()  # or its threads abort the interpreter's exit
    sys.exit(code)


def run_stage(stage: str, main: Callable[[Run], str], name: str, overrides: list[str], overwrite: bool) -> int:
    """Run one stage of a recipe in this process; returns its exit code."""
    is_main = os.environ.get("RANK", "0") == "0"
    run = None
    try:
        recipe = load_checked(name, overrides)
        if stage != "compare" and getattr(recipe, stage) is None:
            raise RecipeError(f"recipe {recipe.name} has no stage {stage}; it has: {', '.join(recipe.stages())}.")
        run = Run(recipe, stage, is_main)
        if _of_main(run.is_done(overwrite) if is_main else None):
            if is_main:
                say(f"{stage:<8} finished before, nothing to do   {run.path}")
            return 0
        check_references(recipe, stage)
        run.start()
        log_to(run.path / "log.txt" if is_main else None)
        hush_libraries()
        line = main(run)
        run.finish()
        if is_main:
            say(f"{stage:<8} {run.seconds:5.0f} s   {line}   {run.path}")
        return 0
    except RecipeError as error:
        if run is not None:
            run.fail(error)
        logging.getLogger(__name__).info("stopped by: %s", traceback.format_exc())
        complain(str(error))
        return USER_ERROR
    except KeyboardInterrupt as error:
        if run is not None:
            run.fail(error)
        complain("interrupted.")
        return 130
    except BaseException as error:
        if run is not None:
            run.fail(error)
        logging.getLogger(__name__).info("died of: %s", traceback.format_exc())
        raise


def _is_distributed() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _of_main(answer: bool | None) -> bool:
    """The main process's answer, on every rank: the others must not look into a folder that it is changing."""
    if not _is_distributed():
        return answer
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=not torch.accelerator.is_available())
    return broadcast_object_list([answer])[0]


def load_checked(name: str, overrides: list[str]) -> Recipe:
    """A recipe whose keys and reward functions have been checked.

    Raises:
        RecipeError: Every finding, one a line.
    """
    recipe = load_recipe(name, overrides)
    findings = check_reward_funcs(recipe)
    if findings:
        raise RecipeError("\n".join(f"{recipe.name}: {finding}" for finding in findings))
    return recipe
