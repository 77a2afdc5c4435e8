"""Training an adapter instead of all weights: what `peft:` and `quantization:` of a stage make of its model.

The folder of such a stage holds the adapter, as peft saves it, and the tokenizer, but no `config.json`: with one,
transformers would look for whole weights beside it instead of following `base_model_name_or_path`.
"""

import copy
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from peft import LoraConfig, PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)
from transformers.pytorch_utils import Conv1D

from rlhf_recipes.models import hardware as machine
from rlhf_recipes.models.load import MERGED_BASE, adapter_of, base_of, load_adapter, load_config, load_model
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.runs.references import is_hub_model, loading
from rlhf_recipes.system.files import writing

INTO_BASE = ("pissa", "olora", "corda", "loftq")
"""Beginnings of values of `init_lora_weights` by which peft changes the model's own weights."""


def adapter_args(run: Run, args: TrainingArguments) -> dict[str, Any]:
    """`peft_config` and `quantization_config` of a TRL trainer, made of the stage's settings; each None without any.

    Raises:
        RecipeError: peft or transformers refuses a value.
    """
    section = getattr(run.recipe, run.stage)
    peft_config = quantization_config = None
    if section.quantization is not None:
        # Layers compute in what the rest of the model does.
        compute = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
        quantization_config = quantization_of(run.stage, section.quantization, compute)
    if section.peft is not None:
        peft_config = lora_of(run.stage, section.peft)
        if str(peft_config.init_lora_weights).startswith(INTO_BASE):
            raise RecipeError(
                f"{run.stage}.peft.init_lora_weights: {peft_config.init_lora_weights} moves a part of the model's own weights "
                "into the adapter, so that what is left is no reference; take gaussian, orthogonal or true."
            )
        if peft_config.init_lora_weights == "mica" and quantization_config is not None:
            raise RecipeError(f"{run.stage}.peft.init_lora_weights: mica needs weights that are not quantized.")
    return {"peft_config": peft_config, "quantization_config": quantization_config}


def lora_of(stage: str, settings: dict[str, Any]) -> LoraConfig:
    """peft's configuration of a stage's adapter.

    Raises:
        RecipeError: peft refuses a value.
    """
    with _refusals(f"{stage}.peft"):
        return LoraConfig(**settings | {"task_type": "SEQ_CLS" if stage == "reward" else "CAUSAL_LM"})


def quantization_of(stage: str, settings: dict[str, Any], compute: str) -> BitsAndBytesConfig:
    """transformers' configuration of a stage's quantized weights, whose layers compute in `compute` by default.

    Raises:
        RecipeError: transformers refuses a value.
    """
    with _refusals(f"{stage}.quantization"):
        return BitsAndBytesConfig(**{"bnb_4bit_compute_dtype": compute} | settings)


def starting_point(run: Run, args: TrainingArguments, key: str, model: str, adapter: dict[str, Any]) -> dict[str, Any]:
    """What a TRL trainer starts from, as its arguments `model`, `peft_config` and `quantization_config`.

    A whole model is handed on by name. Of a start that is an adapter itself, training without `peft` takes the merged
    model; with it, a language model's training goes on with this very adapter, and a reward model gets a new one on
    the merged model, which is written to the run's folder, where the new adapter finds it.

    Args:
        run: The stage's run.
        args: The trainer's arguments; how the model is loaded is put into them.
        key: `model` or `policy`, where the stage names its start.
        model: Folder or Hub id that it stands for.
        adapter: What `adapter_args` made.

    Raises:
        RecipeError: The model cannot be loaded, or `peft` does not fit it.
    """
    where, reference = f"{run.stage}.{key}", getattr(getattr(run.recipe, run.stage), key)
    is_reward, peft_config = run.stage == "reward", adapter["peft_config"]
    auto_class = AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM
    trusted = reference in run.recipe.trust_remote_code
    config = load_config(where, model, trusted)
    settings = {"dtype": "float32"} | machine.attention(args, auto_class, config)
    settings |= (args.model_init_kwargs or {}) | ({"num_labels": 1} if is_reward else {})
    settings |= {"use_safetensors": True, "trust_remote_code": trusted}
    start = adapter_of(where, model)
    _require_whole_numbers(where, reference, config)
    set_seed(args.seed)  # a new head is random
    if start is not None and peft_config is not None and is_reward:
        model, start = _merged_on_disk(run, where, model, settings), None
    if start is None:
        if peft_config is not None:
            _fit(run, where, model, trusted, auto_class, adapter)
        args.model_init_kwargs, args.trust_remote_code = settings, trusted
        return adapter | {"model": model}
    args.model_init_kwargs = None
    if getattr(args, "sync_ref_model", False):
        raise RecipeError(
            f"{run.stage}.trainer.sync_ref_model: {where} is an adapter, and only a whole model's reference can be synced."
        )
    if peft_config is None:
        return {"model": load_model(auto_class, where, model, new_head=is_reward, **settings)}
    _require_same(run, where, reference, peft_config, start, _shape(where, model, trusted, auto_class))
    base = base_of(where, model, start)
    if not is_hub_model(start.base_model_name_or_path or ""):
        start.base_model_name_or_path = base  # which may have moved with the run's folder
    with loading(where, base):
        whole = auto_class.from_pretrained(base, quantization_config=adapter["quantization_config"], **settings)
    return {"model": load_adapter(where, whole, model, start, is_trainable=True)[0]}


def settle(trainer: Any, start: dict[str, Any], model: str, reference: str) -> None:
    """Mend what TRL makes of a model, above all of an adapter; call it before training.

    An adapter names its base so that it is found from everywhere: by its Hub id and commit, or by its whole path.

    On a quantized model it casts the adapter to bf16, where an update below 1/256 of a weight is lost, as those of a
    small learning rate are, and where an adapter that training goes on with differs from its frozen copy, and layers
    that are trained whole from what they were. And on a CPU,
    bitsandbytes rounds the base's scales to bf16 whenever it is evaluated between two checkpoints.

    Args:
        trainer: The trainer, just made.
        start: What `starting_point` returned.
        model: Folder of the start.
        reference: How the recipe names it.
    """
    machine.expect_all_gradients(trainer)
    adapted = trainer.model
    if not is_peft_model(adapted):
        return
    for config in adapted.peft_config.values():
        base = Path(config.base_model_name_or_path)
        if is_hub_model(reference) and base == Path(model):
            config.base_model_name_or_path, config.revision = reference.partition("@")[0], base.name
        elif base.is_dir():
            config.base_model_name_or_path = str(base.resolve())
    if getattr(adapted, "is_loaded_in_4bit", False) or getattr(adapted, "is_loaded_in_8bit", False):
        for name, parameter in adapted.named_parameters():
            if any(f".{adapter}" in name for adapter in adapted.peft_config):
                parameter.data = parameter.data.float()
        for part in adapted.modules():
            if hasattr(part, "support_avx512bf16_for_cpu"):
                part.support_avx512bf16_for_cpu = False
        if start.get("peft_config") is not None:
            for part in adapted.modules():
                if isinstance(part, ModulesToSaveWrapper):
                    for trained in part.modules_to_save.values():
                        trained.load_state_dict(part.original_module.state_dict())
        else:
            weights = load_peft_weights(model, device=str(adapted.device))
            for adapter in adapted.peft_config:
                set_peft_model_state_dict(adapted, weights, adapter)


@contextmanager
def _refusals(key: str) -> Iterator[None]:
    """Turn a library's refusal of settings into a `RecipeError`."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, ImportError, re.error) as error:
        raise RecipeError(f"{key}: {str(error)[:400]}") from error


def _fit(run: Run, where: str, model: str, trusted: bool, auto_class: Any, adapter: dict[str, Any]) -> None:
    """Train the new layers of a classifier whole, and refuse what the model cannot be adapted with."""
    peft_config, quantization_config = adapter["peft_config"], adapter["quantization_config"]
    shape = _shape(where, model, trusted, auto_class)
    if auto_class is AutoModelForSequenceClassification:
        # All that is not in the backbone is new: score; or pooler, pre_classifier, classifier of BERT's relatives.
        new = [n for n, part in shape.named_children() if n != shape.base_model_prefix and list(part.parameters())]
        peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or []), *new})
        if quantization_config is not None:  # what is trained whole must be whole
            skipped = {*(quantization_config.llm_int8_skip_modules or []), *peft_config.modules_to_save}
            quantization_config.llm_int8_skip_modules = sorted(skipped)
    layers = _layers(shape)
    known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
    # Of GPT-2; peft finds out itself, with a warning whenever the adapter is loaded.
    peft_config.fan_in_fan_out |= any(isinstance(part, Conv1D) for part in layers.values())
    key, targets = f"{run.stage}.peft.target_modules", peft_config.target_modules
    known_to_peft = shape.config.model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if targets is None and peft_config.target_parameters is None and not known_to_peft:
        raise RecipeError(
            f"{key}: peft has no default for {shape.config.model_type} models; set it. {model} has: {known}."
        )
    for target in [targets] if isinstance(targets, str) else sorted(targets or ()):
        with _refusals(f"{key}: {target!r}"):
            matched = _matched({target} if target is not targets else target, shape)
        if not matched:
            raise RecipeError(f"{key}: {target!r} matches no layer of {model}; it has: {known}.")
    embeddings = next(name for name, part in layers.items() if part is shape.get_input_embeddings())
    if auto_class is AutoModelForCausalLM and shape.config.get_text_config().tie_word_embeddings:
        of_embeddings = {
            "target_modules": targets and embeddings in _matched(targets, shape),
            "trainable_token_indices": peft_config.trainable_token_indices,
        }
        for name in [name for name, given in of_embeddings.items() if given]:
            raise RecipeError(
                f"{run.stage}.peft.{name}: {embeddings} of {model} is its output layer too, and an adapter changes one of "
                "the two only; leave it out."
            )
    _require_tokens(run, model, peft_config, shape)
    if peft_config.lora_alpha == 0:
        raise RecipeError(f"{run.stage}.peft.lora_alpha is 0, with which an adapter changes nothing; the default is 8.")
    for name in peft_config.target_parameters or ():  # peft warns, and passes over one that is not there
        if not any(f".{parameter}".endswith(f".{name}") for parameter, _ in shape.named_parameters()):
            raise RecipeError(f"{run.stage}.peft.target_parameters: {model} has no parameter {name!r}.")
    for name in peft_config.modules_to_save or ():  # peft passes over one that is not there
        if not any(f".{part}".endswith(f".{name}") for part, _ in shape.named_modules()):
            raise RecipeError(f"{run.stage}.peft.modules_to_save: {model} has no layer {name!r}; it has: {known}.")
    trial = copy.deepcopy(peft_config)
    trial.init_lora_weights = True  # others look at the weights, which are not there
    with _refusals(f"{run.stage}.peft"), torch.device("meta"):
        get_peft_model(shape, trial)


def _require_tokens(run: Run, model: str, peft_config: LoraConfig, shape: PreTrainedModel) -> None:
    """Refuse `trainable_token_indices` that are no rows of the embeddings."""
    key, given = f"{run.stage}.peft.trainable_token_indices", peft_config.trainable_token_indices
    rows = shape.get_input_embeddings().num_embeddings
    for tokens in given.values() if isinstance(given, dict) else [] if given is None else [given]:
        wrong = [token for token in tokens if not 0 <= token < rows]
        if wrong or not tokens:
            found = f"{wrong[0]} is no token of {model}" if wrong else "no token is named"
            raise RecipeError(f"{key}: {found}; its tokens are 0 to {rows - 1}.")
    for name in given if isinstance(given, dict) else ():
        if any(part is shape.get_output_embeddings() for part in (_layers(shape)[n] for n in _matched({name}, shape))):
            raise RecipeError(
                f"{key}: {name} is the output layer, which TRL's loss reads past an adapter; leave it out."
            )


def _require_whole_numbers(where: str, reference: str, config: PreTrainedConfig) -> None:
    """Refuse a model whose weights are stored quantized: its reference, merged and exported model would be others."""
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        method = stored["quant_method"] if isinstance(stored, dict) else stored.quant_method
        raise RecipeError(
            f"{where}: the weights of {reference} are stored quantized ({getattr(method, 'value', method)}), so that "
            "training cannot start from them; start from the unquantized original, with peft and quantization, which "
            "quantizes it when it is loaded."
        )


def _shape(where: str, model: str, trusted: bool, auto_class: Any) -> PreTrainedModel:
    """A model without weights, for its names."""
    config = load_config(where, model, trusted)
    with loading(where, model), torch.device("meta"):
        return auto_class.from_config(config, trust_remote_code=trusted)


def _layers(shape: PreTrainedModel) -> dict[str, nn.Module]:
    """Layers that can be adapted, by name."""
    return {name: part for name, part in shape.named_modules() if isinstance(part, nn.Linear | nn.Embedding | Conv1D)}


def _matched(targets: str | set[str], shape: PreTrainedModel) -> set[str]:
    """Names of a model's layers that `target_modules` means, as peft reads it."""
    layers = _layers(shape)
    if targets == "all-linear":
        head = shape.get_output_embeddings()
        return {name for name, part in layers.items() if not isinstance(part, nn.Embedding) and part is not head}
    if isinstance(targets, str):
        return {name for name in layers if re.fullmatch(targets, name)}
    return {name for name in layers if any(f".{name}".endswith(f".{target}") for target in targets)}


def _require_same(
    run: Run, where: str, reference: str, peft_config: LoraConfig, start: PeftConfig, shape: PreTrainedModel
) -> None:
    """Refuse to go on with an adapter under settings that are not its own."""
    if not isinstance(start, LoraConfig) or start.task_type not in ("CAUSAL_LM", None):
        raise RecipeError(
            f"{where}: {reference} is no LoRA adapter of a language model, so training cannot go on with it."
        )
    if str(start.init_lora_weights).startswith(INTO_BASE):
        raise RecipeError(
            f"{where}: the adapter {reference} has a part of its base's weights in it (init_lora_weights: "
            f"{start.init_lora_weights}), so training cannot go on with it; without {run.stage}.peft the merged model is trained."
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
                f"{run.stage}.peft.{name} is {shown[0]}, but the adapter {reference}, with which training goes on, has "
                f"{str(shown[1])[:200]}; set it to that, or leave it out: peft: {{}} takes all of the adapter's settings."
            )


def _merged_on_disk(run: Run, where: str, model: str, settings: dict[str, Any]) -> str:
    """The folder of a run in which the start, an adapter, stands as a whole classifier; written by the main process."""
    folder = run.path / MERGED_BASE
    with PartialState().main_process_first():
        if not folder.exists():
            part = folder.with_name(f".{MERGED_BASE}")
            shutil.rmtree(part, ignore_errors=True)
            with writing("the merged start of the adapter", part):
                merged = load_model(AutoModelForSequenceClassification, where, model, new_head=True, **settings)
                merged.save_pretrained(part)
                part.rename(folder)
    return str(folder)
