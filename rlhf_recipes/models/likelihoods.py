"""How likely a language model finds completions that it or another model wrote: log-probabilities at temperature 1."""

from typing import Any

import torch

from rlhf_recipes.data.tokenizer import context_length, token_ids
from rlhf_recipes.models.forward import completion_logits, pad_batch, sampled_logps
from rlhf_recipes.recipe.messages import as_text


@torch.inference_mode()
def sequence_logps(
    model: Any, tokenizer: Any, prompt_ids: list[list[int]], completion_ids: list[list[int]]
) -> list[float]:
    """Log-probability of every whole completion of a batch, in nats; no prompt may be empty.

    It is -inf where a completion has a token that is beyond the model's embeddings: another model with this tokenizer
    may have spare rows, and write from them.
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
    """Log-probabilities of a batch of completions' texts, and their lengths, both in the model's own tokens; no EOS.

    The model need not be the one that wrote them. Of a text longer than its context the beginning is left out.
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
    """Tokens of a prompt, at least one, and those that a completion adds to them."""
    text = as_text(completion)
    if not isinstance(prompt, str) and tokenizer.chat_template:
        return token_ids(tokenizer, prompt), tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = prompt if isinstance(prompt, str) else as_text(prompt) + "\n"
    before, whole = token_ids(tokenizer, prompt), token_ids(tokenizer, prompt + text)
    # Tokens may reach over the end of the prompt; nothing says how likely the first token of all is.
    same = next(
        (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), min(len(before), len(whole))
    )
    return whole[: max(1, same)], whole[max(1, same) :]
