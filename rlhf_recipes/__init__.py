"""PPO or RLOO, on your task? Recipes for RLHF on Hugging Face TRL."""

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_recipes.trainers.ppo import PPOConfig, PPOTrainer
    from rlhf_recipes.trainers.rloo import RLOOConfig, RLOOTrainer

__all__ = ["PPOConfig", "PPOTrainer", "RLOOConfig", "RLOOTrainer"]


os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # before huggingface_hub is imported: TRL reports each trainer

if sys.argv[:1] == ["-m"]:  # `python -m rlhf_recipes.ppo` would import torch from a torch.py in the current folder
    del sys.path[0]


def __getattr__(name: str) -> Any:
    # Not before they are asked for: they import torch and TRL, which takes seconds, and the command line needs neither.
    if name in ("PPOConfig", "PPOTrainer"):
        from rlhf_recipes.trainers import ppo as module
    elif name in ("RLOOConfig", "RLOOTrainer"):
        from rlhf_recipes.trainers import rloo as module
    else:
        raise AttributeError(f"module 'rlhf_recipes' has no attribute {name!r}")
    return getattr(module, name)
