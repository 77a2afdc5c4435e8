"""Looks for the causes of a wrong KL to the reference."""

from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor

from rlhf_recipes.models.dropout import rates


def likely_cause(trainer: Any, log_ratio: Tensor, mask: Tensor, prompt_mask: Tensor, at_start: bool) -> str:
    """A sentence with the causes that `kl_suspects` finds."""
    if found := kl_suspects(trainer, log_ratio, mask, prompt_mask, at_start):
        return f"Likely cause: {'; '.join(found)}."
    return "No cause found: sampling settings, temperature, dropout, padding, adapter and weights look right."


def kl_suspects(trainer: Any, log_ratio: Tensor, mask: Tensor, prompt_mask: Tensor, at_start: bool) -> list[str]:
    """Causes that apply to this run, each as a clause.

    Args:
        trainer: The on-policy trainer.
        log_ratio: log pi - log pi_ref of the sampled tokens, (B, T).
        mask: Completion tokens, (B, T).
        prompt_mask: (B, P).
        at_start: True before the first step: policy and reference must be equal.
    """
    model, found = trainer.accelerator.unwrap_model(trainer.model), []
    if trainer.distortions:
        found.append(f"sampling: {', '.join(trainer.distortions)} changes the model's distribution")
    sampled_at = trainer.temperature if trainer.use_vllm else trainer.generation_config.temperature
    if sampled_at != trainer.temperature:
        found.append(f"temperature: {sampled_at} in generation, {trainer.temperature} in training")
    if active := [f"{type(owner).__name__}.{name} = {value}" for owner, name, value in rates(model)]:
        found.append(f"dropout: it is on in {len(active)} places ({active[0]}); set disable_dropout to true")
    by_row = (log_ratio.abs() * mask).sum(1) / mask.sum(1).clamp(min=1)
    padded = (prompt_mask == 0).any(1)
    if padded.any() and (~padded).any() and by_row[padded].mean() > 10 * by_row[~padded].mean():
        found.append("padding: only completions of padded prompts differ, so padding changes the model's positions")
    if at_start and is_peft_model(model):
        if "ref" not in model.peft_config and any(
            "lora_B" in name and p.abs().max() > 0 for name, p in model.named_parameters()
        ):
            found.append(
                "adapter: it is not 0, but the reference is the model without it; to continue an adapter, pass the "
                "model with the adapter loaded and no peft_config"
            )
    elif at_start and trainer.ref_model is not None:
        reference = dict(trainer.accelerator.unwrap_model(trainer.ref_model).named_parameters())
        other = [n for n, p in model.named_parameters() if n in reference and not torch.equal(p, reference[n])]
        if other:
            found.append(f"weights: policy and reference differ in {len(other)} tensors ({other[0]})")
    if trainer.use_vllm:
        found.append("vLLM: it has other kernels, and perhaps another precision")
    return found
