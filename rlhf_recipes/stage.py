"""Runs one stage as a process: arguments, signals, exit codes, and the error message of whatever goes wrong."""

import argparse
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_recipes.launch.checks import check_launch
from rlhf_recipes.launch.setup import launched, prepare
from rlhf_recipes.launch.start import INTERRUPTED, PARENT, STOPPED, USER_ERROR, end_with_parent
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.rewards.registry import check_functions
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.runs.inputs import check_packages, check_references, go_offline, hub_references, sources
from rlhf_recipes.system.errors import explain
from rlhf_recipes.system.files import DISK_ERRNOS, checkpoints, step_of, write_error
from rlhf_recipes.system.terminal import complain, hush_libraries, log_to, say

LOST = (
    "another process of this run has ended: with its own error, shown above, or because the system killed it (out of "
    "memory). The same command resumes from the last checkpoint."
)
"""Message of a process that cannot continue without the others."""


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
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as ppo.trainer.beta=0.1")
    given = parser.parse_intermixed_args()
    code = run_stage(stage, main, given.recipe, given.overrides, given.overwrite)
    if code in (0, STOPPED) and _has_joined():
        from accelerate import PartialState

        PartialState().destroy_process_group()  # otherwise its threads abort the interpreter's exit
    sys.exit(code)


def run_stage(stage: str, main: Callable[[Run], str], name: str, overrides: list[str], overwrite: bool) -> int:
    """Runs one stage of a recipe in this process; returns its exit code."""
    is_main = os.environ.get("RANK", "0") == "0"
    run = log = None
    given: dict[str, Any] = {}
    try:
        signal.signal(signal.SIGTERM, _leave)
        _end_with_launcher()
        logging.raiseExceptions = False  # report a full disk once, not for every line of log.txt
        recipe = load_checked(name, overrides)
        if stage != "compare" and getattr(recipe, stage) is None:
            raise RecipeError(f"recipe {recipe.name} has no stage {stage}; it has: {', '.join(recipe.stages())}.")
        given = getattr(getattr(recipe, stage, None), "trainer", {})
        if hub_references(recipe, stage):
            go_offline()  # before the first import of a Hugging Face library, perhaps in the next line
        check_launch(given)
        _join(given)
        run = Run(recipe, stage, is_main)
        if _of_main(lambda: run.is_done(overwrite)):
            if is_main:
                say(f"{stage:<8} finished before, nothing to do   {run.path}")
            return 0
        prepare()
        check_packages(recipe, stage)
        check_references(recipe, stage)
        log = run.path / "log.txt" if is_main else None
        log_to(log if log and log.is_file() else None)  # `run.start` may warn about an earlier attempt
        run.checkpoint = _of_main(lambda: run.start(launched()))
        log_to(log)
        hush_libraries()
        _of_main(lambda: run.record_sources(sources(recipe, stage)))
        if is_main and run.checkpoint is not None:
            say(f"{stage:<8} resumes from {_progress(run.checkpoint)}   {run.path}")
        line = main(run)
        run.finish()
        if is_main:
            say(f"{stage:<8} {run.seconds:5.0f} s   {line}   {run.path}")
        return 0
    except RecipeError as error:
        _fail(run, error)
        logging.getLogger(__name__).info("stopped by: %s", traceback.format_exc())
        if not is_main:
            _wait_for_failing_rank()
        complain(str(error))
        return USER_ERROR
    except KeyboardInterrupt as error:
        _fail(run, error)
        complain("interrupted.")
        return INTERRUPTED
    except SystemExit as leaving:
        if leaving.code not in (STOPPED, USER_ERROR):  # a library exits
            _fail(run, leaving)
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a cluster sends it more than once
        if leaving.code == STOPPED and is_main and run is not None:
            run.stop()
            say(f"{stage:<8} stopped, {_how_to_resume(run)}   {run.path}")
        return leaving.code
    except BaseException as error:  # noqa: BLE001 - every error becomes a message
        lost = _is_distributed() and _is_lost_connection(error)
        message = LOST if lost else _explained(error, stage, given, run)
        _fail(run, RecipeError(message))
        logging.getLogger(__name__).info("died of: %s", traceback.format_exc())
        if lost or not is_main:
            _wait_for_failing_rank(is_ended_by_launcher=not is_main)
        if log is not None and log.is_file():
            message += "" if lost else f" (traceback in {log})"
        elif not lost:
            traceback.print_exc()
        complain(message)
        return USER_ERROR


def _explained(error: BaseException, stage: str, given: dict[str, Any], run: Run | None) -> str:
    """The message for an error of a library, or a bug; the caller adds the file of the traceback."""
    if run is not None and isinstance(error, OSError) and error.errno in DISK_ERRNOS:
        what = "a file" if error.filename else "a file of a library (perhaps a temporary one)"
        return write_error(what, Path(error.filename or run.path), error)
    return explain(error, stage, given)


def _how_to_resume(run: Run) -> str:
    if saved := checkpoints(run.path):
        return f"the same command resumes from step {step_of(saved[-1])}"
    if run.stage == "eval":  # it has no checkpoints, but keeps the results of every measured model
        return "the same command resumes with the model that was being measured"
    return "it has no checkpoint yet"


def _leave(number, frame) -> None:
    raise SystemExit(STOPPED)


def _fail(run: Run | None, error: BaseException) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher sends it to all ranks when one ends
    if run is not None:
        run.fail(error)


def _end_with_launcher() -> None:
    """Sends this process a SIGTERM when `accelerate launch`, `run` or `sweep` dies (Linux).

    A killed launcher does not stop its stage. `accelerate launch` does not even pass on a SIGTERM to a single process.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ or os.environ.get(PARENT) == str(os.getppid()):
        end_with_parent()


def _wait_for_failing_rank(is_ended_by_launcher: bool = True) -> None:
    """Waits for the process that has the error, so that only this process reports it.

    Args:
        is_ended_by_launcher: True: the launcher ends this process when the other one ends. False: this process reports
            that the other one has ended, because the system may have killed it.
    """
    if is_ended_by_launcher:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(10 if is_ended_by_launcher else 3)  # an interpreter with torch takes seconds to end


def _is_lost_connection(error: BaseException) -> bool:
    """Whether a collective operation failed because another process has ended."""
    from torch.distributed import DistError

    lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout", "gloo/transport")
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in lost)
    )


def _join(given: dict[str, Any]) -> None:
    """Connects to the other processes of this launch, on the device that the stage trains on."""
    if _is_distributed():
        prepare()
        import torch
        from accelerate import PartialState

        PartialState(cpu=bool(given.get("use_cpu")) or not torch.accelerator.is_available())


def _has_joined() -> bool:
    """Whether `_join` has run. It imports nothing: a stop during the import of torch leaves a broken module."""
    state = sys.modules.get("accelerate.state")
    return bool(getattr(getattr(state, "PartialState", None), "_shared_state", None))


def _progress(checkpoint: Path) -> str:
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return f"step {state['global_step']} of {state['max_steps']}"


def _is_distributed() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _of_main(question: Callable[[], Any]) -> Any:
    """The main process's answer, on every rank: other processes must not read a folder while it changes.

    If the answer is an error, the main process raises it, and the others exit without a message.
    """
    if not _is_distributed():
        return question()
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    answer = error = None
    if PartialState().is_main_process:
        try:
            answer = question()
        except RecipeError as caught:
            error = caught
    answer, failed = broadcast_object_list([answer, error is not None])
    if error is not None:
        raise error
    if failed:
        raise SystemExit(USER_ERROR)
    return answer


def load_checked(name: str, overrides: list[str]) -> Recipe:
    """A recipe with checked keys and reward functions.

    Raises:
        RecipeError: Every finding, one per line.
    """
    recipe = load_recipe(name, overrides)
    findings = check_functions(recipe)
    if findings:
        raise RecipeError("\n".join(f"{recipe.name}: {finding}" for finding in findings))
    return recipe
