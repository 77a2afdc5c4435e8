"""How a rollout is divided into optimizer steps and micro-batches."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_recipes.models.forward import longest


def micro_batches(
    batch: dict[str, Tensor], steps: list[Tensor], size: int, total: Callable[[Tensor], Tensor]
) -> list[dict[str, Tensor]]:
    """Divides a rollout into micro-batches of rows with similar length, without their common padding.

    The result of an optimizer step does not depend on how its rows are divided, so they are sorted by length.

    Args:
        batch: A rollout of this process, tensors with B rows; prompts are left-padded, completions right-padded.
        steps: For each optimizer step, the indices of its rows.
        size: Rows of one micro-batch.
        total: Adds a tensor of sums up over all processes.

    Returns:
        The micro-batches in the order of the steps. Each also has `tokens_of_step`: the number of tokens that count in
        its step, over all processes.
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


class MicroBatches:
    """The current rollout, and the micro-batches of the current pass over it.

    Args:
        args: The trainer's settings.
        total: Adds a tensor of sums up over all processes.
    """

    def __init__(self, args: Any, total: Callable[[Tensor], Tensor]):
        self._args, self._total = args, total
        self.clear()

    def clear(self) -> None:
        self.rollout: dict[str, Tensor] | None = None
        self.order: Tensor | None = None
        self.parts: list[dict[str, Tensor]] = []

    def take(self, rollout: dict[str, Tensor]) -> None:
        """Replaces the rollout, and cuts it in a random order."""
        self.rollout = rollout
        self.shuffle()

    def shuffle(self) -> None:
        """Cuts the rollout again, in another random order."""
        self._cut(torch.randperm(len(self.rollout["completion_ids"])))

    def _cut(self, order: Tensor) -> None:
        self.order, size = order, len(order) // self._args.steps_per_generation
        steps = order.split(size * self._args.gradient_accumulation_steps)
        self.parts = micro_batches(self.rollout, steps, size, self._total)

    def single(self, rollout: dict[str, Tensor]) -> dict[str, Tensor]:
        """A rollout of an evaluation as one micro-batch."""
        rows = torch.arange(len(rollout["completion_ids"]))
        return micro_batches(rollout, [rows], len(rows), self._total)[0]

    def to_dict(self) -> dict[str, Any]:
        return {"rollout": self.rollout, "order": self.order}

    def load(self, saved: dict[str, Any]) -> None:
        self.clear()
        if saved["rollout"] is not None:
            self.rollout = saved["rollout"]
            self._cut(saved["order"].cpu())
