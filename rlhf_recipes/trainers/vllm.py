"""Prepares vLLM to sample for an on-policy trainer."""

import logging
from collections.abc import Iterator
from typing import Any

from accelerate.utils import is_peft_model
from torch import Tensor

logger = logging.getLogger(__name__)


def send_policy_only(trainer: Any) -> None:
    """Sends vLLM the policy's weights and nothing else, adapters merged; warns about what is not corrected."""
    weights, adapted = trainer.vllm_generation._iter_named_params, is_peft_model(trainer.model)

    def of_policy() -> Iterator[tuple[str, Tensor]]:
        # To merge an adapter and take it out again rounds twice: in bf16 the base would drift by 1 % in 1,000 syncs.
        bases = [(p, p.data.clone()) for name, p in trainer.model.named_parameters() if ".base_layer." in name]
        for name, tensor in weights():
            # A value network is PPO's, and vLLM knows none; nor layers that the reference's adapter has whole.
            if not name.startswith("value_network.") and ".modules_to_save." not in name:
                # A copy: tensors are sent when 1 GiB of them has come together or there are no more, and by then
                # peft has taken the adapter out of them again.
                yield name, tensor.clone() if adapted else tensor
        for parameter, before in bases:
            parameter.data.copy_(before)

    trainer.vllm_generation._iter_named_params = of_policy
    if trainer.accelerator.is_main_process:
        logger.warning(
            "use_vllm: vLLM samples with its own arithmetic, and nothing corrects for what its probabilities differ by "
            "from the trainer's (TRL's RLOO has no importance weight): give it the trainer's precision (vllm serve "
            "--dtype)."
        )
