"""Must learn: both algorithms on tasks whose best score is known, and the value network on one whose values are.

Seeds are fixed. Three others were tried by hand for every test; none came near a limit.
"""

import pytest
import torch

from rlhf_recipes import PPOTrainer, RLOOTrainer
from rlhf_recipes.data.tokenizer import make_tokenizer
from rlhf_recipes.models.forward import completion_logits, pad_batch
from rlhf_recipes.recipe.stages import Scratch
from support.tiny_models import causal_lm, word_tokenizer
from support.tiny_trainers import logged, make

pytestmark = pytest.mark.slow

ALL = [(PPOTrainer, {"value_model": "shared"}), (PPOTrainer, {"value_model": "policy"}), (RLOOTrainer, {})]
BASELINES = ["none", "moving_average", "batch_mean", "leave_one_out"]
BEST = {"the film": "fun", "it was": "dull"}
"""The bandit's best arm for each prompt; there is one arm for every word."""


def pull(prompts, completions, **columns):
    return [float(completion.strip() == BEST[prompt]) for prompt, completion in zip(prompts, completions, strict=True)]


def share_of_good(completion_ids, completions, **columns):
    return [text.split().count("good") / len(ids) for text, ids in zip(completions, completion_ids, strict=True)]


def learn(trainer_class, tmp_path, reward, **settings):
    """Mean score of the first rollout and of the last ten."""
    settings = {"beta": 0.0, "lr_scheduler_type": "constant"} | settings
    trainer = make(trainer_class, causal_lm(word_tokenizer()), tmp_path, reward, **settings)
    trainer.train()
    scores = [line["score_mean"] for line in logged(trainer)]
    return scores[0], sum(scores[-10:]) / 10


def learn_bandit(trainer_class, tmp_path, max_steps, **settings):
    return learn(trainer_class, tmp_path, pull, prompts=list(BEST), max_completion_length=1, max_steps=max_steps,
                 per_device_train_batch_size=64, num_generations=8, learning_rate=1e-3, **settings)  # fmt: skip


@pytest.mark.parametrize(("trainer_class", "settings"), ALL)
def test_a_one_token_bandit(trainer_class, settings, tmp_path):
    first, last = learn_bandit(trainer_class, tmp_path, max_steps=250, **settings)
    assert first < 0.2 and last > 0.95


@pytest.mark.parametrize(("trainer_class", "settings"), ALL)
def test_to_emit_a_word(trainer_class, settings, tmp_path):
    first, last = learn(trainer_class, tmp_path, share_of_good, max_completion_length=4, max_steps=120,
                        per_device_train_batch_size=32, num_generations=4, learning_rate=2e-3, **settings)  # fmt: skip
    assert first < 0.2 and last > 0.95


@pytest.mark.parametrize("baseline", BASELINES)
def test_every_rung_from_reinforce_to_rloo_learns(baseline, tmp_path):
    first, last = learn_bandit(RLOOTrainer, tmp_path, max_steps=120, baseline=baseline)
    assert first < 0.2 and last > 0.8


# Exact values


TABLE = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).tolist()
"""What a token (column) scores behind another one (row; at the start, the pad token)."""


def pairs_by_table(completion_ids, **columns):
    return [sum(TABLE[a][b] for a, b in zip([0, *ids], ids, strict=False)) for ids in completion_ids]


def all_completions(vocabulary, eos, length):
    unfinished, found = [[]], []
    for _ in range(length):
        grown = [ids + [token] for ids in unfinished for token in range(vocabulary)]
        found += [ids for ids in grown if ids[-1] == eos]
        unfinished = [ids for ids in grown if ids[-1] != eos]
    return found + unfinished


@torch.no_grad()
def states_of(trainer, prompt, completions):
    """Every state of a prompt: how likely it is visited, and with that weight the sum of scores from there and of their
    squares; its value; its features."""
    tokenizer, features = trainer.processing_class, []
    prompts = [tokenizer(prompt)["input_ids"]] * len(completions)
    ids, attention, mask = pad_batch(prompts, completions, tokenizer.pad_token_id)
    hook = trainer.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: features.append(args[0]))
    logits, outputs = completion_logits(trainer.model, ids, attention, mask.size(1))
    hook.remove()
    logps = logits.log_softmax(-1).gather(-1, ids[:, -mask.size(1) :, None])[..., 0]
    probabilities = (logps * mask).sum(1).exp().double()
    assert probabilities.sum() == pytest.approx(1, abs=1e-5)  # they are all completions
    scores, states = pairs_by_table(completions), {}
    for row, (completion, score) in enumerate(zip(completions, scores, strict=True)):
        for t in range(len(completion)):
            state = states.setdefault(tuple(completion[:t]), {"visits": 0.0, "sum": 0.0, "squares": 0.0})
            p = probabilities[row].item()
            state["visits"] += p
            state["sum"] += p * score
            state["squares"] += p * score**2
            state |= {"value": outputs.state_values[row, t].item(), "features": features[0][row, t].tolist()}
    return list(states.values())


@pytest.mark.parametrize(("value_model", "length", "learning_rate"), [("policy", 3, 3e-3), ("shared", 2, 3e-2)])
def test_values_of_an_enumerable_mdp_become_exact(value_model, length, learning_rate, tmp_path):
    """The policy is held fixed, so that every state's expected score can be summed up over all completions.

    A whole network (`policy`) can represent 42 states of up to three tokens. A head (`shared`) can do as much as a
    linear function of the policy's hidden states: exact where there are fewer states (10) than hidden units (32), as
    in completions of up to two tokens.
    """
    tokenizer = make_tokenizer(Scratch(tokenizer="word", vocabulary=10), ["a b"])
    prompts, steps = ["a", "b a"], 300
    # Weights large enough for a policy that prefers some tokens, small enough for one that visits every state.
    model = causal_lm(tokenizer, initializer_range=0.1)
    trainer = make(PPOTrainer, model, tmp_path, pairs_by_table, prompts, tokenizer, value_model=value_model,
                   max_steps=steps, value_warmup_steps=steps, learning_rate=learning_rate, max_completion_length=length,
                   per_device_train_batch_size=192, num_generations=96, beta=0.0, gamma=1.0, lam=1.0,
                   vf_coef=1.0)  # fmt: skip
    policy = {name: p.detach().clone() for name, p in model.named_parameters() if not name.startswith("value_network.")}
    trainer.train()
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(p, now[name]) for name, p in policy.items())

    completions = all_completions(len(tokenizer), tokenizer.eos_token_id, length)
    states = [state for prompt in prompts for state in states_of(trainer, prompt, completions)]
    assert len(states) == len(prompts) * sum(4**t for t in range(length))
    visits, sums, squares, values = (
        torch.tensor([state[name] for state in states]) for name in ("visits", "sum", "squares", "value")
    )
    exact = sums / visits
    spread = exact.max() - exact.min()
    if value_model == "shared":
        features = torch.tensor([[*s["features"], 1.0] for s in states])
        assert torch.linalg.matrix_rank(features) == len(states), "no linear function of these is exact"
    assert (values - exact).abs().mean() < 0.05 * spread
    assert (values - exact).abs().mean() < 0.25 * exact.mean().sub(exact).abs().mean()  # no constant does this well

    share = visits / visits.sum()
    of_returns = (share * squares / visits).sum() - (share * exact).sum() ** 2
    within_states = (share * (squares / visits - exact**2)).sum()
    explained = [line["explained_variance"] for line in logged(trainer)]
    largest = (1 - within_states / of_returns).item()
    assert explained[0] < 0.05 < 0.15 < largest
    assert sum(explained[-20:]) / 20 == pytest.approx(largest, abs=0.05)
