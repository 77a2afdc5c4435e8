"""The reference of a policy that is given as an instance: a frozen copy of it."""

import copy
from typing import Any

from accelerate import Accelerator
from accelerate.utils import is_peft_model
from torch import nn
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import disable_dropout_in_model


def frozen_copy(model: Any, args: Any, peft_config: Any) -> nn.Module | None:
    """A copy that does not train; None where TRL makes the reference itself, or where `beta` is 0.

    TRL loads a reference by the model's name. An instance may hold other weights than the Hub has under that name.
    """
    is_whole = isinstance(model, nn.Module) and peft_config is None and not is_peft_model(model)
    if not is_whole or args.beta == 0.0 or args.sync_ref_model:
        return None
    reference = copy.deepcopy(model).requires_grad_(False)
    if args.disable_dropout:
        disable_dropout_in_model(reference)
    return reference


def prepare(reference: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The reference on its device, sharded like the policy; as TRL prepares its own."""
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        return prepare_deepspeed(reference, accelerator)
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        return prepare_fsdp(reference, accelerator)
    return accelerator.prepare_model(reference, evaluation_mode=True)
