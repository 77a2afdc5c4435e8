"""Starts a stage as one process or as several, and passes signals to it."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_recipes.recipe.schema import TRAINED
from rlhf_recipes.system.terminal import complain, say

USER_ERROR = 2
"""Exit code of a stage that ended with an error, the user's or a library's."""

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGHUP", "SIGINT", "SIGTERM") if hasattr(signal, name)]
"""A closed terminal, Ctrl-C and `kill` ask a stage to stop. The same command resumes it."""

STOPPED, INTERRUPTED = 128 + signal.SIGTERM, 128 + signal.SIGINT

STOP_CODES = [128 + number for number in STOP_SIGNALS]
"""Exit codes of a stage that was asked to stop."""

MODULES = {"eval": "evaluate"}
"""Stage -> its module, if the names differ."""

COMMAND = "RLHF_RECIPES_LAUNCH"
"""Environment variable with the launcher's arguments; a stage compares them with its launch."""

PARENT = "RLHF_RECIPES_PARENT"
"""Environment variable with the id of the process that waits for a stage."""


def launch_stage(
    stage: str, name: str, overrides: list[str], overwrite: bool, config: Path | None = None, push: bool = False
) -> int:
    """Run one stage of a recipe to its end.

    Passes `STOP_SIGNALS` on to the stage and waits for its end. The first Ctrl-C stops a training with a checkpoint, as
    the other signals do; the second stops it at once. If this process is killed, the stage gets a SIGTERM (Linux).

    Args:
        stage: One of `STAGES`.
        name: Name of a recipe, or path of a YAML file.
        overrides: `dotted.key=value` each.
        overwrite: True moves a run with other settings aside.
        config: A configuration file of accelerate: a stage that trains starts as its number of processes.
        push: Whether the stage may upload to the Hub.

    Returns:
        The stage's exit code, as a shell reports it.
    """
    command = ["-m", f"rlhf_recipes.{MODULES.get(stage, stage)}", "--recipe", name, *overrides]
    command += ["--overwrite"] * overwrite + ["--push"] * push
    spread = config is not None and stage in TRAINED  # another stage would repeat its work in each process
    if spread:
        command = ["-m", "rlhf_recipes.launch.processes", "--config_file", str(config), *command]
    process = subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | {PARENT: str(os.getpid())},
        process_group=0 if spread else None,  # its own group, so that Ctrl-C reaches it only through this process
    )
    passed_on: list[int] = []

    def pass_on(number, frame) -> None:
        is_first = number == signal.SIGINT and number not in passed_on
        passed_on.append(number)
        if is_first and stage in TRAINED:
            say("stopping, with a checkpoint; Ctrl-C again stops without one")
        # The terminal's Ctrl-C has reached a single process: a second one from here would be taken for the user's.
        process.send_signal(signal.SIGTERM if is_first else number)

    before = on_stop(pass_on)
    code = process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if code < 0 and not passed_on:
        complain(f"stage {stage}: {ended_by(process.pid, code)}")
    return INTERRUPTED if signal.SIGINT in passed_on and as_shell(code) in STOP_CODES else as_shell(code)


def on_stop(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Handle `STOP_SIGNALS` but those that are ignored, as `nohup` asks for; returns the earlier handlers."""
    heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) or signal.SIG_DFL for number in heard}


def ended_by(pid: int, code: int) -> str:
    """A sentence about a process that a signal ended; `code` is the negative exit code."""
    why = " (the system does that when memory runs out)" if code == -signal.SIGKILL else ""
    return f"process {pid} was ended by {signal.Signals(-code).name}{why}. The same command resumes the run."


def as_shell(code: int) -> int:
    """An exit code as a shell reports it: -9, the code of a process that signal 9 ended, becomes 137."""
    return code if code >= 0 else 128 - code


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Send this process a signal when the process that started it dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # 1: PR_SET_PDEATHSIG
