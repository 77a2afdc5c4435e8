"""A reward function with a timeout, in a process of its own: it is killed when it is late, whatever it does."""

import functools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

from rlhf_recipes.rewards.apart import RewardStreams
from rlhf_recipes.rewards.checked import RewardError, Values, first_of, late


class TimedReward:
    """A reward function in a process of its own, which starts once and ends with this process (Linux).

    The function gets copies of its arguments; `trainer_state` is an object with the state's attributes. It may call
    `log_metric` and `log_extra`, which take effect when it has answered. It prints to this process's output.

    Args:
        source: How the process gets its function: ("recipe", (name, args)), or ("pickle", bytes).
        name: The name of the function in logs and messages.
        may_skip: Whether the function may return None for a completion.
        timeout: Seconds that one call may take.

    Raises:
        RewardError: The function cannot be set up.
    """

    def __init__(self, source: tuple[str, Any], name: str, may_skip: bool, timeout: float):
        self.__name__, self.timeout = name, timeout
        self._settings = source, name, may_skip
        self._call: dict[str, Any] = {}
        self._process: subprocess.Popen | None = None
        self._start()

    def __call__(self, /, **call: Any) -> Values:
        """The values, with random numbers that begin anew."""
        try:
            self.begin(call, RewardStreams(), "")
            return self.finish()
        finally:
            self.give_up()

    def begin(self, call: dict[str, Any], streams: RewardStreams, key: str) -> None:
        """Starts a call, whose random numbers are those of `key` in `streams`."""
        if self._process is None:
            self._start()
        self._call, self._put = call, functools.partial(streams.put, key)
        self._deadline = time.monotonic() + self.timeout
        logs = [key for key, value in call.items() if callable(value)]
        plain = {key: SimpleNamespace(**vars(value)) if is_dataclass(value) else value for key, value in call.items()}
        self._send({key: value for key, value in plain.items() if key not in logs}, logs, *streams.of(key))

    def finish(self) -> Values:
        """The values of the call.

        Raises:
            RewardError: The function failed, was late, or ended its process.
        """
        if not self._connection.poll(max(0.0, self._deadline - time.monotonic())):
            raise late(self.__name__, self.timeout, self._call)
        values, state, logged, seconds = self._receive()
        if seconds > self.timeout:  # it answered while this process was busy
            raise late(self.__name__, self.timeout, self._call)
        self._put(state)
        for name, arguments, keywords in logged:
            self._call[name](*arguments, **keywords)
        self._call = {}
        return values

    def give_up(self) -> None:
        """Ends the process if it has a call without an answer, with all that the function has started."""
        if self._call and self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._connection.close()
            self._process, self._call = None, {}

    def _start(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-m", "rlhf_recipes.rewards.timed_process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=_environment(),
                process_group=0,  # Ctrl-C is for this process alone, and `kill` reaches what the function has started
            )
        self._send(*self._settings)
        self._receive()

    def _send(self, *message: Any) -> None:
        with suppress(BrokenPipeError):  # `_receive` reports that the process has ended
            self._connection.send_bytes(pickle.dumps(message))

    def _receive(self) -> Any:
        try:
            error, answer = pickle.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionResetError) as end:
            assert self._process is not None
            code = self._process.wait()
            how = f"exit code {code}" if code >= 0 else f"signal {-code}"
            said = f"reward function {self.__name__!r} ended its process ({how}) {first_of(self._call)}"
            raise RewardError(said) from end
        if error is not None:
            message, trace = error
            raised = RewardError(message)
            raised.add_note(trace)
            raise raised
        return answer


def _environment() -> dict[str, str]:
    """The function's process is no rank of this launch, and sees this process's device as its only one."""
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    state: Any = sys.modules.get("accelerate.state")  # without an import, which takes seconds
    device = state and state.PartialState._shared_state.get("device")
    if device is not None and device.type in ("cpu", "cuda"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range((device.index or 0) + 1)]
        environment["CUDA_VISIBLE_DEVICES"] = "" if device.type == "cpu" else names[device.index or 0]
    return environment
