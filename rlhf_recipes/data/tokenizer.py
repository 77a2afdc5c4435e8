"""Tokenizers: loading a model's, making one, and what prompts and completions are in its tokens."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rlhf_recipes.recipe.schema import Recipe, RecipeError, Scratch
from rlhf_recipes.runs.references import loading, resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
"""Special tokens of a tokenizer made from scratch: pad and EOS are distinct, so that padding never hides an EOS."""


def load_tokenizer(recipe: Recipe, key: str, reference: str, classifier: bool = False) -> "PreTrainedTokenizerBase":
    """Load a model's tokenizer, with the recipe's special tokens where it lacks them; else without pad it pads with EOS.

    A pad token that is the EOS token counts as none where the recipe has one.

    Args:
        recipe: The recipe, for `special_tokens` and `trust_remote_code`.
        key: Where the model stands in the recipe, for messages.
        reference: The model, as in `resolve_model`.
        classifier: Whether a sequence classifier will read it: then it pads on the right, and a tokenizer without EOS
            (BERT's) ends texts with its separator. Otherwise it pads on the left, and must have an EOS token of its
            own that it does not put behind every prompt.

    Raises:
        RecipeError: It cannot be loaded, or cannot be used.
    """
    from transformers import AutoTokenizer

    side = "right" if classifier else "left"
    folder = resolve_model(recipe, key, reference)
    with loading(key, reference):
        tokenizer = AutoTokenizer.from_pretrained(
            folder,
            padding_side=side,
            truncation_side=side,
            trust_remote_code=reference in recipe.trust_remote_code,
        )
    for name in ("eos_token", "pad_token"):
        has = getattr(tokenizer, name)
        lacks = has is None or (name == "pad_token" and has == tokenizer.eos_token)
        if name in recipe.special_tokens and lacks:
            tokenizer.add_special_tokens({name: recipe.special_tokens[name]})
    if classifier and tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.eos_token_id is None:
        raise RecipeError(
            f"{key}: the tokenizer of {reference} has no EOS token, so no text could ever end. "
            'Name one: special_tokens={eos_token: "..."}.'
        )
    if not classifier and tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]:
        raise RecipeError(
            f"{key}: the tokenizer of {reference} ends every text with {tokenizer.eos_token}, a prompt too. "
            "Set it in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def make_tokenizer(scratch: Scratch, texts: list[str]) -> "PreTrainedTokenizerBase":
    """Train a tokenizer on `texts`: whole words (blanks separate them), or byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = list(SPECIAL_TOKENS.values())
    if scratch.tokenizer == "word":
        tokenizer = Tokenizer(models.WordLevel(unk_token=SPECIAL_TOKENS["unk_token"]))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(vocab_size=scratch.vocabulary, special_tokens=special, show_progress=False)
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
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]


def longest_prompt(tokenizer: "PreTrainedTokenizerBase", prompts: Iterable[str | list[dict]]) -> int:
    """Tokens of the longest of some prompts."""
    return max(len(token_ids(tokenizer, prompt)) for prompt in prompts)


def continuation(tokenizer: "PreTrainedTokenizerBase", prompt_ids: list[int], completion_ids: list[int]) -> str:
    """The completion's text such that prompt + completion is the text of both, without special tokens.

    Decoders of whole words and of SentencePiece drop a blank at the beginning, which a completion decoded alone loses.
    """
    prompt = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt_ids, *completion_ids], skip_special_tokens=True)
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    return tokenizer.decode(completion_ids, skip_special_tokens=True)


def eos_token_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Every token that ends a completion: the tokenizer's EOS and those that the model declares, as TRL counts them."""
    declared = model.generation_config.eos_token_id
    declared = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    return sorted({tokenizer.eos_token_id, *declared})


COUNT_FROM_PAD = {
    "camembert", "data2vec-text", "ibert", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
}  # fmt: skip
"""Encoders whose first position is the one behind that of pads: of RoBERTa's 514 positions a text has 512."""


def context_length(config: "PreTrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> float:
    """Longest text in tokens that a model reads; infinite where nothing limits it."""
    from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

    config = config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or math.inf
    if config.model_type in COUNT_FROM_PAD:
        context -= config.pad_token_id + 1
    if tokenizer.model_max_length < VERY_LARGE_INTEGER:  # which it is where nobody set it
        context = min(context, tokenizer.model_max_length)
    return context
