"""The other processes of a launch: joining them, asking the main one, and noticing that one has ended."""

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from rlhf_recipes.launch.setup import prepare
from rlhf_recipes.launch.start import USER_ERROR
from rlhf_recipes.recipe.schema import RecipeError

LOST = (
    "another process of this run has ended: with its own error, shown above, or because the system killed it (out of "
    "memory). The same command resumes from the last checkpoint."
)
"""Message of a process that cannot continue without the others."""


def wait_for_failing_rank(is_ended_by_launcher: bool = True) -> None:
    """Waits for the process that has the error, so that only this process reports it.

    Args:
        is_ended_by_launcher: True: the launcher ends this process when the other one ends. False: this process reports
            that the other one has ended, because the system may have killed it.
    """
    if is_ended_by_launcher:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(10 if is_ended_by_launcher else 3)  # an interpreter with torch takes seconds to end


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective operation failed because another process has ended."""
    from torch.distributed import DistError

    lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout", "gloo/transport")
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in lost)
    )


def join(given: dict[str, Any]) -> None:
    """Connects to the other processes of this launch, on the device that the stage trains on."""
    if is_distributed():
        prepare()
        import torch
        from accelerate import PartialState

        PartialState(cpu=bool(given.get("use_cpu")) or not torch.accelerator.is_available())


def has_joined() -> bool:
    """Whether `join` has run. It imports nothing: a stop during the import of torch leaves a broken module."""
    state = sys.modules.get("accelerate.state")
    return bool(getattr(getattr(state, "PartialState", None), "_shared_state", None))


def is_distributed() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def of_main(question: Callable[[], Any]) -> Any:
    """The main process's answer, on every rank: other processes must not read a folder while it changes.

    If the answer is an error, the main process raises it, and the others exit without a message.
    """
    if not is_distributed():
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
