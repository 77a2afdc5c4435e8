"""The metrics of an on-policy run: means since the last log line, and the time of each phase."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlhf_recipes.pages.metrics import RENAMED, our_name
from rlhf_recipes.system.files import without_nan

LEFT_OUT = ("clip_ratio", "completions", "step_time", "kl", "frac_reward_zero_std")
"""Prefixes of TRL's metrics that this project's own metrics replace."""

PHASES = ("generate", "score", "forward", "update")
"""Sampling; reward functions; passes without gradient; passes with gradient and optimizer steps."""


def in_float64(values: Tensor) -> Tensor:
    """For sums whose difference counts, such as those of a variance; float32 on Apple's GPUs, which lack float64."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


class MetricLog:
    """Sums of every metric since the last line: the next line has means over all tokens or rows, not means of means."""

    def __init__(self):
        self.sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}

    def add(self, mode: str, name: str, values: Tensor, mask: Tensor | None = None, copies: int = 1) -> None:
        """Adds values of this process to a metric.

        Args:
            mode: `train` or `eval`.
            name: Of the metric.
            values: Of any shape.
            mask: Of the same shape; None: all of them count.
            copies: Number of processes that add these same values.
        """
        mask = torch.ones_like(values) if mask is None else mask
        sums = torch.stack([(in_float64(values.detach()) * mask).sum(), in_float64(mask.sum())])
        self.sums[mode][name] = self.sums[mode].get(name, 0.0) + (sums if copies == 1 else sums / copies)

    def take_means(self, mode: str, sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, list[float]]:
        """Every metric's mean over all processes, as a list of one value, as in TRL; resets the sums."""
        sums, self.sums[mode] = self.sums[mode], {}
        if not sums:
            return {}
        totals = sum_over_ranks(torch.stack([sums[name] for name in sorted(sums)])).tolist()
        means = {name: total / n for name, (total, n) in zip(sorted(sums), totals, strict=True) if n > 0}
        return {name: [value] for name, value in _with_explained_variance(means).items()}

    def to_dict(self) -> dict[str, Any]:
        return self.sums

    def load(self, saved: dict[str, Any]) -> None:
        self.sums = saved


def _with_explained_variance(means: dict[str, float]) -> dict[str, float]:
    """PPO's moments of returns and errors as 1 - Var(errors) / Var(returns); nothing where returns do not vary."""
    if "returns_1" in means:
        moments = [means.pop(f"{name}_{power}") for name in ("returns", "errors") for power in (1, 2)]
        of_returns, of_errors = moments[1] - moments[0] ** 2, moments[3] - moments[2] ** 2
        if of_returns > 1e-12:
            means["explained_variance"] = 1 - of_errors / of_returns
    return means


def rename(metrics: dict[str, list[float]]) -> None:
    """Renames TRL's metrics in place; drops those without a value, and those that this project's metrics replace."""
    for name in list(metrics):
        values = metrics.pop(name)
        if all(math.isnan(value) for value in values):
            continue  # such as the mean of a function that never applied
        if ours := our_name(name, RENAMED):
            metrics[ours] = values
        elif name.split("/")[0] not in LEFT_OUT:
            metrics[name] = values


class RolloutLogs:
    """TRL's logs of the last rollout: prompts, completions, their scores and advantages."""

    def __init__(self, logs: dict[str, Any]):
        self._logs = logs

    def replace_advantages(self, advantages: list[float]) -> None:
        """Puts the algorithm's own advantages in the place of those that TRL has just logged."""
        logged = self._logs["advantages"]
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside, an evaluation has the logs to itself; afterwards they are the training rollout's again."""
        kept = self.to_dict()
        self._clear()
        try:
            yield
        finally:
            self._clear()
            self.load(kept)

    def _clear(self) -> None:
        for values in self._logs.values():
            for column in values.values() if isinstance(values, dict) else [values]:
                column.clear()

    def first(self, number: int, step: int) -> list[dict[str, Any]]:
        """The first `number` completions; a score that is NaN is None."""
        names = list(self._logs["rewards"])
        columns = [self._logs[name] for name in ("prompt", "completion", "advantages")]
        rows = list(zip(*columns, *self._logs["rewards"].values(), strict=True))[:number]
        return [
            {
                "step": step,
                "prompt": prompt,
                "completion": completion,
                "advantage": advantage,
                "scores": {n: without_nan(value) for n, value in zip(names, values, strict=True)},
            }
            for prompt, completion, advantage, *values in rows
        ]

    def to_dict(self) -> dict[str, Any]:
        """In plain types, so that a checkpoint is read without running code."""
        return {
            name: {key: [_plain(x) for x in column] for key, column in values.items()}
            if isinstance(values, dict)
            else list(values)
            for name, values in self._logs.items()
        }

    def load(self, saved: dict[str, Any]) -> None:
        for name, values in saved.items():
            if isinstance(values, dict):
                for key, column in values.items():
                    self._logs[name][key].extend(column)
            else:
                self._logs[name].extend(values)


def _plain(value: Any) -> Any:
    """A value that a reward function gave to `log_extra`, as a number or a text."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return value if value is None or type(value) in (bool, int, float, str) else str(value)


class PhaseTimer:
    """Seconds of each phase of training since the last line. It runs from the first `start`, except while paused."""

    def __init__(self, device_type: str):
        self._has_queue = device_type != "cpu"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._since: float | None = None
        self.episodes_logged = 0

    def start(self) -> None:
        self._since = self._since or time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time before this counts for `update`; time inside counts for no phase."""
        self.book("update")
        since, self._since = self._since, None
        try:
            yield
        finally:
            self._since = since and time.perf_counter()

    def book(self, phase: str) -> None:
        """Counts the time since the last booking for a phase."""
        if self._since is None:
            return
        if self._has_queue:
            torch.accelerator.synchronize()  # otherwise this phase's work would count for the next phase
        now = time.perf_counter()
        self._seconds[phase] += now - self._since
        self._since = now

    def take(self, episodes: int) -> dict[str, float]:
        """Seconds of each phase, and episodes per second, since the last line; resets them."""
        line = {f"seconds_{phase}": seconds for phase, seconds in self._seconds.items()}
        new, seconds = episodes - self.episodes_logged, sum(self._seconds.values())
        if new and seconds:
            line["episodes_per_second"] = new / seconds
        self.episodes_logged = episodes
        self._seconds = dict.fromkeys(PHASES, 0.0)
        return line

    def to_dict(self) -> dict[str, Any]:
        return {"episodes_logged": self.episodes_logged}

    def load(self, saved: dict[str, Any]) -> None:
        self.episodes_logged = saved["episodes_logged"]
