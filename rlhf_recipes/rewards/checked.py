"""Wraps a reward function: passes it the arguments it takes, checks its values, and turns any failure into one error.

A reward function is called with keywords: `prompts`, `completions`, `completion_ids`, `finished` and the data's other
columns. It gets those that it takes, so it needs no `**kwargs`. It is a function, a `functools.partial` or an object with
`__call__`, and any of these may be `async`.
"""

import asyncio
import copy
import functools
import inspect
import math
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from numbers import Real
from typing import Any

from rlhf_recipes.recipe.messages import as_text
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.recipe.sections import LARGEST
from rlhf_recipes.recipe.user_code import ends_process

Reward = Callable[..., Sequence[float | None]]

Values = list[float | None]
"""One value per completion; None where the function does not apply."""


class RewardError(RecipeError):
    """A reward function raised, did not answer, or returned something other than one finite number per completion."""


def checked(function: Callable, name: str, may_skip: bool, timeout: float | None = None) -> "SyncReward | AsyncReward":
    """Wraps a reward function, so that any failure is a `RewardError` with the function's name and a completion.

    The wrapper is async if the function is. The function gets copies of lists, dictionaries and data classes: it cannot
    change those of other functions or of the trainer. A wrapper is returned as it is.

    Args:
        name: The name of the function in logs and messages.
        may_skip: Whether the function may return None for a completion.
        timeout: Seconds that one call may take. `call_all` then runs a sync function in a thread of its own. A thread
            cannot be stopped: see `timed.py` for a timeout that holds whatever the function does.
    """
    if isinstance(function, (SyncReward, AsyncReward)):
        return function
    return (AsyncReward if _is_async(function) else SyncReward)(function, name, may_skip, timeout)


class _Wrapper:
    """The part that sync and async functions share: which arguments they get, and which errors they make."""

    def __init__(self, function: Callable, name: str, may_skip: bool, timeout: float | None):
        self.__name__ = name  # TRL logs the function by it
        self.timeout = timeout
        self._function, self._may_skip = function, may_skip

    @contextmanager
    def _explaining(self, call: dict[str, Any]) -> Iterator[None]:
        """Turns an exception of the function into a `RewardError`."""
        try:
            yield
        except RewardError:
            raise
        except BaseException as error:
            if ends_process(error) or (isinstance(error, asyncio.CancelledError) and _is_being_cancelled()):
                raise
            raise self._error(f"raised {type(error).__name__}: {error} {first_of(call)}") from error

    def _error(self, failure: str) -> RewardError:
        return RewardError(f"reward function {self.__name__!r} {failure}")

    def _arguments(self, call: dict[str, Any]) -> tuple[list, dict[str, Any]]:
        """The part of a call that the function takes, by position and by name."""
        if isinstance(self._function, functools.partial):  # a bound argument wins over a column of the same name
            call = {key: value for key, value in call.items() if key not in self._function.keywords}
        parameters = inspect.signature(self._function).parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        missing = [p.name for p in named if p.default is p.empty and p.name not in call]
        if missing:
            raise self._error(
                f"needs {', '.join(missing)}, which is no column of the data; there is: {', '.join(call)}."
            )
        positional = [p.name for p in named if p.kind is p.POSITIONAL_ONLY and p.name in call]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        taken = (call.keys() if takes_any else {p.name for p in named} & call.keys()) - set(positional)
        return [_copy(call[key]) for key in positional], {key: _copy(call[key]) for key in taken}

    def _check(self, values: Any, completions: list) -> Values:
        kind = type(values).__name__
        if isinstance(values, Coroutine):
            values.close()
            raise self._error("returned a coroutine: make it `async def`, so that it is awaited.")
        if hasattr(values, "tolist"):  # a tensor or an array
            if getattr(values, "ndim", 1) != 1:
                raise self._error(
                    f"returned a {kind} of shape {tuple(values.shape)}, not ({len(completions)},): one number per "
                    "completion."
                )
            values = values.tolist()
        if not isinstance(values, (list, tuple)):
            raise self._error(f"returned {kind}, not a list of numbers.")
        if len(values) != len(completions):
            raise self._error(f"returned {len(values)} values for {len(completions)} completions.")
        return [self._check_value(value, i, completions[i]) for i, value in enumerate(values)]

    def _check_value(self, value: Any, i: int, completion: Any) -> float | None:
        if value is None and self._may_skip:
            return None
        number = value.item() if getattr(value, "ndim", None) == 0 else value  # a scalar of torch or numpy
        if isinstance(number, Real):
            try:
                number = float(number)
            except OverflowError:
                number = math.inf
            if abs(number) <= LARGEST:
                return number
            why = f"a score is finite, and at most {LARGEST:g} in size, so that training can square it in float32"
        elif value is None:
            why = "only one of several functions may return None"
        else:
            why = "a score is one number"
        raise self._error(f"returned {value!r} for sample {i}: {as_text(completion)[:120]!r}; {why}.")


class SyncReward(_Wrapper):
    """A sync reward function that `checked` has wrapped."""

    def __call__(self, /, prompts: list, completions: list, **columns: Any) -> Values:
        call = {"prompts": prompts, "completions": completions, **columns}
        with self._explaining(call):
            positional, keywords = self._arguments(call)
            values = self._function(*positional, **keywords)
        return self._check(values, completions)


class AsyncReward(_Wrapper):
    """An async reward function that `checked` has wrapped."""

    async def __call__(self, /, prompts: list, completions: list, **columns: Any) -> Values:
        call = {"prompts": prompts, "completions": completions, **columns}
        with self._explaining(call):
            positional, keywords = self._arguments(call)
            values = await self._function(*positional, **keywords)
        return self._check(values, completions)


def _is_async(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(function.__call__)


def _is_being_cancelled() -> bool:
    """Whether somebody else cancels the coroutine that runs now."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        return False
    return task is not None and task.cancelling() > 0


def late(name: str, timeout: float, call: dict[str, Any]) -> RewardError:
    """The error of a call that takes too long."""
    return RewardError(
        f"reward function {name!r} did not answer within {timeout:g} s {first_of(call)}; give it a longer timeout, or "
        "find out what it waits for."
    )


def first_of(call: dict[str, Any]) -> str:
    """The beginning of a call's first completion, for messages; a function without a call is still being set up."""
    if not call:
        return "while it was set up"
    first = as_text(call["completions"][0]) if call["completions"] else ""
    return f"(on {len(call['completions'])} completions, the first: {first[:80]!r})"


def _copy(value: Any) -> Any:
    """Copies nested lists, dictionaries and data classes (the trainer's state), but not other objects in them."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item) if isinstance(item, (list, dict)) else item for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        vars(made).update(_copy(vars(value)))
        return made
    return value
