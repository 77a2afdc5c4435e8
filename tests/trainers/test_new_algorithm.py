"""A new algorithm is one trainer, one door and one class of the schema: here REINFORCE with the batch's mean as baseline."""

from dataclasses import dataclass
from typing import Any

from rlhf_recipes.models.start import Start
from rlhf_recipes.recipe.schema import Recipe
from rlhf_recipes.recipe.stages import OnPolicy
from rlhf_recipes.rewards.registry import build_reward_funcs
from rlhf_recipes.runs.callbacks import attach, save_model
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.system.files import read_json, read_lines
from rlhf_recipes.trainers.args import trainer_args
from rlhf_recipes.trainers.config import OnPolicyConfig
from rlhf_recipes.trainers.on_policy import OnPolicyTrainer
from support.texts import REVIEWS, write_jsonl
from support.tiny_models import causal_lm, save_pair, word_tokenizer

# The file in trainers/


@dataclass
class ReinforceConfig(OnPolicyConfig):
    @property
    def needs_siblings(self) -> bool:
        return False


class ReinforceTrainer(OnPolicyTrainer):
    _name = "REINFORCE"
    config_class = ReinforceConfig

    def _add_advantages(self, output, rollout):
        rewards = rollout.scores - self.beta * self.accelerator.gather(rollout.kl.sum(1))
        advantages = rewards - rewards.mean()
        output["advantages"] = self._local_rows(advantages)
        return advantages

    def _compute_loss(self, model, inputs):
        mask = inputs["completion_mask"]
        now = self._forward_batch(model, inputs)
        self._log_update((now.logps - inputs["old_per_token_logps"]) * mask, mask)
        return -(inputs["advantages"] * (now.logps * mask).sum(1)).mean()


# The class of the schema


class Reinforce(OnPolicy):
    trainer: dict[str, Any] = {}


class RecipeWithReinforce(Recipe):
    reinforce: Reinforce | None = None


# The door


def main(run: Run) -> str:
    from rlhf_recipes.data.rows import load_rows
    from rlhf_recipes.data.shapes import prompts
    from rlhf_recipes.data.tokenizer import load_tokenizer

    recipe = run.recipe
    args = trainer_args(run, ReinforceConfig)
    start = Start(run, args, "policy")
    reward_funcs = build_reward_funcs(recipe, recipe.reward_funcs)
    tokenizer = load_tokenizer(recipe, "reinforce.policy", recipe.reinforce.policy)
    train = prompts(recipe.data, load_rows(recipe.data, recipe.seed)[0], tokenizer, recipe.seed)
    trainer = start.trainer(ReinforceTrainer, tokenizer, reward_funcs=reward_funcs, train_dataset=train)
    callback = attach(trainer, run)
    trainer.train()
    save_model(trainer, run)
    return callback.summary()


def test_a_new_algorithm_trains_by_the_path_of_the_stages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    write_jsonl(tmp_path / "reviews.jsonl", REVIEWS)
    save_pair(tmp_path / "model", causal_lm(word_tokenizer()), word_tokenizer())
    settings = {
        "per_device_train_batch_size": 8,
        "num_generations": 2,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
    }
    recipe = RecipeWithReinforce(
        name="toy",
        description="toy",
        data={"path": "reviews.jsonl", "prompt_tokens": [2, 4], "eval_fraction": 0.3},
        reward_funcs=[{"name": "length"}],
        episodes=16,
        reinforce={"policy": str(tmp_path / "model"), "trainer": settings | {"use_cpu": True, "beta": 0.1}},
    )
    run = Run(recipe, "reinforce")
    run.start()
    assert main(run).endswith("16 episodes")
    run.finish()
    lines = read_lines(run.path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2] and lines[0]["kl"] == 0.0 and lines[1]["kl"] != 0.0
    assert read_json(run.path / "manifest.json")["status"] == "finished"
