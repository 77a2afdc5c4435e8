"""The reference of a policy that is given as an instance: a frozen copy of it."""

import copy
from typing import Any

from accelerate import Accelerator
from accelerate.utils import is_peft_model
from torch import nn
from transformers import TrainerCallback
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.callbacks import SyncRefModelCallback

from rlhf_recipes.models.dropout import switch_off


def frozen_copy(model: Any, args: Any, peft_config: Any) -> nn.Module | None:
    """A copy that does not train; None where TRL makes the reference itself, or where `beta` is 0.

    TRL loads a reference by the model's name. An instance may hold other weights than the Hub has under that name.
    """
    is_whole = isinstance(model, nn.Module) and peft_config is None and not is_peft_model(model)
    if not is_whole or args.beta == 0.0:
        return None
    reference = copy.deepcopy(model).requires_grad_(False)
    if args.disable_dropout:
        switch_off(reference)
    return reference


def prepare(reference: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The reference on its device, sharded like the policy; as TRL prepares its own."""
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        return prepare_deepspeed(reference, accelerator)
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        return prepare_fsdp(reference, accelerator)
    return accelerator.prepare_model(reference, evaluation_mode=True)


class SyncReference(TrainerCallback):
    """Moves the reference towards the policy, as TRL's callback does, which also counts the value network's weights."""

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.ref_model_sync_steps == 0:
            policy = self._trainer.accelerator.unwrap_model(self._trainer.model)
            own = [p for name, p in policy.named_parameters() if not name.startswith("value_network.")]
            reference = self._trainer.ref_model
            SyncRefModelCallback.sync_target_model(nn.ParameterList(own), reference, args.ref_model_mixup_alpha)
