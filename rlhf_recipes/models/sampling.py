"""Sampling completions from a causal language model's own distribution."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from rlhf_recipes.models.forward import pad_batch, rows_at_once, takes, takes_position_ids

CACHES = ("past_key_values", "cache_params", "state")
"""Names of the cache, among a model's arguments and outputs: of most models, of Mamba's relatives, of RWKV."""


@torch.no_grad()
def sample_completions(
    model: Any,
    prompt_ids: list[list[int]],
    pad_token_id: int,
    max_new_tokens: int,
    temperature: float,
    eos_token_ids: list[int],
) -> list[list[int]]:
    """One completion for every prompt, each token drawn from softmax(logits / temperature).

    Finished completions leave the batch, so that a long one alone does not cost as much as all. Each token needs one
    uniform number; `torch.multinomial` draws one for each entry of the vocabulary, which is slower than a small model.

    Args:
        model: The model, not wrapped for training.
        prompt_ids: Token ids of B prompts.
        pad_token_id: Pads shorter prompts on the left.
        max_new_tokens: Longest completion.
        temperature: Above 0.
        eos_token_ids: Tokens that end a completion.

    Returns:
        B lists of token ids; the last one is EOS unless the completion was cut off.
    """
    padded = pad_batch(prompt_ids, [[]] * len(prompt_ids), pad_token_id)
    input_ids, attention_mask = (tensor.to(model.device) for tensor in padded[:2])
    ends = torch.tensor(eos_token_ids, device=input_ids.device)
    sampled = torch.full((len(input_ids), max_new_tokens), -1, device=input_ids.device)
    rows = torch.arange(len(input_ids), device=input_ids.device)
    running = torch.ones_like(rows, dtype=torch.bool)
    positions, has_positions = _positions(attention_mask), takes_position_ids(model)
    cache_name = next((name for name in CACHES if takes(model, name)), None)
    cache = None
    for t in range(max_new_tokens):
        outputs = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=True,
            logits_to_keep=1,
            **({cache_name: cache} if cache_name else {}),
            **({"position_ids": positions} if has_positions else {}),
        )
        cache, token = cache_name and outputs[cache_name], _draw(outputs.logits[:, -1], temperature)
        sampled[rows[running], t] = token[running]
        running = running & ~torch.isin(token, ends)
        if not running.any():
            break
        # Copying the cache takes time too, so not for every finished completion.
        if running.sum() <= 0.875 * len(rows) and isinstance(cache, Cache):
            kept = running.nonzero().squeeze(1)
            cache.reorder_cache(kept)  # every kind of layer has it, linear attention and convolutions too
            rows, token, attention_mask, positions = rows[kept], token[kept], attention_mask[kept], positions[kept]
            running = running[kept]
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(rows), 1)], dim=1)
        if cache_name:
            input_ids, positions = token[:, None], positions[:, -1:] + 1
        else:  # such as GPT-1: the model reads the whole text again
            input_ids, positions = torch.cat([input_ids, token[:, None]], dim=1), _positions(attention_mask)
    return [[token for token in row if token >= 0] for row in sampled.tolist()]


def _positions(attention_mask: Tensor) -> Tensor:
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def _draw(logits: Tensor, temperature: float) -> Tensor:
    """A token for each row of logits (B, vocabulary), by inverting the cumulative distribution."""
    # float64 keeps the small probabilities of a large vocabulary in the sum; Apple's GPUs lack it.
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    tokens = []
    for chunk in rows_at_once(logits):
        cumulative = (logits[chunk].float() / temperature).softmax(-1).cumsum(-1, dtype=dtype)
        at = torch.rand(len(cumulative), 1, dtype=dtype, device=logits.device) * cumulative[:, -1:]
        # The first entry above `at` has a probability above 0, unless rounding puts `at` at the top.
        tokens.append(torch.searchsorted(cumulative, at, right=True).clamp(max=logits.size(-1) - 1))
    return torch.cat(tokens).squeeze(1)
