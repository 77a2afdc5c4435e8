"""Keeps reward functions apart from the training: their random numbers, and the process's settings that they may change."""

import hashlib
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast


class RewardStreams:
    """The random streams of a run's reward functions: `random`, numpy, torch on the CPU and on the current CUDA device.

    Functions of the trainer's process share one set of streams. A function with a process of its own has its own set.

    Args:
        seed: The run's seed.
        rank: Of this process.
    """

    def __init__(self, seed: int = 0, rank: int = 0):
        self._seed = f"{seed} {rank}"
        self._states: dict[str, dict[str, Any]] = {}

    def of(self, name: str) -> tuple[int, dict[str, Any]]:
        """The seed of one set of streams, and its present state: empty until it has been used."""
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        return int.from_bytes(digest[:4], "big"), self._states.get(name, {})

    def put(self, name: str, state: dict[str, Any]) -> None:
        self._states[name] = state

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, random numbers come from these streams; afterwards the process has its own streams and settings again."""
        with _unchanged_settings():
            seed, state = self.of("")
            before = _states()
            _set(_states(seed) | state)
            try:
                yield
            finally:
                after, new = _states(), _states(seed)
                # torch may have been loaded inside, with numbers that are the same in every run.
                self.put("", {name: new[name] if name not in before | state else after[name] for name in after})
                _set(before)

    def to_dict(self) -> dict[str, Any]:
        return self._states

    def load(self, saved: dict[str, Any]) -> None:
        self._states = dict(saved)


def _states(seed: int | None = None) -> dict[str, Any]:
    """The states of this process's streams, or of new ones that begin with a seed, as plain values and tensors.

    Those of torch are there only if the process has loaded it.
    """
    import numpy as np

    python, numpy = (random, np.random) if seed is None else (random.Random(seed), np.random.RandomState(seed))
    kind, keys, *rest = cast(tuple, numpy.get_state())
    states: dict[str, Any] = {"random": python.getstate(), "numpy": [kind, keys.tolist(), *rest]}
    if (torch := sys.modules.get("torch")) is not None:
        for device in ("cpu", "cuda") if torch.cuda.is_initialized() else ("cpu",):
            own = (
                torch.default_generator
                if device == "cpu"
                else torch.cuda.default_generators[torch.cuda.current_device()]
            )
            states[device] = (own if seed is None else torch.Generator(device).manual_seed(seed)).get_state()
    return states


def _set(states: dict[str, Any]) -> None:
    import numpy as np

    random.setstate(states["random"])
    np.random.set_state(tuple(states["numpy"]))
    if "cpu" in states:
        import torch

        torch.set_rng_state(states["cpu"].cpu())
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"].cpu())


@contextmanager
def _unchanged_settings() -> Iterator[None]:
    """Afterwards, settings of the whole process are as before that would change or end the training."""
    kept: list[tuple[Any, Any]] = [(os.chdir, os.getcwd()), (logging.disable, logging.root.manager.disable)]
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        kept += [(partial(signal.signal, number), found) for number, found in handlers.items() if found is not None]
    if (torch := sys.modules.get("torch")) is not None:
        kept += [
            (torch.set_grad_enabled, torch.is_grad_enabled()),
            (torch.set_default_dtype, torch.get_default_dtype()),
        ]
        device = torch.get_default_device()
        kept.append((torch.set_default_device, None if device.type == "cpu" else device))
        if torch.cuda.is_initialized():
            kept.append((torch.cuda.set_device, torch.cuda.current_device()))
    filters = warnings.filters[:]
    try:
        yield
    finally:
        for put, value in kept:
            put(value)
        if warnings.filters != filters:
            warnings.resetwarnings()  # also forgets which warnings have been shown
            warnings.filters[:] = filters  # type: ignore[index]
