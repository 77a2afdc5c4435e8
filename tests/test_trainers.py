"""PPO and RLOO on tiny models: identities of the first step, invariances, hand-computed losses, and learning."""

import warnings

import pytest
import torch
import trl
from conftest import bpe_tokenizer, causal_lm, save_pair, word_tokenizer
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from rlhf_recipes.forward import completion_logits, pad_batch
from rlhf_recipes.ppo_trainer import VALUE_HEAD_FILE, PPOConfig, PPOTrainer
from rlhf_recipes.rloo_trainer import RLOOTrainer

PROMPTS = ["the film", "i liked the movie and", "it was", "a very"]


def sum_of_ids(completion_ids, **kwargs):
    return [float(sum(ids) % 7) for ids in completion_ids]


def length(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def make(
    trainer_class,
    folder,
    output_dir,
    reward_funcs=length,
    prompts=PROMPTS,
    tokenizer=None,
    peft_config=None,
    **settings,
):
    config_class = PPOConfig if trainer_class is PPOTrainer else trl.RLOOConfig
    values = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_dropout": True,
        "per_device_train_batch_size": 8,
        "num_generations": 2,
        "max_completion_length": 6,
        "max_steps": 1,
        "learning_rate": 1e-3,
    }
    return trainer_class(
        model=str(folder),
        reward_funcs=reward_funcs,
        args=config_class(**values | settings),
        train_dataset=Dataset.from_dict({"prompt": list(prompts) * 4}),
        processing_class=tokenizer or word_tokenizer(),
        peft_config=peft_config,
    )


def rollout(trainer, prompts=PROMPTS):
    """One rollout in training mode, as `training_step` would see it."""
    trainer.model.train()
    return trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])


@pytest.mark.parametrize("trainer_class", [PPOTrainer, RLOOTrainer])
def test_first_step_identities(trainer_class, policy_folder, tmp_path):
    trainer = make(trainer_class, policy_folder, tmp_path, beta=0.1)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["kl"] == pytest.approx(0, abs=1e-5) and first["kl_per_token"] == pytest.approx(0, abs=1e-5)
    assert first["clip_fraction"] == 0
    if trainer_class is PPOTrainer:
        assert first["ratio"] == pytest.approx(1, abs=1e-5)
        assert first["approx_kl"] == pytest.approx(0, abs=1e-6)
        assert first["value_clip_fraction"] == 0 and first["value_mean"] == 0


def test_the_two_algorithms_log_the_same_names_and_ppo_some_more(policy_folder, tmp_path):
    logged = {}
    for trainer_class in (PPOTrainer, RLOOTrainer):
        trainer = make(trainer_class, policy_folder, tmp_path)
        trainer.train()
        logged[trainer_class] = trainer.state.log_history[0]
    assert set(logged[RLOOTrainer]) <= set(logged[PPOTrainer])
    expected = {
        "score_mean",
        "score_std",
        "score/length",
        "kl",
        "kl_per_token",
        "entropy",
        "eos_rate",
        "length_mean",
        "clip_fraction",
        "episodes",
        "tokens",
        "grad_norm",
        "learning_rate",
    }
    assert expected <= set(logged[RLOOTrainer])
    assert {"value_loss", "explained_variance", "value_clip_fraction", "value_mean", "return_mean", "approx_kl"} <= set(
        logged[PPOTrainer]
    )
    assert logged[PPOTrainer]["episodes"] == 8


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama"])
def test_logps_do_not_depend_on_padding(architecture):
    tokenizer = word_tokenizer()
    model = causal_lm(tokenizer, architecture).eval()
    alone = pad_batch([[5, 6]], [[7, 8, 9]], tokenizer.pad_token_id)
    among = pad_batch([[5, 6], [9] * 7], [[7, 8, 9], [5] * 6], tokenizer.pad_token_id)
    with torch.no_grad():
        first, second = (
            completion_logits(model, ids, mask, completion.size(1), 0.7)[0] for ids, mask, completion in (alone, among)
        )
    assert torch.allclose(first[0], second[0, :3], atol=1e-5)


def test_old_logps_are_those_of_sampling(policy_folder, tmp_path):
    """With learned positions and padded prompts: every sampled token's log-probability under `generate` itself."""
    trainer = make(PPOTrainer, policy_folder, tmp_path, temperature=0.7)
    output = rollout(trainer)
    for row in range(len(PROMPTS)):
        prompt = output["prompt_ids"][row][output["prompt_mask"][row].bool()]
        completion = output["completion_ids"][row][output["completion_mask"][row].bool()]
        with torch.no_grad():  # without any padding, position ids are the plain ones
            logits = trainer.model(input_ids=torch.cat([prompt, completion])[None]).logits[0] / 0.7
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, completion[:, None])[:, 0]
        assert torch.allclose(output["old_per_token_logps"][row, : len(completion)], expected, atol=1e-5)


def test_rloo_equals_trl(policy_folder, tmp_path):
    """Same completions and scores: advantages to the last bit, loss and gradients to float tolerance (no padding here,
    where TRL's positions are right too)."""
    prompts = ["the film", "it was", "a very", "i liked"]
    results = []
    for trainer_class in (RLOOTrainer, trl.RLOOTrainer):
        trainer = make(trainer_class, policy_folder, tmp_path, prompts=prompts, beta=0.0, reward_funcs=sum_of_ids)
        torch.manual_seed(3)
        output = rollout(trainer, prompts=[p for p in prompts for _ in range(2)])
        loss = trainer._compute_loss(trainer.model, output)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
        results.append((output, loss, gradient))
    (ours, our_loss, our_gradient), (theirs, their_loss, their_gradient) = results
    assert torch.equal(ours["completion_ids"], theirs["completion_ids"])
    assert torch.equal(ours["advantages"], theirs["advantages"]) and ours["advantages"].abs().sum() > 0
    assert torch.allclose(our_loss, their_loss, atol=1e-5)
    assert torch.allclose(our_gradient, their_gradient, atol=1e-5) and our_gradient.abs().sum() > 0


def test_ppo_loss_by_hand(policy_folder, tmp_path):
    trainer = make(PPOTrainer, policy_folder, tmp_path, vf_coef=0.5, epsilon=0.2, cliprange_value=0.1)
    output = rollout(trainer)
    mask = output["completion_mask"].float()
    moved = torch.linspace(-0.6, 0.6, mask.numel()).view_as(mask)
    batch = output | {
        "old_per_token_logps": output["old_per_token_logps"] - moved,
        "advantages": torch.where(torch.arange(mask.numel()).view_as(mask) % 2 == 0, 1.0, -1.0) * mask,
        "old_values": torch.full_like(mask, 0.3) * mask,
        "returns": torch.full_like(mask, 2.0) * mask,
    }
    loss = trainer._compute_loss(trainer.model, batch)
    policy_terms, value_terms = [], []
    for i, t in mask.nonzero().tolist():
        ratio, advantage = moved[i, t].exp().item(), batch["advantages"][i, t].item()
        policy_terms.append(-min(advantage * ratio, advantage * min(max(ratio, 0.8), 1.2)))
        # The head starts at 0, which is 0.3 below the old value: clipped to 0.2, and the worse of the two errors counts.
        value_terms.append(0.5 * max((0.0 - 2.0) ** 2, (0.2 - 2.0) ** 2))
    expected = sum(policy_terms) / len(policy_terms) + 0.5 * sum(value_terms) / len(value_terms)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_value_of_action_t_is_read_at_state_t(policy_folder, tmp_path):
    """The value of a token's state must not change with that token, and must change with the one before."""
    trainer = make(PPOTrainer, policy_folder, tmp_path)
    torch.nn.init.normal_(trainer.value_head.linear.weight)

    def values(completion):
        ids, attention, mask = pad_batch([[5, 6]], [completion], 0)
        trainer._values = []
        trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, mask.size(1))
        return trainer._values_of_last_pass()[0]

    base, changed = values([7, 8, 9, 10]), values([7, 8, 11, 10])
    assert torch.allclose(base[:3], changed[:3], atol=1e-6)
    assert (base[3] - changed[3]).abs() > 1e-4


def test_value_head_is_trained_once_and_saved_beside_a_plain_model(policy_folder, tmp_path):
    trainer = make(PPOTrainer, policy_folder, tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    head = list(trainer.value_head.parameters())
    in_optimizer = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert all(sum(p is q for q in in_optimizer) == 1 for p in head)
    assert trainer.value_head.linear.weight.abs().sum() > 0
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "final", tmp_path / "out" / "checkpoint-2"):
        assert (folder / VALUE_HEAD_FILE).is_file()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        trained = {name: p for name, p in trainer.model.named_parameters() if not name.startswith("value_head")}
        assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())


def test_resume_restores_the_value_head(policy_folder, tmp_path):
    whole = make(PPOTrainer, policy_folder, tmp_path / "whole", max_steps=2, save_strategy="steps", save_steps=1)
    whole.train()
    again = make(PPOTrainer, policy_folder, tmp_path / "again", max_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    for (name, first), (_, second) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(first, second), name


def test_lora_trains_adapter_and_value_head_only(policy_folder, tmp_path):
    trainer = make(
        PPOTrainer,
        policy_folder,
        tmp_path / "out",
        max_steps=2,
        beta=0.1,
        peft_config=LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM"),
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-5)  # the reference is the adapter switched off
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name or "value_head" in name for name in changed)
    assert any("value_head" in name for name in changed)
    trainer.save_model(str(tmp_path / "final"))
    assert {"adapter_model.safetensors", VALUE_HEAD_FILE} <= {p.name for p in (tmp_path / "final").iterdir()}


def test_ppo_takes_one_completion_per_prompt_and_other_bad_values_are_still_refused(policy_folder, tmp_path):
    trainer = make(PPOTrainer, policy_folder, tmp_path, num_generations=1)
    trainer.train()
    assert trainer.state.log_history[0]["episodes"] == 8
    with pytest.raises(ValueError, match="divisible"):
        PPOConfig(
            output_dir="x",
            use_cpu=True,
            bf16=False,
            num_generations=1,
            per_device_train_batch_size=8,
            generation_batch_size=12,
        )


def test_a_completion_without_any_score_teaches_nothing(policy_folder, tmp_path):
    trainer = make(
        PPOTrainer,
        policy_folder,
        tmp_path,
        reward_funcs=lambda completions, **kwargs: [None] + [1.0] * (len(completions) - 1),
    )
    output = rollout(trainer)
    assert output["advantages"][0].abs().sum() == 0
    assert torch.equal(output["returns"][0], output["old_values"][0])


def test_finished_is_told_apart_from_cut_off_when_pad_is_eos(bpe_policy_folder, tmp_path):
    tokenizer = bpe_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    seen = {}

    def watch(completion_ids, finished, **kwargs):
        seen.update(ids=completion_ids, finished=finished)
        return [0.0] * len(finished)

    trainer = make(
        PPOTrainer, bpe_policy_folder, tmp_path, reward_funcs=watch, tokenizer=tokenizer, max_completion_length=40
    )
    with torch.no_grad():  # make EOS likely, so that both kinds occur
        trainer.model.lm_head.weight[tokenizer.eos_token_id] += 0.2 * torch.randn(
            32, generator=torch.Generator().manual_seed(0)
        )
    output = rollout(trainer, prompts=PROMPTS * 8)
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
        again = tokenizer(prompt + completion)["input_ids"]
        assert again == tokenizer(prompt)["input_ids"] + kept


def test_chat_prompts(tmp_path):
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
    trainer = make(PPOTrainer, folder, tmp_path / "out", reward_funcs=watch, prompts=chats, tokenizer=tokenizer)
    trainer.train()
    assert seen["completions"][0][0]["role"] == "assistant"


@pytest.mark.slow
@pytest.mark.parametrize("trainer_class", [PPOTrainer, RLOOTrainer])
def test_learns_to_emit_a_word(trainer_class, policy_folder, tmp_path):
    """Emit-token task: the share of `good` among the words must exceed 0.95."""

    def share_of_good(completion_ids, completions, **kwargs):
        return [
            text.split().count("good") / max(len(ids), 1) for text, ids in zip(completions, completion_ids, strict=True)
        ]

    trainer = make(
        trainer_class,
        policy_folder,
        tmp_path,
        reward_funcs=share_of_good,
        beta=0.0,
        max_steps=250,
        learning_rate=3e-3,
        per_device_train_batch_size=32,
        num_generations=4,
        max_completion_length=4,
        lr_scheduler_type="constant",
    )
    trainer.train()
    assert trainer.state.log_history[0]["score_mean"] < 0.2
    assert max(line.get("score_mean", 0.0) for line in trainer.state.log_history[-5:]) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("trainer_class", [PPOTrainer, RLOOTrainer])
def test_learns_a_one_token_bandit(trainer_class, policy_folder, tmp_path):
    """A bandit with one arm per word and a different best arm for each prompt."""
    best = {"the film": "fun", "it was": "dull"}

    def pull(prompts, completions, **kwargs):
        return [float(c.strip() == best[p]) for p, c in zip(prompts, completions, strict=True)]

    trainer = make(
        trainer_class,
        policy_folder,
        tmp_path,
        reward_funcs=pull,
        prompts=list(best),
        beta=0.0,
        max_steps=200,
        learning_rate=3e-3,
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=1,
        lr_scheduler_type="constant",
    )
    trainer.train()
    last = [line["score_mean"] for line in trainer.state.log_history if "score_mean" in line][-5:]
    assert sum(last) / len(last) > 0.95


def test_canary_trl_has_not_moved():
    """If this fails, TRL changed under `OnPolicyTrainer`: read its new `RLOOTrainer` and check every overridden method."""
    import inspect

    def names(method):
        return list(inspect.signature(getattr(trl.RLOOTrainer, method)).parameters)

    assert trl.__version__.startswith("1.16."), "pyproject pins trl to 1.16: re-check on_policy.py and ppo_trainer.py"
    assert names("_generate") == ["self", "prompts"]
    assert names("_calculate_rewards") == ["self", "inputs", "prompts", "completions", "completion_ids_list"]
    assert names("_generate_and_score_completions") == ["self", "inputs"]
    assert names("_compute_loss") == ["self", "model", "inputs"]
    assert names("log") == ["self", "logs", "start_time"]
    assert names("_get_per_token_logps_and_entropies")[:8] == [
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
    ]


def test_canary_keys_of_the_rollout(policy_folder, tmp_path):
    """If this fails, TRL put other things into the batch: check what `PPOTrainer._finish_rollout` relies on."""
    output = rollout(make(RLOOTrainer, policy_folder, tmp_path))
    assert set(output) == {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "old_logps", "advantages"}


def test_values_stay_float32_under_autocast(policy_folder, tmp_path):
    trainer = make(PPOTrainer, policy_folder, tmp_path, bf16=True)
    output = rollout(trainer)
    assert output["old_values"].dtype == torch.float32
    torch.nn.init.normal_(trainer.value_head.linear.weight)
    values = rollout(trainer)["old_values"]
    assert (values != values.bfloat16().float()).any()
