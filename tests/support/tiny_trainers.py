"""Trainers on tiny models, for the tests of both algorithms."""

import trl
from datasets import Dataset

from rlhf_recipes import PPOConfig, PPOTrainer, RLOOConfig, RLOOTrainer
from support.tiny_models import word_tokenizer

PROMPTS = ["the film", "i liked the movie and", "it was", "a very"]
UNPADDED = ["the film", "it was", "a very", "i liked"]
"""Prompts of one length: without padding, TRL's positions are right too."""

ALGORITHMS = [PPOTrainer, RLOOTrainer]


def length(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def sum_of_ids(completion_ids, **kwargs):
    return [float(sum(ids) % 7) for ids in completion_ids]


def make(
    trainer_class,
    model,
    output_dir,
    reward_funcs=length,
    prompts=PROMPTS,
    tokenizer=None,
    peft_config=None,
    value_model=None,
    eval_dataset=None,
    **settings,
):
    """A trainer for one step of 8 completions, 2 for each prompt; `settings` override this."""
    config_class = {PPOTrainer: PPOConfig, RLOOTrainer: RLOOConfig}.get(trainer_class, trl.RLOOConfig)
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
        model=model if hasattr(model, "config") else str(model),
        reward_funcs=reward_funcs,
        args=config_class(**values | settings),
        train_dataset=Dataset.from_dict({"prompt": list(prompts) * 4}),
        eval_dataset=eval_dataset and Dataset.from_dict({"prompt": eval_dataset}),
        processing_class=tokenizer or word_tokenizer(),
        peft_config=peft_config,
        **({"value_model": value_model} if value_model else {}),
    )


def rollout(trainer, prompts=PROMPTS):
    """One rollout in training mode, as `training_step` gets it."""
    trainer.model.train()
    return trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])


def micro_batches(trainer, batch):
    """The micro-batches of one pass over a rollout, in the rollout's own order."""
    import torch

    from rlhf_recipes.trainers import batches

    size = trainer.args.per_device_train_batch_size
    steps = torch.arange(len(batch["completion_ids"])).split(size * trainer.args.gradient_accumulation_steps)
    return batches.micro_batches(batch, steps, size, trainer._sum_over_ranks)


def train_on(trainer, prompts=PROMPTS):
    """Loss and gradient of one optimizer step on one rollout; without the optimizer."""
    import torch

    batch = rollout(trainer, prompts)
    trainer.model.zero_grad()
    loss = 0.0
    for part in micro_batches(trainer, batch):
        share = trainer._compute_loss(trainer.model, part) / trainer.args.gradient_accumulation_steps
        share.backward()
        loss += share.item()
    gradient = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(g).all() for g in gradient.values())
    return batch, loss, gradient


SHARED = {
    "score_mean", "score_std", "score/length", "reward_mean", "kl", "kl_per_token", "kl_k3", "kl_k3_per_token", "beta",
    "entropy", "eos_rate", "length_mean", "length_min", "length_max", "ratio", "clip_fraction", "approx_kl",
    "policy_loss", "grad_norm", "learning_rate", "loss", "tokens", "episodes", "episodes_per_second",
    "seconds_generate", "seconds_score", "seconds_forward", "seconds_update",
}  # fmt: skip


OF_PPO = {"value_loss", "value_clip_fraction", "explained_variance", "value_mean", "return_mean"}


OF_RLOO = {"baseline_mean", "no_signal_fraction"}


def logged(trainer):
    return [line for line in trainer.state.log_history if "train_runtime" not in line]
