"""Calls reward functions on completions, slow functions side by side, and makes scores of their values."""

import math
import time
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any

from rlhf_recipes.recipe.sections import RewardFunc
from rlhf_recipes.rewards.apart import RewardStreams
from rlhf_recipes.rewards.background import abandon_loop, run_in_loop, run_in_thread
from rlhf_recipes.rewards.checked import AsyncReward, RewardError, SyncReward, Values, late
from rlhf_recipes.rewards.score import weighted_sum
from rlhf_recipes.rewards.timed import TimedReward

CheckedReward = SyncReward | AsyncReward | TimedReward


def call_all(functions: list[CheckedReward], streams: RewardStreams | None = None, /, **call: Any) -> list[Values]:
    """Calls every reward function on B completions: one list of B values per function.

    Async functions, and functions with a timeout, run side by side. Meanwhile the other functions run in this thread, one
    after another: signals work in them, and they draw random numbers in a fixed order.

    Args:
        functions: Wrapped by `checked`, or a `TimedReward`.
        streams: Their random numbers, which go on from call to call. None: they begin anew.
        call: `prompts` and `completions`, texts or lists of chat messages; `completion_ids`, token ids with EOS;
            `finished`, which completions ended with EOS; the data's other columns, and anything else that a function may
            ask for by name.

    Raises:
        RewardError: A function failed. If several did, the first of them in the list.
    """
    streams = streams or RewardStreams()
    answers: dict[int, Future] = {}
    with streams.swapped_in(), ExitStack() as leaving:
        for i, function in enumerate(functions):
            if isinstance(function, TimedReward):
                leaving.callback(function.give_up)
                function.begin(call, streams, f"{i} {function.__name__}")
            elif isinstance(function, AsyncReward):
                answers[i] = run_in_loop(function, **call)
                leaving.callback(answers[i].cancel)
            elif function.timeout is not None:
                answers[i] = run_in_thread(function, **call)
        started = time.monotonic()
        for i, function in enumerate(functions):
            if isinstance(function, SyncReward) and function.timeout is None:
                answers[i] = Future()
                try:
                    answers[i].set_result(function(**call))
                except RewardError as error:
                    answers[i].set_exception(error)
                    break  # a later function cannot change which error is raised
        return [
            function.finish() if isinstance(function, TimedReward) else _wait(function, answers[i], call, started)
            for i, function in enumerate(functions)
        ]


def _wait(function: SyncReward | AsyncReward, answer: Future, call: dict[str, Any], started: float) -> Values:
    if function.timeout is None:
        return answer.result()
    try:
        return answer.result(max(0.0, started + function.timeout - time.monotonic()))
    except TimeoutError as error:
        if isinstance(function, AsyncReward):
            abandon_loop()
        raise late(function.__name__, function.timeout, call) from error


def call_all_on_every_rank(functions: list[CheckedReward], streams: RewardStreams, /, **call: Any) -> list[Values]:
    """`call_all` for this process's completions. An error on one process is raised on all processes.

    Args:
        functions: As in `call_all`.
        streams: As in `call_all`.
        call: As in `call_all`.

    Raises:
        RewardError: The error of the first process that has one; otherwise the other processes would wait forever.
    """
    from accelerate.utils import gather_object

    values: list[Values] = []
    error = None
    try:
        values = call_all(functions, streams, **call)
    except RewardError as raised:
        error = raised
    messages = gather_object([error and str(error)])
    for rank, message in enumerate(messages):
        if message is not None:
            raise RewardError(message + (f" (process {rank})" if len(messages) > 1 else "")) from error
    return values


def score_all(
    specs: list[RewardFunc], functions: list[CheckedReward], seed: int, /, **call: Any
) -> tuple[Values, dict[str, Values]]:
    """Scores B completions outside a trainer.

    The functions see the state at the end of a training; what they log is dropped.

    Args:
        specs: The recipe's list of reward functions, for the weights.
        functions: One for each entry of `specs`.
        seed: Of the functions' random numbers.
        call: As in `call_all`.

    Returns:
        B scores, None where no function applies; and the B values of each function, by its name.
    """
    import numpy
    import torch
    from transformers import TrainerState

    state = TrainerState(epoch=1.0, global_step=1, max_steps=1, num_train_epochs=1)
    call = {"trainer_state": state, "log_extra": _drop, "log_metric": _drop} | call
    values = call_all(functions, RewardStreams(seed), **call)
    by_name = {function.__name__: value for function, value in zip(functions, values, strict=True)}
    table = numpy.array(values, dtype=float).reshape(len(functions), len(call["completions"]))  # None becomes NaN
    weights = torch.tensor([spec.weight for spec in specs], dtype=torch.float64)
    scores = weighted_sum(torch.from_numpy(table).T, weights).tolist()
    return [None if math.isnan(score) else score for score in scores], by_name


def _drop(*arguments: Any, **keywords: Any) -> None:
    """Stands for the logging of a training."""
