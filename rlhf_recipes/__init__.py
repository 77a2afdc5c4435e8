"""PPO or RLOO, on your task? Recipes for RLHF on Hugging Face TRL."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_recipes.ppo_trainer import PPOConfig, PPOTrainer
    from rlhf_recipes.rloo_trainer import RLOOConfig, RLOOTrainer

__all__ = ["PPOConfig", "PPOTrainer", "RLOOConfig", "RLOOTrainer"]


def __getattr__(name: str) -> Any:
    # Not before they are asked for: they import torch and TRL, which takes seconds, and the command line needs neither.
    if name in ("PPOConfig", "PPOTrainer"):
        from rlhf_recipes import ppo_trainer as module
    elif name in ("RLOOConfig", "RLOOTrainer"):
        from rlhf_recipes import rloo_trainer as module
    else:
        raise AttributeError(f"module 'rlhf_recipes' has no attribute {name!r}")
    return getattr(module, name)
