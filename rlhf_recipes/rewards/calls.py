"""Calls reward functions: checks every answer, runs slow functions side by side, and stops waiting after a timeout.

A reward function is called with keywords, of which it gets those that it takes: `prompts`, `completions`,
`completion_ids`, `finished` and the data's other columns. It may be a function, a `functools.partial` or an object with
`__call__`, and any of these may be `async`.
"""

import asyncio
import functools
import inspect
import math
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from numbers import Real
from typing import Any

from rlhf_recipes.recipe.messages import as_text
from rlhf_recipes.recipe.schema import RecipeError, RewardFunc
from rlhf_recipes.rewards.score import weighted_sum

Reward = Callable[..., list[float | None]]

_background: tuple[asyncio.AbstractEventLoop, threading.Thread] | None = None
"""The loop that async functions run in, and its thread. One for all calls: clients and locks belong to their loop."""


class RewardError(RecipeError):
    """A reward function raised, hung, or returned something that is not one finite number per completion."""


def callable_name(function: Callable) -> str:
    """The name that TRL logs a reward function by: its own, or of a callable object its class's."""
    function = _unwrapped(function)
    return getattr(function, "__name__", type(function).__name__)


def is_async(function: Callable) -> bool:
    """Whether calling it gives a coroutine; partials and callable objects included."""
    function = _unwrapped(function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(function.__call__)


def checked(function: Callable, name: str, may_skip: bool, timeout: float | None = None) -> Reward:
    """Wrap a reward function so that whatever is wrong with it is a `RewardError` with its name and the sample.

    The wrapper is async where the function is. The function gets copies: what it does to its lists, nobody else sees.
    A function that is checked already is returned as it is.

    Args:
        function: The reward function.
        name: What it is called in logs and messages.
        may_skip: Whether it may say None.
        timeout: Seconds to answer in. A sync function is then called in a thread of its own, where signals (so
            `signal.alarm`) do not work; a call that hangs keeps that thread, but not the interpreter from exiting.
    """
    if hasattr(function, "checked_timeout"):
        return function

    def failed(error: BaseException, call: dict[str, Any]) -> RewardError:
        if isinstance(error, RewardError):
            return error
        return RewardError(f"reward function {name!r} raised {type(error).__name__}: {error} {_on(call)}")

    def late(call: dict[str, Any]) -> RewardError:
        return RewardError(
            f"reward function {name!r} did not answer within {timeout:g} s {_on(call)}; "
            "give it a longer timeout, or find out what it waits for."
        )

    # SystemExit too: a library that exits would end the training as if all were well.
    if is_async(function):

        async def ask(call: dict[str, Any]) -> Any:
            try:
                positional, keywords = _arguments(function, name, call)
                return await function(*positional, **keywords)
            except (Exception, SystemExit) as error:
                raise failed(error, call) from error

        async def reward(prompts, completions, **columns):
            call = {"prompts": prompts, "completions": completions, **columns}
            task = asyncio.ensure_future(ask(call))
            try:
                done, _ = await asyncio.wait({task}, timeout=timeout)
            finally:
                task.cancel()  # does nothing to a task that is done
            if not done:
                raise late(call)
            if task.cancelled():
                raise failed(asyncio.CancelledError("it cancelled itself"), call)
            return _check_values(task.result(), name, completions, may_skip)
    else:

        def ask(call: dict[str, Any]) -> Any:
            try:
                positional, keywords = _arguments(function, name, call)
                return function(*positional, **keywords)
            except (Exception, SystemExit, asyncio.CancelledError) as error:
                raise failed(error, call) from error

        def reward(prompts, completions, **columns):
            call = {"prompts": prompts, "completions": completions, **columns}
            if timeout is None:
                values = ask(call)
            else:
                try:
                    values = _in_thread(ask, call).result(timeout)
                except TimeoutError as error:  # ours: one of the function's own is a RewardError by now
                    raise late(call) from error
            return _check_values(values, name, completions, may_skip)

    reward.__name__ = name
    reward.checked_timeout = timeout
    return reward


def call_all(
    functions: list[Callable],
    *,
    prompts: list,
    completions: list,
    completion_ids: list[list[int]],
    finished: list[bool],
    **columns: Any,
) -> list[list[float | None]]:
    """Calls every reward function on B completions: one list of B values per function.

    Async functions, and functions with a timeout, run side by side and while the others run; these run in this thread,
    one after another, so that signals work in them and that they draw from the global random streams in a fixed order.

    Args:
        functions: Checked already, or checked here.
        prompts: Texts or lists of chat messages, (B,).
        completions: As the prompts, (B,).
        completion_ids: Token ids, EOS included.
        finished: Which completions ended with EOS.
        columns: The data's other columns, and whatever else functions may ask for by name.

    Raises:
        RewardError: A function's; of several, that of the first function in the list.
    """
    functions = [checked(f, callable_name(f), may_skip=len(functions) > 1) for f in functions]
    call = columns | {
        "prompts": prompts,
        "completions": completions,
        "completion_ids": completion_ids,
        "finished": finished,
    }
    answers = [_start(function, call) for function in functions]
    try:
        for i, function in enumerate(functions):
            if answers[i] is None:
                answers[i] = Future()
                try:
                    answers[i].set_result(function(**call))
                except RewardError as error:
                    answers[i].set_exception(error)
                    break  # the functions behind it have no say any more
        return [_result(function, answer) for function, answer in zip(functions, answers, strict=True)]
    finally:
        for answer in answers:
            if answer is not None:
                answer.cancel()


def call_all_on_every_rank(functions: list[Callable], processes: int, **call: Any) -> list[list[float | None]]:
    """`call_all` for this process's completions, after which all processes go on, or all stop.

    Args:
        functions: As `call_all` takes them.
        processes: Their number; every one of them calls this.
        call: As `call_all` takes it.

    Raises:
        RewardError: That of the first process which has one, on all processes: the others would wait for it in vain.
    """
    from accelerate.utils import gather_object

    values, error = None, None
    try:
        values = call_all(functions, **call)
    except RewardError as raised:
        error = raised
    for rank, message in enumerate(gather_object([error and str(error)])):
        if message is not None:
            raise RewardError(message + (f" (process {rank})" if processes > 1 else "")) from error
    return values


def score_all(
    specs: list[RewardFunc], functions: list[Reward], **call: Any
) -> tuple[list[float | None], dict[str, list[float | None]]]:
    """Call every reward function outside a trainer.

    Args:
        specs: The recipe's list of reward functions, for the weights.
        functions: One for each entry of `specs`.
        call: As in `call_all`.

    Returns:
        B scores, None where no function applies, and each function's own B values by its name.
    """
    import torch

    values = call_all(functions, **call)
    by_name = {function.__name__: value for function, value in zip(functions, values, strict=True)}
    table = [[math.nan if value is None else value for value in column] for column in values]
    table = torch.tensor(table, dtype=torch.float64).reshape(len(functions), len(call["completions"]))
    weights = torch.tensor([spec.weight for spec in specs], dtype=torch.float64)
    scores = weighted_sum(table.T, weights).tolist()
    return [None if math.isnan(score) else score for score in scores], by_name


def _start(function: Reward, call: dict[str, Any]) -> Future | None:
    """The coming answer of a function that runs beside the others; None for one that does not."""
    if is_async(function):
        return asyncio.run_coroutine_threadsafe(function(**call), _loop())
    return None if function.checked_timeout is None else _in_thread(lambda: function(**call))


def _result(function: Reward, answer: Future) -> list[float | None]:
    global _background
    timeout = function.checked_timeout
    try:
        return answer.result(None if timeout is None else timeout + 1)
    except TimeoutError as error:  # its own timer has not fired: the loop itself stands still
        _background = None
        raise RewardError(
            f"reward function {function.__name__!r} did not answer within {timeout:g} s, nor could it be stopped: it, or "
            "another async one, blocks the event loop (time.sleep or requests instead of asyncio.sleep or aiohttp)."
        ) from error


def _loop() -> asyncio.AbstractEventLoop:
    global _background
    if _background is None or not _background[1].is_alive():
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="reward-functions", daemon=True)
        thread.start()
        _background = (loop, thread)
    return _background[0]


def _in_thread(function: Callable, *args: Any) -> Future:
    """Call a function in a daemon thread of its own; executors' threads would keep the interpreter from exiting."""
    answer = Future()
    answer.set_running_or_notify_cancel()

    def work() -> None:
        try:
            answer.set_result(function(*args))
        except BaseException as error:  # noqa: BLE001 - the caller that waits raises it
            answer.set_exception(error)

    threading.Thread(target=work, name="reward-function", daemon=True).start()
    return answer


def _unwrapped(function: Callable) -> Callable:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _on(call: dict[str, Any]) -> str:
    first = as_text(call["completions"][0]) if call["completions"] else ""
    return f"(on {len(call['completions'])} completions, the first: {first[:80]!r})"


def _arguments(function: Callable, name: str, call: dict[str, Any]) -> tuple[list, dict[str, Any]]:
    """What of a call the function takes, by position and by name: a user need not write `**kwargs`.

    Raises:
        RewardError: It needs something that is not there.
    """
    if isinstance(function, functools.partial):  # what is bound stays bound, also where a column has that name
        call = {key: value for key, value in call.items() if key not in function.keywords}
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some functions of compiled modules do not say what they take
        return [], _copy(call)
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [p.name for p in named if p.default is p.empty and p.name not in call]
    if missing:
        raise RewardError(
            f"reward function {name!r} needs {', '.join(missing)}, which is no column of the data; "
            f"there is: {', '.join(call)}."
        )
    positional = [p.name for p in named if p.kind is p.POSITIONAL_ONLY and p.name in call]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    taken = call.keys() if takes_any else {p.name for p in named} & call.keys()
    return [_copy(call[key]) for key in positional], {key: _copy(call[key]) for key in taken if key not in positional}


def _copy(value: Any) -> Any:
    """Lists and dictionaries anew, all the way down; what is in them as it is."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item) if isinstance(item, (list, dict)) else item for item in value]
    return value


def _check_values(values: Any, name: str, completions: list, may_skip: bool) -> list[float | None]:
    what = type(values).__name__
    if isinstance(values, Coroutine):
        values.close()
        raise RewardError(f"reward function {name!r} returned a coroutine: make it `async def`, so that it is awaited.")
    if hasattr(values, "tolist"):  # a tensor or an array
        if getattr(values, "ndim", 1) != 1:
            raise RewardError(
                f"reward function {name!r} returned a {what} of shape {tuple(values.shape)}, not ({len(completions)},): "
                "one number per completion."
            )
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise RewardError(f"reward function {name!r} returned {what}, not a list of numbers.")
    if len(values) != len(completions):
        raise RewardError(f"reward function {name!r} returned {len(values)} values for {len(completions)} completions.")
    return [_check_value(value, i, name, completions, may_skip) for i, value in enumerate(values)]


def _check_value(value: Any, i: int, name: str, completions: list, may_skip: bool) -> float | None:
    if value is None and may_skip:
        return None
    number = value.item() if getattr(value, "ndim", None) == 0 else value  # a scalar of torch or numpy
    if isinstance(number, Real):
        try:
            number = float(number)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
        why = "a score is finite"
    elif value is None:
        why = "None is for one of several functions, or there is no score"
    else:
        why = "a score is one number"
    raise RewardError(
        f"reward function {name!r} returned {value!r} for sample {i}: {as_text(completions[i])[:120]!r}; {why}."
    )
