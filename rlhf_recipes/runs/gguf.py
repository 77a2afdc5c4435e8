"""Models in GGUF files, the format of llama.cpp: unpacked once into a folder with safetensors that every stage loads."""

import hashlib
import json
import logging
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.system.files import is_disk_error, stamp_of

logger = logging.getLogger(__name__)

DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
"""Values of `tokenizer.ggml.pre` that split off single digits before GPT-2's rule; transformers ignores them."""

AS_GPT2 = {"gpt-2", "mpt", "olmo", "jais", "phi-2", "roberta-bpe"}
"""Values of `tokenizer.ggml.pre` that mean GPT-2's rule alone, which transformers takes for every unknown value."""


def cache_folder() -> Path:
    """Where unpacked and fetched models lie."""
    cache = os.environ.get("RLHF_RECIPES_CACHE")
    return Path(cache or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "rlhf_recipes")).expanduser()


def unpacked(key: str, file: Path) -> Path:
    """The folder with the weights of a GGUF file in float32, and its tokenizer; it is made at the first call.

    Args:
        key: The model's key in the recipe, for messages.
        file: The GGUF file.

    Raises:
        RecipeError: The file is damaged, or transformers cannot read its architecture or tokenizer.
    """
    from filelock import FileLock

    stamp = json.dumps([str(file.resolve()), *stamp_of(file)])
    folder = cache_folder() / "gguf" / f"{file.stem}-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # the ranks of a launch unpack it once
        if not folder.is_dir():
            logger.warning("%s: unpacks %s into %s, once", key, file.name, folder)
            unpack(key, file, folder)
    return folder


def unpack(key: str, file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to a new folder. Errors as in `unpacked`."""
    if find_spec("gguf") is None:
        raise RecipeError(f"{key}: {file.name} needs the package gguf: pip install 'rlhf-recipes[offline]'.")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    part = folder.with_name(f".{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    source: dict[str, Any] = {"gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
        _split_as_llama_cpp(key, file, tokenizer)
        whole = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, quantization_config=whole, **source
        )
        model.hf_quantizer = None  # it refuses to save weights, which are plain now
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.rename(folder)
    except Exception as error:  # a damaged file ends in any error of a parser
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, RecipeError) or is_disk_error(error):
            raise
        raise RecipeError(
            f"{key}: {file} cannot be read as a language model in GGUF ({type(error).__name__}: {str(error)[:300]}); "
            "the file is damaged, or transformers does not know its architecture: set the original model."
        ) from error


def _split_as_llama_cpp(key: str, file: Path, tokenizer: Any) -> None:
    """Let a byte-level tokenizer split texts as `tokenizer.ggml.pre` says, before it merges bytes.

    Raises:
        RecipeError: The rule is unknown, so that the model would read other tokens than it was trained on.
    """
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    from transformers.integrations.gguf.reader import read_gguf_metadata

    metadata, _ = read_gguf_metadata(str(file))
    rule = metadata.get("tokenizer.ggml.pre")
    if metadata.get("tokenizer.ggml.model") != "gpt2" or rule in GGUF_PRE_TOKENIZER_SPLITS or rule in AS_GPT2:
        return
    if rule not in DIGITS:
        raise RecipeError(
            f"{key}: {file} splits texts by the rule {rule} (tokenizer.ggml.pre), which is not known here, so the model "
            "would read wrong tokens; set the original model."
        )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
