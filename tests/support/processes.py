"""Processes that tests start."""

import os
import subprocess
import sys
from pathlib import Path

TRAINERS = [
    "trl.trainer.sft_trainer",
    "trl.trainer.reward_trainer",
    "rlhf_recipes.trainers.rloo",
    "rlhf_recipes.trainers.ppo",
    "rlhf_recipes.runs.callbacks",
    "rlhf_recipes.runs.checkpoints",
]
"""What takes seconds to import: a server does it once and forks the processes of tests."""


def run_python(*arguments: str, cwd: Path, timeout: int = 300, **environment: str) -> subprocess.CompletedProcess:
    """Run this Python as a process of its own, in the tests' environment."""
    variables = os.environ | {"COLUMNS": "160"} | environment
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def cli(*arguments: str, cwd: Path, **more) -> subprocess.CompletedProcess:
    """Run `rlhf-recipes` as a user does."""
    return run_python("-m", "rlhf_recipes.cli", *arguments, cwd=cwd, **more)


TIMES = ("seconds", "runtime", "per_second")
"""In names of metrics that differ from run to run."""
