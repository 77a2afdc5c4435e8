"""Finds the reward functions that a recipe names, checks their arguments, and builds them.

`REWARD_FUNCS` lists the names. A user's own function is `module:function` or `path/to/file.py:function`. It is a factory
like those in `functions.py`, or a reward function itself, which has a parameter `completions`.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.recipe.sections import CALL_KEYWORDS, RewardFunc
from rlhf_recipes.recipe.trust import own_code, require_trusted_model
from rlhf_recipes.recipe.user_code import find_function, running_user_code, signature_of
from rlhf_recipes.rewards import functions
from rlhf_recipes.rewards.apart import RewardStreams
from rlhf_recipes.rewards.calls import CheckedReward
from rlhf_recipes.rewards.checked import Reward, checked
from rlhf_recipes.rewards.timed import TimedReward
from rlhf_recipes.runs.references import resolve_model

REWARD_FUNCS: dict[str, Callable[..., Reward]] = {
    "sentiment": functions.sentiment,
    "vader_sentiment": functions.vader_sentiment,
    "reward_model": functions.reward_model,
    "length": functions.length,
    "length_range": functions.length_range,
    "repetition": functions.repetition,
    "regex": functions.regex,
}

WHAT = "reward function"  # in messages about a user's own

MISTAKEN = ("prompt", "completion", "response", "responses", "query", "queries")
"""Parameters that a call never fills in, which other libraries have."""


def check_functions(recipe: Recipe) -> list[str]:
    """Finds errors in the names and arguments of a recipe's functions. No model is loaded, and none of the user's code runs."""
    checks: dict[str, Callable[[], Any]] = {}
    for key, data in (("data", recipe.data), ("reward.data", recipe.reward.data if recipe.reward else None)):
        if data is not None and data.transform is not None:
            checks[f"{key}.transform"] = functools.partial(signature_of, data.transform, "function")
    for key, model in own_code(recipe).items():
        checks[key] = functools.partial(require_trusted_model, "own code", model)
    for key, specs in (("reward_funcs", recipe.reward_funcs), ("eval.held_out_funcs", recipe.eval.held_out_funcs)):
        checks |= {f"{key}.{i}": functools.partial(_check_args, spec) for i, spec in enumerate(specs)}
    findings = []
    for key, check in checks.items():
        try:
            check()
        except RecipeError as error:
            findings.append(f"{key}: {error}")
    return findings


def build_reward_funcs(recipe: Recipe, specs: list[RewardFunc], key: str = "reward_funcs") -> list[CheckedReward]:
    """Builds reward functions for a trainer: binds their arguments, loads their models, and wraps them by `checked`.

    Each has its own `__name__`, under which TRL logs it.

    Args:
        recipe: Resolves model ids such as `stage:reward`.
        specs: The recipe's list of reward functions.
        key: Where the list is in the recipe. It replaces `reward_funcs` at the beginning of a factory's message.

    Raises:
        RecipeError: Unknown name, wrong argument, or a model that cannot be loaded. Names the entry of the list.
    """
    built: list[CheckedReward] = []
    names: list[str] = []
    for i, spec in enumerate(specs):
        with RewardStreams(recipe.seed).swapped_in():  # a module may also seed and set what it likes
            found = REWARD_FUNCS.get(spec.name) or find_function(_named(spec), WHAT)
        _check_args(spec, found)
        args = dict(spec.args)
        for name, value in args.items():
            is_model = name == "model" and spec.name in REWARD_FUNCS
            if isinstance(value, str) and (is_model or value.startswith("stage:")):
                args[name] = resolve_model(recipe, f"{key}.{i}.args.{name}", value)
        if spec.name in REWARD_FUNCS and args.get("trust_remote_code"):
            given = str(spec.args["model"])
            require_trusted_model(f"{key}.{i}.args", args["model"] if given.startswith("stage:") else given)
        name = spec.name.rpartition(":")[2]
        names.append(name)
        if names.count(name) > 1:
            name = f"{name}_{names.count(name)}"
        may_skip = len(specs) > 1
        try:
            if spec.timeout is not None:
                built.append(TimedReward(("recipe", (spec.name, args)), name, may_skip, spec.timeout))
            else:
                with _complete_models(), RewardStreams(recipe.seed).swapped_in():
                    built.append(checked(_bind(spec.name, found, args), name, may_skip))
        except RecipeError as error:  # the factory does not know the function's place in the list
            message = str(error)
            where = "" if message.startswith("reward_funcs") else ": "
            raise RecipeError(f"{key}.{i}{where}{message.removeprefix('reward_funcs')}") from error
    return built


def bind_named(name: str, args: dict[str, Any]) -> Callable:
    """A reward function with its arguments, which have been checked; see `build_reward_funcs`."""
    return _bind(name, REWARD_FUNCS.get(name) or find_function(name, WHAT, is_announced=True), args)


@contextmanager
def _complete_models() -> Iterator[None]:
    """Makes every process load complete models under ZeRO-3, too. Nothing would gather the parts of a reward model."""
    from transformers.integrations import deepspeed

    zero3 = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = zero3


def _named(spec: RewardFunc) -> str:
    """The name of a user's own function, `module:function` or `file.py:function`."""
    if ":" not in spec.name:
        near = difflib.get_close_matches(spec.name, REWARD_FUNCS, n=3, cutoff=0.4)
        raise RecipeError(
            f"unknown reward function {spec.name!r}; "
            + (f"nearest: {', '.join(near)}. " if near else f"known: {', '.join(REWARD_FUNCS)}. ")
            + "Your own: module:function or path/to/file.py:function."
        )
    return spec.name


def _takes_completions(signature: inspect.Signature) -> bool:
    """Whether a function is a reward function itself, as TRL's users write them. Any other function is a factory."""
    return "completions" in signature.parameters


def _check_args(spec: RewardFunc, found: Callable | None = None) -> None:
    found = found or REWARD_FUNCS.get(spec.name)
    signature = inspect.signature(found) if found else signature_of(_named(spec), WHAT)
    if signature is None:  # known once the function is found
        return
    is_reward, parameters = _takes_completions(signature), signature.parameters.values()
    known = {
        p.name: p
        for p in parameters
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and not (is_reward and p.name in CALL_KEYWORDS)
    }
    takes_any = is_reward and any(p.kind is p.VAR_KEYWORD for p in parameters)
    for name, value in spec.args.items():
        if name not in known and not takes_any:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"nearest: {near[0]}" if near else f"it takes: {', '.join(known) or 'none'}"
            raise RecipeError(f"{spec.name} has no argument {name!r}; {hint}.")
        choices = get_args(known[name].annotation) if name in known else ()
        if choices and all(isinstance(choice, str) for choice in choices) and value not in choices:
            raise RecipeError(f"{spec.name}: {name} must be one of {', '.join(choices)}, not {value!r}.")
    needed = [name for name, p in known.items() if p.default is p.empty and name not in spec.args]
    if mistaken := [name for name in needed if name in CALL_KEYWORDS or name in MISTAKEN]:
        raise RecipeError(
            f"{spec.name} has the parameters {', '.join(mistaken)}; a reward function has `completions`, the list of all "
            f"completions (and perhaps others of {', '.join(CALL_KEYWORDS)}, and columns of the data)."
        )
    if needed and not is_reward:
        raise RecipeError(f"{spec.name} needs the argument {needed[0]!r}.")


def _bind(name: str, found: Callable, args: dict[str, Any]) -> Callable:
    if _takes_completions(inspect.signature(found)):
        return functools.partial(found, **args)
    with running_user_code(f"reward function {name!r} could not be set up"):
        function = found(**args)
    if not callable(function):
        raise RecipeError(
            f"reward function {name!r} returned {type(function).__name__} when set up; a factory returns a function "
            "(or write the function itself, with a parameter `completions`)."
        )
    return function
