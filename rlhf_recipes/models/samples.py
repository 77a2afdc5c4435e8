"""One completion for each held-out prompt."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf_recipes.data.tokenizer import continuation, eos_token_ids, token_ids
from rlhf_recipes.models.sampling import sample_completions


@dataclass
class Samples:
    """The completions of one model, one entry per prompt."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    """First EOS included."""
    completions: list[Any]
    finished: list[bool]


def sample(model, tokenizer, prompts: list, new_tokens: int, temperature: float, batch_size: int) -> Samples:
    """Sample one completion for every prompt, from the unchanged distribution (no top-k, no top-p)."""
    ends = eos_token_ids(model, tokenizer)
    prompt_ids = [token_ids(tokenizer, prompt) for prompt in prompts]
    completion_ids = []
    for start in range(0, len(prompts), batch_size):
        part = prompt_ids[start : start + batch_size]
        completion_ids += sample_completions(model, part, tokenizer.pad_token_id, new_tokens, temperature, ends)
    finished = [bool(ids) and ids[-1] in ends for ids in completion_ids]
    texts = [continuation(tokenizer, p, c) for p, c in zip(prompt_ids, completion_ids, strict=True)]
    chat = bool(prompts) and not isinstance(prompts[0], str)
    completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
    return Samples(prompt_ids, completion_ids, completions, finished)


def shared_out(accelerator, rows: list, work: Callable[[list], list]) -> list:
    """Applies `work`, which returns one value a row, to this process's share of the rows; returns all values.

    All ranks call this.
    """
    from accelerate.utils import gather_object

    rank, ranks = accelerator.process_index, accelerator.num_processes
    local = range(rank, len(rows), ranks)
    done = gather_object(list(zip(local, work([rows[i] for i in local]), strict=True)))
    return [value for _, value in sorted(done, key=lambda pair: pair[0])]
