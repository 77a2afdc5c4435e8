"""Log-probabilities and sampling: against torch's own, against brute force, and invariant to padding."""

import pytest
import torch

from rlhf_recipes.models.forward import completion_logits, pad_batch, sampled_logps
from rlhf_recipes.models.sampling import _draw, sample_completions
from support.tiny_models import causal_lm, word_tokenizer


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama"])
def test_logps_do_not_depend_on_padding_or_batch_order(architecture):
    tokenizer = word_tokenizer()
    model = causal_lm(tokenizer, architecture).eval()
    rows = [([5, 6], [7, 8, 9]), ([9] * 7, [5] * 6), ([4, 4, 4], [6])]

    def logps(some):
        ids, mask, completion = pad_batch([p for p, _ in some], [c for _, c in some], tokenizer.pad_token_id)
        with torch.no_grad():
            logits, _ = completion_logits(model, ids, mask, completion.size(1))
            values, _ = sampled_logps(logits, ids[:, -completion.size(1) :], 0.7)
        return [row[: len(c)] for row, (_, c) in zip(values, some, strict=True)]

    together, backwards = logps(rows), logps(rows[::-1])[::-1]
    for i, row in enumerate(rows):
        alone = logps([row])[0]
        assert torch.allclose(together[i], alone, atol=1e-5) and torch.allclose(backwards[i], alone, atol=1e-5)


def test_sampled_logps_are_log_softmax_with_its_gradients():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 11, generator=generator, dtype=torch.float32, requires_grad=True)
    tokens = torch.randint(0, 11, (3, 4), generator=generator)
    weights = torch.randn(2, 3, 4, generator=generator)
    results = []
    for ours in (True, False):
        logits.grad = None
        if ours:
            logps, entropies = sampled_logps(logits, tokens, 0.7, entropy=True)
        else:
            everything = (logits / 0.7).log_softmax(-1)
            logps = everything.gather(-1, tokens[..., None])[..., 0]
            entropies = -(everything.exp() * everything).sum(-1)
        (weights[0] * logps + weights[1] * entropies).sum().backward()
        results.append((logps.detach(), entropies.detach(), logits.grad.clone()))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_sampled_logps_without_entropy_and_in_chunks(monkeypatch):
    logits = torch.randn(5, 4, 11, generator=torch.Generator().manual_seed(1), requires_grad=True)
    tokens = torch.arange(20).view(5, 4) % 11
    logps, entropies = sampled_logps(logits, tokens, 1.0)
    logps.sum().backward()
    assert entropies.numel() == 0
    whole, logits.grad = logits.grad.clone(), None
    monkeypatch.setattr(
        "rlhf_recipes.models.forward.rows_at_once", lambda x: [slice(i, i + 3) for i in range(0, len(x), 3)]
    )
    again, _ = sampled_logps(logits, tokens, 1.0)
    again.sum().backward()
    assert torch.equal(logps, again) and torch.equal(whole, logits.grad)


@pytest.mark.parametrize("entropy", [False, True])
def test_overwritten_logits_give_the_same_gradients(entropy):
    hidden = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2))
    tokens = torch.arange(12).view(3, 4) % 7
    gradients = []
    for overwrite in (False, True):
        head = torch.nn.Linear(5, 7, bias=False)
        torch.nn.init.constant_(head.weight, 0.3)
        with torch.no_grad():
            head.weight[2] = 1.0
        logits = head(hidden)
        logps, entropies = sampled_logps(logits, tokens, 0.7, entropy, overwrite)
        loss = (logps * torch.arange(12).view(3, 4)).sum() + (entropies**2).sum()
        loss.backward(retain_graph=True)
        gradients.append(head.weight.grad.clone())
        if overwrite:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
    assert torch.equal(*gradients)


def test_logits_that_their_own_gradient_needs_are_not_overwritten():
    """Gemma's soft cap: the gradient of tanh is made from its output."""
    gradients = []
    for overwrite in (False, True):
        hidden = torch.linspace(-2, 2, 24).view(2, 3, 4).requires_grad_()
        logps, _ = sampled_logps(torch.tanh(hidden * 3), torch.ones(2, 3, dtype=torch.long), 1.0, overwrite=overwrite)
        logps.sum().backward()
        gradients.append(hidden.grad)
    assert torch.equal(*gradients)


def test_logps_of_bfloat16_logits_are_float32():
    logits = torch.randn(2, 3, 7).bfloat16().requires_grad_()
    logps, _ = sampled_logps(logits, torch.zeros(2, 3, dtype=torch.long), 1.0)
    logps.sum().backward()
    assert logps.dtype == torch.float32 and logits.grad.dtype == torch.bfloat16
    assert torch.allclose(logps, logits.float().log_softmax(-1)[..., 0], atol=1e-6)


def test_tokens_are_drawn_with_their_probabilities():
    torch.manual_seed(0)
    logits = torch.tensor([0.3, -1.0, 1.2, float("-inf"), 0.0, float("-inf")])
    n = 60_000
    counts = torch.bincount(_draw(logits.expand(n, -1), 0.8), minlength=6)
    p = (logits / 0.8).softmax(0)
    assert counts[3] == counts[5] == 0
    assert ((counts - n * p).abs() <= 4.5 * (n * p * (1 - p)).sqrt()).all()


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama"])
def test_completions_that_leave_the_batch_change_nothing_for_the_others(architecture):
    """At a temperature near 0 sampling is greedy: every row must say what it says alone, under `generate` itself."""
    tokenizer = word_tokenizer()
    model = causal_lm(tokenizer, architecture).eval()
    prompts = [[5], [6, 7, 8], [9, 9], [4, 5, 6, 7], [8], [7, 5]]
    alone = []
    for prompt in prompts:
        made = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        alone.append(made[0, len(prompt) :].tolist())
    ends = sorted({row[k] for row, k in zip(alone, (2, 4, 6), strict=False)})  # so that some end early, and some do not
    expected = []
    for row in alone:
        first = next((i for i, token in enumerate(row) if token in ends), len(row))
        expected.append(row[: first + 1])
    assert len({len(row) for row in expected}) > 1
    assert sample_completions(model, prompts, tokenizer.pad_token_id, 12, 1e-4, ends) == expected


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_that_cannot_be_drawn_leave_entropy_and_gradients_finite(temperature):
    """A logit of -inf, against the same distribution without that token."""
    logits = torch.tensor([[[1.0, 2.0, 0.5]]])
    found = []
    for end in (torch.full((1, 1, 1), -torch.inf), torch.empty(1, 1, 0)):
        whole = torch.cat([logits, end], -1).requires_grad_()
        logps, entropies = sampled_logps(whole, torch.tensor([[1]]), temperature, entropy=True)
        (logps + entropies).sum().backward()
        found.append((logps.detach(), entropies.detach(), whole.grad[..., :3]))
    for with_end, without in zip(*found, strict=True):
        torch.testing.assert_close(with_end, without)
