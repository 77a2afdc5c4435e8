"""Limits of a model: its vocabulary and its context."""

import math
from typing import TYPE_CHECKING

from rlhf_recipes.data.tokenizer import context_length, longest_prompt
from rlhf_recipes.models.load import config_of
from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.system.terminal import expected

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from trl import RewardConfig, SFTConfig


def fit_embeddings(key: str, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Add rows to the embeddings if the tokenizer has more tokens. Spare rows, as in GPT-NeoX, stay.

    New rows are near the mean of the old ones, so that a new token is no likelier than the average one.

    Raises:
        RecipeError: The stage trains an adapter, which cannot add rows.
    """
    from accelerate.utils import is_peft_model

    if is_peft_model(model):
        rows = model.config.get_text_config().vocab_size
        if len(tokenizer) > rows:
            raise RecipeError(
                f"{key}: the tokenizer has {len(tokenizer)} tokens (special_tokens included), the model {rows}, and an "
                "adapter adds none; name special_tokens that the vocabulary has, or train all weights (no peft)."
            )
    elif len(tokenizer) > model.get_input_embeddings().num_embeddings:
        with expected("multivariate normal"):
            model.resize_token_embeddings(len(tokenizer))


def check_context(
    recipe: Recipe,
    key: str,
    model_id: str,
    prompts: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    new_tokens: int,
) -> None:
    """Refuse prompts that leave no room for `new_tokens` in the model's context, and tokens beyond its vocabulary."""
    config = config_of(recipe, key, model_id)
    stage = key.partition(".")[0]
    added = sum(tokenizer.convert_tokens_to_ids(t) >= config.vocab_size for t in recipe.special_tokens.values())
    if len(tokenizer) > config.vocab_size + (added if stage == "eval" else 0):  # eval calls fit_embeddings
        fix = " Stage sft makes room for special_tokens: start from stage:sft, or leave them out." if added else ""
        raise RecipeError(
            f"{key}: the tokenizer of {model_id} has {len(tokenizer)} tokens, the model only {config.vocab_size}.{fix}"
        )
    context = context_length(config, tokenizer)
    longest = longest_prompt(tokenizer, prompts["prompt"])
    if longest + new_tokens > context:
        length = "eval.max_new_tokens" if stage == "eval" else f"{stage}.trainer.max_completion_length"
        raise RecipeError(
            f"{key}: the longest prompt has {longest} tokens; with {new_tokens} new ones that is more than the "
            f"{context} of {model_id}: lower data.max_prompt_tokens (the data has prompts) or data.prompt_tokens "
            f"(prompts are cut from texts), or {length}."
        )


def fit_length(
    recipe: Recipe,
    stage: str,
    config: "PreTrainedConfig",
    tokenizer: "PreTrainedTokenizerBase",
    args: "SFTConfig | RewardConfig",
) -> None:
    """Lower TRL's default of `max_length` to the model's context; refuse a greater value in the recipe."""
    context = context_length(config, tokenizer)
    if args.max_length is not None and args.max_length <= context:
        return
    trainer = getattr(recipe, stage).trainer
    if "max_length" not in trainer:
        args.max_length = context
    elif context < math.inf:
        raise RecipeError(
            f"{stage}.trainer.max_length is {trainer['max_length'] or 'null'}, but the model reads {context} tokens at most; "
            "set it to no more, or leave it out."
        )
