"""Starts a stage as one process or as several, and passes signals to it."""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

from rlhf_recipes.recipe.schema import TRAINED
from rlhf_recipes.system.terminal import say

USER_ERROR = 2
"""Exit code of a stage that ended with an error, the user's or a library's."""

STOPPED = 128 + signal.SIGTERM
"""Exit code of a stage that was asked to stop. The same command resumes it."""

INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a stage that Ctrl-C ended."""

MODULES = {"eval": "evaluate"}
"""Stage -> its module, if the names differ."""

COMMAND = "RLHF_RECIPES_LAUNCH"
"""Environment variable with the launcher's arguments; a stage compares them with its launch."""

PARENT = "RLHF_RECIPES_PARENT"
"""Environment variable with the id of the process that waits for a stage."""


def launch_stage(stage: str, name: str, overrides: list[str], overwrite: bool, config: Path | None = None) -> int:
    """Run one stage of a recipe to its end.

    Passes SIGTERM and Ctrl-C on to the stage and waits for its end. If this process is killed, the stage gets a SIGTERM
    (Linux).

    Args:
        stage: One of `STAGES`.
        name: Name of a recipe, or path of a YAML file.
        overrides: `dotted.key=value` each.
        overwrite: True moves a run with other settings aside.
        config: A configuration file of accelerate: a stage that trains starts as its number of processes. The first
            Ctrl-C then stops them as SIGTERM does, with a checkpoint; the second kills them.

    Returns:
        The stage's exit code, as a shell reports it.
    """
    command = ["-m", f"rlhf_recipes.{MODULES.get(stage, stage)}", "--recipe", name, *overrides]
    command += ["--overwrite"] if overwrite else []
    spread = config is not None and stage in TRAINED  # another stage would repeat its work in each process
    if spread:
        command = ["-m", "rlhf_recipes.launch.processes", "--config_file", str(config), *command]
    process = subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | {PARENT: str(os.getpid())},
        process_group=0 if spread else None,  # its own group, so that Ctrl-C reaches it only through this process
    )
    signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    interrupted = False
    while True:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            if process.poll() is None:  # the terminal's Ctrl-C has reached it, `kill -INT` of this process has not
                if spread and not interrupted:
                    say("stopping, with a checkpoint; Ctrl-C again stops without one")
                    process.terminate()
                else:
                    process.send_signal(signal.SIGINT)
            interrupted = True
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            return as_shell(code)


def as_shell(code: int) -> int:
    """An exit code as a shell reports it: -9, the code of a process that signal 9 ended, becomes 137."""
    return code if code >= 0 else 128 - code


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Send this process a signal when the process that started it dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # 1: PR_SET_PDEATHSIG
