"""A training that diverges stops before it spoils a checkpoint, and says at which step, by what, and why."""

import math

import pytest
import torch
from datasets import Dataset
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from rlhf_recipes import PPOConfig
from rlhf_recipes.models.load import load_model
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.runs.checkpoints import resumable
from rlhf_recipes.runs.divergence import Diverged, first_not_finite, require_finite_output, require_finite_weights
from rlhf_recipes.system.files import checkpoints
from support.tiny_models import causal_lm, save_pair, word_tokenizer
from support.tiny_trainers import ALGORITHMS, PPOTrainer, RLOOTrainer, make

SAVING = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}


def assert_whole(folder):
    from transformers import AutoModelForCausalLM

    for checkpoint in checkpoints(folder):
        assert first_not_finite(AutoModelForCausalLM.from_pretrained(checkpoint)) is None


@pytest.mark.parametrize("trainer_class", ALGORITHMS)
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"learning_rate": 1e30}, r"step 2: the KL to the reference is nan, .* learning_rate is 1e\+30"),
        ({"learning_rate": 1e-3, "weight_decay": 1e38}, r"step 2: the KL .* weight_decay is 1e\+38"),
        ({"beta": 1e38}, r"step [12]: the (loss|gradient norm|KL to the reference) is (inf|nan), .* beta is 1e\+38"),
    ],
)
def test_on_policy_training_stops_at_the_first_number_that_is_not_finite(
    trainer_class, settings, said, policy_folder, tmp_path
):
    trainer = make(trainer_class, policy_folder, tmp_path, **SAVING | {"max_steps": 4, "beta": 0.1} | settings)
    with pytest.raises(Diverged, match=said):
        trainer.train()
    assert_whole(tmp_path)


@pytest.mark.parametrize("setting", ["vf_coef", "ent_coef"])
def test_a_loss_that_is_not_finite_stops_the_first_step(setting, policy_folder, tmp_path):
    trainer = make(PPOTrainer, policy_folder, tmp_path, **SAVING, **{setting: 1e38})
    with pytest.raises(Diverged, match=f"step 1: the (loss|gradient norm) is .* {setting} is 1e"):
        trainer.train()
    assert not checkpoints(tmp_path)


@pytest.mark.parametrize("setting", ["gamma", "lam", "beta", "learning_rate", "weight_decay"])
def test_settings_that_are_no_number_are_refused(setting, tmp_path):
    for value in (math.nan, math.inf, 1e39):
        with pytest.raises(ValueError, match=f"{setting} must be a finite number, in float32 too"):
            PPOConfig(str(tmp_path), use_cpu=True, bf16=False, **{setting: value})
    with pytest.raises(ValueError, match="missing_eos.value must be a finite number"):
        PPOConfig(str(tmp_path), use_cpu=True, bf16=False, missing_eos={"mode": "replace", "value": math.inf})


@pytest.mark.parametrize("trainer_class", ALGORITHMS)
def test_scores_that_overflow_stop_the_rollout(trainer_class, policy_folder, tmp_path):
    trainer = make(trainer_class, policy_folder, tmp_path, lambda completions, **columns: [1e18] * len(completions))
    trainer.reward_weights = torch.tensor([1e30])
    with pytest.raises(Diverged, match="step 1: the score is inf.* a weight of reward_funcs"):
        trainer.train()


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_the_other_stages_stop_too(kind, policy_folder, tmp_path):
    config, trainer = {"sft": (SFTConfig, SFTTrainer), "reward": (RewardConfig, RewardTrainer)}[kind]
    args = config(str(tmp_path), learning_rate=1e30, max_steps=4, use_cpu=True, bf16=False, report_to=[], **SAVING)
    columns = {"sft": {"text": ["the film was"] * 16}, "reward": {"chosen": ["the film"] * 16, "rejected": ["a"] * 16}}
    with pytest.raises(Diverged, match=r"learning_rate is 1e\+30"):
        resumable(trainer)(str(policy_folder), args=args, train_dataset=Dataset.from_dict(columns[kind]),
                           processing_class=word_tokenizer()).train()  # fmt: skip


def test_a_model_whose_output_is_not_finite_is_not_saved(policy_folder, tmp_path):
    trainer = make(RLOOTrainer, policy_folder, tmp_path)
    require_finite_output(trainer)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1e38)
    require_finite_weights(trainer)
    with pytest.raises(Diverged, match="output is not finite"):
        require_finite_output(trainer)
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(Diverged, match="weights are not finite .*(wte|lm_head)"):
        require_finite_weights(trainer)


def test_a_model_with_weights_that_are_not_finite_is_not_loaded(tmp_path):
    from transformers import AutoModelForCausalLM

    model = causal_lm(word_tokenizer())
    with torch.no_grad():
        model.transformer.ln_f.bias[3] = math.inf
    folder = save_pair(tmp_path / "spoiled", model, word_tokenizer())
    with pytest.raises(
        RecipeError, match=r"eval.models.ppo: the weights of .*spoiled are not finite \(transformer.ln_f.bias\)"
    ):
        load_model(AutoModelForCausalLM, "eval.models.ppo", str(folder))
