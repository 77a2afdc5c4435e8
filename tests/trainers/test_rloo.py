"""RLOO: equal to TRL's, to the last bit where nothing is computed in another order; and its other baselines."""

import logging

import pytest
import torch
import trl

from rlhf_recipes import RLOOConfig, RLOOTrainer
from support.tiny_trainers import PROMPTS, UNPADDED, logged, make, micro_batches, rollout, sum_of_ids

TWICE = [p for p in UNPADDED for _ in range(2)]


def moved(trainer):
    """The trainer, with a policy that has left its reference."""
    trainer.args.check_first_step = False
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return trainer


def some_missing(completion_ids, **kwargs):
    """A score for all but two completions; the last prompt has only one."""
    values = sum_of_ids(completion_ids)
    values[1] = values[-1] = None
    return values


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("reward", [sum_of_ids, some_missing])
@pytest.mark.parametrize("settings", [{}, {"normalize_advantages": True}, {"reward_clip_range": [1.0, 4.0]},
                                      {"mask_truncated_completions": True}])  # fmt: skip
def test_equals_trl(beta, reward, settings, policy_folder, tmp_path):
    """On the same completions and scores: advantages, loss, gradients and metrics."""
    sampled = rollout(make(RLOOTrainer, policy_folder, tmp_path), TWICE)
    completions = [
        row[mask.bool()].tolist()
        for row, mask in zip(sampled["completion_ids"], sampled["completion_mask"], strict=True)
    ]
    results = []
    for trainer_class in (RLOOTrainer, trl.RLOOTrainer):
        trainer = moved(make(trainer_class, policy_folder, tmp_path, reward, UNPADDED, beta=beta, **settings))
        trainer._generate_single_turn = lambda *args: completions
        output = rollout(trainer, TWICE)
        advantages = output["advantages"].clone()
        # Ratios outside of the clip range, every second one on the side where the clip decides.
        output["old_logps"] = output["old_logps"] - 0.6 * advantages.sign() * torch.tensor([1, -1] * 4)
        part = micro_batches(trainer, output)[0] if trainer_class is RLOOTrainer else output
        loss = trainer._compute_loss(trainer.model, part)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
        logs = {}
        trainer.log(logs)
        results.append((output, advantages, loss, gradient, logs))
    (ours, our_advantages, our_loss, our_gradient, our_logs), (theirs, advantages, loss, gradient, logs) = results
    assert torch.equal(ours["completion_ids"], theirs["completion_ids"])
    if beta == 0.0:  # the KL's log-probabilities come from other kernels
        assert torch.equal(our_advantages, advantages)
    assert torch.allclose(our_advantages, advantages, atol=1e-4) and advantages.abs().sum() > 0
    assert torch.allclose(our_loss, loss, atol=1e-4)
    assert torch.allclose(our_gradient, gradient, atol=1e-4) and gradient.abs().sum() > 0
    names = {"score_mean": "reward", "score_std": "reward_std", "length_mean": "completions/mean_length",
             "clip_fraction": "clip_ratio/region_mean", "entropy": "entropy", "tokens": "num_tokens",
             f"score/{reward.__name__}": f"rewards/{reward.__name__}/mean"}  # fmt: skip
    if beta:
        names["kl_per_token"] = "kl"
    for name, in_trl in names.items():
        assert our_logs[name] == pytest.approx(logs[in_trl], abs=1e-4), name
    assert our_logs["clip_fraction"] > 0


def test_a_whole_training_equals_trl(policy_folder, tmp_path):
    """Several rollouts, passes and optimizer steps, with the same completions: the same weights in the end."""
    weights = []
    for trainer_class in (RLOOTrainer, trl.RLOOTrainer):
        trainer = make(trainer_class, policy_folder, tmp_path, sum_of_ids, UNPADDED, per_device_train_batch_size=2,
                       steps_per_generation=4, num_iterations=2, gradient_accumulation_steps=2, max_steps=8,
                       num_generations=4, beta=0.1)  # fmt: skip
        generator = torch.Generator().manual_seed(0)

        def complete(prompt_ids, *rest, generator=generator):
            return torch.randint(2, 20, (len(prompt_ids), 6), generator=generator).tolist()

        trainer._generate_single_turn = complete
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    for name in weights[0]:
        # Adam divides by the gradient's size, so that a tiny gradient's rounding counts as much as a large one's.
        assert torch.allclose(weights[0][name], weights[1][name], atol=2e-4), name
        assert name.endswith("c_attn.bias") or not torch.allclose(weights[0][name], start[name], atol=2e-3), name


BASELINE_BY_HAND = {
    "leave_one_out": lambda rewards, i, group: [r for j, r in enumerate(rewards) if j != i and j // 4 == group],
    "group_mean": lambda rewards, i, group: [r for j, r in enumerate(rewards) if j // 4 == group],
    "batch_mean": lambda rewards, i, group: rewards,
    "constant": lambda rewards, i, group: [2.5],
    "none": lambda rewards, i, group: [0.0],
}


@pytest.mark.parametrize("baseline", BASELINE_BY_HAND)
def test_baselines_by_hand(baseline, policy_folder, tmp_path):
    trainer = make(RLOOTrainer, policy_folder, tmp_path, sum_of_ids, beta=0.0, baseline=baseline, num_generations=4,
                   baseline_value=2.5 if baseline == "constant" else 0.0)  # fmt: skip
    output = rollout(trainer, [p for p in PROMPTS for _ in range(4)])
    rewards = [s["scores"]["sum_of_ids"] for s in trainer.sampled_completions(16)]
    used = [BASELINE_BY_HAND[baseline](rewards, i, i // 4) for i in range(16)] if len(rewards) == 16 else None
    if used is None:  # the log holds a rollout of the configured size only
        rewards = sum_of_ids(
            [r[m.bool()].tolist() for r, m in zip(output["completion_ids"], output["completion_mask"], strict=True)]
        )
        used = [BASELINE_BY_HAND[baseline](rewards, i, i // 4) for i in range(16)]
    expected = [r - sum(b) / len(b) for r, b in zip(rewards, used, strict=True)]
    assert output["advantages"].tolist() == pytest.approx(expected, abs=1e-5)
    logs = {}
    trainer.log(logs)
    assert logs["baseline_mean"] == pytest.approx(sum(sum(b) / len(b) for b in used) / 16, abs=1e-5)


def test_moving_average_is_the_mean_of_all_rollouts_before(policy_folder, tmp_path):
    trainer = make(RLOOTrainer, policy_folder, tmp_path, sum_of_ids, beta=0.0, baseline="moving_average")
    seen = []
    for _ in range(3):
        output = rollout(trainer, TWICE)
        rewards = torch.tensor([s["scores"]["sum_of_ids"] for s in trainer.sampled_completions(8)])
        baseline = torch.cat(seen).mean() if seen else rewards.mean()
        assert torch.allclose(output["advantages"], rewards - baseline, atol=1e-5)
        seen.append(rewards)


def test_reinforce_needs_one_completion_a_prompt_and_rloo_two(policy_folder, tmp_path):
    for baseline in ("batch_mean", "moving_average", "constant", "none"):
        make(RLOOTrainer, policy_folder, tmp_path, baseline=baseline, num_generations=1).train()
    for baseline in ("leave_one_out", "group_mean"):
        with pytest.raises(
            ValueError, match="the baseline needs other completions of the same prompt: set it to 2 or more"
        ):
            RLOOConfig(output_dir="x", use_cpu=True, bf16=False, baseline=baseline, num_generations=1)


def test_constant_rewards_teach_nothing_and_are_reported(policy_folder, tmp_path, caplog):
    trainer = make(RLOOTrainer, policy_folder, tmp_path, lambda completions, **k: [0.3] * len(completions), beta=0.0)
    with caplog.at_level(logging.WARNING, "rlhf_recipes"):
        trainer.train()
    line = logged(trainer)[0]
    assert line["no_signal_fraction"] == 1.0 and line["grad_norm"] == pytest.approx(0, abs=1e-6)
    assert "the same reward" in caplog.text
