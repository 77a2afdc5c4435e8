"""The registry of reward functions: finds a recipe's functions, checks their arguments, builds them.

`REWARD_FUNCS` is the one place that knows the names. A user's own function is `module:function` or `path/to/file.py:function`:
a factory like those in `functions.py`, or the reward function itself, which has a parameter `completions`.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rlhf_recipes.recipe.schema import Recipe, RecipeError, RewardFunc
from rlhf_recipes.recipe.user_code import find_function, running_user_code
from rlhf_recipes.rewards.calls import Reward, callable_name, checked
from rlhf_recipes.rewards.classifier import load_classifier, own_tokenizer, placed
from rlhf_recipes.rewards.functions import (
    length,
    length_range,
    regex,
    repetition,
    reward_model,
    sentiment,
    vader_sentiment,
)
from rlhf_recipes.rewards.reader import reader
from rlhf_recipes.runs.references import resolve_model

REWARD_FUNCS: dict[str, Callable[..., Reward]] = {
    "sentiment": sentiment,
    "vader_sentiment": vader_sentiment,
    "reward_model": reward_model,
    "length": length,
    "length_range": length_range,
    "repetition": repetition,
    "regex": regex,
}


def check_reward_funcs(recipe: Recipe) -> list[str]:
    """Findings about the names and arguments of a recipe's reward functions; loads no model."""
    findings = []
    for key, specs in (("reward_funcs", recipe.reward_funcs), ("eval.held_out_funcs", recipe.eval.held_out_funcs)):
        for i, spec in enumerate(specs):
            try:
                _check_args(spec, _find(spec.name))
            except RecipeError as error:
                findings.append(f"{key}.{i}: {error}")
    return findings


def build_reward_funcs(recipe: Recipe, specs: list[RewardFunc], key: str = "reward_funcs") -> list[Reward]:
    """Reward functions ready for a trainer: arguments bound, models loaded, every call checked.

    Each has a `__name__` of its own, under which TRL logs it.

    Raises:
        RecipeError: Unknown name, wrong argument, or a model that cannot be loaded. A key `reward_funcs` at the
            beginning of a factory's message becomes that of the list's entry, such as `reward_funcs.0`.
        RewardError: Raised by the functions themselves, when called, with the function's name and the sample.
    """
    built, names = [], []
    for i, spec in enumerate(specs):
        found = _find(spec.name)
        _check_args(spec, found)
        args = dict(spec.args)
        for name, value in args.items():
            is_model = name == "model" and spec.name in REWARD_FUNCS
            if isinstance(value, str) and (is_model or value.startswith("stage:")):
                args[name] = resolve_model(recipe, f"{key}.{i}.args.{name}", value)
        name = spec.name.rpartition(":")[2]
        names.append(name)
        if names.count(name) > 1:
            name = f"{name}_{names.count(name)}"
        try:
            with _whole_models():
                function = _bind(spec, found, args)
        except RecipeError as error:  # it cannot know its place in the list
            message = str(error)
            where = "" if message.startswith("reward_funcs") else ": "
            raise RecipeError(f"{key}.{i}{where}{message.removeprefix('reward_funcs')}") from error
        built.append(checked(function, name, may_skip=len(specs) > 1, timeout=spec.timeout))
    return built


@contextmanager
def _whole_models() -> Iterator[None]:
    """Inside, every process loads all of a model under ZeRO-3, too: no engine would put together one that is spread."""
    from transformers.integrations import deepspeed

    spread = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = spread


def _find(name: str) -> Callable:
    """The factory or function behind a name of the registry, `module:function` or `file.py:function`."""
    if name in REWARD_FUNCS:
        return REWARD_FUNCS[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, REWARD_FUNCS, n=3, cutoff=0.4)
        raise RecipeError(
            f"unknown reward function {name!r}; "
            + (f"nearest: {', '.join(near)}. " if near else f"known: {', '.join(REWARD_FUNCS)}. ")
            + "Your own: module:function or path/to/file.py:function."
        )
    return find_function(name, "reward function")


def _is_reward_itself(function: Callable) -> bool:
    """A function that takes completions is a reward function, as TRL's users write them; any other is a factory."""
    return "completions" in inspect.signature(function).parameters


def _check_args(spec: RewardFunc, found: Callable) -> None:
    parameters = inspect.signature(found).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    of_a_call = {"prompts", "completions", "completion_ids", "finished", "trainer_state", "log_extra", "log_metric"}
    itself = _is_reward_itself(found)
    known = [
        name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD and not (itself and name in of_a_call)
    ]
    for name, value in spec.args.items():
        if name not in known and not (itself and takes_any):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"nearest: {near[0]}" if near else f"it takes: {', '.join(known) or 'none'}"
            raise RecipeError(f"{spec.name} has no argument {name!r}; {hint}.")
        allowed = getattr(parameters[name].annotation, "__args__", ()) if name in parameters else ()
        if allowed and all(isinstance(choice, str) for choice in allowed) and value not in allowed:
            raise RecipeError(f"{spec.name}: {name} must be one of {', '.join(allowed)}, not {value!r}.")
    if not itself:
        for name in known:
            if (
                parameters[name].default is inspect.Parameter.empty
                and name not in spec.args
                and parameters[name].kind is not inspect.Parameter.VAR_POSITIONAL
            ):
                raise RecipeError(f"{spec.name} needs the argument {name!r}.")


def _bind(spec: RewardFunc, found: Callable, args: dict[str, Any]) -> Callable:
    if _is_reward_itself(found):
        return functools.partial(found, **args)
    with running_user_code(f"reward function {spec.name!r} could not be set up"):
        function = found(**args)
    if not callable(function):
        raise RecipeError(
            f"reward function {spec.name!r} returned {type(function).__name__} when set up; a factory returns a function "
            "(or write the function itself, with a parameter `completions`)."
        )
    return function


def as_reward_func(
    function: Any, processing_class: Any = None, batch_size: int = 64, max_length: int | None = None
) -> Callable:
    """Turns anything that TRL's trainers take as a reward function into a function with a `__name__`, which TRL logs.

    Args:
        function: A callable, which comes back as it is (or as a `partial` of it, where it has no name); or a Hub id, a
            folder or an instance of a sequence classifier with one label: it is read as `reward_model` reads.
        processing_class: The tokenizer of such a model. None: its own.
        batch_size: Of such a model: texts a forward pass.
        max_length: Of such a model: see `reward_model`.

    Raises:
        RecipeError: The model cannot be used as a reward model, or it is none of these.
    """
    from torch import nn

    if isinstance(function, str):
        model, (classifier, tokenizer) = function, load_classifier("reward_model", function, processing_class)
    elif isinstance(function, nn.Module) and hasattr(function, "config"):  # not only PreTrainedModel: compiled, PEFT
        model, classifier = function.config._name_or_path, placed(function)
        if processing_class is None and not model:
            raise RecipeError(
                f"reward_funcs: {type(function).__name__} does not say where it was loaded from; pass its tokenizer too."
            )
        tokenizer = processing_class or own_tokenizer("reward_model", model)
    elif callable(function):
        if not hasattr(function, "__name__"):
            function, name = functools.partial(function), callable_name(function)
            function.__name__ = name
        return function
    else:
        raise RecipeError(
            f"reward_funcs: {function!r} is no reward function; it must be a callable, or a model, its Hub id or its folder."
        )
    score = reader(model, classifier, tokenizer, batch_size, max_length)
    score.__name__ = model.split("/")[-1] or type(function).__name__
    return score
