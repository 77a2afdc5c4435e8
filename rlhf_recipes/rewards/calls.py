"""Calls reward functions on completions, slow functions side by side, and makes scores of their values."""

import math
from concurrent.futures import Future
from typing import Any

from rlhf_recipes.recipe.sections import RewardFunc
from rlhf_recipes.rewards.background import abandon_loop, run_in_loop, run_in_thread
from rlhf_recipes.rewards.checked import AsyncReward, CheckedReward, RewardError, SyncReward, Values
from rlhf_recipes.rewards.score import weighted_sum


def call_all(functions: list[CheckedReward], /, **call: Any) -> list[Values]:
    """Calls every reward function on B completions: one list of B values per function.

    Async functions, and functions with a timeout, run side by side. Meanwhile the other functions run in this thread, one
    after another: signals work in them, and they draw random numbers in a fixed order.

    Args:
        functions: Wrapped by `checked`.
        call: `prompts` and `completions`, texts or lists of chat messages; `completion_ids`, token ids with EOS;
            `finished`, which completions ended with EOS; the data's other columns, and anything else that a function may
            ask for by name.

    Raises:
        RewardError: A function failed. If several did, the first of them in the list.
    """
    answers = [_start(function, call) for function in functions]
    try:
        for function, answer in zip(functions, answers, strict=True):
            if isinstance(function, SyncReward) and function.timeout is None:
                try:
                    answer.set_result(function(**call))
                except RewardError as error:
                    answer.set_exception(error)
                    break  # a later function cannot change which error is raised
        return [_result(function, answer) for function, answer in zip(functions, answers, strict=True)]
    finally:
        for answer in answers:
            answer.cancel()


def _start(function: CheckedReward, call: dict[str, Any]) -> Future:
    """Starts a function that runs beside the others. A function of this thread gets a future that has no result yet."""
    if isinstance(function, AsyncReward):
        return run_in_loop(function(**call))
    return Future() if function.timeout is None else run_in_thread(function, **call)


def _result(function: CheckedReward, answer: Future) -> Values:
    try:
        return answer.result(None if function.timeout is None else function.timeout + 1)
    except TimeoutError as error:  # its own timer did not fire, so the event loop stands still
        abandon_loop()
        raise RewardError(
            f"reward function {function.__name__!r} did not answer within {function.timeout:g} s, nor could it be stopped: "
            "it, or another async one, blocks the event loop (time.sleep or requests instead of asyncio.sleep or aiohttp)."
        ) from error


def call_all_on_every_rank(functions: list[CheckedReward], /, **call: Any) -> list[Values]:
    """`call_all` for this process's completions. An error on one process is raised on all processes.

    Args:
        functions: As in `call_all`.
        call: As in `call_all`.

    Raises:
        RewardError: The error of the first process that has one; otherwise the other processes would wait forever.
    """
    from accelerate.utils import gather_object

    values: list[Values] = []
    error = None
    try:
        values = call_all(functions, **call)
    except RewardError as raised:
        error = raised
    messages = gather_object([error and str(error)])
    for rank, message in enumerate(messages):
        if message is not None:
            raise RewardError(message + (f" (process {rank})" if len(messages) > 1 else "")) from error
    return values


def score_all(
    specs: list[RewardFunc], functions: list[CheckedReward], /, **call: Any
) -> tuple[Values, dict[str, Values]]:
    """Scores B completions outside a trainer.

    Args:
        specs: The recipe's list of reward functions, for the weights.
        functions: One for each entry of `specs`.
        call: As in `call_all`.

    Returns:
        B scores, None where no function applies; and the B values of each function, by its name.
    """
    import numpy
    import torch

    values = call_all(functions, **call)
    by_name = {function.__name__: value for function, value in zip(functions, values, strict=True)}
    table = numpy.array(values, dtype=float).reshape(len(functions), len(call["completions"]))  # None becomes NaN
    weights = torch.tensor([spec.weight for spec in specs], dtype=torch.float64)
    scores = weighted_sum(torch.from_numpy(table).T, weights).tolist()
    return [None if math.isnan(score) else score for score in scores], by_name
