"""The reward functions that a recipe can name.

Each is a factory: its keyword arguments are the recipe's `args`, and it returns a function

    (prompts, completions, completion_ids, finished, **columns) -> list[float | None]

with one entry per completion, B of them. `prompts` and `completions` are texts, or lists of chat messages.
`completion_ids` are token ids, EOS included. `finished` is True for completions that ended with EOS, False for those that
were cut off. `columns` are the data's other columns. None means that the function does not apply to a completion: the
other functions then make its score. A recipe's only function must not return None.

Add a function here and name it in `registry.REWARD_FUNCS`; or write it in a file of your own, which changes no file here.
"""

import math
import re
from typing import Any, Literal

from rlhf_recipes.recipe.messages import as_text
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.rewards.checked import Reward
from rlhf_recipes.rewards.classifier import Dtype, batch_logits, label_index, load_classifier
from rlhf_recipes.rewards.reader import RewardModelReader


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
    classifier, tokenizer = load_classifier("sentiment", model, dtype=dtype, trust_remote_code=trust_remote_code)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # A classifier on a causal backbone reads the last token that is not padding: it must know which one pads.
    classifier.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    index = label_index(model, classifier.config, label)

    def score(prompts, completions, **columns) -> list[float]:
        texts = [_joined(p, c, text) for p, c in zip(prompts, completions, strict=True)]
        values = []
        for logits in batch_logits(classifier, tokenizer, texts, batch_size, max_length):
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
    parts = load_classifier("reward_model", model, dtype=dtype, trust_remote_code=trust_remote_code)
    return RewardModelReader(model, *parts, batch_size, max_length)


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


def _joined(prompt: str | list[dict], completion: str | list[dict], text: str) -> str:
    if text == "completion":
        return as_text(completion)
    separator = "" if isinstance(prompt, str) else "\n"
    return as_text(prompt) + separator + as_text(completion)


def _lengths(unit: str, call: dict[str, Any]) -> list[int]:
    if unit == "words":
        return [len(as_text(completion).split()) for completion in call["completions"]]
    return [len(ids) - ended for ids, ended in zip(call["completion_ids"], call["finished"], strict=True)]
