"""What TRL's trainers take as `reward_funcs`, as this project's reward functions."""

import functools
import inspect
import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.rewards.calls import CheckedReward
from rlhf_recipes.rewards.checked import checked
from rlhf_recipes.rewards.classifier import load_classifier, on_device, own_tokenizer
from rlhf_recipes.rewards.reader import RewardModelReader
from rlhf_recipes.rewards.timed import TimedReward


def as_reward_func(function: Any, processing_class: Any = None) -> Callable:
    """Turns anything that TRL's trainers take as a reward function into a callable.

    Args:
        function: A callable, which is returned as it is; or a sequence classifier with one label, as a model id or an
            instance. Such a model scores as the reward function `reward_model` does.
        processing_class: The model's tokenizer. None: the one saved with it.

    Raises:
        RecipeError: The model cannot be used as a reward model, or `function` is something else.
    """
    from torch import nn

    config = getattr(function, "config", None)
    if isinstance(function, str):
        model_id, (classifier, tokenizer) = function, load_classifier("reward_model", function, processing_class)
    elif isinstance(function, nn.Module) and config is not None:  # also a compiled model or one with PEFT
        model_id, classifier = config._name_or_path, on_device(function)
        if processing_class is None and not model_id:
            raise RecipeError(
                f"reward_funcs: {type(function).__name__} does not say where it was loaded from; pass its tokenizer too."
            )
        tokenizer = processing_class or own_tokenizer("reward_model", model_id)
    elif callable(function):
        return function
    else:
        raise RecipeError(
            f"reward_funcs: {function!r} is no reward function; it must be a callable, a model or a model id."
        )
    return RewardModelReader(model_id, classifier, tokenizer, batch_size=64, max_length=None)


def as_reward_funcs(functions: Any, processing_classes: Any, timeout: float | None) -> tuple[list[CheckedReward], list]:
    """What TRL's trainers take as `reward_funcs`, one or several, as checked functions; and the tokenizer of each.

    Args:
        functions: One, or a list; each as `as_reward_func` takes it.
        processing_classes: One for each function, or one for all.
        timeout: Seconds to answer in. A function of an importable module, or a partial of one, then gets a process of its
            own. Models, objects, lambdas and functions inside of functions get a thread, which cannot be stopped: one
            that holds the interpreter (a regular expression that backtracks) also holds the timeout and signals.

    Raises:
        RecipeError: There are more or fewer processing classes than functions.
    """
    from trl.trainer.utils import get_callable_name

    functions = functions if isinstance(functions, list) else [functions]
    several = isinstance(processing_classes, list)
    tokenizers = processing_classes if several else [processing_classes] * len(functions)
    if len(tokenizers) != len(functions):
        raise RecipeError(
            f"reward_processing_classes has {len(tokenizers)} entries for {len(functions)} reward functions; give one for "
            "each, None for a function that is no model."
        )
    made = [as_reward_func(f, tokenizer) for f, tokenizer in zip(functions, tokenizers, strict=True)]
    tokenizers = [getattr(f, "tokenizer", tokenizer) for f, tokenizer in zip(made, tokenizers, strict=True)]
    return [_with_timeout(f, get_callable_name(f), timeout) for f in made], tokenizers


def _with_timeout(function: Callable, name: str, timeout: float | None) -> CheckedReward:
    if isinstance(function, TimedReward):
        return function
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    if timeout is not None and inspect.isfunction(inner) and inner.__module__ != "__main__":
        with suppress(pickle.PicklingError, AttributeError, TypeError):
            return TimedReward(("pickle", pickle.dumps(function)), name, True, timeout)
    return checked(function, name, may_skip=True, timeout=timeout)
