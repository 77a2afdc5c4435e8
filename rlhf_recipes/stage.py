"""Runs one stage as a process: arguments, signals, exit codes, and the error message of whatever goes wrong."""

import argparse
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_recipes.launch.checks import check_launch
from rlhf_recipes.launch.ranks import (
    LOST,
    has_joined,
    is_distributed,
    is_lost_connection,
    join,
    of_main,
    wait_for_failing_rank,
)
from rlhf_recipes.launch.setup import launched, prepare
from rlhf_recipes.launch.start import INTERRUPTED, PARENT, STOP_CODES, USER_ERROR, end_with_parent, on_stop
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.recipe.secrets import redacted
from rlhf_recipes.recipe.trust import refuse_uploads
from rlhf_recipes.rewards.registry import check_functions
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.runs.inputs import check_packages, check_references, go_offline, hub_references, sources
from rlhf_recipes.system.errors import explain
from rlhf_recipes.system.files import checkpoints, is_disk_error, read_json, step_of, write_error
from rlhf_recipes.system.terminal import complain, hush_libraries, log_to, say


def stage_command(stage: str, main: Callable[[Run], str]) -> None:
    """Runs `python -m rlhf_recipes.<stage> --recipe NAME [key=value ...]`, and exits.

    Args:
        stage: One of `STAGES`.
        main: Does the work in a started run, and returns the results in one line.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m rlhf_recipes.{stage}", description=f"Run stage {stage} of a recipe."
    )
    parser.add_argument("--recipe", required=True, help="name of a recipe (rlhf-recipes list), or path of a YAML file")
    parser.add_argument("--overwrite", action="store_true", help="replace a run with other settings; it is moved aside")
    parser.add_argument("--push", action="store_true", help="upload to the Hub as the recipe says")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as ppo.trainer.beta=0.1")
    given = parser.parse_intermixed_args()
    code = run_stage(stage, main, given.recipe, given.overrides, given.overwrite, given.push, is_own_process=True)
    if code in (0, *STOP_CODES) and has_joined():
        from accelerate import PartialState

        PartialState().destroy_process_group()  # otherwise its threads abort the interpreter's exit
    sys.exit(code)


def run_stage(
    stage: str,
    main: Callable[[Run], str],
    name: str,
    overrides: list[str],
    overwrite: bool,
    push: bool = False,
    is_own_process: bool = False,
) -> int:
    """Runs one stage of a recipe in this process; returns its exit code. Arguments as those of its command.

    `is_own_process`: this process ends with the stage, so that its temporary files can go with it.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    run = log = None
    given: dict[str, Any] = {}
    try:
        _on_request(_leave)
        _end_with_launcher()
        logging.raiseExceptions = False  # report a full disk once, not for every line of log.txt
        recipe = load_checked(name, overrides)
        if stage != "compare" and getattr(recipe, stage) is None:
            raise RecipeError(f"recipe {recipe.name} has no stage {stage}; it has: {', '.join(recipe.stages())}.")
        sys.argv = redacted(sys.argv)  # W&B sends it
        refuse_uploads(recipe, [stage], push)
        given = getattr(getattr(recipe, stage, None), "trainer", {})
        if hub_references(recipe, stage):
            go_offline()  # before the first import of a Hugging Face library, perhaps in the next line
        check_launch(given)
        join(given)
        run = Run(recipe, stage, is_main)
        of_main(run.lock.take)
        if is_own_process:
            of_main(run.temporary.sweep)
            run.temporary.use()
        if of_main(lambda: run.is_done(overwrite)):
            if is_main:
                say(f"{stage:<8} finished before, nothing to do   {run.path}")
            return 0
        prepare()
        check_packages(recipe, stage)
        check_references(recipe, stage)
        log = run.path / "log.txt" if is_main else None
        log_to(log if log and log.is_file() else None)  # `run.start` may warn about an earlier attempt
        run.checkpoint = of_main(lambda: run.start(launched()))
        log_to(log)
        hush_libraries()
        of_main(lambda: run.record_sources(sources(recipe, stage)))
        if is_main and run.checkpoint is not None:
            say(f"{stage:<8} resumes from {_progress(run.checkpoint)}   {run.path}")
        line = main(run)
        run.finish()
        if is_main:
            say(f"{stage:<8} {run.seconds:5.0f} s   {line}   {run.path}")
            for finding in run.findings:
                say(f"note: {stage}: {finding}")
        return 0
    except RecipeError as error:
        _fail(run, error)
        logging.getLogger(__name__).info("stopped by: %s", traceback.format_exc())
        if not is_main:
            wait_for_failing_rank()
        complain(str(error))
        return USER_ERROR
    except (KeyboardInterrupt, SystemExit) as leaving:
        code = leaving.code if isinstance(leaving, SystemExit) else INTERRUPTED
        if code not in (USER_ERROR, *STOP_CODES):  # a library exits
            _fail(run, leaving)
            raise
        _on_request(signal.SIG_IGN)  # a cluster asks more than once
        if code != USER_ERROR and is_main and run is not None:
            run.stop()
            say(f"{stage:<8} stopped, {_how_to_resume(run)}   {run.path}")
        return code
    except BaseException as error:  # noqa: BLE001 - every error becomes a message
        lost = is_distributed() and is_lost_connection(error)
        message = LOST if lost else _explained(error, stage, given, run)
        _fail(run, RecipeError(message))
        logging.getLogger(__name__).info("died of: %s", traceback.format_exc())
        if lost or not is_main:
            wait_for_failing_rank(is_ended_by_launcher=not is_main)
        if log is not None and log.is_file():
            message += "" if lost else f" (traceback in {log})"
        elif not lost and not is_disk_error(error):
            print(redacted(traceback.format_exc()), file=sys.stderr)
        complain(message)
        return USER_ERROR
    finally:
        if run is not None:
            run.temporary.leave()
            run.lock.release()


def _explained(error: BaseException, stage: str, given: dict[str, Any], run: Run | None) -> str:
    """The message for an error of a library, or a bug; the caller adds the file of the traceback."""
    if run is not None and is_disk_error(error):
        file = getattr(error, "filename", None)
        what = "a file" if file else "a file of a library (perhaps a temporary one)"
        return write_error(what, Path(file or run.path), error)
    return explain(error, stage, given)


def _how_to_resume(run: Run) -> str:
    if saved := checkpoints(run.path):
        return f"the same command resumes from step {step_of(saved[-1])}"
    if run.stage == "eval":  # it has no checkpoints, but keeps the results of every measured model
        return "the same command resumes with the model that was being measured"
    return "it has no checkpoint yet"


def _leave(number, frame) -> None:
    raise SystemExit(128 + number)


def _on_request(handler: Any) -> None:
    """Handle the `STOP_SIGNALS` that are not ignored; Ctrl-C stays a KeyboardInterrupt."""
    interrupt = signal.getsignal(signal.SIGINT)
    on_stop(handler)
    signal.signal(signal.SIGINT, interrupt)


def _fail(run: Run | None, error: BaseException) -> None:
    _on_request(signal.SIG_IGN)  # a launcher asks all ranks when one ends
    if run is not None:
        run.fail(error)


def _end_with_launcher() -> None:
    """Sends this process a SIGTERM when `accelerate launch`, `run` or `sweep` dies (Linux).

    A killed launcher does not stop its stage. `accelerate launch` does not even pass on a SIGTERM to a single process.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ or os.environ.get(PARENT) == str(os.getppid()):
        end_with_parent()


def _progress(checkpoint: Path) -> str:
    state = read_json(checkpoint / "trainer_state.json")
    return f"step {state['global_step']} of {state['max_steps']}"


def load_checked(name: str, overrides: list[str]) -> Recipe:
    """A recipe with checked keys and reward functions.

    Raises:
        RecipeError: Every finding, one per line.
    """
    recipe = load_recipe(name, overrides)
    if findings := check_functions(recipe):
        raise RecipeError("\n".join(f"{recipe.name}: {finding}" for finding in findings))
    return recipe
