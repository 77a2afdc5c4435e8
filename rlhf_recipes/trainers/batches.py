"""The order of prompts, and how a rollout is divided into optimizer steps and micro-batches."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import RepeatSampler

from rlhf_recipes.models.forward import longest


def micro_batches(
    batch: dict[str, Tensor], steps: list[Tensor], size: int, total: Callable[[Tensor], Tensor]
) -> list[dict[str, Tensor]]:
    """Divides a rollout into micro-batches: rows of similar length together, without their common padding.

    Which of a step's micro-batches holds a row makes no difference to the step, so rows are sorted by length.

    Args:
        batch: A rollout of this process, tensors with B rows; prompts are left-padded, completions right-padded.
        steps: For each optimizer step, the indices of its rows.
        size: Rows of one micro-batch.
        total: Adds a tensor of sums up over all processes.

    Returns:
        The micro-batches in the order of the steps. Each also has `tokens_of_step`: the tokens that count in its whole
        step, over all processes.
    """
    lengths = (batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)).cpu()
    counted = batch.get("loss_mask", batch["completion_mask"])
    tokens = total(torch.stack([counted[rows].sum() for rows in steps]).float())
    parts = []
    for rows, of_step in zip(steps, tokens, strict=True):
        for part in rows[lengths[rows].argsort(descending=True, stable=True)].split(size):
            picked = {name: tensor[part] for name, tensor in batch.items()}
            p, t = longest(picked["prompt_mask"], picked["completion_mask"])
            for name, tensor in picked.items():
                if tensor.ndim == 2:
                    picked[name] = tensor[:, -p:] if name.startswith("prompt") else tensor[:, :t]
            parts.append(picked | {"tokens_of_step": of_step})
    return parts


class EpochSampler(RepeatSampler):
    """TRL's sampler with an order for each epoch that does not depend on the epochs that this process saw.

    TRL's draws all orders from one generator, so that a resumed run would see the first epoch's again.
    """

    def __init__(self, trainer: Any, **kwargs):
        super().__init__(**kwargs)
        self._trainer = trainer

    def __iter__(self):
        if self.shuffle:
            self.generator.manual_seed(self.seed + int(self._trainer.state.epoch or 0))
        return super().__iter__()
