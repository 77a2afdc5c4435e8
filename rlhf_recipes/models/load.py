"""Models: their configurations and weights, an adapter's merged into its base's; models from scratch; what must fit."""

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.data.tokenizer import context_length, longest_prompt
from rlhf_recipes.recipe.schema import Recipe, RecipeError, Scratch
from rlhf_recipes.runs.files import MERGED_BASE, read_manifest
from rlhf_recipes.runs.references import hub_snapshot, is_hub_model, is_local, loading, resolve_model
from rlhf_recipes.system.terminal import expected

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from trl import RewardConfig, SFTConfig

logger = logging.getLogger(__name__)


def fit_embeddings(key: str, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Add rows to the embeddings where the tokenizer has tokens beyond them; spare rows, as GPT-NeoX has, stay.

    New rows are near the mean of the old ones, so that a new token is no likelier than the average one.

    Args:
        key: Where the model stands in the recipe, for messages.
        model: Changed in place.
        tokenizer: Gives the number of rows.

    Raises:
        RecipeError: An adapter is trained, which has no rows of its own.
    """
    from accelerate.utils import is_peft_model

    if is_peft_model(model):
        rows = model.config.get_text_config().vocab_size
        if len(tokenizer) > rows:
            raise RecipeError(
                f"{key}: the tokenizer has {len(tokenizer)} tokens (special_tokens included), the model {rows}, and an "
                "adapter adds none; name special_tokens that the vocabulary has, or train all weights (no peft)."
            )
    elif len(tokenizer) > model.get_input_embeddings().num_embeddings:
        with expected("multivariate normal"):
            model.resize_token_embeddings(len(tokenizer))


def check_context(
    recipe: Recipe,
    key: str,
    reference: str,
    prompts: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    new_tokens: int,
) -> None:
    """Refuse prompts that leave no room for the completion in the model's context, and tokens the model does not have.

    Raises:
        RecipeError: The longest prompt and `new_tokens` do not fit, or the tokenizer has more tokens than the model.
    """
    config = config_of(recipe, key, reference)
    stage = key.partition(".")[0]
    added = sum(tokenizer.convert_tokens_to_ids(t) >= config.vocab_size for t in recipe.special_tokens.values())
    if len(tokenizer) > config.vocab_size + (added if stage == "eval" else 0):  # which calls fit_embeddings
        fix = " Stage sft makes room for special_tokens: start from stage:sft, or leave them out." if added else ""
        raise RecipeError(
            f"{key}: the tokenizer of {reference} has {len(tokenizer)} tokens, the model only {config.vocab_size}.{fix}"
        )
    context = context_length(config, tokenizer)
    longest = longest_prompt(tokenizer, prompts["prompt"])
    if longest + new_tokens > context:
        length = "eval.max_new_tokens" if stage == "eval" else f"{stage}.trainer.max_completion_length"
        raise RecipeError(
            f"{key}: the longest prompt has {longest} tokens; with {new_tokens} new ones that is more than the "
            f"{context} of {reference}: lower data.max_prompt_tokens (prompts of the data's own) or data.prompt_tokens "
            f"(cut from texts), or {length}."
        )


def fit_length(
    recipe: Recipe,
    stage: str,
    config: "PreTrainedConfig",
    tokenizer: "PreTrainedTokenizerBase",
    args: "SFTConfig | RewardConfig",
) -> None:
    """Lower TRL's default of `max_length` to the model's context, for texts that would be longer.

    Raises:
        RecipeError: The recipe sets a greater one.
    """
    context = context_length(config, tokenizer)
    if args.max_length is not None and args.max_length <= context:
        return
    trainer = getattr(recipe, stage).trainer
    if "max_length" not in trainer:
        args.max_length = context
    elif context < math.inf:
        raise RecipeError(
            f"{stage}.trainer.max_length is {trainer['max_length'] or 'null'}, but the model reads {context} tokens at most; "
            "set it to no more, or leave it out."
        )


def config_of(recipe: Recipe, key: str, reference: str, classifier: bool = False) -> "PreTrainedConfig":
    """Configuration of a model's language part.

    Args:
        recipe: The recipe, for `trust_remote_code`.
        key: Where the model stands in the recipe, for messages.
        reference: The model, as in `resolve_model`.
        classifier: Whether the model is to give a text one number, or to write texts.

    Raises:
        RecipeError: There is no such model, transformers cannot read its configuration, or it is of another kind.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    trusted = reference in recipe.trust_remote_code
    config = load_config(key, resolve_model(recipe, key, reference), trusted)
    has_labels = any("ForSequenceClassification" in name for name in config.architectures or ())
    if classifier and has_labels and config.num_labels != 1:
        raise RecipeError(
            f"{key}: {reference} is a classifier with {config.num_labels} labels, and a reward model has one; start from "
            "the model that it was trained from, or use it as it is by the reward function sentiment."
        )
    if not classifier and (has_labels or not (trusted or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING)):
        kind = "classifier" if has_labels else "model"
        raise RecipeError(
            f"{key}: {reference} is a {config.model_type} {kind}, which writes no text; set a language model."
        )
    return config.get_text_config()


def adapter_of(key: str, model: str) -> "PeftConfig | None":
    """Configuration of the adapter that a folder or Hub repository holds; None: it holds a whole model."""
    from peft import PeftConfig
    from transformers.utils.peft_utils import find_adapter_config_file

    with loading(key, model):
        return PeftConfig.from_pretrained(model) if find_adapter_config_file(model) is not None else None


def base_of(key: str, model: str, adapter: "PeftConfig") -> str:
    """Folder of the whole model that an adapter belongs to; one of the Hub is downloaded.

    Raises:
        RecipeError: It is a folder that is not there any more.
    """
    merged = Path(model) / MERGED_BASE
    if (merged / "config.json").is_file():  # also where the run was moved to another place
        return str(merged)
    base = adapter.base_model_name_or_path
    if base is not None and is_hub_model(base):
        with loading(key, base):
            return str(hub_snapshot(base, adapter.revision or ""))
    if base is None or (is_local(base) and not Path(base).is_dir()):
        moved = base and _moved_along(Path(model).resolve(), Path(base))
        if moved:
            return str(moved)
        raise RecipeError(
            f"{key}: {model} is an adapter of the model {base}, which is not there; put it back, or set "
            f"base_model_name_or_path in {model}/adapter_config.json."
        )
    return base


def _moved_along(run: Path, base: Path) -> Path | None:
    """Where a base is now that was a stage on which the run builds, by its id: the recipe's folder was moved as a whole."""
    if base.parent.name != run.parent.name:
        return None
    for name, run_id in (read_manifest(run) or {}).get("inputs", {}).items():
        beside = run.parent / name
        if run_id is not None and (read_manifest(beside) or {}).get("id") == run_id:
            found = beside if name == base.name else _moved_along(beside, base)
            if found is not None:
                return found
    return None


def load_config(key: str, model: str, trust_remote_code: bool = False) -> "PreTrainedConfig":
    """A model's configuration; that of an adapter is its base's."""
    from transformers import AutoConfig

    adapter = adapter_of(key, model)
    with loading(key, model):
        return AutoConfig.from_pretrained(
            model if adapter is None else base_of(key, model, adapter), trust_remote_code=trust_remote_code
        )


def load_model(
    auto_class: Any, key: str, model: str, trust_remote_code: bool = False, new_head: bool = False, **settings: Any
) -> "PreTrainedModel":
    """Load a model to read it or to train all of it; an adapter is merged into its base.

    An adapter of a language model merges into the layers of a classifier too.

    Args:
        auto_class: Of transformers, such as `AutoModelForCausalLM`.
        key: Where the model stands in the recipe, for messages.
        model: Folder or Hub id, of a whole model or of an adapter.
        trust_remote_code: Whether its own Python code may run.
        new_head: Whether weights that it does not have may be random.
        settings: Of `from_pretrained`.

    Raises:
        RecipeError: It cannot be loaded, or weights are missing.
    """
    adapter = adapter_of(key, model)
    source = model
    if adapter is not None and adapter.is_prompt_learning:
        raise RecipeError(f"{key}: {model} is a {adapter.peft_type.value} adapter, which no model can be merged with.")
    if adapter is not None:
        source = adapter.base_model_name_or_path = base_of(key, model, adapter)  # which may have moved
    settings = settings | {"use_safetensors": True, "trust_remote_code": trust_remote_code, "output_loading_info": True}
    if adapter is not None and adapter.task_type == "SEQ_CLS":
        settings.setdefault("num_labels", _labels_of(key, model))
    with loading(key, source), expected("LOAD REPORT"):  # what is missing is said below
        loaded, report = auto_class.from_pretrained(source, **settings)
    missing = set(report["missing_keys"])
    if adapter is not None:
        loaded, supplied = _merged(key, loaded, model, adapter)
        missing -= supplied
    if missing and not new_head:
        kind = "classifier" if "Classification" in auto_class.__name__ else "language model"
        raise RecipeError(f"{key}: {model} is no trained {kind}: it has no {', '.join(sorted(missing)[:4])}.")
    return loaded


def adapter_weights(key: str, model: str) -> Path:
    """The file with an adapter's weights."""
    from transformers.utils import cached_file

    with loading(key, model):
        return Path(cached_file(model, "adapter_model.safetensors"))


def _labels_of(key: str, model: str) -> int:
    """Number of labels of the classifier's head that was saved with an adapter."""
    from safetensors import safe_open

    with safe_open(adapter_weights(key, model), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            if name.endswith((".score.weight", ".classifier.weight", ".classifier.out_proj.weight")):
                return file.get_slice(name).get_shape()[0]
    raise RecipeError(f"{key}: {model} is an adapter of a classifier without the classifier's head.")


def _merged(key: str, base: "PreTrainedModel", model: str, adapter: "PeftConfig") -> tuple["PreTrainedModel", set[str]]:
    """The base with the adapter merged into it, and the names of the base's weights that the adapter brought whole."""
    if getattr(base, "is_quantized", False):
        raise RecipeError(
            f"{key}: {model} is an adapter of {base.config.name_or_path}, whose weights are stored quantized, so that "
            f"nothing can be merged into them; set base_model_name_or_path in {model}/adapter_config.json to the "
            "unquantized original."
        )
    if adapter.task_type == "CAUSAL_LM" and not hasattr(base, "prepare_inputs_for_generation"):
        adapter.task_type = None  # peft's class for language models must generate; the layers are the same
    adapted, saved = load_adapter(key, base, model, adapter, torch_device=str(base.device))
    whole = adapted.merge_and_unload().requires_grad_(True)
    return whole, {name.removeprefix("base_model.model.") for name in saved}


def load_adapter(
    key: str, base: "PreTrainedModel", model: str, adapter: "PeftConfig", **settings: Any
) -> tuple["PeftModel", set[str]]:
    """The base with an adapter on it, and the names of the adapter's weights.

    Args:
        key: Where the model stands in the recipe, for messages.
        base: Gets the adapter's layers.
        model: Folder or Hub id of the adapter.
        adapter: Its configuration.
        settings: Of `PeftModel.from_pretrained`.

    Raises:
        RecipeError: It was made for another base: there, its layers are not, or have other sizes, or are more.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    with loading(key, model), safe_open(adapter_weights(key, model), framework="pt") as file:
        saved = set(file.keys())
    misfit = f"{key}: the adapter {model} does not fit its base {base.config.name_or_path}"
    try:
        with loading(key, model), expected("missing adapter keys"):  # which are refused below
            adapted = PeftModel.from_pretrained(base, model, config=adapter, **settings)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise RecipeError(f"{misfit}: {str(error).split(chr(10))[1].strip()}") from error
    unused = saved - set(get_peft_model_state_dict(adapted))
    if not hasattr(base, "prepare_inputs_for_generation"):  # a language model's head has no place in a classifier
        unused = {name for name in unused if f".{base.base_model_prefix}." in name}
    missing = set(get_peft_model_state_dict(adapted, save_embedding_layers=False)) - saved
    if unused or missing:
        who, names = ("that", unused) if unused else ("the adapter", missing)
        raise RecipeError(f"{misfit}: {who} has no {', '.join(sorted(names)[:4])}.")
    return adapted, saved


def make_model(scratch: Scratch, tokenizer: "PreTrainedTokenizerBase", seed: int) -> "PreTrainedModel":
    """A causal language model with random weights that fits the tokenizer.

    Raises:
        RecipeError: transformers knows no such architecture, or refuses the configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    set_seed(seed)
    try:
        config = AutoConfig.for_model(
            scratch.architecture,
            vocab_size=len(tokenizer),
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **scratch.config,
        )
        return AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"sft.scratch: transformers refuses {scratch.architecture}: {str(error)[:300]}") from error


def scale_head(model: Any, seed: int) -> None:
    """Draw a new scalar head's weights from N(0, 1 / (d + 1)), d its input features, and set its bias to 0.

    A head that comes with the model is trained already and stays as it is; the log says so. The seed alone decides:
    the global random numbers go on as without.

    Source: Huang et al. 2024 (2403.17031), detail 11.

    Raises:
        RecipeError: The model has no linear layer that gives one number.
    """
    import torch

    if any("ForSequenceClassification" in name for name in model.config.architectures or ()):
        logger.warning("reward.scale_head: reward.model brings a trained head, which is kept.")
        return
    heads = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer.out_features == 1]
    if not heads:
        raise RecipeError(
            f"reward.scale_head: {type(model).__name__} has no linear layer that gives one number; set it to false."
        )
    with torch.no_grad():
        for head in heads:
            std = (head.in_features + 1) ** -0.5
            drawn = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed)) * std
            head.weight.copy_(drawn)
            if head.bias is not None:
                head.bias.zero_()
