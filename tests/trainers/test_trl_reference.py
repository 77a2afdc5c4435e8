"""PPO against the numbers of TRL 1.12.0's own PPO, on the same weights, prompts, completions and scores.

`benchmarks/reference_trl_1_12.py` made them; `benchmarks/README.md` describes them and numbers the differences that are
meant here by "difference N". Where the two mean the same, they agree to 1e-5; where they do not, a helper of this file
turns the one into the other (`unbiased`, `with_slots_behind_eos`, `score_on_last_token`), so that the rest can be
compared, and a test shows that the difference is one. Differences 7, 9, 11 and 14 to 20 leave no trace in the numbers.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf_recipes import PPOTrainer
from rlhf_recipes.trainers import ppo as ppo_trainer
from rlhf_recipes.trainers.advantages import masked_whiten
from support.places import DATA
from support.tiny_trainers import make, micro_batches, rollout

ABOUT = json.loads((DATA / "trl_1_12_ppo.json").read_text(encoding="utf-8"))
MODEL, CASES = ABOUT["model"], ABOUT["cases"]

WHOLE = ["full", "full_k3", "full_whiten_rewards", "full_missing_eos", "ragged_monte_carlo"]
"""Cases in which difference 1 changes neither advantages nor returns of tokens."""
WITH_GRADIENTS = ["full", "ragged_monte_carlo"]

with np.load(DATA / "trl_1_12_ppo.npz") as file:
    ARRAYS = {name: torch.from_numpy(file[name]) for name in file.files}


def theirs(case, name):
    return ARRAYS[f"case/{case}/{name}"]


def mask_of(case):
    """Completion tokens, (B, T)."""
    return ARRAYS[f"batch/{CASES[case]['batch']}/completion_mask"]


def slots_of(case):
    """Difference 1: completion tokens and the slot behind them, where there is one; (B, T)."""
    mask = mask_of(case)
    return torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], 1)


def close(ours, trls, mask):
    return torch.allclose(ours * mask, trls * mask, rtol=0, atol=1e-5)


def tokenizer():
    """Words whose numbers are the fixture's token ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<pad>", "<eos>", *(f"w{i:02}" for i in range(2, MODEL["vocab_size"]))]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w02"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="w02", padding_side="left"
    )


def load(parameters, name):
    vector_to_parameters(ARRAYS[f"weights/{name}"].clone(), parameters)


def of_policy(trainer):
    return [p for name, p in trainer.model.named_parameters() if not name.startswith("value_network.")]


def of_value_network(trainer):
    return list(trainer.value_network.model.parameters())


@dataclass
class Seen:
    """What our trainer made of a case."""

    trainer: Any
    batch: dict[str, torch.Tensor] = field(default_factory=dict)
    rollout: Any = None
    """Scores, KL and passes, before advantages are made of them."""
    gae: dict[str, torch.Tensor] = field(default_factory=dict)
    token_rewards: torch.Tensor | None = None
    logs: dict[str, float] = field(default_factory=dict)


def unbiased(x, mask, total=lambda sums: sums, center=True):
    """Differences 3 and 4: our whitening as TRL has it, by the variance with n - 1."""
    whitened, n = masked_whiten(x, mask, total, center), mask.sum()
    mean = 0.0 if center else whitened[mask.bool()].mean()
    return (mean + (whitened - mean) * ((n - 1) / n).sqrt()) * mask


def run(case, tmp_path, monkeypatch, whiten=unbiased, **changes):
    """One rollout of our trainer, in which nothing is fixed but what the model samples and how it is scored."""
    settings, batch = CASES[case]["settings"], CASES[case]["batch"]
    names = ("prompt_ids", "prompt_mask", "completion_ids", "scores")
    given = {name: ARRAYS[f"batch/{batch}/{name}"] for name in names}
    policy = GPT2LMHeadModel(GPT2Config(**MODEL))
    value_model = GPT2ForSequenceClassification(GPT2Config(**MODEL, num_labels=1))
    load(policy.parameters(), "policy")
    load(value_model.parameters(), "value")
    penalty = settings["missing_eos_penalty"]
    ours = {
        "gamma": settings["gamma"],
        "lam": settings["lam"],
        "epsilon": settings["cliprange"],
        "cliprange_value": settings["cliprange_value"],
        "vf_coef": settings["vf_coef"],
        "beta": settings["kl_coef"],
        "kl_estimator": settings["kl_estimator"],
        "temperature": settings["temperature"],
        "whiten_rewards": settings["whiten_rewards"],
        "missing_eos": penalty and {"mode": "subtract", "value": penalty},
    }
    words, prompts = tokenizer(), []
    for ids, mask in zip(given["prompt_ids"], given["prompt_mask"], strict=True):
        prompts.append(" ".join(words.convert_ids_to_tokens(ids[mask.bool()].tolist())))
    trainer = make(
        PPOTrainer,
        policy,
        tmp_path,
        lambda completions, **columns: given["scores"].tolist(),
        prompts,
        words,
        value_model=value_model,
        num_generations=1,
        max_completion_length=ABOUT["new_tokens"],
        check_first_step=False,
        **(ours | changes),
    )
    load(trainer.ref_model.parameters(), "ref")
    completions = [ids[mask.bool()].tolist() for ids, mask in zip(given["completion_ids"], mask_of(case), strict=True)]
    trainer._generate_single_turn = lambda *args: completions
    seen = Seen(trainer)
    add_advantages, gae, token_rewards = trainer._add_advantages, ppo_trainer.gae, ppo_trainer.token_rewards

    def remember_rollout(output, rollout):
        seen.rollout = rollout
        return add_advantages(output, rollout)

    def remember_token_rewards(*args):
        seen.token_rewards = token_rewards(*args)
        return seen.token_rewards

    def remember_gae(rewards, values, *args):
        advantages, returns = gae(rewards, values, *args)
        seen.gae = {"rewards": rewards, "values": values, "advantages": advantages, "returns": returns}
        return advantages, returns

    trainer._add_advantages = remember_rollout
    monkeypatch.setattr(ppo_trainer, "token_rewards", remember_token_rewards)
    monkeypatch.setattr(ppo_trainer, "gae", remember_gae)
    monkeypatch.setattr(ppo_trainer, "masked_whiten", whiten)
    seen.batch = rollout(trainer, prompts)
    trainer.log(seen.logs)
    assert torch.equal(seen.batch["prompt_ids"], given["prompt_ids"])
    assert torch.equal(seen.batch["completion_ids"], given["completion_ids"])
    assert torch.equal(seen.batch["completion_mask"], mask_of(case))
    return seen


def step(seen, number, batch=None):
    """Loss, what it was made of, and metrics of pass 0 or 1 over a rollout; gradients are left in the parameters."""
    trainer, batch = seen.trainer, batch or seen.batch
    if number == 1:
        load(of_policy(trainer), "policy_after")
        load(of_value_network(trainer), "value_after")
    (part,) = micro_batches(trainer, batch | {"row": torch.arange(len(batch["completion_ids"]))})
    made, forward = [], trainer._forward
    trainer._forward = lambda *args, **kwargs: made.append(forward(*args, **kwargs)) or made[-1]
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, part)
    loss.backward()
    trainer._forward = forward
    back, logs = part["row"].argsort(), {}  # micro-batches are sorted by length
    trainer.log(logs)
    return loss.item(), {"logps": made[0].logps.detach()[back], "values": made[0].values.detach()[back]}, logs


def score_on_last_token(case, rewards):
    """Difference 1: TRL's rewards with each score at the completion's last token, instead of the slot behind it."""
    behind = slots_of(case) - mask_of(case)
    return (rewards + torch.cat([(rewards * behind)[:, 1:], torch.zeros_like(rewards[:, :1])], 1)) * mask_of(case)


def with_slots_behind_eos(case, batch):
    """Difference 2: a batch whose value loss counts the slots behind EOS too, with what TRL has there."""
    behind, slots = slots_of(case) - mask_of(case), slots_of(case)
    return batch | {
        "loss_mask": slots,
        "old_values": batch["old_values"] + theirs(case, "values") * behind,
        "returns": batch["returns"] + theirs(case, "returns") * behind,
    }


# Where the two mean the same


@pytest.mark.parametrize("case", CASES)
def test_rollout(case, tmp_path, monkeypatch):
    """Log-probabilities, reference, KL estimate, values, scores, and rewards of tokens."""
    seen, mask = run(case, tmp_path, monkeypatch), mask_of(case)
    policy, reference = seen.rollout.policy_pass, seen.rollout.ref_pass
    assert close(policy.logps, theirs(case, "logprobs"), mask)
    assert close(reference.logps, theirs(case, "ref_logprobs"), mask)
    assert close(seen.rollout.kl, theirs(case, "kl"), torch.ones_like(mask))
    assert close(seen.gae["values"], theirs(case, "values"), mask)
    assert torch.allclose(seen.rollout.scores, theirs(case, "scores"))
    unwhitened = "unwhitened_rewards" if CASES[case]["settings"]["whiten_rewards"] else "rewards"
    assert close(seen.token_rewards, score_on_last_token(case, theirs(case, unwhitened)), torch.ones_like(mask))
    metric = "kl_k3" if CASES[case]["settings"]["kl_estimator"] == "k3" else "kl"
    assert seen.logs[metric] == pytest.approx(theirs(case, "kl").sum(1).mean().item(), abs=1e-5)


@pytest.mark.parametrize("case", WHOLE)
def test_advantages_and_returns(case, tmp_path, monkeypatch):
    seen, mask = run(case, tmp_path, monkeypatch), mask_of(case)
    if case != "ragged_monte_carlo":  # difference 1 moves the score
        assert close(seen.gae["rewards"], theirs(case, "rewards"), mask)
    assert close(seen.gae["advantages"], theirs(case, "unwhitened_advantages"), mask)
    assert close(seen.gae["returns"], theirs(case, "returns"), mask)
    assert close(seen.batch["advantages"], theirs(case, "advantages"), torch.ones_like(mask))


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("case", WHOLE)
def test_losses_and_clip_fractions(case, number, tmp_path, monkeypatch):
    """Pass 0 with ratios of 1; pass 1 with clipping in both losses."""
    seen, mask, scalars = run(case, tmp_path, monkeypatch), mask_of(case), CASES[case]["scalars"]
    loss, now, logs = step(seen, number)
    assert close(now["logps"], theirs(case, f"pass{number}/new_logprobs"), mask)
    assert close((now["logps"] - seen.batch["old_per_token_logps"]).exp(), theirs(case, f"pass{number}/ratio"), mask)
    assert close(now["values"], theirs(case, f"pass{number}/vpred"), slots_of(case))
    assert logs["policy_loss"] == pytest.approx(scalars["pg_loss"][number], abs=1e-5)
    assert logs["clip_fraction"] == pytest.approx(scalars["pg_clipfrac"][number], abs=1e-6)
    if case.startswith("ragged"):
        _, _, logs = step(seen, number, with_slots_behind_eos(case, seen.batch))
        value_loss, loss = logs["value_loss"], scalars["pg_loss"][number] + 0.1 * logs["value_loss"]
    else:
        value_loss = logs["value_loss"]
    assert value_loss == pytest.approx(scalars["vf_loss"][number], abs=1e-5)
    assert loss == pytest.approx(scalars["loss"][number], abs=1e-5)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("case", WITH_GRADIENTS)
def test_gradients(case, number, tmp_path, monkeypatch):
    seen = run(case, tmp_path, monkeypatch)
    step(seen, number)
    of_the_policy = parameters_to_vector([p.grad for p in of_policy(seen.trainer)])
    if case == "ragged_monte_carlo":
        step(seen, number, with_slots_behind_eos(case, seen.batch))
    of_the_value = parameters_to_vector([p.grad for p in of_value_network(seen.trainer)])
    for role, ours in (("policy", of_the_policy), ("value", of_the_value)):
        trls = theirs(case, f"pass{number}/gradient/{role}")
        assert torch.allclose(ours, trls, rtol=0, atol=1e-5), role
        assert trls.abs().max() > 1e-2


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("case", [case for case in CASES if case not in WHOLE])
def test_losses_of_ragged_cases_given_trls_advantages_and_returns(case, number, tmp_path, monkeypatch):
    seen, mask, scalars = run(case, tmp_path, monkeypatch), mask_of(case), CASES[case]["scalars"]
    given = {"advantages": theirs(case, "advantages"), "returns": theirs(case, "returns") * mask}
    _, now, logs = step(seen, number, seen.batch | given)
    assert logs["policy_loss"] == pytest.approx(scalars["pg_loss"][number], abs=1e-5)
    assert logs["clip_fraction"] == pytest.approx(scalars["pg_clipfrac"][number], abs=1e-6)
    assert close(now["values"], theirs(case, f"pass{number}/vpred"), slots_of(case))
    _, _, logs = step(seen, number, with_slots_behind_eos(case, seen.batch | given))
    assert logs["value_loss"] == pytest.approx(scalars["vf_loss"][number], abs=1e-5)


# Where they do not


def differ(ours, trls, mask):
    return ((ours - trls).abs() * mask).max() > 1e-3


@pytest.mark.parametrize("case", ["ragged", "ragged_discounted", "ragged_k3"])
def test_difference_1_trl_acts_once_more_behind_eos(case, tmp_path, monkeypatch):
    """Completions of T tokens have the same advantages, shorter ones have not."""
    seen, mask = run(case, tmp_path, monkeypatch), mask_of(case)
    whole = mask.all(1)
    advantages = theirs(case, "unwhitened_advantages")
    assert close(seen.gae["advantages"][whole], advantages[whole], mask[whole])
    for row in (~whole).nonzero().flatten():
        assert differ(seen.gae["advantages"][row], advantages[row], mask[row])


def test_difference_2_trls_value_loss_counts_the_slots_behind_eos(tmp_path, monkeypatch):
    case = "ragged_monte_carlo"
    seen = run(case, tmp_path, monkeypatch)
    _, _, logs = step(seen, 1)
    assert (mask_of(case).sum(), slots_of(case).sum()) == (53, 58)
    assert abs(logs["value_loss"] - CASES[case]["scalars"]["vf_loss"][1]) > 1e-3


def test_difference_3_trl_whitens_rewards_over_the_slots_behind_eos():
    case = "ragged_whiten_rewards"
    rewards, whitened = theirs(case, "unwhitened_rewards"), theirs(case, "rewards")
    assert close(unbiased(rewards, slots_of(case), center=False), whitened, slots_of(case))
    assert differ(unbiased(rewards, mask_of(case), center=False), whitened, mask_of(case))


@pytest.mark.parametrize("case", ["full", "ragged_monte_carlo"])
def test_difference_4_trl_whitens_by_the_unbiased_variance(case, tmp_path, monkeypatch):
    seen, mask = run(case, tmp_path, monkeypatch, whiten=masked_whiten), mask_of(case)
    n, advantages = mask.sum(), theirs(case, "advantages")
    assert close(seen.batch["advantages"], advantages * (n / (n - 1)).sqrt(), mask)
    assert differ(seen.batch["advantages"], advantages, mask)
    assert seen.batch["advantages"].square()[mask.bool()].mean() == pytest.approx(1, abs=1e-5)


def test_difference_5_trl_averages_metrics_over_pads_and_measures_k2(tmp_path, monkeypatch):
    for case, has_pads in (("full", False), ("ragged_monte_carlo", True)):
        seen, mask, scalars = run(case, tmp_path, monkeypatch), mask_of(case), CASES[case]["scalars"]
        _, now, logs = step(seen, 1)
        log_ratio = (now["logps"] - seen.batch["old_per_token_logps"]) * mask
        assert (0.5 * log_ratio.square()).mean() == pytest.approx(scalars["approxkl"][1], abs=1e-5)
        k3 = log_ratio.exp() - 1 - log_ratio
        assert logs["approx_kl"] == pytest.approx(k3[mask.bool()].mean().item(), abs=1e-5)
        assert abs(logs["approx_kl"] - scalars["approxkl"][1]) > 1e-3
        assert log_ratio.exp().mean() == pytest.approx(scalars["ratio"][1], abs=1e-5)
        assert (abs(logs["ratio"] - scalars["ratio"][1]) > 1e-3) is has_pads
        assert (abs(seen.logs["entropy"] - scalars["entropy"][0]) > 1e-3) is has_pads


def test_difference_6_trl_counts_where_the_clipped_value_loss_is_the_larger(tmp_path, monkeypatch):
    case = "full"
    seen, scalars = run(case, tmp_path, monkeypatch), CASES[case]["scalars"]
    _, now, logs = step(seen, 1)
    moved = now["values"] - seen.batch["old_values"]
    errors = (now["values"] - seen.batch["returns"]).square()
    clipped = (seen.batch["old_values"] + moved.clamp(-0.2, 0.2) - seen.batch["returns"]).square()
    assert (clipped > errors).float().mean() == pytest.approx(scalars["vf_clipfrac"][1], abs=1e-6)
    assert logs["value_clip_fraction"] == pytest.approx((moved.abs() > 0.2).float().mean().item(), abs=1e-6)
    assert logs["value_clip_fraction"] > scalars["vf_clipfrac"][1]


def test_difference_8_trl_writes_1_where_there_is_no_token(tmp_path, monkeypatch):
    case = "ragged"
    seen, pads = run(case, tmp_path, monkeypatch), mask_of(case) == 0
    assert (theirs(case, "logprobs")[pads] == 1.0).all()
    assert (seen.rollout.policy_pass.logps[pads] != 1.0).all()
    assert (seen.rollout.kl[pads] == 0).all() and (seen.batch["advantages"][pads] == 0).all()


def test_difference_10_trl_subtracts_the_penalty_where_the_paper_replaces_the_score(tmp_path, monkeypatch):
    case = "full_missing_eos"
    replaced = run(case, tmp_path, monkeypatch, missing_eos={"mode": "replace", "value": -1.0}).rollout.scores
    unfinished = theirs(case, "scores") != ARRAYS["batch/full/scores"]
    assert unfinished.sum() == 5 and (replaced[unfinished] == -1.0).all()
    assert torch.equal(replaced[~unfinished], theirs(case, "scores")[~unfinished])
    assert differ(replaced, theirs(case, "scores"), 1)


def test_difference_12_trl_does_not_clip_gradients(tmp_path, monkeypatch):
    """The gradient that its optimizer got is longer than `max_grad_norm`, 1.0 by default there and here."""
    trainer = run("full", tmp_path, monkeypatch).trainer
    both = torch.cat([theirs("full", f"pass1/gradient/{role}") for role in ("policy", "value")])
    assert both.norm() > trainer.args.max_grad_norm == 1.0


def test_difference_13_trl_averages_micro_batches_whatever_they_hold(tmp_path, monkeypatch):
    """Ours in four micro-batches is still TRL's loss of one; TRL's own arithmetic on the same four is not."""
    case = "ragged_monte_carlo"
    seen = run(case, tmp_path, monkeypatch, per_device_train_batch_size=2, gradient_accumulation_steps=4, vf_coef=0.0)
    load(of_policy(seen.trainer), "policy_after")
    shares, own_means = [], []
    for part in micro_batches(seen.trainer, seen.batch):
        share = seen.trainer._compute_loss(seen.trainer.model, part).item() / 4
        shares.append(share)
        own_means.append(share * part["tokens_of_step"].item() / part["loss_mask"].sum().item())
    expected = CASES[case]["scalars"]["pg_loss"][1]
    assert sum(shares) == pytest.approx(expected, abs=1e-5)
    assert abs(sum(own_means) / 4 - expected) > 1e-3
