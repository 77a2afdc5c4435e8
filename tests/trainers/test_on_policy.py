"""What PPO and RLOO share: identities of the first step, one batch however it is cut, KL control, scores, metrics."""

import inspect
import logging
import math
import random

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from rlhf_recipes import PPOConfig, PPOTrainer, RLOOConfig, RLOOTrainer
from rlhf_recipes.models.sampling import sample_completions
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.trainers.args import trainer_args
from rlhf_recipes.trainers.kl import KLControl, adapted_beta
from support.processes import run_python
from support.texts import REVIEWS, write_jsonl
from support.tiny_models import bpe_tokenizer, causal_lm, save_pair, word_tokenizer
from support.tiny_trainers import (
    ALGORITHMS,
    OF_PPO,
    OF_RLOO,
    PROMPTS,
    SHARED,
    length,
    logged,
    make,
    micro_batches,
    rollout,
    sum_of_ids,
    train_on,
)


@pytest.mark.parametrize("trainer_class", ALGORITHMS)
def test_first_step_identities(trainer_class, policy_folder, tmp_path):
    trainer = make(trainer_class, policy_folder, tmp_path, beta=0.1)
    trainer.train()
    first = logged(trainer)[0]
    for name in ("kl", "kl_per_token", "kl_k3", "kl_k3_per_token", "approx_kl"):
        assert first[name] == pytest.approx(0, abs=1e-5), name
    assert first["clip_fraction"] == 0 and first["ratio"] == pytest.approx(1, abs=1e-5)
    assert first["reward_mean"] == pytest.approx(first["score_mean"], abs=1e-4)


@pytest.mark.parametrize(
    ("trainer_class", "own", "others"), [(PPOTrainer, OF_PPO, OF_RLOO), (RLOOTrainer, OF_RLOO, OF_PPO)]
)
def test_metrics_have_one_set_of_names(trainer_class, own, others, policy_folder, tmp_path):
    trainer = make(trainer_class, policy_folder, tmp_path, max_steps=2)
    trainer.train()
    for line in logged(trainer):
        # `loss` is a mean of steps; the others come from the same sums, so none is missing in any line.
        assert SHARED | own <= set(line), (SHARED | own) - set(line)
        assert not others & set(line)
        assert set(line) - SHARED - own <= {"step", "epoch", "score/length/std"}
    assert [line["episodes"] for line in logged(trainer)] == [8, 16]


def test_metrics_are_means_over_tokens_and_completions_by_hand(policy_folder, tmp_path):
    trainer = make(RLOOTrainer, policy_folder, tmp_path, beta=0.1, check_first_step=False)
    with torch.no_grad():  # a policy that has moved
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    batch = rollout(trainer)
    mask = batch["completion_mask"].bool()
    assert not mask.all()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        both = [
            m(ids, attention_mask=attention, position_ids=(attention.cumsum(1) - 1).clamp(min=0)).logits.log_softmax(-1)
            for m in (trainer.model, trainer.ref_model)
        ]
    T = mask.size(1)
    policy, reference = (logps[:, -T - 1 : -1].gather(-1, ids[:, -T:, None])[..., 0] for logps in both)
    entropy = -(both[0].exp() * both[0]).sum(-1)[:, -T - 1 : -1]
    d = policy - reference
    logs = {}
    trainer.log(logs)
    assert logs["entropy"] == pytest.approx(entropy[mask].mean().item(), rel=1e-4)
    assert logs["kl"] == pytest.approx((d * mask).sum(1).mean().item(), rel=1e-3)
    assert logs["kl_per_token"] == pytest.approx(d[mask].mean().item(), rel=1e-3)
    assert logs["kl_k3"] == pytest.approx((((-d).exp() - 1 + d) * mask).sum(1).mean().item(), rel=1e-3)
    assert logs["kl_k3_per_token"] == pytest.approx(((-d).exp() - 1 + d)[mask].mean().item(), rel=1e-3)
    assert logs["reward_mean"] == pytest.approx(logs["score_mean"] - 0.1 * logs["kl"], rel=1e-4)


@pytest.mark.parametrize("trainer_class", ALGORITHMS)
def test_the_kl_penalty_of_both_algorithms_comes_from_one_place(trainer_class, tmp_path, monkeypatch):
    for penalty in (0.0, 3.0):
        first_token = torch.tensor([penalty, 0, 0, 0, 0, 0])
        monkeypatch.setattr(
            KLControl, "penalty", lambda self, ratio, mask, at=first_token: ratio * 0 + at[: ratio.shape[1]]
        )
        trainer = make(trainer_class, causal_lm(word_tokenizer()), tmp_path, beta=0.1)
        rollout(trainer)
        trainer.log(logs := {})
        assert logs["reward_mean"] == pytest.approx(logs["score_mean"] - 0.1 * penalty, rel=1e-5)


def test_kl_is_left_out_without_a_reference(policy_folder, tmp_path):
    trainer = make(PPOTrainer, policy_folder, tmp_path, beta=0.0)
    trainer.train()
    assert not any(name.startswith("kl") or name == "beta" for name in logged(trainer)[0])


@pytest.mark.parametrize("trainer_class", ALGORITHMS)
def test_seconds_cover_the_time_of_training(trainer_class, policy_folder, tmp_path):
    import time

    def slow(completion_ids, **kwargs):
        time.sleep(0.2)
        return length(completion_ids)

    trainer = make(trainer_class, policy_folder, tmp_path, reward_funcs=slow, max_steps=3)
    trainer.train()
    for line in logged(trainer):
        phases = [line[f"seconds_{phase}"] for phase in ("generate", "score", "forward", "update")]
        assert line["seconds_score"] >= 0.2 and all(seconds > 0 for seconds in phases)
        assert line["episodes_per_second"] == pytest.approx(8 / sum(phases), rel=1e-6)


# One batch however it is cut


@pytest.mark.parametrize("trainer_class", ALGORITHMS)
@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_micro_batches_change_nothing(trainer_class, whiten_rewards, policy_folder, tmp_path):
    """(8, 1) == (2, 4): loss, gradient and every metric, with completions of very different lengths."""
    settings = {"beta": 0.1}
    if trainer_class is PPOTrainer:
        settings |= {"whiten_rewards": whiten_rewards, "ent_coef": 0.1, "vf_coef": 0.7}
    results = []
    for size, accumulation in ((8, 1), (2, 4)):
        trainer = make(trainer_class, policy_folder, tmp_path, sum_of_ids, per_device_train_batch_size=size,
                       gradient_accumulation_steps=accumulation, max_completion_length=12, **settings)  # fmt: skip
        torch.manual_seed(5)
        batch, loss, gradient = train_on(trainer, prompts=PROMPTS * 2)
        assert len(micro_batches(trainer, batch)) == accumulation
        logs = {}
        trainer.log(logs)
        results.append((batch, loss, gradient, logs))
    (batch, loss, gradient, logs), (_, loss_cut, gradient_cut, logs_cut) = results
    assert len(set(batch["completion_mask"].sum(1).tolist())) > 2
    assert loss == pytest.approx(loss_cut, abs=1e-5)
    for name in gradient:
        assert torch.allclose(gradient[name], gradient_cut[name], atol=1e-5), name
    for name in set(logs) - {"episodes_per_second"} - {n for n in logs if n.startswith("seconds")}:
        assert logs[name] == pytest.approx(logs_cut[name], rel=1e-4, abs=1e-5), name


def test_every_token_of_an_optimizer_step_weighs_the_same(policy_folder, tmp_path):
    """In PPO; a mean of micro-batch means would give tokens of short completions more weight."""
    trainer = make(PPOTrainer, policy_folder, tmp_path, sum_of_ids, per_device_train_batch_size=1,
                   gradient_accumulation_steps=8, num_generations=1, vf_coef=0.0, whiten_advantages=False)  # fmt: skip
    batch, loss, _ = train_on(trainer, PROMPTS * 2)
    mask = batch["loss_mask"].bool()
    assert loss == pytest.approx(-batch["advantages"][mask].mean().item(), rel=1e-4)


def test_micro_batches_are_trimmed_and_of_similar_length(policy_folder, tmp_path):
    trainer = make(PPOTrainer, policy_folder, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=8,
                   max_completion_length=12)  # fmt: skip
    parts = micro_batches(trainer, rollout(trainer, PROMPTS * 4))
    for part in parts:
        for side, name in ((0, "prompt_mask"), (-1, "completion_mask")):
            assert part[name][:, side].any(), "a column that is all padding is left"
        assert {t.size(1) for n, t in part.items() if t.ndim == 2 and not n.startswith("prompt")} == {
            part["completion_mask"].size(1)
        }
    lengths = [(part["prompt_mask"].sum(1) + part["completion_mask"].sum(1)).tolist() for part in parts]
    assert sum(lengths, []) == sorted(sum(lengths, []), reverse=True)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"per_device_train_batch_size": 8}, 1),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, 1),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4}, 2),
        ({"per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 3}, 6),
    ],
)
@pytest.mark.parametrize("trainer_class", ALGORITHMS)
def test_optimizer_steps_a_rollout(trainer_class, settings, steps, policy_folder, tmp_path):
    calls = []

    def count(completion_ids, **kwargs):
        calls.append(len(completion_ids))
        return length(completion_ids)

    trainer = make(trainer_class, policy_folder, tmp_path, reward_funcs=count, max_steps=2 * steps, **settings)
    trainer.train()
    assert trainer.state.global_step == 2 * steps
    assert calls == [8, 8] and logged(trainer)[-1]["episodes"] == 16


def test_ppo_draws_mini_batches_anew_in_every_pass_and_rloo_does_not_like_trl(policy_folder, tmp_path):
    for trainer_class, differs in ((PPOTrainer, True), (RLOOTrainer, False)):
        trainer = make(trainer_class, policy_folder, tmp_path, per_device_train_batch_size=2, steps_per_generation=4,
                       num_iterations=2, max_steps=8)  # fmt: skip
        orders, prepare = [], trainer._prepare_inputs

        def remember(inputs, trainer=trainer, orders=orders, prepare=prepare):
            batch = prepare(inputs)
            orders.append(trainer._micro_batches.order.tolist())
            return batch

        trainer._prepare_inputs = remember
        trainer.train()
        first, second = orders[0], orders[4]
        assert orders == [first] * 4 + [second] * 4 and (first != second) is differs
        assert sorted(second) == list(range(8))


def test_a_rollout_is_a_whole_number_of_optimizer_steps(policy_folder, tmp_path):
    with pytest.raises(ValueError, match="must be a multiple of gradient_accumulation_steps"):
        make(PPOTrainer, policy_folder, tmp_path, gradient_accumulation_steps=2, steps_per_generation=3)


# Sampling


def test_old_logps_are_those_of_sampling(policy_folder, tmp_path):
    """With learned positions, padded prompts and a temperature: what the model itself says about every token."""
    trainer = make(PPOTrainer, policy_folder, tmp_path, temperature=0.7)
    output = rollout(trainer)
    for row in range(len(PROMPTS)):
        prompt = output["prompt_ids"][row][output["prompt_mask"][row].bool()]
        completion = output["completion_ids"][row][output["completion_mask"][row].bool()]
        with torch.no_grad():  # without any padding, position ids are the plain ones
            logits = trainer.model(input_ids=torch.cat([prompt, completion])[None]).logits[0] / 0.7
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, completion[:, None])[:, 0]
        assert torch.allclose(output["old_per_token_logps"][row, : len(completion)], expected, atol=1e-5)


def test_sampling_in_parts_is_that_of_separate_calls(policy_folder, tmp_path):
    trainer = make(RLOOTrainer, policy_folder, tmp_path, sampling_batch_size=3)
    prompts, tokenizer = [[5], [6, 7, 8], [9, 9], [4, 5, 6, 7], [8], [7, 5], [6], [5, 5]], trainer.processing_class
    torch.manual_seed(0)
    sampled, expected = trainer._generate_single_turn(prompts, None, None), []
    torch.manual_seed(0)
    for part in (prompts[:3], prompts[3:6], prompts[6:]):
        expected += sample_completions(trainer.model, part, tokenizer.pad_token_id, 6, 1.0, trainer.eos_token_ids)
    assert sampled == expected and len(sampled) == 8
    torch.manual_seed(0)
    trainer.args.sampling_batch_size = 100  # more than there are
    assert trainer._generate_single_turn(prompts, None, None) != sampled


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.1}, {"repetition_penalty": 1.2},
                                      {"generation_kwargs": {"no_repeat_ngram_size": 2}}])  # fmt: skip
def test_truncated_sampling_is_refused_unless_asked_for(settings, policy_folder, tmp_path):
    for config in (PPOConfig, RLOOConfig):
        with pytest.raises(ValueError, match="allow_truncated_sampling"):
            config(output_dir="x", use_cpu=True, bf16=False, **settings)
    trainer = make(RLOOTrainer, policy_folder, tmp_path, allow_truncated_sampling=True, **settings)
    trainer.train()


def test_truncated_sampling_in_the_models_own_generation_config_is_refused(policy_folder, tmp_path):
    model = causal_lm(word_tokenizer())
    model.generation_config.top_p = 0.5  # overridden by the trainer's own 1.0
    make(PPOTrainer, model, tmp_path)
    model.generation_config.no_repeat_ngram_size = 3
    with pytest.raises(ValueError, match="no_repeat_ngram_size=3"):
        make(PPOTrainer, model, tmp_path)


def test_another_temperature_for_generation_is_refused():
    with pytest.raises(ValueError, match="temperature"):
        PPOConfig(output_dir="x", use_cpu=True, bf16=False, generation_kwargs={"temperature": 0.5})


def test_finished_is_told_apart_from_cut_off_when_pad_is_eos(bpe_policy_folder, tmp_path):
    tokenizer = bpe_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    seen = {}

    def watch(completion_ids, finished, **kwargs):
        seen.update(ids=completion_ids, finished=finished)
        return [0.0] * len(finished)

    trainer = make(PPOTrainer, bpe_policy_folder, tmp_path, watch, tokenizer=tokenizer, max_completion_length=40,
                   check_first_step=False)  # fmt: skip
    with torch.no_grad():  # make EOS likely, so that both kinds occur
        trainer.model.lm_head.weight[tokenizer.eos_token_id] += 0.2 * torch.randn(
            32, generator=torch.Generator().manual_seed(0)
        )
    output = rollout(trainer, prompts=PROMPTS * 8)
    assert len(set(seen["finished"])) == 2
    assert seen["finished"] == [ids[-1] == tokenizer.eos_token_id for ids in seen["ids"]]
    assert output["completion_mask"].sum(1).tolist() == [len(ids) for ids in seen["ids"]]  # the real EOS counts


def test_prompt_plus_completion_is_the_sampled_text(policy_folder, tmp_path):
    tokenizer, seen = word_tokenizer(), {}

    def watch(prompts, completions, completion_ids, **kwargs):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids)
        return [0.0] * len(prompts)

    rollout(make(PPOTrainer, policy_folder, tmp_path, reward_funcs=watch))
    for prompt, completion, ids in zip(seen["prompts"], seen["completions"], seen["ids"], strict=True):
        kept = [i for i in ids if i not in tokenizer.all_special_ids]
        assert tokenizer(prompt + completion)["input_ids"] == tokenizer(prompt)["input_ids"] + kept


@pytest.mark.parametrize("trainer_class", ALGORITHMS)
def test_chat_prompts(trainer_class, tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}{{ '!' }}{% endif %}"
    )
    folder = save_pair(tmp_path / "model", causal_lm(tokenizer), tokenizer)
    seen = {}

    def watch(completions, **kwargs):
        seen["completions"] = completions
        return [float(len(c[0]["content"])) for c in completions]

    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    make(trainer_class, folder, tmp_path / "out", watch, chats, tokenizer).train()
    assert seen["completions"][0][0]["role"] == "assistant"


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama"])
@pytest.mark.parametrize("trainer_class", ALGORITHMS)
def test_other_architectures(trainer_class, architecture, tmp_path):
    trainer = make(trainer_class, causal_lm(word_tokenizer(), architecture), tmp_path, beta=0.1, max_steps=2)
    trainer.train()
    assert logged(trainer)[0]["kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("trainer_class", ALGORITHMS)
def test_a_mixture_of_experts_balances_its_load(trainer_class, tmp_path):
    losses = []
    for coefficient in (0.0, 0.5):
        model = causal_lm(word_tokenizer(), "mixtral")
        trainer = make(trainer_class, model, tmp_path, router_aux_loss_coef=coefficient)
        torch.manual_seed(0)
        batch, loss, gradient = train_on(trainer)
        losses.append(loss)
    (part,) = micro_batches(trainer, batch)
    ids, mask = (torch.cat([part[f"prompt_{name}"], part[f"completion_{name}"]], 1) for name in ("ids", "mask"))
    aux_loss = trainer.model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False).aux_loss
    assert losses[1] - losses[0] == pytest.approx(0.5 * aux_loss.item(), rel=1e-4)
    assert any("gate" in name and tensor.abs().sum() > 0 for name, tensor in gradient.items())


def test_the_reference_of_an_instance_is_a_copy_of_it(policy_folder, tmp_path):
    """Not the weights that its name has on disk; and an instance without any name works."""
    from transformers import AutoModelForCausalLM

    changed = AutoModelForCausalLM.from_pretrained(policy_folder)
    with torch.no_grad():
        changed.lm_head.weight.mul_(1.5)
    for model in (changed, causal_lm(word_tokenizer())):
        trainer = make(RLOOTrainer, model, tmp_path, beta=0.1)
        trainer.train()
        assert logged(trainer)[0]["kl"] == pytest.approx(0, abs=1e-5)
        assert trainer.beta == trainer.args.beta == 0.1 and not trainer.ref_model.lm_head.weight.requires_grad


def test_a_configuration_of_another_trainer_is_refused(policy_folder, tmp_path):
    for config in (RLOOConfig, trl.RLOOConfig):
        args = config(output_dir=str(tmp_path), use_cpu=True, bf16=False)
        with pytest.raises(TypeError, match="takes a PPOConfig"):
            PPOTrainer(str(policy_folder), length, args)


def test_reward_functions_do_not_change_the_training_around_them(policy_folder, tmp_path):
    """One that seeds once made every rollout sample the same, and one that turned gradients off stopped learning."""

    def harmful(completion_ids, **kwargs):
        torch.manual_seed(0), random.seed(0), np.random.seed(0), torch.set_grad_enabled(False)
        return length(completion_ids)

    weights, lengths = [], []
    for function in (length, harmful):
        trainer = make(RLOOTrainer, policy_folder, tmp_path, function, max_steps=3)
        trainer.train()
        weights.append(trainer.model.state_dict())
        lengths.append([line["length_mean"] for line in logged(trainer)])
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert lengths[0] == lengths[1] and len(set(lengths[0])) > 1


def test_evaluation_does_not_advance_the_training_random_numbers(policy_folder, tmp_path):
    def noisy(completion_ids, **kwargs):
        return [torch.rand(()).item() for _ in completion_ids]

    losses = []
    for strategy in ("no", "steps"):
        more = (
            {"eval_strategy": strategy, "eval_steps": 1, "per_device_eval_batch_size": 4} if strategy == "steps" else {}
        )
        trainer = make(PPOTrainer, policy_folder, tmp_path, noisy, max_steps=3, eval_dataset=PROMPTS, **more)
        trainer.train()
        losses.append([line["loss"] for line in logged(trainer) if "loss" in line])
        evaluated = [line for line in logged(trainer) if "eval_score_mean" in line]
    assert losses[0] == losses[1] and len(evaluated) == 3
    assert {"eval_kl", "eval_entropy", "eval_policy_loss"} <= set(evaluated[0])


# Scores


def scores_of(trainer, values, finished):
    """Shaped scores of four completions with these values."""

    class Given:
        rewards_per_func = torch.tensor(values)[:, None]

    Given.finished = torch.tensor(finished)
    trainer.model.train()
    return trainer._scores(Given)


def test_missing_eos(policy_folder, tmp_path):
    values, finished = [1.0, 2.0, float("nan"), -3.0], [True, False, False, False]
    for mode, expected in (("replace", [1.0, -1.0, float("nan"), -1.0]), ("subtract", [1.0, 3.0, float("nan"), -2.0])):
        trainer = make(RLOOTrainer, policy_folder, tmp_path, missing_eos={"mode": mode, "value": -1.0})
        assert torch.equal(scores_of(trainer, values, finished).nan_to_num(99), torch.tensor(expected).nan_to_num(99))
    for wrong in ({"mode": "add", "value": 1}, {"mode": "replace"}, {"mode": "replace", "value": "x"}):
        with pytest.raises(ValueError, match="missing_eos"):
            PPOConfig(output_dir="x", use_cpu=True, bf16=False, missing_eos=wrong)


def test_scores_are_normalized_by_running_moments_then_clipped(policy_folder, tmp_path):
    trainer = make(PPOTrainer, policy_folder, tmp_path, normalize_scores=True, reward_clip_range=[-1.0, 1.0])
    first, second = [1.0, 2.0, 3.0, 6.0], [10.0, 0.0, 5.0, 5.0]
    scores_of(trainer, first, [True] * 4)
    scores = scores_of(trainer, second, [True] * 4)
    seen = torch.tensor(first + second)
    expected = ((torch.tensor(second) - seen.mean()) / seen.std(correction=0)).clamp(-1, 1)
    assert torch.allclose(scores, expected, atol=1e-6) and scores[0] == 1.0


def test_weights_of_reward_functions(policy_folder, tmp_path):
    trainer = make(RLOOTrainer, policy_folder, tmp_path, [length, sum_of_ids], reward_weights=[2.0, -0.5])
    rollout(trainer)
    logs = {}
    trainer.log(logs)
    assert logs["score_mean"] == pytest.approx(2 * logs["score/length"] - 0.5 * logs["score/sum_of_ids"], rel=1e-5)


@pytest.mark.parametrize("trainer_class", ALGORITHMS)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda completions, **k: [float("nan")] * len(completions), "nan"),
        (lambda completions, **k: [float("inf")] * len(completions), "inf"),
        (lambda completions, **k: [0.0], "1 value"),
        (lambda completions, **k: 1 / 0, "ZeroDivisionError"),
        (lambda completions, **k: ["good"] * len(completions), "good"),
    ],
)
def test_bad_rewards_stop_training_with_the_functions_name(trainer_class, bad, message, policy_folder, tmp_path):
    bad.__name__ = "my_reward"
    with pytest.raises(RecipeError, match=f"(?s)my_reward.*{message}"):
        make(trainer_class, policy_folder, tmp_path, bad).train()


@pytest.mark.parametrize("trainer_class", ALGORITHMS)
def test_a_completion_without_any_score_teaches_nothing(trainer_class, policy_folder, tmp_path):
    def some(completions, **kwargs):
        return [None, None] + [float(i) for i in range(len(completions) - 2)]

    trainer = make(trainer_class, policy_folder, tmp_path, some, beta=0.1)
    output = rollout(trainer, prompts=[p for p in PROMPTS for _ in range(2)])
    assert output["advantages"][:2].abs().sum() == 0 and output["advantages"][2:].abs().sum() > 0


def test_a_hanging_reward_function_is_an_error(policy_folder, tmp_path):
    import threading

    def hang(completions, **kwargs):
        threading.Event().wait(30)

    with pytest.raises(RecipeError, match="hang.*0.3 s"):
        make(PPOTrainer, policy_folder, tmp_path, hang, reward_timeout=0.3).train()


def test_sampled_completions_have_scores_and_the_algorithms_own_advantages(policy_folder, tmp_path):
    for trainer_class in ALGORITHMS:
        trainer = make(trainer_class, policy_folder, tmp_path, sum_of_ids, beta=0.0)
        batch = rollout(trainer, PROMPTS * 2)
        samples = trainer.sampled_completions(8)
        advantages = batch["advantages"]
        if trainer_class is PPOTrainer:
            advantages = advantages.sum(1) / batch["completion_mask"].sum(1)
        assert [s["advantage"] for s in samples] == pytest.approx(advantages.tolist(), abs=1e-6)
        assert [s["scores"]["sum_of_ids"] for s in samples] == sum_of_ids(
            [row[m.bool()].tolist() for row, m in zip(batch["completion_ids"], batch["completion_mask"], strict=True)]
        )


# KL control


@pytest.mark.parametrize("trainer_class", ALGORITHMS)
def test_beta_follows_the_kl_target(trainer_class, policy_folder, tmp_path):
    trainer = make(trainer_class, policy_folder, tmp_path, beta=0.1, kl_target=0.5, kl_horizon=40, max_steps=6,
                   learning_rate=3e-2)  # fmt: skip
    trainer.train()
    beta = 0.1
    for line in logged(trainer):
        assert line["beta"] == pytest.approx(beta, rel=1e-5)
        beta = adapted_beta(beta, line["kl"], 0.5, 40, 8)
    assert trainer.beta == pytest.approx(beta, rel=1e-4) and logged(trainer)[1]["beta"] == pytest.approx(0.1 * 0.96)
    assert max(line["kl"] for line in logged(trainer)) > 0.5 and trainer.beta > min(
        line["beta"] for line in logged(trainer)
    )


def test_learning_rate_follows_the_kl_of_the_update(policy_folder, tmp_path):
    for target, change in ((1e-9, 1 / 1.5), (1e3, 1.5)):
        trainer = make(PPOTrainer, policy_folder, tmp_path, num_iterations=2, lr_kl_target=target, max_steps=4,
                       lr_scheduler_type="constant")  # fmt: skip
        trainer.train()
        rates = [line["learning_rate"] for line in logged(trainer)]
        assert rates == pytest.approx([1e-3, 1e-3, 1e-3 * change, 1e-3 * change])
    with pytest.raises(ValueError, match="more than one optimizer step"):
        make(PPOTrainer, policy_folder, tmp_path, lr_kl_target=0.1)
    with pytest.raises(ValueError, match="both adapt the learning rate"):
        make(PPOTrainer, policy_folder, tmp_path, num_iterations=2, lr_kl_target=0.1,
             lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_dataset=PROMPTS)  # fmt: skip


def test_learning_rate_stays_while_the_policy_cannot_move(policy_folder, tmp_path):
    """While only the value network trains, and where all rewards are equal; TRL's step counts both."""
    still = {"num_iterations": 2, "lr_kl_target": 1.0, "max_steps": 4, "lr_scheduler_type": "constant", "beta": 0.0}
    for trainer in (
        make(PPOTrainer, policy_folder, tmp_path, value_warmup_steps=4, **still),
        make(RLOOTrainer, policy_folder, tmp_path, lambda completions, **columns: [1.0] * len(completions), **still),
    ):
        trainer.train()
        assert [line["learning_rate"] for line in logged(trainer)] == pytest.approx([1e-3] * 4)


@pytest.mark.parametrize("trainer_class", ALGORITHMS)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_reward_takes_the_chosen_kl_estimate(trainer_class, estimator, policy_folder, tmp_path):
    settings = {"whiten_advantages": False, "lam": 1.0} if trainer_class is PPOTrainer else {"baseline": "none"}
    trainer = make(trainer_class, policy_folder, tmp_path, beta=0.5, kl_estimator=estimator, check_first_step=False,
                   **settings)  # fmt: skip
    with torch.no_grad():
        trainer.model.transformer.wpe.weight.mul_(3.0)
    output = rollout(trainer)
    mask = output["completion_mask"]
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
    with torch.no_grad():
        reference, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.ref_model, ids, torch.cat([output["prompt_mask"], mask], 1), mask.size(1)
        )
    d = output["old_per_token_logps"] - reference
    kl = {"k1": d, "k2": d.square() / 2, "k3": (-d).exp() - 1 + d}[estimator]
    expected = mask.sum(1) - 0.5 * (kl * mask).sum(1)  # the score is the length
    got = output["returns"][:, 0] if trainer_class is PPOTrainer else output["advantages"]
    assert torch.allclose(got, expected, atol=1e-4) and (kl * mask).abs().sum() > 0.01


def warnings_of(trainer, caplog, steps=1):
    caplog.clear()
    with caplog.at_level(logging.WARNING, "rlhf_recipes"):
        for _ in range(steps):
            rollout(trainer, PROMPTS * 4)
    return " ".join(record.getMessage() for record in caplog.records)


def with_other_weights(trainer):
    with torch.no_grad():
        trainer.model.lm_head.weight.add_(0.1 * torch.randn(trainer.model.lm_head.weight.shape))
    return trainer


def test_a_policy_that_is_not_its_reference_at_the_start_does_not_train(policy_folder, tmp_path, caplog):
    trainer = make(PPOTrainer, policy_folder, tmp_path, beta=0.1)
    assert warnings_of(trainer, caplog) == ""
    with pytest.raises(RecipeError, match="differs from the reference by .* weights: policy and reference differ"):
        with_other_weights(make(PPOTrainer, policy_folder, tmp_path, beta=0.1)).train()
    trainer = with_other_weights(make(PPOTrainer, policy_folder, tmp_path, beta=0.1, check_first_step=False))
    assert "weights: policy and reference differ" in warnings_of(trainer, caplog)


@pytest.mark.parametrize("trainer_class", ALGORITHMS)
def test_a_policy_that_is_not_the_rollouts_in_the_first_pass_does_not_train(trainer_class, policy_folder, tmp_path):
    for beta in (0.0, 0.1):
        settings = {"beta": beta, "disable_dropout": False}
        with pytest.raises(RecipeError, match="before the first step .* dropout: it is on in"):
            make(trainer_class, policy_folder, tmp_path, **settings).train()
        make(trainer_class, policy_folder, tmp_path, **settings, check_first_step=False).train()


@pytest.mark.parametrize("trainer_class", ALGORITHMS)
def test_weights_that_are_not_finite_do_not_train(trainer_class, policy_folder, tmp_path):
    trainer = make(trainer_class, policy_folder, tmp_path, beta=0.0)
    with torch.no_grad():
        trainer.model.transformer.ln_f.weight[0] = math.nan
    with pytest.raises(RecipeError, match="before the first step"):
        trainer.train()


@pytest.mark.parametrize("trainer_class", ALGORITHMS)
def test_a_synced_reference_follows_the_policy_and_survives_a_resume(trainer_class, policy_folder, tmp_path):
    """By hand: after a sync with mix-up 1, the reference is the policy. An instance is its own first reference."""
    from transformers import AutoModelForCausalLM

    def changed():
        model = AutoModelForCausalLM.from_pretrained(policy_folder)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        return model

    settings = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0}
    settings |= {"save_strategy": "steps", "save_steps": 3, "max_steps": 4}
    trainer = make(trainer_class, changed(), tmp_path / "run", **settings)
    trainer.train()
    kl = [line["kl"] for line in logged(trainer)]
    assert kl[0] == pytest.approx(0, abs=1e-5) and abs(kl[1]) > 1e-4 and kl[2] == pytest.approx(0, abs=1e-5)
    policy = trainer.model.state_dict()
    for name, tensor in trainer.ref_model.state_dict().items():
        assert torch.equal(tensor, policy[name]), name
    again = make(trainer_class, changed(), tmp_path / "run", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert logged(again)[-1]["kl"] == kl[3]


def test_tokenizers_of_reward_models_are_one_for_each_function(policy_folder, tmp_path):
    tokenizer = word_tokenizer()
    data = {"train_dataset": Dataset.from_dict({"prompt": PROMPTS}), "processing_class": tokenizer}
    args = RLOOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    trainer = RLOOTrainer(str(policy_folder), length, args, reward_processing_classes=tokenizer, **data)
    assert trainer.reward_processing_classes == [tokenizer]
    with pytest.raises(RecipeError, match="reward_processing_classes has 1 entries for 2 reward functions"):
        RLOOTrainer(str(policy_folder), [length, length], args, reward_processing_classes=[tokenizer], **data)


def test_an_evaluation_has_its_own_completions(policy_folder, tmp_path):
    trainer = make(RLOOTrainer, policy_folder, tmp_path, eval_dataset=["a very"] * 2, per_device_eval_batch_size=4)
    rollout(trainer, PROMPTS * 2)
    before, during = trainer.sampled_completions(8), []
    trainer.log = lambda logs, *more: during.extend(trainer.sampled_completions(8))
    trainer.evaluate()
    assert {row["prompt"] for row in during} == {"a very"} and trainer.sampled_completions(8) == before


def test_an_adapter_that_is_not_0_at_the_start_is_explained(policy_folder, tmp_path, caplog):
    trainer = make(PPOTrainer, policy_folder, tmp_path, beta=0.1,
                   peft_config=LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False))  # fmt: skip
    assert "adapter: it is not 0" in warnings_of(trainer, caplog)


def test_going_on_from_an_adapter_starts_at_kl_0(policy_folder, tmp_path, caplog):
    from transformers import AutoModelForCausalLM

    adapter = LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(policy_folder), adapter)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    assert warnings_of(make(PPOTrainer, model, tmp_path, beta=0.1), caplog) == ""


def test_positions_that_depend_on_padding_are_named(policy_folder, tmp_path, caplog, monkeypatch):
    trainer = make(RLOOTrainer, policy_folder, tmp_path, beta=0.1, check_first_step=False)
    forward = trainer.ref_model.forward
    trainer.ref_model.forward = lambda position_ids=None, **kwargs: forward(**kwargs)
    assert "padding: only completions of padded prompts differ" in warnings_of(trainer, caplog)


def test_a_negative_mean_kl_is_explained_once(policy_folder, tmp_path, caplog):
    """Greedy-like sampling from a policy that moved: its tokens are not the policy's, and k1 goes wrong."""
    trainer = make(RLOOTrainer, policy_folder, tmp_path, beta=0.1, top_k=1, allow_truncated_sampling=True)
    with torch.no_grad():  # a flatter policy than the reference, sampled where the reference is surer
        trainer.model.transformer.ln_f.weight.mul_(0.2)
    trainer._run_state.episodes = 8
    text = warnings_of(trainer, caplog, steps=4)
    assert text.count("is negative") == 1 and "sampling: top_k=1" in text


# Settings that cannot be


@pytest.mark.parametrize("config_class", [PPOConfig, RLOOConfig])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_generations": 0}, "num_generations must be positive, not 0"),
        ({"max_completion_length": -1}, "max_completion_length must be positive, not -1"),
        ({"num_iterations": 0}, "num_iterations must be positive, not 0"),
        ({"temperature": 0.0}, "temperature must be positive, not 0.0"),
        ({"sampling_batch_size": 0}, "sampling_batch_size must be positive, not 0"),
        (
            {"per_device_train_batch_size": 4, "steps_per_generation": 2, "num_generations": 3},
            r"num_generations \(3\): the 8 completions .* not divisible .* per_device_train_batch_size \(4\) x "
            r"steps_per_generation \(2\) x processes \(1\)",
        ),
        (
            {"per_device_train_batch_size": 4, "generation_batch_size": 12, "num_generations": 5},
            r"num_generations \(5\): the 12 completions .* x steps_per_generation \(3\) x processes \(1\)",
        ),
        (
            {"per_device_train_batch_size": 8, "generation_batch_size": 12},
            r"generation_batch_size \(12\) must be divisible by per_device_train_batch_size \(8\) x processes \(1\)",
        ),
        (
            {"generation_batch_size": 8, "steps_per_generation": 1},
            "generation_batch_size and steps_per_generation are both set",
        ),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 3}, r"steps_per_generation \(3\) must be a mult"),
        ({"lr_kl_target": 0.1}, "lr_kl_target needs more than one optimizer step"),
    ],
)
def test_batches_that_cannot_be_are_refused_with_their_numbers(config_class, settings, expected):
    with pytest.raises(ValueError, match=f"^{expected}"):
        config_class("x", use_cpu=True, bf16=False, **{"num_generations": 2} | settings)


def test_trls_other_refusals_are_passed_on():
    with pytest.raises(ValueError, match="auto_find_batch_size is not supported by RLOO"):
        RLOOConfig("x", use_cpu=True, bf16=False, auto_find_batch_size=True)


def args_of(stage, tmp_path, *overrides):
    run = Run(load_recipe("imdb_tiny", [f"runs_dir={tmp_path}", *overrides]), stage)
    return trainer_args(run, {"ppo": PPOConfig, "rloo": RLOOConfig}[stage])


@pytest.mark.parametrize("stage", ["ppo", "rloo"])
def test_a_recipes_episodes_are_whole_rollouts(stage, tmp_path, caplog):
    """imdb_tiny: 64 completions a rollout, two optimizer steps each."""
    for episodes, steps in ((64, 2), (65, 4), (640, 20)):
        args = args_of(stage, tmp_path, f"episodes={episodes}")
        assert (args.max_steps, args.logging_steps) == (steps, 2)
    with pytest.raises(RecipeError, match=rf"^episodes: 63 is less .* of 64 .*{stage}.trainer.per_device_train_batch"):
        args_of(stage, tmp_path, "episodes=63")
    assert not caplog.records


def test_a_stages_own_budget_counts_and_is_warned_of(tmp_path, caplog):
    for key in ("max_steps=3", "num_train_epochs=2"):
        caplog.clear()
        args = args_of("rloo", tmp_path, f"rloo.trainer.{key}", "episodes=64")
        assert f"{key.split('=')[0]}={getattr(args, key.split('=')[0])}" == key
        assert f"rloo.trainer.{key.split('=')[0]}: it replaces episodes (64)" in caplog.text


def test_a_refused_setting_is_named_by_its_key(tmp_path):
    for override, expected in (
        ("rloo.trainer.num_generations=1", "rloo.trainer.num_generations is 1, .* rloo.baseline"),
        ("rloo.trainer.top_k=5", "rloo.trainer: top_k=5: completions"),
    ):
        with pytest.raises(RecipeError, match=f"^{expected}"):
            args_of("rloo", tmp_path, override)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "override", "expected"),
    [
        ("rloo", "rloo.trainer.num_generations=1", "rloo.trainer.num_generations is 1, "),
        ("ppo", "ppo.trainer.num_generations=5", "ppo.trainer.num_generations (5): the 64 completions of a rollout"),
        ("rloo", "rloo.trainer.generation_batch_size=65", "rloo.trainer.generation_batch_size (65) must be divisible"),
        ("rloo", "episodes=63", "episodes: 63 is less than one rollout of 64 completions"),
        (
            "rloo",
            "reward_funcs=[{{name: length}}, {{name: sentiment, args: {{model: '{classifier}', label: HAPPY}}}}]",
            "reward_funcs.1.args.label: {classifier} has no label 'HAPPY'; it has: NEGATIVE, POSITIVE",
        ),
        (
            "ppo",
            "reward_funcs=[{{name: reward_model, args: {{model: '{classifier}'}}}}]",
            "reward_funcs.0.name: reward_model: {classifier} has 2 labels",
        ),
    ],
)
def test_mistakes_are_found_before_the_policy_is_loaded(stage, override, expected, classifier_folder, tmp_path):
    """The policy's weights cannot be loaded: whoever tries to fails with another message."""
    causal_lm(word_tokenizer()).config.save_pretrained(tmp_path / "policy")
    (tmp_path / "policy" / "model.safetensors").touch()
    data = write_jsonl(tmp_path / "reviews.jsonl", REVIEWS)
    overrides = [f"{stage}.policy={tmp_path / 'policy'}", override.format(classifier=classifier_folder)]
    done = run_python(
        "-m", f"rlhf_recipes.{stage}", "--recipe", "imdb_tiny", f"data.path={data}", *overrides, cwd=tmp_path
    )
    assert done.returncode == 2, done.stdout + done.stderr
    message = done.stderr.splitlines()[-1]  # libraries may have warned of something before
    assert message.startswith("error: " + expected.format(classifier=classifier_folder)), done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1


# Canaries


def test_canary_trl_has_not_moved():
    """If this fails, TRL changed under `OnPolicyTrainer`: read its new `RLOOTrainer` and check every overridden method."""

    def names(method):
        return list(inspect.signature(getattr(trl.RLOOTrainer, method)).parameters)

    assert trl.__version__.startswith("1.16."), "pyproject pins trl to 1.16: re-check on_policy.py and ppo_trainer.py"
    assert names("__init__")[:4] == ["self", "model", "reward_funcs", "args"]
    assert names("_generate") == ["self", "prompts"]
    assert names("_generate_single_turn") == ["self", "prompt_ids", "images", "multimodal_fields"]
    assert names("_calculate_rewards") == ["self", "inputs", "prompts", "completions", "completion_ids_list"]
    assert names("_generate_and_score_completions") == ["self", "inputs"]
    assert names("_prepare_inputs") == ["self", "generation_batch"]
    assert names("_compute_loss") == ["self", "model", "inputs"]
    assert names("_get_train_sampler") == ["self", "dataset"]
    assert names("training_step") == ["self", "model", "inputs", "num_items_in_batch"]
    assert names("log") == ["self", "logs", "start_time"]
    assert names("_save_checkpoint") == ["self", "model", "trial"]
    assert names("_save_rng_state") == ["self", "output_dir"] and names("_load_rng_state") == ["self", "checkpoint"]
    assert names("_get_per_token_logps_and_entropies")[:8] == [
        "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy",
        "compute_aux_loss",
    ]  # fmt: skip


def test_canary_keys_of_the_rollout(policy_folder, tmp_path):
    """If this fails, TRL put other things into the batch: check what `_add_advantages` and `_compute_loss` rely on."""
    trainer = make(RLOOTrainer, policy_folder, tmp_path)
    trainer._add_advantages = lambda output, rollout: torch.zeros(4)
    output = rollout(trainer)
    assert set(output) - {"old_per_token_logps"} == {
        "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "old_logps", "advantages",
    }  # fmt: skip


def test_canary_trls_reward_is_ours_where_nothing_is_shaped(policy_folder, tmp_path):
    """TRL's own advantages, which RLOO replaces by the same: if they part, TRL changed how it makes them."""
    trainer = make(RLOOTrainer, policy_folder, tmp_path, sum_of_ids, beta=0.1, check_first_step=False)
    theirs = {}
    add = trainer._add_advantages
    trainer._add_advantages = lambda out, roll: theirs.update(a=out["advantages"].clone()) or add(out, roll)
    with torch.no_grad():
        trainer.model.transformer.wpe.weight.mul_(2.0)
    output = rollout(trainer, [p for p in PROMPTS for _ in range(2)])
    assert torch.equal(output["advantages"], theirs["a"]) and theirs["a"].abs().sum() > 0
