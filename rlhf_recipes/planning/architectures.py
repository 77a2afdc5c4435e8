"""Configurations of the models that a recipe names, without their weights."""

from typing import Any

from transformers import AutoConfig

from rlhf_recipes.models.adapters import lora_of
from rlhf_recipes.models.load import adapter_of, load_config
from rlhf_recipes.recipe.schema import ON_POLICY, TRAINED, Recipe, RecipeError
from rlhf_recipes.runs.fetched import FETCHED, is_fetched
from rlhf_recipes.runs.inputs import is_reachable
from rlhf_recipes.runs.references import (
    GGUF,
    hub_parts,
    is_hub_model,
    is_offline,
    loading,
    local_folder,
    resolve_model,
)

_GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
_NEOX = {"model_type": "gpt_neox", "vocab_size": 50304, "max_position_embeddings": 2048, "tie_word_embeddings": False}


def _neox(layers: int, hidden: int, heads: int, vocabulary: int = 50304) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    return _NEOX | sizes | {"intermediate_size": 4 * hidden, "vocab_size": vocabulary}


ARCHITECTURES = {
    "openai-community/gpt2": _GPT2,
    "lvwerra/gpt2-imdb": _GPT2,
    "distilbert/distilgpt2": _GPT2 | {"n_layer": 6},
    "openai-community/gpt2-medium": _GPT2 | {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "openai-community/gpt2-large": _GPT2 | {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "openai-community/gpt2-xl": _GPT2 | {"n_embd": 1600, "n_layer": 48, "n_head": 25},
    "EleutherAI/pythia-160m-deduped": _neox(12, 768, 12),
    "EleutherAI/pythia-410m-deduped": _neox(24, 1024, 16),
    "EleutherAI/pythia-1b-deduped": _neox(16, 2048, 8),
    "EleutherAI/pythia-1.4b-deduped": _neox(24, 2048, 16),
    "EleutherAI/pythia-2.8b-deduped": _neox(32, 2560, 32),
    "EleutherAI/pythia-6.9b-deduped": _neox(32, 4096, 32, 50432),
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama",
        "vocab_size": 49152,
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "sentence-transformers/all-MiniLM-L6-v2": {
        "model_type": "bert",
        "num_hidden_layers": 6,
        "hidden_size": 384,
        "intermediate_size": 1536,
    },
    "distilbert/distilbert-base-uncased": {"model_type": "distilbert"},
    "distilbert/distilbert-base-cased": {"model_type": "distilbert", "vocab_size": 28996},
    "lvwerra/distilbert-imdb": {"model_type": "distilbert"},
    "microsoft/deberta-v3-base": {
        "model_type": "deberta-v2",
        "vocab_size": 128100,
        "type_vocab_size": 0,
        "relative_attention": True,
        "position_buckets": 256,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "layer_norm_eps": 1e-7,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "meta-llama/Llama-3.2-1B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
}
"""Configurations of the Hub models in the shipped recipes, to plan them without network."""


def config_of(recipe: Recipe, key: str, model_id: str, passed: tuple[str, ...] = ()) -> tuple[Any, Any]:
    """The configuration of a model, and of its adapter (None: a whole model).

    A stage need not have run: the model that it starts from has the same sizes.

    Args:
        recipe: The recipe, for `stage:` references.
        key: The recipe's key of the model id, for messages.
        model_id: As in `resolve_model`.
        passed: Stages that led here.

    Raises:
        RecipeError: The model is neither here nor on the Hub, or stages start from one another.
    """
    if model_id.startswith("stage:"):
        return _config_of_stage(recipe, key, model_id.removeprefix("stage:"), passed)
    fetched = model_id.removeprefix("fetched:")
    if fetched != model_id and fetched in FETCHED and not is_fetched(fetched):
        return AutoConfig.for_model(**ARCHITECTURES[FETCHED[fetched].origin]), None
    if model_id.endswith(GGUF):
        folder = resolve_model(recipe, key, model_id)
    elif is_hub_model(model_id):
        return _config_of_hub_model(recipe, key, model_id), None
    else:
        folder = str(local_folder(key, model_id))
    return load_config(key, folder), adapter_of(key, folder)


def _config_of_hub_model(recipe: Recipe, key: str, model_id: str) -> Any:
    from huggingface_hub import try_to_load_from_cache

    name, revision, _ = hub_parts(model_id)
    revision = revision or "main"
    is_cached = isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    if not is_cached and name in ARCHITECTURES:
        return AutoConfig.for_model(**ARCHITECTURES[name])
    # Without network, huggingface_hub retries for most of a minute.
    offline = is_offline() or not (is_cached or is_reachable())
    try:
        with loading(key, model_id):
            return AutoConfig.from_pretrained(
                name, revision=revision, local_files_only=offline, trust_remote_code=False
            )
    except RecipeError as error:
        raise RecipeError(
            f"{key}: plan needs the config.json of {model_id}, which is neither here nor on the Hub; set {key} to a local "
            "folder that has it."
        ) from error


def _config_of_stage(recipe: Recipe, key: str, stage: str, passed: tuple[str, ...]) -> tuple[Any, Any]:
    if stage in passed:
        raise RecipeError(f"{key}: stage:{stage} starts from a model that is made from it; set {key} to a model.")
    section = getattr(recipe, stage, None) if stage in TRAINED else None
    if section is None:
        raise RecipeError(f"{key}: stage:{stage}: recipe {recipe.name} has no stage {stage} that makes a model.")
    if stage == "sft" and section.scratch is not None:
        scratch = section.scratch
        with loading("sft.scratch", scratch.architecture):
            return AutoConfig.for_model(scratch.architecture, vocab_size=scratch.vocabulary, **scratch.config), None
    name = "policy" if stage in ON_POLICY else "model"
    config, adapter = config_of(recipe, f"{stage}.{name}", getattr(section, name), (*passed, stage))
    # A stage without peft writes a whole model: it merges the adapter that it starts from.
    return config, None if section.peft is None else adapter or lora_of(stage, section.peft)


def drops_out(config: Any) -> bool:
    """True if the model has dropout of any kind."""
    return any("drop" in name and value for name, value in config.to_dict().items() if isinstance(value, float))
