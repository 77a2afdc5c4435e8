"""Runs functions beside the caller, who can stop waiting: each in a thread of its own, coroutines in one event loop."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

_loop: tuple[asyncio.AbstractEventLoop, threading.Thread] | None = None
"""The event loop of all coroutines, and its thread. There is only one: clients and locks belong to the loop they are
made in."""


def run_in_thread(function: Callable, /, **kwargs: Any) -> Future:
    """Calls a function in a new daemon thread. The threads of an executor would keep the interpreter from exiting."""
    answer: Future = Future()
    answer.set_running_or_notify_cancel()

    def work() -> None:
        try:
            answer.set_result(function(**kwargs))
        except BaseException as error:  # noqa: BLE001 - the caller that waits raises it
            answer.set_exception(error)

    threading.Thread(target=work, name="reward-function", daemon=True).start()
    return answer


def run_in_loop(function: Callable[..., Coroutine], /, **kwargs: Any) -> Future:
    """Calls an async function in the event loop of all coroutines."""
    global _loop
    if _loop is None or not _loop[1].is_alive():
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="reward-functions", daemon=True)
        thread.start()
        _loop = loop, thread
    return asyncio.run_coroutine_threadsafe(function(**kwargs), _loop[0])


def abandon_loop() -> None:
    """Gives up an event loop that a coroutine may block; the next coroutine gets a new loop."""
    global _loop
    _loop = None
