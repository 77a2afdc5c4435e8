"""Settings that depend on the machine: precision, attention, gradient checkpointing, vLLM."""

import logging
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
from transformers.utils import is_flash_attn_2_available, is_torch_bf16_gpu_available

from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.recipe.stages import Trained

logger = logging.getLogger(__name__)

ALL_TRAINED = frozenset(
    ("albert", "bert", "bloom", "deberta-v2", "distilbert", "electra", "falcon", "gemma", "gemma2", "gpt2", "gpt_neo")
    + ("gpt_neox", "gptj", "llama", "mistral", "opt", "phi", "phi3", "qwen2", "qwen3", "roberta", "smollm3", "stablelm")
)
"""Architectures in which every weight has a gradient in every step; a mixture of experts does not."""


def settings(stage: str, section: Trained, asked_precision: str | None = None) -> dict[str, Any]:
    """A trainer's arguments for this hardware, and a line in the log with the reasons.

    The stage's `trainer` section comes first, then `mixed_precision` of accelerate's configuration (`asked_precision`,
    None: not set), then the hardware.

    Raises:
        RecipeError: The hardware does not support the precision, or the stage has vLLM and a quantized base.
    """
    given = section.trainer
    if given.get("use_vllm") and section.quantization is not None:
        raise RecipeError(
            f"{stage}.trainer.use_vllm: TRL sends vLLM the merged model, and each merge rounds the weights of a quantized "
            f"base again; remove {stage}.quantization, or sample with transformers."
        )
    on_cpu = bool(given.get("use_cpu")) or not torch.accelerator.is_available()
    precision, why = _precision(stage, given, asked_precision, on_cpu)
    values = {"bf16": precision == "bf16", "fp16": precision == "fp16"}
    if on_cpu:  # accelerate runs several CPU processes as one run only with use_cpu
        values |= {"use_cpu": True, "dataloader_pin_memory": False}
    checkpointing, reason = _checkpointing(given, on_cpu)
    if checkpointing is not None:
        values["gradient_checkpointing"] = checkpointing
    dtype = (given.get("model_init_kwargs") or {}).get("dtype")
    logger.info(
        "%s: %s: %s%s; attention %s; gradient checkpointing %s",
        stage,
        "fp32" if precision == "no" else precision,
        why,
        f", but of weights in {dtype}, as the recipe says" if dtype is not None else "",
        _attention_line(given, on_cpu, precision),
        reason if checkpointing is None else f"{'on' if checkpointing else 'off'}: {reason}",
    )
    return values


def _precision(stage: str, given: dict[str, Any], asked: str | None, on_cpu: bool) -> tuple[str, str]:
    """bf16, fp16 or no (float32), and the reason."""
    has, why = ("no", "on a CPU") if on_cpu else native_precision()
    own = [name for name in ("bf16", "fp16") if given.get(name) is not None]
    if own:
        wanted = next((name for name in own if given[name]), "no")
        key, why = f"{stage}.trainer.{own[0] if wanted == 'no' else wanted}", "the recipe says so"
    elif asked is not None:
        wanted, key, why = asked, "accelerate's mixed_precision", "accelerate's mixed_precision"
    else:
        return has, why
    if wanted not in ("bf16", "fp16", "no"):
        raise RecipeError(f"{key} is {wanted}; take bf16, fp16 or no.")
    if wanted == "fp16" and on_cpu:
        raise RecipeError(f"{key}: a CPU does not train in fp16; leave it out for float32, or take bf16.")
    if wanted == "bf16" and not on_cpu and has != "bf16":
        raise RecipeError(f"{key}: {_device_name()} does not have bf16; take fp16, or float32.")
    return wanted, why


def native_precision() -> tuple[str, str]:
    """The accelerator's precision, bf16 or fp16, and the reason. Emulated bf16 does not count: float32 is faster."""
    if torch.cuda.is_available():
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = is_torch_bf16_gpu_available()
    return ("bf16", f"{_device_name()} has it") if has else ("fp16", f"{_device_name()} does not have bf16")


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else torch.accelerator.current_accelerator().type


def _checkpointing(given: dict[str, Any], on_cpu: bool) -> tuple[bool | None, str]:
    """Whether to recompute activations instead of keeping them, and the reason; None: the recipe decides."""
    own = [name for name in ("gradient_checkpointing", "activation_checkpointing") if given.get(name) is not None]
    if own:
        return None, f"{'on' if given[own[0]] else 'off'}: the recipe says so"
    if on_cpu:
        return False, "it trades time for a GPU's memory"
    return True, "the default on a GPU; rlhf-recipes plan says whether it fits without, which is faster"


def has_flash_attention(on_cpu: bool, precision: str) -> tuple[bool, str]:
    """Whether flash-attn can compute attention, and the reason."""
    if on_cpu or not torch.cuda.is_available():
        return False, "flash-attn needs a CUDA GPU"
    if precision == "no":
        return False, "flash-attn does not compute in fp32"
    if native_precision()[0] != "bf16":  # both came with Ampere
        return False, f"flash-attn does not run on {_device_name()}"
    if not is_flash_attn_2_available():
        return False, "flash-attn is not installed"
    return True, "flash-attn is installed"


def _attention_line(given: dict[str, Any], on_cpu: bool, precision: str) -> str:
    own = (given.get("model_init_kwargs") or {}).get("attn_implementation")
    if own is not None:
        return f"{own}: the recipe says so"
    flash, why = has_flash_attention(on_cpu, precision)
    return f"{'flash_attention_2' if flash else 'sdpa'}, where the model has it: {why}"


def attention(args: TrainingArguments, auto_class: Any, config: PreTrainedConfig) -> dict[str, str]:
    """`attn_implementation` for a model to train, if transformers' own choice is not the fastest."""
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    model_class = auto_class._model_mapping.get(type(config), None)  # None: the model has its own code
    supported = getattr(model_class, "_supports_flash_attn", False)
    flash = has_flash_attention(args.use_cpu, precision)[0] and supported
    return {"attn_implementation": "flash_attention_2"} if flash else {}


def expect_all_gradients(trainer: Any) -> None:
    """Switch off DDP's search for parameters without a gradient, if every parameter has one; call it before training.

    The search costs a pass over the graph in every step, and torch warns on every process. Without the search, a
    parameter without a gradient is an error in the second step, so unknown architectures keep it.
    """
    models = [part for part in trainer.model.modules() if isinstance(part, PreTrainedModel)]
    known = all(model.config.model_type in ALL_TRAINED for model in models)
    if trainer.args.ddp_find_unused_parameters is None and known:
        trainer.accelerator.ddp_handler.find_unused_parameters = False
