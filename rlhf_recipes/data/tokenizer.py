"""Tokenizers: loading, training from scratch, and the tokens of prompts and completions."""

import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.recipe.stages import Scratch
from rlhf_recipes.recipe.trust import runs_own_code
from rlhf_recipes.runs.references import loading, resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
"""Special tokens of a tokenizer from scratch. Pad and EOS differ, so that padding never hides an EOS."""


def load_tokenizer(recipe: Recipe, key: str, model_id: str, classifier: bool = False) -> "PreTrainedTokenizerBase":
    """Load a model's tokenizer. The recipe's `special_tokens` replace missing ones; otherwise it pads with EOS. Its chat
    template gets the recipe's `chat_template_kwargs`.

    If the recipe names a pad token, it also replaces a pad token that is the EOS token.

    A classifier's tokenizer pads on the right, and ends texts with its separator if it has no EOS (BERT's). Other
    tokenizers pad on the left, and must have an EOS token that they do not append to prompts.

    Raises:
        RecipeError: It cannot be loaded, has no EOS token, or appends it to prompts.
    """
    from transformers import AutoTokenizer

    side = "right" if classifier else "left"
    folder = resolve_model(recipe, key, model_id)
    with loading(key, model_id):
        tokenizer = AutoTokenizer.from_pretrained(
            folder,
            padding_side=side,
            truncation_side=side,
            trust_remote_code=runs_own_code(recipe, model_id),
        )
    for name in ("eos_token", "pad_token"):
        has = getattr(tokenizer, name)
        lacks = has is None or (name == "pad_token" and has == tokenizer.eos_token)
        if name in recipe.special_tokens and lacks:
            tokenizer.add_special_tokens({name: recipe.special_tokens[name]})
    fixed = "".join(f"{{%- set {name} = {json.dumps(v)} -%}}" for name, v in recipe.chat_template_kwargs.items())
    if isinstance(tokenizer.chat_template, str) and not tokenizer.chat_template.startswith(fixed):
        tokenizer.chat_template = fixed + tokenizer.chat_template
    if classifier and tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.eos_token_id is None:
        raise RecipeError(
            f"{key}: the tokenizer of {model_id} has no EOS token, which ends a text. "
            'Name one: special_tokens={eos_token: "..."}.'
        )
    if not classifier and tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]:
        raise RecipeError(
            f"{key}: the tokenizer of {model_id} ends every text with {tokenizer.eos_token}, even a prompt. "
            "Change that in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def make_tokenizer(scratch: Scratch, texts: list[str]) -> "PreTrainedTokenizerBase":
    """Train a tokenizer on `texts`: whole words between blanks, or byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = list(SPECIAL_TOKENS.values())
    if scratch.tokenizer == "word":
        tokenizer = Tokenizer(models.WordLevel(unk_token=SPECIAL_TOKENS["unk_token"]))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer: Any = trainers.WordLevelTrainer(
            vocab_size=scratch.vocabulary, special_tokens=special, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=scratch.vocabulary,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", clean_up_tokenization_spaces=False, **SPECIAL_TOKENS
    )


def token_ids(tokenizer: "PreTrainedTokenizerBase", prompt: str | list[dict]) -> list[int]:
    """Token ids of a prompt, text or chat messages, as TRL's trainers make them."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return through_template(tokenizer, prompt, "data", **options)["input_ids"]


def through_template(tokenizer: "PreTrainedTokenizerBase", messages: list[dict], where: str, **options: Any) -> Any:
    """Chat messages as the model reads them.

    Args:
        tokenizer: Has the chat template.
        messages: Chat messages.
        where: The messages' place, for the error.
        options: Of `apply_chat_template`.

    Raises:
        RecipeError: The chat template refuses the messages, such as a system message.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise RecipeError(
            f"{where}: the chat template of {tokenizer.name_or_path} refuses the messages ({roles}): {error}; make other "
            "messages with data.transform."
        ) from error


def longest_prompt(tokenizer: "PreTrainedTokenizerBase", prompts: Iterable[str | list[dict]]) -> int:
    """Number of tokens of the longest prompt."""
    return max(len(token_ids(tokenizer, prompt)) for prompt in prompts)


def continuation(tokenizer: "PreTrainedTokenizerBase", prompt_ids: list[int], completion_ids: list[int]) -> str:
    """The completion's text without special tokens, such that prompt + completion is the whole text.

    A completion decoded alone may lose its first blank: word-level and SentencePiece decoders drop it.
    """
    prompt = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt_ids, *completion_ids], skip_special_tokens=True)
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    return tokenizer.decode(completion_ids, skip_special_tokens=True)


def eos_token_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """All tokens that end a completion, as in TRL: the tokenizer's EOS and those in the model's configuration."""
    declared = model.generation_config.eos_token_id
    declared = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    return sorted({tokenizer.eos_token_id, *declared})


COUNT_FROM_PAD = {
    "camembert", "data2vec-text", "ibert", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
}  # fmt: skip
"""Encoders that number positions from the pad token id + 1: a text has 512 of RoBERTa's 514 positions."""


def context_length(config: "PreTrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> float:
    """The longest text in tokens that a model can read; infinite without a limit."""
    from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

    config = config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or math.inf
    if config.model_type in COUNT_FROM_PAD:
        context -= config.pad_token_id + 1
    if tokenizer.model_max_length < VERY_LARGE_INTEGER:  # its value when it is not set
        context = min(context, tokenizer.model_max_length)
    return context
