"""Processes that tests start."""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


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


def call(function: Callable, *arguments) -> subprocess.Popen:
    """Start a process that calls a function of a test module; both the function and its arguments are pickled."""
    with tempfile.NamedTemporaryFile(prefix="call-", delete=False) as file:
        file.write(pickle.dumps((sys.path, pickle.dumps((function, arguments)))))
    return subprocess.Popen([sys.executable, "-m", "support.call", file.name])


TIMES = ("seconds", "runtime", "per_second")
"""In names of metrics that differ from run to run."""
