"""The model that a stage starts from: it is found, loaded and put into a TRL trainer.

start = Start(run, args, "policy")
trainer = start.trainer(PPOTrainer, tokenizer, reward_funcs=reward_funcs, train_dataset=prompts)
"""

import inspect
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import is_peft_model
from peft import load_peft_weights, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)

from rlhf_recipes.models import hardware
from rlhf_recipes.models.adapters import adapter_args, fit, require_same, shape_of
from rlhf_recipes.models.limits import fit_embeddings
from rlhf_recipes.models.load import adapter_of, base_of, config_of, load_adapter, load_config, load_model
from rlhf_recipes.recipe.checks import refuse_unknown
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.recipe.secrets import drop_secrets
from rlhf_recipes.recipe.trust import runs_own_code
from rlhf_recipes.runs.files import MERGED_BASE
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.runs.references import GGUF, is_hub_model, loading, resolve_model
from rlhf_recipes.system.files import writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Start:
    """A stage's starting model. The constructor checks the settings; `trainer` loads the weights.

    Args:
        run: The stage's run.
        args: The trainer's arguments; `trainer` adds to them how the model is loaded.
        key: The stage's key for its start, `model` or `policy`. Its value is None for a model from scratch.
    """

    def __init__(self, run: Run, args: TrainingArguments, key: str) -> None:
        self._run, self._args, self._key = run, args, f"{run.stage}.{key}"
        self._model_id = getattr(getattr(run.recipe, run.stage), key)
        self._adapter = adapter_args(run, args)
        self.config: Any = None
        """Configuration of the model's language part; None for a model from scratch."""
        if self._model_id is not None:
            self.config = config_of(run.recipe, self._key, self._model_id, classifier=run.stage == "reward")
        self.model: Any = None if self._model_id is None else resolve_model(run.recipe, self._key, self._model_id)
        """Folder of the model; a stage may put a model from scratch here."""

    def trainer(self, trainer_class: type, tokenizer: "PreTrainedTokenizerBase", **more: Any) -> Any:
        """A TRL trainer with the model, ready to train; the embeddings get a row for every token.

        `more` has the trainer's other arguments: data sets, reward functions.

        Raises:
            RecipeError: The model cannot be loaded, or `peft` does not fit it.
        """
        arguments = {"model": self.model} if self._model_id is None else self.arguments()
        with loading(self._key, str(self._model_id), by="create_model_from_path"):
            trainer = trainer_class(**arguments, args=self._args, processing_class=tokenizer, **more)
        drop_secrets(trainer.args)  # the model is loaded
        fit_embeddings(self._key, trainer.model, tokenizer)
        hardware.expect_all_gradients(trainer)
        if is_peft_model(trainer.model):
            _name_bases(trainer.model, self.model, self._model_id)
            if getattr(trainer.model, "is_loaded_in_4bit", False) or getattr(trainer.model, "is_loaded_in_8bit", False):
                _undo_casts(trainer.model, None if arguments.get("peft_config") is not None else self.model)
        return trainer

    def arguments(self) -> dict[str, Any]:
        """A TRL trainer's arguments `model`, `peft_config` and `quantization_config`.

        The trainer loads a whole model by its path. If the start is an adapter, a stage without `peft` trains the merged
        model, and with `peft` it trains this adapter further. A reward model instead gets a new adapter on the merged
        model, which is saved in the run's folder as the new adapter's base.
        """
        run, args, where, model_id = self._run, self._args, self._key, self._model_id
        model, peft_config = self.model, self._adapter["peft_config"]
        is_reward = run.stage == "reward"
        auto_class = AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM
        trusted = runs_own_code(run.recipe, model_id)
        config = load_config(where, model, trusted)
        settings = {"dtype": "float32"} | hardware.attention(args, auto_class, config)
        if args.model_init_kwargs:
            _refuse_unknown_settings(run.stage, config, args.model_init_kwargs)
        settings |= (args.model_init_kwargs or {}) | ({"num_labels": 1} if is_reward else {})
        settings |= {"use_safetensors": True, "trust_remote_code": trusted}
        start = adapter_of(where, model)
        _require_unquantized(where, model_id, config)
        set_seed(args.seed)  # a new head is random
        if start is not None and peft_config is not None and is_reward:
            model, start = _merged_on_disk(run, where, model, settings), None
        if start is None:
            if peft_config is not None:
                fit(run, where, model, trusted, auto_class, self._adapter)
            args.model_init_kwargs, args.trust_remote_code = settings, trusted
            return self._adapter | {"model": model}
        args.model_init_kwargs = None
        if getattr(args, "sync_ref_model", False):
            raise RecipeError(
                f"{run.stage}.trainer.sync_ref_model: {where} is an adapter; TRL syncs whole models only."
            )
        if peft_config is None:
            return {"model": load_model(auto_class, where, model, new_head=is_reward, **settings)}
        require_same(run, where, model_id, peft_config, start, shape_of(where, model, trusted, auto_class))
        base = base_of(where, model, start)
        if not is_hub_model(start.base_model_name_or_path or ""):
            start.base_model_name_or_path = base  # it may have moved
        settings["quantization_config"] = self._adapter["quantization_config"]
        with loading(where, base):
            whole = auto_class.from_pretrained(base, **settings)
        return {"model": load_adapter(where, whole, model, start, is_trainable=True)[0]}


def _refuse_unknown_settings(stage: str, config: PreTrainedConfig, given: dict[str, Any]) -> None:
    """Refuses keys of `model_init_kwargs` that neither `from_pretrained` nor the model's configuration has."""
    load = PreTrainedModel.from_pretrained
    known = {*inspect.signature(load).parameters, *re.findall(r'kwargs\.pop\(\s*"(\w+)"', inspect.getsource(load))}
    known |= {*config.to_dict(), *config.attribute_map, "attn_implementation", "dtype", "torch_dtype"}
    refuse_unknown(f"{stage}.trainer.model_init_kwargs", given, known, f"from_pretrained and {type(config).__name__}")


def _name_bases(adapted: Any, model: str, model_id: str) -> None:
    """Write a base name into the adapter that works from any folder: Hub id and commit, or an absolute path."""
    for config in adapted.peft_config.values():
        base = Path(config.base_model_name_or_path)
        if is_hub_model(model_id) and not model_id.endswith(GGUF) and base == Path(model):
            config.base_model_name_or_path, config.revision = model_id.partition("@")[0], base.name
        elif base.is_dir():
            config.base_model_name_or_path = str(base.resolve())


def _undo_casts(adapted: Any, trained_on: str | None) -> None:
    """Restore the precision of an adapter on a quantized model, which TRL and bitsandbytes lower.

    TRL casts the adapter to bf16, in which updates below 1/256 of a weight are lost, such as those of a small learning
    rate. The cast also changes an existing adapter, so that it differs from its frozen copy, and layers trained whole.
    On a CPU, bitsandbytes rounds the base's scales to bf16 at every evaluation. `trained_on` is the folder of an adapter
    that is trained further; None: the adapter is new.
    """
    for name, parameter in adapted.named_parameters():
        if any(f".{adapter}" in name for adapter in adapted.peft_config):
            parameter.data = parameter.data.float()
    for part in adapted.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False
    if trained_on is None:
        for part in adapted.modules():
            if isinstance(part, ModulesToSaveWrapper):
                for trained in part.modules_to_save.values():
                    trained.load_state_dict(part.original_module.state_dict())
    else:
        weights = load_peft_weights(trained_on, device=str(adapted.device))
        for adapter in adapted.peft_config:
            set_peft_model_state_dict(adapted, weights, adapter)


def _require_unquantized(where: str, model_id: str, config: PreTrainedConfig) -> None:
    """Refuse stored quantized weights: the KL reference, the merged and the exported model would differ."""
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        method = stored["quant_method"] if isinstance(stored, dict) else stored.quant_method
        raise RecipeError(
            f"{where}: the weights of {model_id} are stored quantized ({getattr(method, 'value', method)}); training "
            "needs the unquantized original, which the settings peft and quantization quantize when it is loaded."
        )


def _merged_on_disk(run: Run, where: str, model: str, settings: dict[str, Any]) -> str:
    """Merge the start, an adapter, into a whole classifier in the run's folder; the main process writes it."""
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
