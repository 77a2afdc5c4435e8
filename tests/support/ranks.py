"""Two processes of one training, forked from a server."""

import multiprocessing
import os
import socket
import time
from pathlib import Path

PRELOADED = [
    "trl.trainer.rloo_trainer",
    "rlhf_recipes.trainers.ppo",
    "rlhf_recipes.trainers.rloo",
    "support.tiny_trainers",
]


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
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    started = [processes.Process(target=as_rank, args=(rank, port, work, folder, arguments)) for rank in (0, 1)]
    for process in started:
        process.start()
    deadline = time.monotonic() + seconds
    for process in started:
        process.join(deadline - time.monotonic())
    hanging = [rank for rank, process in enumerate(started) if process.is_alive()]
    for process in started:
        process.kill()
        process.join()
    outputs = [(folder / f"output-{rank}.txt").read_text() for rank in (0, 1)]
    assert not hanging, f"ranks {hanging} hang:\n" + "\n".join(outputs)
    return [process.exitcode for process in started], outputs
