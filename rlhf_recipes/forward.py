"""One forward pass over prompts and completions, as sampling saw them; for training and for evaluation alike."""

from typing import Any

import torch
from torch import Tensor


def completion_logits(
    model: Any, input_ids: Tensor, attention_mask: Tensor, length: int, temperature: float, **kwargs: Any
) -> tuple[Tensor, Any]:
    """Logits that predict the last `length` tokens, in float32 and divided by the temperature.

    Position ids follow the attention mask, as in generation: with learned positions (GPT-2), a left-padded prompt
    would otherwise be read at other positions than it was continued from. The LM head runs on `length` + 1 positions.

    Args:
        model: Causal language model, wrapped or not.
        input_ids: Left-padded prompts and right-padded completions, (B, P + T).
        attention_mask: 1 for tokens that are no padding, (B, P + T).
        length: T.
        temperature: The one that completions are sampled with.
        kwargs: Further arguments of the model's forward.

    Returns:
        Logits, (B, T, vocabulary), and the model's own outputs.
    """
    outputs = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
        logits_to_keep=length + 1,  # the position before a token is the one that predicts it
        use_cache=False,
        **kwargs,
    )
    return outputs.logits[:, :-1].float() / temperature, outputs


def pad_batch(
    prompt_ids: list[list[int]], completion_ids: list[list[int]], pad_token_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Pad prompts on the left and completions on the right.

    Returns:
        Token ids (B, P + T), attention mask (B, P + T) and completion mask (B, T).
    """
    P, T = max(map(len, prompt_ids)), max(map(len, completion_ids))
    ids, attention = [], []
    for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
        left, right = P - len(prompt), T - len(completion)
        ids.append([pad_token_id] * left + list(prompt) + list(completion) + [pad_token_id] * right)
        attention.append([0] * left + [1] * (len(prompt) + len(completion)) + [0] * right)
    mask = torch.tensor(attention)
    return torch.tensor(ids), mask, mask[:, P:]
