"""PPO: its loss by hand, its value networks, what is saved, and what is refused."""

import warnings

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Model, TrainerCallback

from rlhf_recipes import PPOConfig, PPOTrainer
from rlhf_recipes.models.forward import completion_logits, pad_batch
from rlhf_recipes.runs.files import VALUE_MODEL
from rlhf_recipes.trainers.advantages import gae, masked_whiten
from rlhf_recipes.trainers.value_network import HEAD_FILE, ValueNetwork
from support.tiny_models import bpe_tokenizer, causal_lm, save_pair, word_tokenizer
from support.tiny_trainers import ALGORITHMS, PROMPTS, logged, make, micro_batches, rollout, sum_of_ids, train_on

VALUE_MODELS = ["shared", "policy", "classifier"]


@pytest.fixture(scope="session")
def value_folder(tmp_path_factory):
    """A GPT-2 reward model with the policy's tokenizer."""
    tokenizer = word_tokenizer()
    torch.manual_seed(7)
    model = AutoModelForSequenceClassification.from_config(one_label(causal_lm(tokenizer).config))
    model.config.score_center = 0.25
    return save_pair(tmp_path_factory.mktemp("value"), model, tokenizer)


def one_label(config):
    config.num_labels = 1
    return config


def ppo(folder, output_dir, *args, value_model="shared", value_folder=None, **settings):
    source = str(value_folder) if value_model == "classifier" else value_model
    return make(PPOTrainer, folder, output_dir, *args, value_model=source, **settings)


def head_of(trainer):
    network = trainer.value_network
    return network.head if network.model is None else network.model.score


def test_loss_by_hand(policy_folder, tmp_path):
    trainer = ppo(policy_folder, tmp_path, vf_coef=0.5, epsilon=0.2, cliprange_value=0.1, ent_coef=0.3,
                  check_first_step=False)  # fmt: skip
    output = rollout(trainer)
    mask = output["completion_mask"].float()
    moved = torch.linspace(-0.6, 0.6, mask.numel()).view_as(mask)
    batch = output | {
        "old_per_token_logps": output["old_per_token_logps"] - moved,
        "advantages": torch.where(torch.arange(mask.numel()).view_as(mask) % 2 == 0, 1.0, -1.0) * mask,
        "old_values": torch.full_like(mask, 0.3) * mask,
        "returns": torch.full_like(mask, 2.0) * mask,
        "tokens_of_step": mask.sum(),
    }
    loss = trainer._compute_loss(trainer.model, batch)
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
    attention = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
    with torch.no_grad():
        logits = trainer.model(
            ids, attention_mask=attention, position_ids=(attention.cumsum(1) - 1).clamp(min=0)
        ).logits
    p = logits[:, -mask.size(1) - 1 : -1].softmax(-1)
    policy_terms, value_terms, entropies = [], [], []
    for i, t in mask.nonzero().tolist():
        ratio, advantage = moved[i, t].exp().item(), batch["advantages"][i, t].item()
        policy_terms.append(-min(advantage * ratio, advantage * min(max(ratio, 0.8), 1.2)))
        # The head starts at 0, which is 0.3 below the old value: clipped to 0.2, and the worse of the two errors counts.
        value_terms.append(0.5 * max((0.0 - 2.0) ** 2, (0.2 - 2.0) ** 2))
        entropies.append(-(p[i, t] * p[i, t].log()).sum().item())
    n = len(policy_terms)
    expected = sum(policy_terms) / n + 0.5 * sum(value_terms) / n - 0.3 * sum(entropies) / n
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    logs = {}
    trainer.log(logs)
    outside = [abs(moved[i, t].exp().item() - 1) > 0.2 for i, t in mask.nonzero().tolist()]
    decides = [o and (moved[i, t] > 0) == (batch["advantages"][i, t] > 0)
               for o, (i, t) in zip(outside, mask.nonzero().tolist(), strict=True)]  # fmt: skip
    assert logs["clip_fraction"] == pytest.approx(sum(decides) / n) and logs["value_clip_fraction"] == 1.0
    assert logs["value_loss"] == pytest.approx(sum(value_terms) / n, rel=1e-4)


@pytest.mark.parametrize("value_model", VALUE_MODELS)
def test_value_of_action_t_is_read_at_state_t(value_model, policy_folder, value_folder, tmp_path):
    """The value of a token's state must not change with that token, and must change with the one before."""
    trainer = ppo(policy_folder, tmp_path, value_model=value_model, value_folder=value_folder)
    torch.nn.init.normal_(head_of(trainer).weight)

    def values(completion):
        ids, attention, mask = pad_batch([[5, 6]], [completion], 0)
        return trainer._forward(trainer.model, ids, attention, mask.size(1)).values[0]

    base, changed = values([7, 8, 9, 10]), values([7, 8, 11, 10])
    assert torch.allclose(base[:3], changed[:3], atol=1e-6)
    assert (base[3] - changed[3]).abs() > 1e-4


def test_a_reward_model_starts_as_it_scores(policy_folder, value_folder, tmp_path):
    """The value of a state is what the classifier says about the text so far, less its center."""
    trainer = ppo(policy_folder, tmp_path, value_model="classifier", value_folder=value_folder)
    classifier = AutoModelForSequenceClassification.from_pretrained(value_folder)
    ids, attention, mask = pad_batch([[5, 6], [9, 8, 7]], [[7, 8, 9], [4, 4]], 0)
    with torch.no_grad():
        values = trainer._forward(trainer.model, ids, attention, mask.size(1)).values
        for row, prompt, completion in ((0, [5, 6], [7, 8, 9]), (1, [9, 8, 7], [4, 4])):
            for t in range(len(completion)):
                so_far = torch.tensor([prompt + completion[:t]])
                assert values[row, t] == pytest.approx(classifier(so_far).logits.item() - 0.25, abs=1e-5)


@pytest.mark.parametrize("value_model", VALUE_MODELS)
def test_values_do_not_depend_on_padding(value_model, policy_folder, value_folder, tmp_path):
    trainer = ppo(policy_folder, tmp_path, value_model=value_model, value_folder=value_folder)
    torch.nn.init.normal_(head_of(trainer).weight)
    alone = pad_batch([[5, 6]], [[7, 8, 9]], 0)
    among = pad_batch([[5, 6], [9] * 7], [[7, 8, 9], [5] * 6], 0)
    with torch.no_grad():
        first, second = (
            trainer._forward(trainer.model, ids, mask, c.size(1)).values for ids, mask, c in (alone, among)
        )
    assert torch.allclose(first[0], second[0, :3], atol=1e-5)


@pytest.mark.parametrize("value_model", VALUE_MODELS)
@pytest.mark.parametrize("lora", [False, True])
def test_trained_once_and_saved_beside_a_plain_policy(value_model, lora, policy_folder, value_folder, tmp_path):
    adapter = LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM") if lora else None
    trainer = ppo(policy_folder, tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=1, beta=0.1,
                  value_model=value_model, value_folder=value_folder, peft_config=adapter)  # fmt: skip
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert logged(trainer)[0]["kl"] == pytest.approx(0, abs=1e-5)  # with an adapter: the reference has it switched off
    in_optimizer = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    ours = list(trainer.value_network.parameters())
    assert all(sum(p is q for q in in_optimizer) == 1 for p in ours)
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert any("value_network" in name for name in changed) and any("value_network" not in name for name in changed)
    if lora:
        assert all("lora_" in name or "value_network" in name for name in changed)
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "final", tmp_path / "out" / "checkpoint-2"):
        if lora:
            assert (folder / "adapter_model.safetensors").is_file()
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        trained = dict(trainer.model.named_parameters())
        assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())
    for folder in (tmp_path / "final", tmp_path / "out" / "checkpoint-2"):
        if value_model == "shared":
            assert (folder / VALUE_MODEL / HEAD_FILE).is_file()
        else:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder / VALUE_MODEL, output_loading_info=True
            )
            assert not any(info.values()), info
            trained = dict(trainer.value_network.model.named_parameters())
            assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())
            assert (folder / VALUE_MODEL / "tokenizer.json").is_file()  # it can be the value model of a next run


def test_own_copy_starts_as_the_policy_and_then_goes_its_own_way(policy_folder, tmp_path):
    trainer = ppo(policy_folder, tmp_path, value_model="policy")
    own, policy = (
        dict(trainer.value_network.model.transformer.named_parameters()),
        dict(trainer.model.transformer.named_parameters()),
    )
    assert all(torch.equal(own[name], policy[name]) and own[name] is not policy[name] for name in policy)
    assert rollout(trainer)["old_values"].abs().sum() == 0
    trainer.train()
    assert any(not torch.equal(own[name], policy[name]) for name in policy)


def test_own_copy_below_an_adapter(policy_folder, tmp_path):
    adapter = LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)
    trainer = ppo(policy_folder, tmp_path, value_model="policy", peft_config=adapter)
    assert not any("lora" in name for name, _ in trainer.value_network.named_parameters())
    assert all(p.requires_grad for p in trainer.value_network.parameters())


def test_an_instance_as_value_model_is_copied(policy_folder, value_folder, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(value_folder)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make(PPOTrainer, policy_folder, tmp_path, value_model=model, max_steps=2).train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_policy_without_a_classifier_of_its_kind_cannot_be_copied_as_value_model(tmp_path):
    with pytest.raises(ValueError, match="no sequence classifier for cohere, .* use 'shared'"):
        make(PPOTrainer, causal_lm(word_tokenizer(), "cohere"), tmp_path, value_model="policy")


def test_value_warmup_is_refused_under_fsdp(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="value_warmup_steps is 1, but an optimizer step of DeepSpeed or FSDP"):
        PPOConfig(str(tmp_path), value_warmup_steps=1, use_cpu=True, bf16=False)


def test_values_keep_their_precision_under_fsdp(tmp_path):
    """FSDP casts what a model returns to its own precision; values of bf16 would be 1 % off."""
    init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        policy = causal_lm(word_tokenizer(), "llama")
        network = ValueNetwork(policy)
        torch.nn.init.normal_(network.head.weight)
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
        fully_shard(policy, mesh=init_device_mesh("cpu", (1,)), mp_policy=precision)
        ids = torch.arange(3, 19)[None]
        _, outputs = completion_logits(policy, ids, torch.ones_like(ids), 12)
        values = outputs.state_values.real
        assert outputs.logits.dtype == torch.bfloat16 and values.dtype == torch.float32
        assert not torch.equal(values, values.bfloat16().float())
        values.sum().backward()
        assert network.head.weight.grad.full_tensor().abs().sum() > 0
    finally:
        destroy_process_group()


@pytest.mark.parametrize("trainer_class", ALGORITHMS)
def test_a_rollout_whose_completions_are_all_masked_moves_no_weight(
    trainer_class, policy_folder, tmp_path, monkeypatch
):
    trainer = make(trainer_class, policy_folder, tmp_path, sum_of_ids, mask_truncated_completions=True, beta=0.1)
    never_ends = [7, 8, 9]
    monkeypatch.setattr(trainer, "_generate_single_turn", lambda ids, *more: [never_ends for _ in ids])
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())


def test_value_models_that_cannot_be_one_are_refused(policy_folder, classifier_folder, tmp_path):
    tokenizer = bpe_tokenizer()
    other = AutoModelForSequenceClassification.from_config(one_label(causal_lm(tokenizer).config))
    folder = save_pair(tmp_path / "bpe", other, tokenizer)
    for source in (folder, classifier_folder):
        with pytest.raises(ValueError, match="another tokenizer"):
            make(PPOTrainer, policy_folder, tmp_path, value_model=str(source))
    looks_ahead = AutoModelForSequenceClassification.from_pretrained(classifier_folder)
    with pytest.raises(ValueError, match="no causal sequence classifier|another tokenizer"):
        make(PPOTrainer, policy_folder, tmp_path, value_model=looks_ahead)


def test_a_bidirectional_classifier_with_the_policys_tokenizer_is_refused(policy_folder, tmp_path):
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    tokenizer = word_tokenizer()
    config = DistilBertConfig(vocab_size=len(tokenizer), dim=32, n_layers=1, n_heads=2, hidden_dim=32, num_labels=1)
    folder = save_pair(tmp_path / "model", DistilBertForSequenceClassification(config), tokenizer)
    with pytest.raises(ValueError, match="no causal sequence classifier"):
        make(PPOTrainer, policy_folder, tmp_path, value_model=str(folder))


def test_no_warning_of_padding_where_a_value_model_is_looked_at(policy_folder, value_folder, tmp_path, monkeypatch):
    masks = []
    monkeypatch.setattr(
        GPT2Model, "warn_if_padding_and_no_attention_mask", lambda self, ids, mask: masks.append(mask), raising=False
    )
    ppo(policy_folder, tmp_path, value_model="classifier", value_folder=value_folder)
    assert masks and all(mask is not None for mask in masks)


@pytest.mark.parametrize("value_model", VALUE_MODELS)
def test_warm_up_trains_the_value_network_alone(value_model, policy_folder, value_folder, tmp_path):
    trainer = ppo(policy_folder, tmp_path, value_model=value_model, value_folder=value_folder, value_warmup_steps=2,
                  max_steps=3, weight_decay=0.1, lr_scheduler_type="constant", ent_coef=0.1)  # fmt: skip
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})

    trainer.add_callback(Watch())
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name in start:
        of_value = name.startswith("value_network")
        assert torch.equal(seen[1][name], start[name]) is not of_value or not start[name].requires_grad, name
    assert any(not torch.equal(seen[2][n], seen[1][n]) for n in start if not n.startswith("value_network"))


def test_the_best_checkpoints_value_network_comes_with_its_policy(policy_folder, tmp_path):
    """The first checkpoint is the best one: scores fall with every step."""
    trainer = ppo(
        policy_folder, tmp_path, lambda completions, trainer_state, **_: [-trainer_state.global_step] * len(completions),
        eval_dataset=PROMPTS, per_device_eval_batch_size=8, num_generations_eval=2, max_steps=2, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True, greater_is_better=True,
        metric_for_best_model="score_mean",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    best, last = (load_file(tmp_path / f"checkpoint-{step}" / VALUE_MODEL / HEAD_FILE) for step in (1, 2))
    assert torch.equal(head_of(trainer).weight, best["head.weight"])
    assert not torch.equal(last["head.weight"], best["head.weight"])


def test_rewards_are_whitened_without_losing_their_mean(policy_folder, tmp_path):
    trainer = ppo(policy_folder, tmp_path, sum_of_ids, whiten_rewards=True, whiten_advantages=False, lam=0.9, gamma=0.8)
    output = rollout(trainer, PROMPTS * 2)
    mask = output["completion_mask"]
    scores = torch.tensor(
        sum_of_ids([r[m.bool()].tolist() for r, m in zip(output["completion_ids"], mask, strict=True)])
    )
    rewards = torch.zeros_like(mask, dtype=torch.float32)
    rewards[torch.arange(len(mask)), mask.sum(1) - 1] = scores
    whitened = masked_whiten(rewards, mask, center=False)
    assert whitened.sum() / mask.sum() == pytest.approx((rewards.sum() / mask.sum()).item(), rel=1e-4)
    assert torch.allclose(output["advantages"], gae(whitened, torch.zeros_like(whitened), mask, 0.8, 0.9)[0], atol=1e-5)


def test_entropy_bonus_raises_entropy(policy_folder, tmp_path):
    ends = []
    for coefficient in (0.0, 1.0):
        trainer = ppo(policy_folder, tmp_path, lambda completions, **k: [0.0] * len(completions), ent_coef=coefficient,
                      beta=0.0, max_steps=8, learning_rate=3e-3)  # fmt: skip
        with torch.no_grad():
            trainer.model.transformer.ln_f.weight.mul_(8.0)  # a policy with entropy to gain
        trainer.train()
        ends.append(logged(trainer)[-1]["entropy"] - logged(trainer)[0]["entropy"])
    assert ends[1] > ends[0] + 0.02


def test_explained_variance_by_hand(policy_folder, tmp_path):
    trainer = ppo(policy_folder, tmp_path, sum_of_ids, beta=0.0)
    torch.nn.init.normal_(head_of(trainer).weight, std=0.3)
    output = rollout(trainer, PROMPTS * 2)
    mask = output["completion_mask"].bool()
    returns, values = output["returns"][mask], output["old_values"][mask]
    logs = {}
    trainer.log(logs)
    assert logs["explained_variance"] == pytest.approx(
        1 - ((returns - values).var(correction=0) / returns.var(correction=0)).item(), rel=1e-3
    )
    assert logs["value_mean"] == pytest.approx(values.mean().item(), rel=1e-4)
    assert logs["return_mean"] == pytest.approx(returns.mean().item(), rel=1e-4)


def test_returns_are_score_minus_kl_in_every_row_wherever_eos_stands(policy_folder, tmp_path):
    """EOS in the middle, in the last slot, first, and nowhere; gamma = lam = 1 and values 0."""
    trainer = ppo(policy_folder, tmp_path, beta=0.3, lam=1.0, num_generations=1, check_first_step=False)
    eos, completions = 1, [[5, 6, 1], [5, 6, 7, 8, 9, 1], [1], [5, 6, 7, 8, 9, 4]]
    assert trainer.eos_token_ids == [eos]
    trainer._generate_single_turn = lambda prompt_ids, *rest: completions
    with torch.no_grad():
        trainer.model.transformer.wpe.weight.mul_(3.0)
    output = rollout(trainer)
    assert output["completion_mask"].sum(1).tolist() == [3, 6, 1, 6]
    samples = trainer.sampled_completions(4)
    trainer._rollout = None
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
    attention = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
    with torch.no_grad():
        reference, _, _ = trainer._get_per_token_logps_and_entropies(trainer.ref_model, ids, attention, 6)
    kl = ((output["old_per_token_logps"] - reference) * output["completion_mask"]).sum(1)
    assert kl.abs().min() > 1e-4
    scores = torch.tensor([s["scores"]["length"] for s in samples])
    assert torch.allclose(output["returns"][:, 0], scores - 0.3 * kl, atol=1e-5)


def test_one_completion_per_prompt_and_other_bad_values_are_still_refused(policy_folder, tmp_path):
    trainer = ppo(policy_folder, tmp_path, num_generations=1)
    trainer.train()
    assert logged(trainer)[0]["episodes"] == 8
    with pytest.raises(ValueError, match="divisible"):
        PPOConfig(output_dir="x", use_cpu=True, bf16=False, num_generations=1, per_device_train_batch_size=8,
                  generation_batch_size=12)  # fmt: skip


def test_values_stay_float32_under_autocast(policy_folder, tmp_path):
    trainer = ppo(policy_folder, tmp_path, bf16=True)
    assert rollout(trainer)["old_values"].dtype == torch.float32
    torch.nn.init.normal_(head_of(trainer).weight)
    values = rollout(trainer)["old_values"]
    assert (values != values.bfloat16().float()).any()


def test_gradient_checkpointing_changes_nothing(policy_folder, tmp_path):
    gradients = []
    for checkpointing in (False, True):
        trainer = ppo(policy_folder, tmp_path, sum_of_ids, value_model="policy", gradient_checkpointing=checkpointing)
        torch.manual_seed(3)
        gradients.append(train_on(trainer, PROMPTS * 2)[2])
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])


def test_unscored_completions_move_neither_policy_nor_value(policy_folder, tmp_path):
    """The gradient is that of the scored ones alone."""
    trainer = ppo(policy_folder, tmp_path, lambda completions, **k: [1.0, 2.0, None, None], beta=0.0)
    batch = rollout(trainer)
    gradients = []
    for rows in (slice(0, 4), slice(0, 2)):
        trainer.model.zero_grad()
        part = micro_batches(trainer, {name: tensor[rows] for name, tensor in batch.items()})[0]
        trainer._compute_loss(trainer.model, part).backward()
        gradients.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])
    assert sum(g.abs().sum() for g in gradients[0].values()) > 0
