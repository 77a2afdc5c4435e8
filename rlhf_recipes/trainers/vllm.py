"""Prepares vLLM to sample for an on-policy trainer."""

import logging
from collections.abc import Iterator
from typing import Any

from accelerate.utils import is_peft_model
from torch import Tensor

logger = logging.getLogger(__name__)


def send_policy_only(trainer: Any) -> None:
    """Makes the trainer send vLLM only the policy's weights, with merged adapters; warns that probabilities differ."""
    weights, adapted = trainer.vllm_generation._iter_named_params, is_peft_model(trainer.model)

    def of_policy() -> Iterator[tuple[str, Tensor]]:
        # Merging and unmerging an adapter rounds twice: in bf16 the base would drift by 1 % in 1,000 syncs.
        bases = [(p, p.data.clone()) for name, p in trainer.model.named_parameters() if ".base_layer." in name]
        for name, tensor in weights():
            # vLLM has neither a value network nor the full layers of the reference's adapter.
            if not name.startswith("value_network.") and ".modules_to_save." not in name:
                # A copy: tensors are sent in packs of 1 GiB, after peft has unmerged the adapter.
                yield name, tensor.clone() if adapted else tensor
        for parameter, before in bases:
            parameter.data.copy_(before)

    trainer.vllm_generation._iter_named_params = of_policy
    if trainer.accelerator.is_main_process:
        logger.warning(
            "use_vllm: vLLM's probabilities differ from the trainer's, and nothing corrects for that (TRL's RLOO has "
            "no importance weight): give vLLM the trainer's precision (vllm serve --dtype)."
        )
