"""A stage as a process of its own, or as several, which hear the signals that this one gets."""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

from rlhf_recipes.system.terminal import say

USER_ERROR = 2
"""Exit code of a stage that an error ended: the user's, or a library's."""

STOPPED = 128 + signal.SIGTERM
"""Exit code of a stage that was asked to stop. The same command resumes it."""

INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a stage that Ctrl-C ended."""

MODULES = {"eval": "evaluate"}
"""Stages whose module has another name than the stage."""

TRAINED = ("sft", "reward", "ppo", "rloo")
"""Stages that a configuration of accelerate spreads over processes; the others would do their work in each of them."""

COMMAND = "RLHF_RECIPES_LAUNCH"
"""Environment variable with what the launcher of a stage was given, for the stage to compare with what it gets."""

PARENT = "RLHF_RECIPES_PARENT"
"""Environment variable that tells a stage the process that waits for it."""


def launch_stage(stage: str, name: str, overrides: list[str], overwrite: bool, config: Path | None = None) -> int:
    """Run one stage of a recipe to its end.

    SIGTERM and Ctrl-C are passed on to it; it is waited for until it has ended. Should this process be killed, the stage
    takes that for a SIGTERM (Linux).

    Args:
        stage: One of `STAGES`.
        name: Name of a recipe, or path of a YAML file.
        overrides: `dotted.key=value` each.
        overwrite: Whether a run with other settings is moved aside.
        config: Of accelerate: starts a stage that trains as that many processes. Ctrl-C then stops them as SIGTERM does,
            with a checkpoint, for they must end together; the second time it kills them.

    Returns:
        Its exit code, as a shell says it: ended by signal 9 is 137.
    """
    command = ["-m", f"rlhf_recipes.{MODULES.get(stage, stage)}", "--recipe", name, *overrides]
    command += ["--overwrite"] if overwrite else []
    spread = config is not None and stage in TRAINED
    if spread:
        command = ["-m", "rlhf_recipes.launch.processes", "--config_file", str(config), *command]
    process = subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | {PARENT: str(os.getpid())},
        process_group=0 if spread else None,  # apart: Ctrl-C reaches them through this process only, once
    )
    signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    interrupted = False
    while True:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            if process.poll() is None:  # Ctrl-C reached it too, `kill -INT` of this process did not
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
    """An exit code as a shell says it."""
    return code if code >= 0 else 128 - code


def end_with_parent() -> None:
    """From now on the death of the process that started this one is a SIGTERM to this one (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
