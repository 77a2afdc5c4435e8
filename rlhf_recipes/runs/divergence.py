"""Stops a training that has diverged at its first number that is not finite, before it reaches weights on the disk."""

import math
from typing import Any

import torch
from torch import nn

from rlhf_recipes.recipe.schema import RecipeError

LARGEST = {"learning_rate": 0.01, "beta": 10.0, "vf_coef": 10.0, "ent_coef": 1.0, "weight_decay": 10.0}
"""Setting -> the value above which it is a likelier cause of a divergence than the learning rate."""


class Diverged(RecipeError):
    """A quantity of the training is not finite."""


def require_finite(trainer: Any, quantity: str, value: float, cause: str | None = None) -> None:
    """Refuses to go on with a quantity that is NaN or infinite.

    Args:
        trainer: The trainer, before the optimizer step that would use the quantity.
        quantity: Its name, for the message.
        value: Its value, the same on every process.
        cause: The likeliest cause. None: found among the trainer's settings.

    Raises:
        Diverged: Names step, quantity and cause.
    """
    if not math.isfinite(value):
        step = trainer.state.global_step + 1
        raise Diverged(
            f"step {step}: the {quantity} is {value}, so training has diverged. Likeliest cause: "
            f"{cause or likeliest_cause(trainer.args)}. Checkpoints of earlier steps are intact."
        )


def likeliest_cause(args: Any) -> str:
    """The setting that most likely made a training diverge, with its value."""
    given = {name: value for name, value in vars(args).items() if isinstance(value, float)}
    wrong = [name for name, value in given.items() if not math.isfinite(value)]
    wrong += [name for name, limit in LARGEST.items() if given.get(name, 0.0) > limit]
    if wrong:
        return f"{wrong[0]} is {given[wrong[0]]:g}"
    return f"learning_rate is {args.learning_rate:g}, which may be too high (max_grad_norm: {args.max_grad_norm:g})"


def first_not_finite(model: nn.Module) -> str | None:
    """The name of the first weight that holds NaN or infinity; of a sharded model, on this process."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not torch.isfinite(weight.detach()).all():
            return name
    return None


def require_finite_weights(trainer: Any) -> None:
    """Refuses to save weights that are not finite. All ranks call this.

    Raises:
        Diverged: On every rank.
    """
    found = first_not_finite(trainer.accelerator.unwrap_model(trainer.model))
    wrong = torch.tensor([float(found is not None)], device=trainer.accelerator.device)
    if trainer.accelerator.reduce(wrong).item() > 0:
        where = found or "on another process"
        raise Diverged(
            f"step {trainer.state.global_step}: weights are not finite ({where}), so training has diverged. Likeliest "
            f"cause: {likeliest_cause(trainer.args)}. They are not saved; checkpoints of earlier steps are intact."
        )


def require_finite_output(trainer: Any) -> None:
    """Refuses a trained model whose weights are finite, but so large that its output is not. All ranks call this.

    Raises:
        Diverged: On every rank that has the output, which is every rank with whole models.
    """
    model = trainer.model_wrapped
    tokens = torch.arange(4, device=trainer.accelerator.device)[None]
    was_training = model.training
    model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    model.train(was_training)
    if not torch.isfinite(logits).all():
        raise Diverged(
            "the trained model's output is not finite, so training has diverged. Likeliest cause: "
            f"{likeliest_cause(trainer.args)}. The model is not saved; checkpoints are kept."
        )
