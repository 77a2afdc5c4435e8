"""Stage ppo: train the policy with PPO.

    accelerate launch -m rlhf_recipes.ppo --recipe imdb_positive

Reads `data`, `reward_funcs`, `missing_eos`, `episodes` and `ppo`. Writes the trained policy and its tokenizer to
`<runs_dir>/<recipe>/ppo/`, and the value network to its subfolder `value_model/`.
"""

from rlhf_recipes.runs.folder import Run
from rlhf_recipes.stage import stage_command


def main(run: Run) -> str:
    from rlhf_recipes.runs.inputs import OWN_VALUE_MODELS
    from rlhf_recipes.runs.references import resolve_model
    from rlhf_recipes.trainers.ppo import PPOTrainer
    from rlhf_recipes.trainers.train import train_policy

    value_model = run.recipe.ppo.value_model
    if value_model not in OWN_VALUE_MODELS:
        value_model = resolve_model(run.recipe, "ppo.value_model", value_model)
    return train_policy(run, PPOTrainer, value_model=value_model)


if __name__ == "__main__":
    stage_command("ppo", main)
