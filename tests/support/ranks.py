"""Two processes of one training."""

import os
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from support.processes import call


def wait_or_kill(started: list[subprocess.Popen], seconds: float) -> list[int]:
    """Waits this long for all processes of a training; kills the others, and returns which of them were hanging."""
    deadline = time.monotonic() + seconds
    for process in started:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0, deadline - time.monotonic()))
    hanging = [rank for rank, process in enumerate(started) if process.poll() is None]
    for process in started:
        process.kill()
        process.wait()
    return hanging


def as_rank(rank: int, port: int, work, folder: Path, arguments: tuple) -> None:
    """What a process does: its output goes to `folder/output-<rank>.txt`."""
    output = os.open(folder / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    work(rank, folder, *arguments)


def two_ranks(work, folder: Path, *arguments, seconds: float) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of two processes that call `work(rank, folder, *arguments)`."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [call(as_rank, rank, port, work, folder, arguments) for rank in (0, 1)]
    hanging = wait_or_kill(started, seconds)
    outputs = [(folder / f"output-{rank}.txt").read_text() for rank in (0, 1)]
    assert not hanging, f"ranks {hanging} hang:\n" + "\n".join(outputs)
    return [process.returncode for process in started], outputs
