"""A run that is stopped and resumed equals one that never was: weights, optimizer, random numbers and metric lines."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from rlhf_recipes import PPOTrainer, RLOOTrainer
from rlhf_recipes.runs.checkpoints import resumable
from support.texts import WORDS
from support.tiny_models import word_tokenizer
from support.tiny_trainers import make

LORA = LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM", lora_dropout=0.0)
TIMES = ("seconds_", "episodes_per_second", "train_")


def noisy_length(completion_ids, **kwargs):
    """A reward that draws random numbers, which a checkpoint keeps."""
    return [len(ids) + torch.rand(()).item() for ids in completion_ids]


def settings_of(trainer_class, several_steps):
    """With 2 passes over 4 micro-batches in steps of 2: 4 optimizer steps a rollout, a checkpoint at each of them."""
    settings = {
        "per_device_train_batch_size": 4 if several_steps else 8,
        "gradient_accumulation_steps": 2 if several_steps else 1,
        "steps_per_generation": 4 if several_steps else 1,
        "num_iterations": 2 if several_steps else 1,
        "max_steps": 11,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 3,
        "kl_target": 1.0,
        "kl_horizon": 100,
        "normalize_scores": True,
        "learning_rate": 3e-3,
    }
    if several_steps:
        settings["lr_kl_target"] = 0.01
    return settings | ({"baseline": "moving_average"} if trainer_class is RLOOTrainer else {"value_warmup_steps": 2})


def train(trainer_class, folder, output_dir, several_steps, lora, value_model, resume=None):
    trainer = make(trainer_class, folder, output_dir, noisy_length, peft_config=LORA if lora else None,
                   value_model=value_model, **settings_of(trainer_class, several_steps))  # fmt: skip
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def lines(trainer):
    """Metric lines without what measures time."""
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in trainer.state.log_history[:-1]]


CASES = [
    pytest.param(cls, several, lora, value, id=f"{cls.__name__}-{several}-{'lora' if lora else 'full'}-{value}",
                 marks=() if several and not lora else pytest.mark.nightly)
    for cls, value in ((PPOTrainer, "shared"), (PPOTrainer, "policy"), (RLOOTrainer, None))
    for several in (False, True)
    for lora in (False, True)
    if not (value == "policy" and (lora or not several))
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("trainer_class", "several_steps", "lora", "value_model"), CASES)
def test_resumed_equals_uninterrupted(trainer_class, several_steps, lora, value_model, policy_folder, tmp_path):
    """From every second checkpoint: in the middle of a rollout, of a log interval and of an epoch, and at their ends."""
    case = (trainer_class, policy_folder)
    whole = train(*case, tmp_path / "whole", several_steps, lora, value_model)
    weights = {name: p.clone() for name, p in whole.model.state_dict().items()}
    moments = whole.optimizer.state_dict()["state"]
    assert whole.beta != whole.args.beta
    for step in (1, 3, 4, 5, 8, 10):
        again = train(*case, tmp_path / f"again-{step}", several_steps, lora, value_model,
                      tmp_path / "whole" / f"checkpoint-{step}")  # fmt: skip
        for name, p in again.model.state_dict().items():
            assert torch.equal(p, weights[name]), (step, name)
        for i, of_parameter in again.optimizer.state_dict()["state"].items():
            for name, value in of_parameter.items():
                assert torch.equal(value, moments[i][name]), (step, i, name)
        assert again.beta == whole.beta and again._kl.lr_factor == whole._kl.lr_factor
        assert lines(again) == lines(whole), step


def test_batches_of_similar_length_resume_exactly_in_any_epoch(policy_folder, tmp_path):
    rows = Dataset.from_dict({"text": [" ".join(WORDS[: 1 + i % 7]) for i in range(12)]})

    def sft(output_dir, resume=None):
        args = SFTConfig(str(output_dir), per_device_train_batch_size=4, max_steps=8, use_cpu=True, bf16=False,
                         train_sampling_strategy="group_by_length", length_column_name="length", report_to=[],
                         learning_rate=1e-2, save_strategy="steps", save_steps=1)  # fmt: skip
        trainer = resumable(SFTTrainer)(str(policy_folder), args=args, train_dataset=rows,
                                        processing_class=word_tokenizer())  # fmt: skip
        trainer.train(resume)
        return trainer.model.state_dict()

    whole = sft(tmp_path / "whole")
    for step in (4, 6):  # in the second epoch of 3 steps, and at its end
        again = sft(tmp_path / f"again-{step}", str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert all(torch.equal(values, whole[name]) for name, values in again.items()), step
