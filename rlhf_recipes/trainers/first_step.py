"""The policy before the first step: it must be the rollout's policy and, if it starts from the reference, the reference."""

import logging
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor

from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.trainers.kl_diagnosis import likely_cause

logger = logging.getLogger(__name__)

IN_FLOAT32, IN_LOWER_PRECISION = 1e-3, 0.1
"""Largest mean |log ratio| of a token, in nats, that rounding explains."""


def check_first_step(
    trainer: Any, other: str, log_ratio: Tensor, mask: Tensor, prompt_mask: Tensor, must_be_equal: bool = True
) -> None:
    """Refuses to train if the policy differs from `other`; in lower precision logs how much it differs.

    Args:
        trainer: The on-policy trainer. Its setting `check_first_step: false` makes a warning of the error.
        other: What the policy is compared with, for the message.
        log_ratio: Log-probabilities of the sampled tokens, the policy's minus the other's, (B, T).
        mask: Completion tokens, (B, T).
        prompt_mask: (B, P).
        must_be_equal: False: a difference may be intended, so it is only a warning.

    Raises:
        RecipeError: On every process, with the likely cause.
    """
    sums = torch.stack([(log_ratio * mask).abs().sum(), mask.sum().float()])
    distance, tokens = trainer._sum_over_ranks(sums).tolist()
    found, limit = distance / max(tokens, 1), IN_FLOAT32 if _in_float32(trainer) else IN_LOWER_PRECISION
    difference = f"before the first step the policy differs from {other} by {found:.2g} nats per token"
    if found <= limit:
        if limit == IN_LOWER_PRECISION and trainer.accelerator.is_main_process:
            logger.info("%s: rounding of the precision in use.", difference)
        return
    message = f"{difference}, more than rounding explains. {likely_cause(trainer, log_ratio, mask, prompt_mask, True)}"
    if must_be_equal and trainer.args.check_first_step:
        raise RecipeError(f"{message} To train all the same, set check_first_step to false.")
    trainer._run_state.warn_once(other, message)


def starts_from_reference(trainer: Any) -> bool:
    """Whether policy and reference are the same model; a trained adapter has the model without it as its reference."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not is_peft_model(model) or "ref" in model.peft_config:
        return True
    return not any("lora_B" in name and parameter.any() for name, parameter in model.named_parameters())


def _in_float32(trainer: Any) -> bool:
    model = trainer.accelerator.unwrap_model(trainer.model)
    lower = trainer.accelerator.mixed_precision != "no" or trainer.args.tf32 or getattr(model, "is_quantized", False)
    return model.dtype == torch.float32 and not lower
