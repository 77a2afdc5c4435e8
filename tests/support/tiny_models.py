"""Tiny new models and tokenizers, so that no test needs a network."""

import hashlib
import os
from pathlib import Path

from support.texts import REVIEWS, WORDS


def word_tokenizer(**special):
    """A word-level tokenizer, whose decoder drops the blank before a completion."""
    from rlhf_recipes.data.tokenizer import make_tokenizer
    from rlhf_recipes.recipe.stages import Scratch

    tokenizer = make_tokenizer(Scratch(tokenizer="word", vocabulary=200), [" ".join(WORDS)])
    for name, value in special.items():
        setattr(tokenizer, name, value)
    return tokenizer


def bpe_tokenizer():
    """A byte-level BPE tokenizer with a separate pad token."""
    from rlhf_recipes.data.tokenizer import make_tokenizer
    from rlhf_recipes.recipe.stages import Scratch

    return make_tokenizer(Scratch(tokenizer="bpe", vocabulary=320), [row["text"] for row in REVIEWS])


def causal_lm(tokenizer, architecture: str = "gpt2", seed: int = 0, **config):
    """A random causal language model with two small layers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64},
        "llama": {
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
        },
        "gpt_neox": {
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
        },
        "mixtral": {
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 64,
            "num_local_experts": 4,
            "max_position_embeddings": 64,
        },
        "cohere": {
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        },
    }[architecture]
    torch.manual_seed(seed)
    settings = (
        sizes
        | {
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
            "pad_token_id": tokenizer.pad_token_id,
        }
        | config
    )
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings))


def save_pair(folder: Path, model, tokenizer) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def put_into_cache(cache: Path, name: str, folder: Path, *refs: str, kind: str = "model") -> str:
    """Lay a folder into huggingface_hub's cache as it lays out a download of a commit; returns the commit."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    commit = hashlib.sha1(b"".join(files.values())).hexdigest()
    root = cache / f"{kind}s--{name.replace('/', '--')}"
    for part in ("blobs", f"snapshots/{commit}"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (root / "snapshots" / commit / file).symlink_to(os.path.relpath(blob, root / "snapshots" / commit))
    for ref in refs:
        (root / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (root / "refs" / ref).write_text(commit)
    return commit
