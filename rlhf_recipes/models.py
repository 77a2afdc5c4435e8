"""Where models and tokenizers come from: `stage:` references, folders, Hub ids, and models made from scratch."""

import functools
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.config import Recipe, RecipeError, Scratch
from rlhf_recipes.data import is_local, locate_in_package
from rlhf_recipes.run import read_manifest, require_stage
from rlhf_recipes.terminal import expected

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from trl import RewardConfig, SFTConfig

log = logging.getLogger(__name__)

SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
"""Special tokens of a tokenizer made from scratch: pad and EOS are distinct, so that padding never hides an EOS."""


WEIGHTS = "*.safetensors"

SNAPSHOT = [WEIGHTS, "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
"""Files of a model on the Hub that are downloaded: weights, configuration, tokenizer and code of its own; no pickle."""

NOT_IN_SNAPSHOT = [f"*/{WEIGHTS}", "consolidated*"]
"""Weights that stand there a second time, in another format."""

MERGED_BASE = "base"
"""In the folder of an adapter: the whole model that it belongs to, where that stands nowhere else."""


def resolve_model(recipe: Recipe, key: str, reference: str) -> str:
    """Turn a model reference into the folder that `from_pretrained` takes; a model of the Hub is downloaded.

    Args:
        recipe: The recipe, for `stage:` references.
        key: Where the reference stands in the recipe, for messages.
        reference: `stage:NAME`, a folder, `package:NAME/FOLDER` in an installed package, or a Hub id, which
            `@revision` pins to a branch, tag or commit.

    Raises:
        RecipeError: That stage has not run, nothing is at that path or on the Hub, or it has no safetensors.
    """
    if reference.startswith("stage:"):
        return str(require_stage(recipe, reference.removeprefix("stage:"), key))
    if is_hub_model(reference):
        name, _, revision = reference.partition("@")
        with loading(key, reference):
            folder = _snapshot(name, revision, hub_cache(), is_offline())
        fix = (
            f"Pin a revision that has them, such as {name}@refs/pr/1, which the Hub's converter opens, or convert it: "
        )
    elif reference.startswith("package:"):
        folder, fix = locate_in_package(key, reference), ""
    else:
        folder, fix = Path(reference).expanduser(), "Convert it: "
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            found = "no such folder" if not folder.is_dir() else "no config.json in it, so it holds no model"
            raise RecipeError(f"{key}: {reference}: {found} (looked from {Path.cwd()}).")
    if not any(folder.glob(WEIGHTS)):
        raise RecipeError(
            f"{key}: {reference} has no weights in safetensors, and others are not loaded: a pickle can run anything. "
            f"{fix}load it where you trust it, save_pretrained() it to a folder, and set {key} to that."
        )
    return str(folder)


def is_hub_model(reference: str) -> bool:
    """Whether a model reference is a Hub id, with or without `@revision`."""
    if reference.startswith(("stage:", "package:")) or Path(reference).exists():
        return False
    return not is_local(reference.partition("@")[0])


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it downloads.

    By its own rules, but asked of the environment: to import it is to fix whether it works offline.
    """
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(cache)).expanduser()


def is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "")


@functools.cache  # a branch that moves meanwhile: one run sees one commit
def _snapshot(name: str, revision: str, cache: Path, offline: bool) -> Path:
    """Folder with the files of a Hub model; an older one whose weights are pickles is taken from the Hub's conversion."""
    # All ranks may call it at once: huggingface_hub locks every file while it is downloaded, so that each is only once.
    from huggingface_hub import snapshot_download

    how = {
        "cache_dir": cache,
        "local_files_only": offline,
        "allow_patterns": SNAPSHOT,
        "ignore_patterns": NOT_IN_SNAPSHOT,
    }
    folder = Path(snapshot_download(name, revision=revision or "main", **how))
    if any(folder.glob(WEIGHTS)) or revision or offline:
        return folder
    from huggingface_hub import HfApi
    from transformers.safetensors_conversion import get_conversion_pr_reference

    try:
        revision = get_conversion_pr_reference(HfApi(), name)
    except OSError as error:  # the caller says that there are no safetensors
        log.info("%s: the Hub has no conversion to safetensors: %s", name, error)
        return folder
    log.warning("%s has no safetensors but those of the Hub's converter, which are taken; pin them: %s@%s", name, name, revision)
    return Path(snapshot_download(name, revision=revision, **how))


def load_tokenizer(recipe: Recipe, key: str, reference: str, classifier: bool = False) -> "PreTrainedTokenizerBase":
    """Load a model's tokenizer, with the recipe's special tokens where it lacks them; else without pad it pads with EOS.

    A pad token that is the EOS token counts as none where the recipe has one.

    Args:
        recipe: The recipe, for `special_tokens` and `trust_remote_code`.
        key: Where the model stands in the recipe, for messages.
        reference: The model, as in `resolve_model`.
        classifier: Whether a sequence classifier will read it: then it pads on the right, and a tokenizer without EOS
            (BERT's) ends texts with its separator. Otherwise it pads on the left, and must have an EOS token of its
            own that it does not put behind every prompt.

    Raises:
        RecipeError: It cannot be loaded, or cannot be used.
    """
    from transformers import AutoTokenizer

    side = "right" if classifier else "left"
    folder = resolve_model(recipe, key, reference)
    with loading(key, reference):
        tokenizer = AutoTokenizer.from_pretrained(
            folder,
            padding_side=side,
            truncation_side=side,
            trust_remote_code=reference in recipe.trust_remote_code,
        )
    for name in ("eos_token", "pad_token"):
        has = getattr(tokenizer, name)
        lacks = has is None or (name == "pad_token" and has == tokenizer.eos_token)
        if name in recipe.special_tokens and lacks:
            tokenizer.add_special_tokens({name: recipe.special_tokens[name]})
    if classifier and tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.eos_token_id is None:
        raise RecipeError(
            f"{key}: the tokenizer of {reference} has no EOS token, so no text could ever end. "
            'Name one: special_tokens={eos_token: "..."}.'
        )
    if not classifier and tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]:
        raise RecipeError(
            f"{key}: the tokenizer of {reference} ends every text with {tokenizer.eos_token}, a prompt too. "
            "Set it in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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
        with expected("new embeddings will be initialized"):
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
    context = _context(config, tokenizer)
    longest = max(len(token_ids(tokenizer, prompt)) for prompt in prompts["prompt"])
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
    context = _context(config.get_text_config(), tokenizer)
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


def config_of(recipe: Recipe, key: str, reference: str) -> "PreTrainedConfig":
    """Configuration of a model's language part.

    Raises:
        RecipeError: There is no such model, or transformers cannot read its configuration.
    """
    folder = resolve_model(recipe, key, reference)
    return load_config(key, folder, reference in recipe.trust_remote_code).get_text_config()


def _context(config: "PreTrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> float:
    """Longest text in tokens that a model reads; infinite where nothing limits it."""
    from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

    context = getattr(config, "max_position_embeddings", None) or math.inf
    if tokenizer.model_max_length < VERY_LARGE_INTEGER:  # which it is where nobody set it
        context = min(context, tokenizer.model_max_length)
    return context


def token_ids(tokenizer: "PreTrainedTokenizerBase", prompt: str | list[dict]) -> list[int]:
    """Token ids of a prompt, text or chat messages, as TRL's trainers make them."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]


@contextmanager
def loading(key: str, reference: str) -> Iterator[None]:
    """Turn a library's error about the model reference at `key` into a `RecipeError`."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, RecipeError):
            raise
        if "trust_remote_code" in str(error):
            raise RecipeError(
                f"{key}: {reference} brings Python code of its own. Read it, and if it may run, say so by name: "
                f"trust_remote_code=[{reference}] (of a reward function: its argument trust_remote_code)."
            ) from error
        raise RecipeError(f"{key}: {reference} cannot be used: {str(error)[:400]}") from error


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
            return str(_snapshot(base, adapter.revision or "", hub_cache(), is_offline()))
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
        for name in file.keys():  # noqa: SIM118  # no mapping
            if name.endswith((".score.weight", ".classifier.weight", ".classifier.out_proj.weight")):
                return file.get_slice(name).get_shape()[0]
    raise RecipeError(f"{key}: {model} is an adapter of a classifier without the classifier's head.")


def _merged(
    key: str, base: "PreTrainedModel", model: str, adapter: "PeftConfig"
) -> tuple["PreTrainedModel", set[str]]:
    """The base with the adapter merged into it, and the names of the base's weights that the adapter brought whole."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(adapter_weights(key, model), framework="pt") as file:
        saved = set(file.keys())
    generates = hasattr(base, "prepare_inputs_for_generation")
    if adapter.task_type == "CAUSAL_LM" and not generates:
        adapter.task_type = None  # peft's class for language models must generate; the layers are the same
    with loading(key, model):
        adapted = PeftModel.from_pretrained(base, model, config=adapter, torch_device=str(base.device))
    unused = saved - set(get_peft_model_state_dict(adapted))
    if not generates:  # the head of a language model has no place in a classifier
        unused = {name for name in unused if f".{base.base_model_prefix}." in name}
    if unused:
        raise RecipeError(f"{key}: the adapter {model} does not fit its base: that has no {', '.join(sorted(unused)[:4])}.")
    whole = adapted.merge_and_unload().requires_grad_(True)
    return whole, {name.removeprefix("base_model.model.") for name in saved}


def make_tokenizer(scratch: Scratch, texts: list[str]) -> "PreTrainedTokenizerBase":
    """Train a tokenizer on `texts`: whole words (blanks separate them), or byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = list(SPECIAL_TOKENS.values())
    if scratch.tokenizer == "word":
        tokenizer = Tokenizer(models.WordLevel(unk_token=SPECIAL_TOKENS["unk_token"]))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(vocab_size=scratch.vocabulary, special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=scratch.vocabulary,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", clean_up_tokenization_spaces=False, **SPECIAL_TOKENS
    )


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


def continuation(tokenizer: "PreTrainedTokenizerBase", prompt_ids: list[int], completion_ids: list[int]) -> str:
    """The completion's text such that prompt + completion is the text of both, without special tokens.

    Decoders of whole words and of SentencePiece drop a blank at the beginning, which a completion decoded alone loses.
    """
    prompt = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt_ids, *completion_ids], skip_special_tokens=True)
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    return tokenizer.decode(completion_ids, skip_special_tokens=True)


def eos_token_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Every token that ends a completion: the tokenizer's EOS and those that the model declares, as TRL counts them."""
    declared = model.generation_config.eos_token_id
    declared = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    return sorted({tokenizer.eos_token_id, *declared})


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
        log.warning("reward.scale_head: reward.model brings a trained head, which is kept.")
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
