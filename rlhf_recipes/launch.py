"""A stage as a process of its own, which hears the signals that this one gets."""

import os
import signal
import subprocess
import sys

MODULES = {"eval": "evaluate"}
"""Stages whose module has another name than the stage."""

PARENT = "RLHF_RECIPES_PARENT"
"""Environment variable that tells a stage the process that waits for it."""


def launch_stage(stage: str, name: str, overrides: list[str], overwrite: bool) -> int:
    """Run one stage of a recipe to its end.

    SIGTERM and Ctrl-C are passed on to it; it is waited for until it has ended. Should this process be killed, the stage
    takes that for a SIGTERM (Linux).

    Returns:
        Its exit code, as a shell says it: ended by signal 9 is 137.
    """
    module = f"rlhf_recipes.{MODULES.get(stage, stage)}"
    command = [sys.executable, "-m", module, "--recipe", name, *overrides, *(["--overwrite"] if overwrite else [])]
    process = subprocess.Popen(command, env=os.environ | {PARENT: str(os.getpid())})
    signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    while True:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            if process.poll() is None:  # Ctrl-C reached it too, `kill -INT` of this process did not
                process.send_signal(signal.SIGINT)
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            return code if code >= 0 else 128 - code
