"""TRL's head of stage sft scores positions with a label only, and nothing else changes."""

import pytest
import torch
from trl.kernels.chunked_logprob import _use_triton
from trl.trainer import utils

from rlhf_recipes.trainers.sft_head import score_labels_only
from support.tiny_models import causal_lm, word_tokenizer

IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 0, 0], [3, 4, 5, 0, 0, 0]])
LABELS = torch.where(torch.arange(6) < 3, -100, torch.where(IDS == 0, -100, IDS))  # the last row is cut in its prompt


def step(labels):
    model = causal_lm(word_tokenizer())
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    outputs = model(input_ids=IDS, attention_mask=(IDS != 0).long(), labels=labels, fused_lm_head=True)
    outputs.loss.backward()
    return outputs, {name: weight.grad for name, weight in model.named_parameters()}


@pytest.fixture
def scored(monkeypatch):
    """Number of positions of every call of the head. It begins with TRL's own choice."""
    found, apply = [], utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(utils, "_use_triton", _use_triton)
    monkeypatch.setattr(
        utils._ChunkedLogProbFunction, "apply", lambda hidden, *rest: found.append(len(hidden)) or apply(hidden, *rest)
    )
    return found


def test_loss_and_gradients_stay(scored):
    before, gradients = step(LABELS)
    score_labels_only(prompts=True)
    after, ours = step(LABELS)
    assert scored == [15, 4]
    assert torch.equal(before.label_mask, after.label_mask)
    for name in ("loss", "log_probs", "entropy", "is_top1"):
        torch.testing.assert_close(after[name], before[name])
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-4)
    assert max(gradient.abs().max() for gradient in gradients.values()) > 0.01


def test_a_batch_without_labels_has_no_gradient(scored):
    score_labels_only(prompts=True)
    outputs, gradients = step(torch.full_like(IDS, -100))
    assert scored == [0] and outputs.loss == 0
    assert all(gradient is None or not gradient.any() for gradient in gradients.values())
