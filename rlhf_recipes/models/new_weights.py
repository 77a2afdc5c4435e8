"""Random weights: a model from scratch, and a new reward head."""

import logging
from typing import TYPE_CHECKING, Any

from rlhf_recipes.models.load import is_classifier
from rlhf_recipes.recipe.checks import refuse_unknown
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.recipe.stages import Scratch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def make_model(scratch: Scratch, tokenizer: "PreTrainedTokenizerBase", seed: int) -> "PreTrainedModel":
    """A causal language model with random weights that fits the tokenizer.

    Raises:
        RecipeError: transformers has no such architecture, or refuses the configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    set_seed(seed)
    try:
        default = AutoConfig.for_model(scratch.architecture)
        known = {*default.to_dict(), *default.attribute_map}
        refuse_unknown("sft.scratch.config", scratch.config, known, type(default).__name__)
        config = AutoConfig.for_model(
            scratch.architecture,
            vocab_size=len(tokenizer),
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **scratch.config,
        )
        return AutoModelForCausalLM.from_config(config)
    except RecipeError:
        raise
    except (ValueError, TypeError) as error:
        raise RecipeError(f"sft.scratch: transformers refuses {scratch.architecture}: {str(error)[:300]}") from error


def scale_head(model: Any, seed: int) -> None:
    """Draw a new scalar head's weights from N(0, 1 / (d + 1)), d its input features, and set its bias to 0.

    A head that comes with the model is trained and stays, with a warning. The draw depends on the seed alone and does
    not advance the global random numbers.

    Source: Huang et al. 2024 (2403.17031), detail 11.

    Raises:
        RecipeError: The model has no linear layer with one output.
    """
    import torch

    if is_classifier(model.config):
        logger.warning("reward.scale_head: reward.model has a trained head, which is kept.")
        return
    heads = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer.out_features == 1]
    if not heads:
        raise RecipeError(
            f"reward.scale_head: {type(model).__name__} has no linear layer with one output; set it to false."
        )
    with torch.no_grad():
        for head in heads:
            std = (head.in_features + 1) ** -0.5
            drawn = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed)) * std
            head.weight.copy_(drawn)
            if head.bias is not None:
                head.bias.zero_()
