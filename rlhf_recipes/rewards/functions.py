"""The reward functions that a recipe can name.

Each is a factory. It takes the recipe's `args` as keywords, and returns a function

    (prompts, completions, completion_ids, finished, **columns) -> list[float | None]

that gives one value per completion. `prompts` and `completions` are texts, or lists of chat messages. `completion_ids` are
token ids, EOS included. `finished` is True for completions that ended with EOS, False for those that were cut off.
`columns` are the data's other columns. None means that the function does not apply to a completion, so that the other
functions alone make its score. A recipe's only function must not return None.

To add a function, write it here and name it in `registry.REWARD_FUNCS`; or write it in a file of your own.
"""

import math
from typing import Any, Literal

from rlhf_recipes.recipe.messages import as_text
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.rewards.checked import Reward, RewardError
from rlhf_recipes.rewards.classifier import Dtype, label_index, label_values, load_classifier
from rlhf_recipes.rewards.reader import RewardModelReader

SEARCH_SECONDS = 5.0
"""Seconds that the reward function `regex` may take for one completion."""


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
        model: Folder or Hub id of a sequence classifier.
        label: One of its labels, by name or by number.
        output: `logit` is unbounded; `probability` lies in 0..1.
        text: `all` classifies prompt and completion, `completion` only the completion.
        batch_size: Texts per forward pass.
        max_length: Longest text in tokens; longer texts lose their end.
        trust_remote_code: Whether Python code in the model's repository may run.
        dtype: Type of the weights. bfloat16 and float16 take half the memory; auto is the type they were saved in.
    """
    classifier, tokenizer = load_classifier("sentiment", model, dtype=dtype, trust_remote_code=trust_remote_code)
    pad: Any = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    index = label_index(model, classifier.config, label)

    def score(prompts, completions, **columns) -> list[float]:
        texts = [_joined(p, c, text) for p, c in zip(prompts, completions, strict=True)]
        rows = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        rows = [row or [pad] for row in rows]  # a model cannot read an empty text
        return label_values(classifier, rows, pad, batch_size, index, output == "probability")

    return score


def reward_model(
    model: str,
    batch_size: int = 64,
    max_length: int | None = None,
    trust_remote_code: bool = False,
    dtype: Dtype = "float32",
) -> Reward:
    """Score of a reward model, which reads each text in the format that it was trained on.

    Stage reward stores the format beside the model, in `scoring.json`. A model without this file reads as TRL's
    RewardTrainer trains: at the EOS that ends a finished text. Chat messages get the chat template of the model's own
    tokenizer. A completion that was cut off does not count as finished. The log says which format is in use.

    Args:
        model: `stage:reward`, or the folder or Hub id of a sequence classifier with one label.
        batch_size: Texts per forward pass.
        max_length: Longest text in tokens; longer texts lose their beginning. None: the limit of the training or of the
            model's context.
        trust_remote_code: Whether Python code in the model's repository may run.
        dtype: Type of the weights. bfloat16 and float16 take half the memory; auto is the type they were saved in.
    """
    parts = load_classifier("reward_model", model, dtype=dtype, trust_remote_code=trust_remote_code)
    return RewardModelReader(model, *parts, batch_size, max_length)


def vader_sentiment(text: Literal["all", "completion"] = "all") -> Reward:
    """VADER's compound sentiment, -1 (negative) to 1 (positive). It uses word lists instead of a model.

    Args:
        text: `all` rates prompt and completion, `completion` only the completion.
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
    """Minus the completion's length, so shorter is better. With a negative weight, longer is better.

    Args:
        unit: `words` are separated by blanks; `tokens` are the policy's, without EOS.
    """
    return lambda **call: [-float(n) for n in _lengths(unit, call)]


def length_range(minimum: int = 0, maximum: int | None = None, unit: Literal["words", "tokens"] = "words") -> Reward:
    """0 for a completion whose length lies within the range, -1 for any other.

    Args:
        minimum: Shortest length within the range.
        maximum: Longest length within the range. None: no limit.
        unit: `words` are separated by blanks; `tokens` are the policy's, without EOS.
    """
    longest = math.inf if maximum is None else maximum
    return lambda **call: [0.0 if minimum <= n <= longest else -1.0 for n in _lengths(unit, call)]


def repetition(unit: Literal["words", "tokens"] = "tokens") -> Reward:
    """Share of tokens that occurred before in the same completion, 0..1. Give it a negative weight.

    Args:
        unit: `words` are separated by blanks; `tokens` are the policy's.
    """

    def score(completions, completion_ids, **columns) -> list[float]:
        rows = completion_ids if unit == "tokens" else [as_text(c).split() for c in completions]
        return [1 - len(set(row)) / len(row) if row else 0.0 for row in rows]

    return score


def regex(pattern: str, match: float = 1.0, no_match: float = 0.0) -> Reward:
    """One value for completions that match a pattern, another for the rest.

    Args:
        pattern: A regular expression of the package `regex`, searched anywhere in the completion.
        match: Value of a completion that matches.
        no_match: Value of any other.
    """
    import regex as engine  # its searches end, and `re`'s may not

    try:
        compiled = engine.compile(pattern)
    except engine.error as error:
        raise RecipeError(f"reward_funcs: regex: {pattern!r} is no regular expression: {error}.") from error

    def value(text: str) -> float:
        try:
            return match if compiled.search(text, timeout=SEARCH_SECONDS) else no_match
        except TimeoutError as error:
            raise RewardError(
                f"reward_funcs: regex: {pattern!r} took more than {SEARCH_SECONDS:g} s on {text[:80]!r}: it backtracks; "
                "write it without a repeat inside of a repeat."
            ) from error

    return lambda completions, **columns: [value(as_text(c)) for c in completions]


def _joined(prompt: str | list[dict], completion: str | list[dict], text: str) -> str:
    if text == "completion":
        return as_text(completion)
    separator = "" if isinstance(prompt, str) else "\n"
    return as_text(prompt) + separator + as_text(completion)


def _lengths(unit: str, call: dict[str, Any]) -> list[int]:
    if unit == "words":
        return [len(as_text(completion).split()) for completion in call["completions"]]
    return [len(ids) - ended for ids, ended in zip(call["completion_ids"], call["finished"], strict=True)]
