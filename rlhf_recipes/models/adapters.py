"""Adapters and quantization: the settings `peft` and `quantization` of a stage, checked against its model.

The folder of such a stage holds the adapter, as peft saves it, and the tokenizer, but no `config.json`: transformers
would then look for whole weights in it, instead of following `base_model_name_or_path`.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

from rlhf_recipes.models.load import load_config
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.runs.references import loading

INTO_BASE = ("pissa", "olora", "corda", "loftq")
"""Values of `init_lora_weights` with these beginnings make peft change the base's own weights."""


def adapter_args(run: Run, args: TrainingArguments) -> dict[str, Any]:
    """`peft_config` and `quantization_config` for a TRL trainer; None without the stage's setting.

    Raises:
        RecipeError: peft or transformers refuses a value.
    """
    section = getattr(run.recipe, run.stage)
    peft_config = quantization_config = None
    if section.quantization is not None:
        # Quantized layers compute in the precision of the other layers.
        compute = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
        quantization_config = quantization_of(run.stage, section.quantization, compute)
    if section.peft is not None:
        peft_config = lora_of(run.stage, section.peft)
        if str(peft_config.init_lora_weights).startswith(INTO_BASE):
            raise RecipeError(
                f"{run.stage}.peft.init_lora_weights: {peft_config.init_lora_weights} moves a part of the model's own weights "
                "into the adapter, so that the base is no KL reference; take gaussian, orthogonal or true."
            )
        if peft_config.init_lora_weights == "mica" and quantization_config is not None:
            raise RecipeError(f"{run.stage}.peft.init_lora_weights: mica needs weights that are not quantized.")
    return {"peft_config": peft_config, "quantization_config": quantization_config}


def lora_of(stage: str, settings: dict[str, Any]) -> LoraConfig:
    """peft's configuration of a stage's adapter."""
    with _refusals(f"{stage}.peft"):
        return LoraConfig(**settings | {"task_type": "SEQ_CLS" if stage == "reward" else "CAUSAL_LM"})


def quantization_of(stage: str, settings: dict[str, Any], compute: str) -> BitsAndBytesConfig:
    """transformers' configuration of a stage's quantized weights; the layers compute in the dtype `compute` by default."""
    with _refusals(f"{stage}.quantization"):
        return BitsAndBytesConfig(**{"bnb_4bit_compute_dtype": compute} | settings)


@contextmanager
def _refusals(key: str) -> Iterator[None]:
    """Turns a library's refusal of settings into a `RecipeError`."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, ImportError, re.error) as error:
        raise RecipeError(f"{key}: {str(error)[:400]}") from error


def fit(run: Run, where: str, model: str, trusted: bool, auto_class: Any, adapter: dict[str, Any]) -> None:
    """Complete the adapter's configuration for a model, and refuse one that does not fit it.

    The new layers of a classifier are trained whole.

    Raises:
        RecipeError: The configuration names layers, parameters or tokens that cannot be adapted, or peft refuses it.
    """
    peft_config, quantization_config = adapter["peft_config"], adapter["quantization_config"]
    shape = shape_of(where, model, trusted, auto_class)
    if auto_class is AutoModelForSequenceClassification:
        # All layers outside the backbone are new: score; for BERT's relatives pooler, pre_classifier, classifier.
        new = [n for n, part in shape.named_children() if n != shape.base_model_prefix and list(part.parameters())]
        peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or []), *new})
        if quantization_config is not None:  # layers that are trained whole must not be quantized
            skipped = {*(quantization_config.llm_int8_skip_modules or []), *peft_config.modules_to_save}
            quantization_config.llm_int8_skip_modules = sorted(skipped)
    layers = _layers(shape)
    known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
    # For GPT-2. Without it, peft warns whenever the adapter is loaded.
    peft_config.fan_in_fan_out |= any(isinstance(part, Conv1D) for part in layers.values())
    key, targets = f"{run.stage}.peft.target_modules", peft_config.target_modules
    for target in [targets] if isinstance(targets, str) else sorted(targets or ()):
        with _refusals(f"{key}: {target!r}"):
            matched = _matched({target} if target is not targets else target, shape)
        if not matched:
            raise RecipeError(f"{key}: {target!r} matches no layer of {model}; it has: {known}.")
    embeddings = next(name for name, part in layers.items() if part is shape.get_input_embeddings())
    is_tied = auto_class is AutoModelForCausalLM and shape.config.get_text_config().tie_word_embeddings
    adapted = {
        "target_modules": targets and embeddings in _matched(targets, shape),
        "trainable_token_indices": peft_config.trainable_token_indices,
    }
    for name in [name for name, given in adapted.items() if is_tied and given]:
        what = f"{embeddings} of {model} is its output layer too, and an adapter would change only one of the two"
        raise RecipeError(f"{run.stage}.peft.{name}: {what}; leave it out.")
    _require_tokens(run, model, peft_config, shape)
    if peft_config.lora_alpha == 0:
        raise RecipeError(f"{run.stage}.peft.lora_alpha is 0, which switches the adapter off; the default is 8.")
    parts = (
        ("target_parameters", "parameter", shape.named_parameters()),
        ("modules_to_save", "layer", shape.named_modules()),
    )
    for setting, kind, there in parts:  # peft ignores wrong names
        names = [f".{name}" for name, _ in there]
        for name in getattr(peft_config, setting) or ():
            if not any(own.endswith(f".{name}") for own in names):
                raise RecipeError(f"{run.stage}.peft.{setting}: {model} has no {kind} {name!r}; it has: {known}.")
    trial = copy.deepcopy(peft_config)
    trial.init_lora_weights = True  # other values need the weights, which are not loaded
    with _refusals(f"{run.stage}.peft"), torch.device("meta"):
        get_peft_model(shape, trial)


def _require_tokens(run: Run, model: str, peft_config: LoraConfig, shape: PreTrainedModel) -> None:
    """Refuse `trainable_token_indices` that are not rows of the embeddings."""
    key, given = f"{run.stage}.peft.trainable_token_indices", peft_config.trainable_token_indices
    rows = shape.get_input_embeddings().num_embeddings
    for tokens in given.values() if isinstance(given, dict) else [] if given is None else [given]:
        wrong = [token for token in tokens if not 0 <= token < rows]
        if wrong or not tokens:
            found = f"{wrong[0]} is no token of {model}" if wrong else "no token is named"
            raise RecipeError(f"{key}: {found}; its tokens are 0 to {rows - 1}.")
    for name in given if isinstance(given, dict) else ():
        if any(part is shape.get_output_embeddings() for part in (_layers(shape)[n] for n in _matched({name}, shape))):
            raise RecipeError(f"{key}: {name} is the output layer, where TRL's loss ignores an adapter; leave it out.")


def shape_of(where: str, model: str, trusted: bool, auto_class: Any) -> PreTrainedModel:
    """A model without weights, for the names of its layers."""
    config = load_config(where, model, trusted)
    with loading(where, model), torch.device("meta"):
        return auto_class.from_config(config, trust_remote_code=trusted)


def _layers(shape: PreTrainedModel) -> dict[str, nn.Module]:
    """Name -> layer, of all layers that LoRA can adapt."""
    return {name: part for name, part in shape.named_modules() if isinstance(part, nn.Linear | nn.Embedding | Conv1D)}


def _matched(targets: str | set[str], shape: PreTrainedModel) -> set[str]:
    """The names of the layers that `target_modules` selects, by peft's rules."""
    layers = _layers(shape)
    if targets == "all-linear":
        head = shape.get_output_embeddings()
        return {name for name, part in layers.items() if not isinstance(part, nn.Embedding) and part is not head}
    if isinstance(targets, str):
        return {name for name in layers if re.fullmatch(targets, name)}
    return {name for name in layers if any(f".{name}".endswith(f".{target}") for target in targets)}


def require_same(
    run: Run, where: str, model_id: str, peft_config: LoraConfig, start: PeftConfig, shape: PreTrainedModel
) -> None:
    """Refuse to train an existing adapter with settings that differ from its own."""
    if not isinstance(start, LoraConfig) or start.task_type not in ("CAUSAL_LM", None):
        raise RecipeError(f"{where}: {model_id} is no LoRA adapter of a language model; it cannot be trained further.")
    if str(start.init_lora_weights).startswith(INTO_BASE):
        raise RecipeError(
            f"{where}: the adapter {model_id} holds a part of its base's weights (init_lora_weights: "
            f"{start.init_lora_weights}), so it cannot be trained further; train the merged model without {run.stage}.peft."
        )
    start.task_type = "CAUSAL_LM"
    for name in getattr(run.recipe, run.stage).peft:
        wanted, found = getattr(peft_config, name), getattr(start, name)
        same = wanted == found
        if name == "target_modules" and wanted is not None and found is not None:
            same = _matched(wanted, shape) == _matched(found, shape)
        if not same:
            shown = [sorted(value) if isinstance(value, set) else value for value in (wanted, found)]
            raise RecipeError(
                f"{run.stage}.peft.{name} is {shown[0]}, but the adapter {model_id}, which is trained further, has "
                f"{str(shown[1])[:200]}; set it to that, or leave it out: peft: {{}} takes all of the adapter's settings."
            )
