"""Reward functions: what a recipe can name, how a user's own are found, and the checks around every call.

A registry entry is a factory: its keyword arguments are the recipe's `args`, and it returns a function

    (prompts, completions, completion_ids, finished, **columns) -> list[float | None]

with one entry per completion (B of them): `prompts` and `completions` are texts, or lists of chat messages;
`completion_ids` are token ids, EOS included; `finished` says which completions ended with EOS instead of being cut
off; `columns` are the data's other columns. None means "does not apply to this one": of several functions the others then
make the score; a recipe's only one must not say it.
"""

import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from rlhf_recipes.models.load import load_model
from rlhf_recipes.recipe.schema import Recipe, RecipeError, RewardFunc
from rlhf_recipes.recipe.user_code import find_function, running_user_code
from rlhf_recipes.rewards.calls import (
    Reward,
    RewardError,  # noqa: F401  # whoever calls reward functions looks for it here
    as_text,
    call_all,
    callable_name,
    checked,
)
from rlhf_recipes.rewards.reader import reader
from rlhf_recipes.runs.references import loading, resolve_model

Dtype = Literal["float32", "bfloat16", "float16", "auto"]


def sentiment(
    model: str,
    label: str | int = "POSITIVE",
    output: Literal["logit", "probability"] = "logit",
    text: Literal["all", "completion"] = "all",
    batch_size: int = 64,
    max_length: int = 512,
    trust_remote_code: bool = False,
    dtype: Dtype = "float32",
) -> Reward:
    """Logit or probability of one label of any text classifier.

    Args:
        model: Hub id or folder of a sequence classifier.
        label: One of its labels, by name or by number.
        output: `logit` is unbounded; `probability` lies in 0..1.
        text: `all` classifies prompt and completion, `completion` only that.
        batch_size: Texts a forward pass.
        max_length: Longer texts are cut to this many tokens.
        trust_remote_code: Whether Python code that comes with the model may run.
        dtype: What the model computes in; bfloat16 and float16 take half the memory, auto is what it was saved in.
    """
    classifier, tokenizer = _classifier("sentiment", model, dtype=dtype, trust_remote_code=trust_remote_code)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # A classifier on a causal backbone reads the last token that is not padding: it must know which one pads.
    classifier.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    index = _label_index(model, classifier.config, label)

    def score(prompts, completions, **columns) -> list[float]:
        texts = [_joined(p, c, text) for p, c in zip(prompts, completions, strict=True)]
        values = []
        for logits in _forward(classifier, tokenizer, texts, batch_size, max_length):
            values += (logits.softmax(-1) if output == "probability" else logits)[:, index].tolist()
        return values

    return score


def reward_model(
    model: str,
    batch_size: int = 64,
    max_length: int | None = None,
    trust_remote_code: bool = False,
    dtype: Dtype = "float32",
) -> Reward:
    """Scalar score of a reward model, read where it was trained to be read; a cut-off completion is not read as finished.

    How it was trained stands beside it in `scoring.json`, which stage reward writes and which is followed. Without that
    file it is read as TRL's RewardTrainer trains: at the EOS behind a finished text. Its own tokenizer is used, and its
    chat template for chat messages. The log says what is done.

    Args:
        model: `stage:reward`, a Hub id or a folder of a sequence classifier with one label.
        batch_size: Texts a forward pass.
        max_length: Longer texts lose their beginning. None: as long as the training's, and the model's context.
        trust_remote_code: Whether Python code that comes with the model may run.
        dtype: What the model computes in; bfloat16 and float16 take half the memory, auto is what it was saved in.
    """
    parts = _classifier("reward_model", model, dtype=dtype, trust_remote_code=trust_remote_code)
    return reader(model, *parts, batch_size, max_length)


def as_reward_func(
    function: Any, processing_class: Any = None, batch_size: int = 64, max_length: int | None = None
) -> Callable:
    """What TRL's trainers take as a reward function, as a function that has a `__name__`: the one that TRL logs it by.

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
        model, (classifier, tokenizer) = function, _classifier("reward_model", function, processing_class)
    elif isinstance(function, nn.Module) and hasattr(function, "config"):  # not only PreTrainedModel: compiled, PEFT
        model, classifier = function.config._name_or_path, _placed(function)
        if processing_class is None and not model:
            raise RecipeError(
                f"reward_funcs: {type(function).__name__} does not say where it was loaded from; pass its tokenizer too."
            )
        tokenizer = processing_class or _tokenizer("reward_model", model)
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


def vader_sentiment(text: Literal["all", "completion"] = "all") -> Reward:
    """VADER's compound sentiment, -1 (negative) to 1 (positive), from word lists: no model.

    Args:
        text: `all` rates prompt and completion, `completion` only that.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise RecipeError("vader_sentiment needs vaderSentiment: pip install 'rlhf-recipes[offline]'") from error
    analyzer = SentimentIntensityAnalyzer()

    def score(prompts, completions, **columns) -> list[float]:
        texts = (_joined(p, c, text) for p, c in zip(prompts, completions, strict=True))
        return [analyzer.polarity_scores(t)["compound"] for t in texts]

    return score


def length(unit: Literal["words", "tokens"] = "words") -> Reward:
    """Minus the completion's length: shorter is better; a negative weight turns it round.

    Args:
        unit: `words` are separated by blanks; `tokens` are the policy's, EOS not counted.
    """
    return lambda **call: [-float(n) for n in _lengths(unit, call)]


def length_range(minimum: int = 0, maximum: int | None = None, unit: Literal["words", "tokens"] = "words") -> Reward:
    """0 for a completion whose length lies within the range, -1 for any other.

    Args:
        minimum: Shortest length that is within.
        maximum: Longest length that is within. None: no limit.
        unit: `words` are separated by blanks; `tokens` are the policy's, EOS not counted.
    """
    longest = math.inf if maximum is None else maximum
    return lambda **call: [0.0 if minimum <= n <= longest else -1.0 for n in _lengths(unit, call)]


def repetition(unit: Literal["words", "tokens"] = "tokens") -> Reward:
    """Share of tokens that occurred before in the same completion, 0..1; give it a negative weight.

    Args:
        unit: `words` are separated by blanks; `tokens` are the policy's.
    """

    def score(completions, completion_ids, **columns) -> list[float]:
        rows = completion_ids if unit == "tokens" else [as_text(c).split() for c in completions]
        return [1 - len(set(row)) / len(row) if row else 0.0 for row in rows]

    return score


def regex(pattern: str, match: float = 1.0, no_match: float = 0.0) -> Reward:
    """One value for completions in which the pattern is found, another for the rest.

    Args:
        pattern: A Python regular expression, searched anywhere in the completion.
        match: The value where it is found.
        no_match: The value where it is not.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise RecipeError(f"reward_funcs: regex: {pattern!r} is no regular expression: {error}.") from error
    return lambda completions, **columns: [match if compiled.search(as_text(c)) else no_match for c in completions]


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
    """What is wrong with the names and arguments of a recipe's reward functions; no model is loaded."""
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


def weighted_scores(specs: list[RewardFunc], values: list[list[float | None]]) -> list[float | None]:
    """Weighted sum over reward functions for every completion; None where no function applies.

    Args:
        specs: For the weights.
        values: One list of B values per reward function.
    """
    scores = []
    for row in zip(*values, strict=True):
        terms = [spec.weight * value for spec, value in zip(specs, row, strict=True) if value is not None]
        scores.append(sum(terms) if terms else None)
    return scores


def score_all(
    specs: list[RewardFunc], functions: list[Reward], **call: Any
) -> tuple[list[float | None], dict[str, list[float | None]]]:
    """Call every reward function outside a trainer: weighted scores of B completions, and each function's own values."""
    values = call_all(functions, **call)
    by_name = {function.__name__: value for function, value in zip(functions, values, strict=True)}
    return weighted_scores(specs, values), by_name


def _joined(prompt: str | list[dict], completion: str | list[dict], text: str) -> str:
    if text == "completion":
        return as_text(completion)
    separator = "" if isinstance(prompt, str) else "\n"
    return as_text(prompt) + separator + as_text(completion)


def _lengths(unit: str, call: dict[str, Any]) -> list[int]:
    if unit == "words":
        return [len(as_text(completion).split()) for completion in call["completions"]]
    return [len(ids) - ended for ids, ended in zip(call["completion_ids"], call["finished"], strict=True)]


def _classifier(
    name: str, model: str, tokenizer: Any = None, trust_remote_code: bool = False, dtype: Dtype = "float32"
):
    from transformers import AutoModelForSequenceClassification

    key = f"reward_funcs: {name}: model"
    classifier = load_model(AutoModelForSequenceClassification, key, model, trust_remote_code, dtype=dtype)
    return _placed(classifier), tokenizer or _tokenizer(name, model, trust_remote_code)


def _tokenizer(name: str, model: str, trust_remote_code: bool = False):
    from transformers import AutoTokenizer

    with loading(f"reward_funcs: {name}: model", model):
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)


def _placed(classifier):
    from accelerate import PartialState

    device = PartialState().device
    return (classifier if classifier.device == device else classifier.to(device)).eval()


def _forward(classifier, tokenizer, texts: list[str], batch_size: int, max_length: int | None) -> Iterator:
    """Logits (batch, labels) of every batch of texts."""
    import torch

    for start in range(0, len(texts), batch_size):
        inputs = tokenizer(
            texts[start : start + batch_size],
            return_tensors="pt",
            padding=True,
            truncation=max_length is not None,
            max_length=max_length,
        ).to(classifier.device)
        with torch.inference_mode():
            yield classifier(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.float()


def _label_index(model: str, config: Any, label: str | int) -> int:
    by_name = {str(name).lower(): i for i, name in config.id2label.items()}
    if isinstance(label, int) and 0 <= label < config.num_labels:
        return label
    if str(label).lower() in by_name:
        return by_name[str(label).lower()]
    raise RecipeError(
        f"reward_funcs.args.label: {model} has no label {label!r}; it has: {', '.join(map(str, config.id2label.values()))}."
    )
