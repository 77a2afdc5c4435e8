"""One forward pass over prompts and completions with the positions of sampling, for training and evaluation."""

import inspect
from typing import Any

import torch
from torch import Tensor


def completion_logits(
    model: Any, input_ids: Tensor, attention_mask: Tensor, length: int, **kwargs: Any
) -> tuple[Tensor, Any]:
    """Logits that predict the last `length` tokens.

    Position ids follow the attention mask, as in generation; otherwise padding would shift the learned positions of
    GPT-2. The LM head runs on `length` positions only.

    Args:
        model: Causal language model, wrapped or not.
        input_ids: Left-padded prompts and right-padded completions, (B, P + T).
        attention_mask: 0 for padding, else 1, (B, P + T).
        length: T.
        kwargs: Further arguments of the model's forward.

    Returns:
        Logits, (B, T, vocabulary), and the model's own outputs.
    """
    if takes_position_ids(model):
        kwargs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    end = input_ids.size(1) - 1  # the position before a token is the one that predicts it
    outputs = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        logits_to_keep=torch.arange(end - length, end, device=input_ids.device),
        use_cache=False,
        **kwargs,
    )
    return outputs.logits, outputs


def takes_position_ids(model: Any) -> bool:
    """Whether the model's forward has `position_ids`; models with positions from the mask (BLOOM) do not."""
    return takes(model, "position_ids")


def takes(model: Any, name: str) -> bool:
    """Whether the model's forward has an argument of this name."""
    while hasattr(model, "module"):  # DDP, DeepSpeed
        model = model.module
    if hasattr(model, "get_base_model"):  # PEFT
        model = model.get_base_model()
    return name in inspect.signature(type(model).forward).parameters


PLAIN = ("UnsafeViewBackward0", "ViewBackward0", "MmBackward0", "AddmmBackward0")
"""Last operations of a linear layer. Their gradients do not need their output."""


def sampled_logps(
    logits: Tensor, tokens: Tensor, temperature: float, entropy: bool = False, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens under logits / temperature, and the entropies of those distributions.

    Computed in float32 for any dtype of the logits. No tensor of their size is made besides their gradient.

    Args:
        logits: (B, T, vocabulary).
        tokens: (B, T).
        temperature: The sampling temperature.
        entropy: Whether to compute entropies; False: they are empty.
        overwrite: Whether the gradient may overwrite the logits, if autograd allows it. Nothing else may need the
            logits, and a second backward pass is an error.

    Returns:
        Both (B, T), in nats.
    """
    overwrite = overwrite and type(logits.grad_fn).__name__ in PLAIN
    flat = logits.contiguous().view(-1, logits.size(-1)), tokens.reshape(-1, 1)
    logps, entropies = _SampledLogps.apply(*flat, temperature, entropy, overwrite)
    return logps.view_as(tokens), entropies.view_as(tokens) if entropy else entropies


LOWEST = torch.finfo(torch.float32).min


class _SampledLogps(torch.autograd.Function):
    """log p_y and H = -sum p log p of p = softmax(logits / temperature), with explicit gradients.

    d log p_y / dz_j = [j = y] - p_j   and   dH / dz_j = -p_j (log p_j + H),   z = logits / temperature.

    The shapes are (N, vocabulary) and (N, 1) for N = B * T tokens.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, tokens: Tensor, temperature: float, entropy: bool, overwrite: bool):
        logsumexp = torch.empty(tokens.shape, dtype=torch.float32, device=logits.device)
        logps, entropies = torch.empty_like(logsumexp), torch.empty_like(logsumexp) if entropy else logsumexp[:0]
        for rows in rows_at_once(logits):
            z = _scaled(logits[rows], temperature)
            logsumexp[rows] = torch.logsumexp(z, -1, keepdim=True)
            logps[rows] = z.gather(-1, tokens[rows]) - logsumexp[rows]
            if entropy:
                p = (z - logsumexp[rows]).exp_()
                # A token that cannot be drawn has p = 0 and z = -inf, whose product must be 0.
                entropies[rows] = logsumexp[rows] - torch.linalg.vecdot(p, z.clamp(min=LOWEST)).unsqueeze(-1)
        ctx.save_for_backward(logits, tokens, logsumexp, entropies)
        ctx.temperature, ctx.overwrite = temperature, overwrite
        return logps, entropies

    @staticmethod
    def backward(ctx, of_logps: Tensor, of_entropies: Tensor):
        logits, tokens, logsumexp, entropies = ctx.saved_tensors
        # Autograd notices the change of a saved tensor and refuses a second pass.
        gradient = logits.detach() if ctx.overwrite else torch.empty_like(logits)
        for rows in rows_at_once(logits):
            there = gradient[rows]
            g = of_logps[rows] / ctx.temperature
            log_p = torch.sub(
                _scaled(logits[rows], ctx.temperature),
                logsumexp[rows],
                out=there if there.dtype == torch.float32 else None,
            )
            if entropies.numel():
                g_entropy = of_entropies[rows] / ctx.temperature
                of_z = -log_p.exp() * (g + g_entropy * (log_p.clamp(min=LOWEST) + entropies[rows]))
            else:
                of_z = log_p.exp_().mul_(-g)
            of_z.scatter_add_(-1, tokens[rows], g)
            if of_z is not there:
                there.copy_(of_z)
        return gradient, None, None, None, None


def rows_at_once(logits: Tensor) -> list[slice]:
    """Slices of rows of (N, vocabulary) for chunked work.

    On a CPU, temporary tensors of a chunk fit into the cache; on a GPU, a chunk keeps it busy.
    """
    step = max(1, (2**19 if logits.device.type == "cpu" else 2**26) // logits.size(-1))
    return [slice(start, start + step) for start in range(0, len(logits), step)]


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() if temperature == 1.0 else logits.float() / temperature


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


def longest(prompt_mask: Tensor, completion_mask: Tensor) -> tuple[int, int]:
    """The numbers of columns that hold all tokens: the last of the prompts, and the first of the completions."""
    P, T = prompt_mask.sum(1).max(), completion_mask.sum(1).max()
    return int(P), max(int(T), 1)
