"""Log-probabilities of completions under a language model, which may be another than their author, at temperature 1."""

from typing import Any

import torch

from rlhf_recipes.data.tokenizer import context_length, token_ids
from rlhf_recipes.models.forward import completion_logits, pad_batch, sampled_logps
from rlhf_recipes.recipe.messages import as_text


@torch.inference_mode()
def sequence_logps(
    model: Any, tokenizer: Any, prompt_ids: list[list[int]], completion_ids: list[list[int]]
) -> list[float]:
    """Log-probability of every completion of a batch, in nats. No prompt may be empty.

    It is -inf for a completion with a token beyond the model's embeddings. Another model with the same tokenizer may
    have spare rows and sample such tokens.
    """
    batch = pad_batch(prompt_ids, completion_ids, tokenizer.pad_token_id)
    ids, attention_mask, mask = (tensor.to(model.device) for tensor in batch)
    if mask.size(1) == 0:
        return [0.0] * len(prompt_ids)
    beyond = ids >= model.get_input_embeddings().num_embeddings
    ids = ids.masked_fill(beyond, 0)
    logits, _ = completion_logits(model, ids, attention_mask, mask.size(1))
    logps, _ = sampled_logps(logits, ids[:, -mask.size(1) :], temperature=1.0)
    logps = logps.masked_fill(beyond[:, -mask.size(1) :], -torch.inf)
    return logps.masked_fill(mask == 0, 0.0).sum(1).tolist()


def text_logps(
    model: Any, tokenizer: Any, prompts: list[str | list[dict]], completions: list[str | list[dict]]
) -> tuple[list[float], list[int]]:
    """Log-probabilities of completions in nats, and their lengths, both in the model's own tokens and without EOS.

    A text longer than the context loses its beginning.
    """
    context = context_length(model.config, tokenizer)
    pairs = []
    for prompt, completion in zip(prompts, completions, strict=True):
        before, after = _text_ids(tokenizer, prompt, completion)
        after = after[: int(min(context - 1, len(after)))]
        pairs.append((before[-int(min(context - len(after), len(before))) :], after))
    sums = sequence_logps(model, tokenizer, [before for before, _ in pairs], [after for _, after in pairs])
    return sums, [len(after) for _, after in pairs]


def _text_ids(tokenizer: Any, prompt: str | list[dict], completion: str | list[dict]) -> tuple[list[int], list[int]]:
    """Tokens of a prompt, at least one, and the tokens that the completion adds."""
    text = as_text(completion)
    if not isinstance(prompt, str) and tokenizer.chat_template:
        return token_ids(tokenizer, prompt), tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = prompt if isinstance(prompt, str) else as_text(prompt) + "\n"
    before, whole = token_ids(tokenizer, prompt), token_ids(tokenizer, prompt + text)
    # A token may cross the end of the prompt. The very first token has no probability.
    same = next(
        (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), min(len(before), len(whole))
    )
    return whole[: max(1, same)], whole[max(1, same) :]
