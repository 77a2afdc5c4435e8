"""Processes that tests start."""

import os
import pickle
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
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


def call(function: Callable, *arguments, **keywords) -> subprocess.Popen:
    """Start a process that calls a function of a test module; both the function and its arguments are pickled."""
    with tempfile.NamedTemporaryFile(prefix="call-", delete=False) as file:
        file.write(pickle.dumps((sys.path, pickle.dumps((function, arguments, keywords)))))
    return subprocess.Popen([sys.executable, "-m", "support.call", file.name])


def become_stage(
    stage: str,
    arguments: list[str],
    folder: Path,
    environment: dict[str, str],
    outputs: tuple[str, str] = ("output.txt", "output.txt"),
    largest_file: int | None = None,
) -> None:
    """Does what `python -m rlhf_recipes.<stage> --recipe ...` does in a folder, in a process that `call` has started.

    Args:
        stage: The stage.
        arguments: The recipe and its overrides.
        folder: The current directory of the stage.
        environment: All its variables.
        outputs: Files in the folder to which standard output and standard error are appended.
        largest_file: Limit on the size of a file, in bytes.
    """
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in enumerate(outputs, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = [stage, "--recipe", *arguments]
    import_module("rlhf_recipes.stage").stage_command(stage, import_module(f"rlhf_recipes.{stage}").main)


TIMES = ("seconds", "runtime", "per_second")
"""In names of metrics that differ from run to run."""
