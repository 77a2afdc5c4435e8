"""Configurations and weights of models; an adapter is merged into its base.

In this package, `key` is a model's key in the recipe, for messages, and `model` is its folder.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.recipe.trust import runs_own_code
from rlhf_recipes.runs.files import MERGED_BASE, read_manifest
from rlhf_recipes.runs.references import hub_snapshot, is_hub_model, is_local, loading, resolve_model
from rlhf_recipes.system.terminal import expected

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel


def config_of(recipe: Recipe, key: str, model_id: str, classifier: bool = False) -> "PreTrainedConfig":
    """Configuration of a model's language part.

    Args:
        recipe: The recipe, for `trust_remote_code`.
        key: The model's key in the recipe.
        model_id: The model, as in `resolve_model`.
        classifier: Whether the stage needs a reward model; otherwise a language model.

    Raises:
        RecipeError: The model does not exist, transformers cannot read its configuration, or it is of another kind.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    trusted = runs_own_code(recipe, model_id)
    config = load_config(key, resolve_model(recipe, key, model_id), trusted)
    has_labels = is_classifier(config)
    if config.is_encoder_decoder:
        why = (
            "a cut-off text has no EOS, at which it reads its score; set a decoder or an encoder"
            if classifier
            else "prompts and completions are one text here; set a decoder"
        )
        raise RecipeError(f"{key}: {model_id} is an encoder-decoder ({config.model_type}): {why}.")
    if classifier and has_labels and config.num_labels != 1:
        raise RecipeError(
            f"{key}: {model_id} is a classifier with {config.num_labels} labels, and a reward model has one; start from "
            "the model that it was trained from, or use it as it is with the reward function sentiment."
        )
    if not classifier and (has_labels or not (trusted or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING)):
        kind = "classifier" if has_labels else "model"
        raise RecipeError(
            f"{key}: {model_id} is a {config.model_type} {kind}, which writes no text; set a language model."
        )
    return config.get_text_config()


def is_classifier(config: "PreTrainedConfig") -> bool:
    """Whether a model has a trained classification head."""
    return any("ForSequenceClassification" in name for name in config.architectures or ())


def adapter_of(key: str, model: str) -> "PeftConfig | None":
    """Configuration of the adapter in a folder; None: the folder holds a whole model."""
    from peft import PeftConfig
    from transformers.utils.peft_utils import find_adapter_config_file

    with loading(key, model):
        return PeftConfig.from_pretrained(model) if find_adapter_config_file(model) is not None else None


def base_of(key: str, model: str, adapter: "PeftConfig") -> str:
    """Folder of an adapter's base model; one of the Hub is downloaded.

    Raises:
        RecipeError: The base's folder does not exist.
    """
    merged = Path(model) / MERGED_BASE
    if (merged / "config.json").is_file():  # first: it moves with the run
        return str(merged)
    base = adapter.base_model_name_or_path
    if base is not None and is_hub_model(base):
        with loading(key, base):
            return str(hub_snapshot(base, adapter.revision or ""))
    if base is None or (is_local(base) and not Path(base).is_dir()):
        moved = base and _moved_base(Path(model).resolve(), Path(base))
        if moved:
            return str(moved)
        raise RecipeError(
            f"{key}: {model} is an adapter of the model {base}, which does not exist; put it back, or set "
            f"base_model_name_or_path in {model}/adapter_config.json."
        )
    return base


def _moved_base(run: Path, base: Path) -> Path | None:
    """The new place of a base that was an input of the run, found by id: the recipe's whole folder was moved."""
    if base.parent.name != run.parent.name:
        return None
    for name, run_id in (read_manifest(run) or {}).get("inputs", {}).items():
        beside = run.parent / name
        if run_id is not None and (read_manifest(beside) or {}).get("id") == run_id:
            found = beside if name == base.name else _moved_base(beside, base)
            if found is not None:
                return found
    return None


def load_config(key: str, model: str, trust_remote_code: bool = False) -> "PreTrainedConfig":
    """A model's configuration; for an adapter, its base's."""
    from transformers import AutoConfig

    adapter = adapter_of(key, model)
    source = model if adapter is None else base_of(key, model, adapter)
    with loading(key, model):
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)


def load_model(
    auto_class: Any, key: str, model: str, trust_remote_code: bool = False, new_head: bool = False, **settings: Any
) -> "PreTrainedModel":
    """Load a whole model; an adapter is merged into its base, which may be a classifier for a language model's adapter.

    With `new_head`, missing weights may be random. `settings` are arguments of `from_pretrained`.

    Raises:
        RecipeError: It cannot be loaded, or weights are missing or not finite.
    """
    from rlhf_recipes.runs.divergence import first_not_finite

    adapter = adapter_of(key, model)
    source = model
    if adapter is not None and adapter.is_prompt_learning:
        raise RecipeError(f"{key}: {model} is a {adapter.peft_type.value} adapter, which cannot be merged.")
    if adapter is not None:
        source = adapter.base_model_name_or_path = base_of(key, model, adapter)  # it may have moved
    settings = settings | {"use_safetensors": True, "trust_remote_code": trust_remote_code, "output_loading_info": True}
    if adapter is not None and adapter.task_type == "SEQ_CLS":
        settings.setdefault("num_labels", _labels_of(key, model))
    with loading(key, source), expected("LOAD REPORT"):  # missing weights are refused below
        loaded, report = auto_class.from_pretrained(source, **settings)
    missing = set(report["missing_keys"])
    if adapter is not None:
        loaded, supplied = _merged(key, loaded, model, adapter)
        missing -= supplied
    if missing and not new_head:
        kind = "classifier" if "Classification" in auto_class.__name__ else "language model"
        raise RecipeError(f"{key}: {model} is no trained {kind}: it has no {', '.join(sorted(missing)[:4])}.")
    if (name := first_not_finite(loaded)) is not None:
        raise RecipeError(f"{key}: the weights of {model} are not finite ({name}): its training has diverged.")
    return loaded


def adapter_weights(key: str, model: str) -> Path:
    """The file with an adapter's weights."""
    from transformers.utils import cached_file

    with loading(key, model):
        return Path(cached_file(model, "adapter_model.safetensors"))


def _labels_of(key: str, model: str) -> int:
    """Number of labels in the classifier's head of an adapter."""
    from safetensors import safe_open

    with safe_open(adapter_weights(key, model), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            if name.endswith((".score.weight", ".classifier.weight", ".classifier.out_proj.weight")):
                return file.get_slice(name).get_shape()[0]
    raise RecipeError(f"{key}: {model} is an adapter of a classifier without the classifier's head.")


def _merged(key: str, base: "PreTrainedModel", model: str, adapter: "PeftConfig") -> tuple["PreTrainedModel", set[str]]:
    """The base with the adapter merged into it, and the names of whole weights that the adapter replaces."""
    if getattr(base, "is_quantized", False):
        raise RecipeError(
            f"{key}: {model} is an adapter of {base.config.name_or_path}, whose weights are stored quantized, so an "
            f"adapter cannot be merged; set base_model_name_or_path in {model}/adapter_config.json to the unquantized "
            "original."
        )
    if adapter.task_type == "CAUSAL_LM" and not hasattr(base, "prepare_inputs_for_generation"):
        adapter.task_type = None  # peft's class for language models needs generation; the layers are the same
    adapted, saved = load_adapter(key, base, model, adapter, torch_device=str(base.device))
    whole = adapted.merge_and_unload().requires_grad_(True)
    return whole, {name.removeprefix("base_model.model.") for name in saved}


def load_adapter(
    key: str, base: "PreTrainedModel", model: str, adapter: "PeftConfig", **settings: Any
) -> tuple["PeftModel", set[str]]:
    """The base with an adapter on it, and the names of the adapter's weights.

    `model` is the adapter's folder; `settings` are arguments of `PeftModel.from_pretrained`.

    Raises:
        RecipeError: The adapter belongs to another base: layers differ in size, or exist in one of the two only.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    misfit = f"{key}: the adapter {model} does not fit its base {base.config.name_or_path}"
    with loading(key, model), expected("missing adapter keys"):  # they are refused below
        with safe_open(adapter_weights(key, model), framework="pt") as file:
            saved = set(file.keys())
        try:
            adapted = PeftModel.from_pretrained(base, model, config=adapter, **settings)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise RecipeError(f"{misfit}: {' '.join(str(error).split())[:400]}") from error
    unused = saved - set(get_peft_model_state_dict(adapted))
    if not hasattr(base, "prepare_inputs_for_generation"):  # a classifier has no place for a language model's head
        unused = {name for name in unused if f".{base.base_model_prefix}." in name}
    missing = set(get_peft_model_state_dict(adapted, save_embedding_layers=False)) - saved
    if unused or missing:
        who, names = ("the base", unused) if unused else ("the adapter", missing)
        raise RecipeError(f"{misfit}: {who} has no {', '.join(sorted(names)[:4])}.")
    return adapted, saved
