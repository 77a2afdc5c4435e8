"""Stage ppo: train the policy with PPO.

    accelerate launch -m rlhf_recipes.ppo --recipe imdb_positive

Reads `data`, `reward_funcs`, `missing_eos`, `episodes` and `ppo`. Writes the trained policy and its tokenizer to
`<runs_dir>/<recipe>/ppo/`, and the value network to its subfolder `value_model/`.
"""

from rlhf_recipes.runs.folder import Run
from rlhf_recipes.stage import stage_command


def main(run: Run) -> str:
    from rlhf_recipes.data.rows import load_rows
    from rlhf_recipes.data.shapes import prompts
    from rlhf_recipes.data.tokenizer import load_tokenizer
    from rlhf_recipes.models.limits import check_context
    from rlhf_recipes.models.start import Start
    from rlhf_recipes.rewards.registry import build_reward_funcs
    from rlhf_recipes.runs.callbacks import attach, save_model
    from rlhf_recipes.runs.inputs import OWN_VALUE_MODELS
    from rlhf_recipes.runs.references import resolve_model
    from rlhf_recipes.trainers.args import check_enough_prompts, trainer_args
    from rlhf_recipes.trainers.ppo import PPOConfig, PPOTrainer

    recipe, ppo = run.recipe, run.recipe.ppo
    args = trainer_args(run, PPOConfig)
    start = Start(run, args, "policy")
    value_model = ppo.value_model
    if value_model not in OWN_VALUE_MODELS:
        value_model = resolve_model(recipe, "ppo.value_model", value_model)
    reward_funcs = build_reward_funcs(recipe, recipe.reward_funcs)
    tokenizer = load_tokenizer(recipe, "ppo.policy", ppo.policy)
    train = prompts(recipe.data, load_rows(recipe.data, recipe.seed)[0], tokenizer, recipe.seed)
    check_enough_prompts(run, args, train)
    check_context(recipe, "ppo.policy", ppo.policy, train, tokenizer, args.max_completion_length)
    trainer = start.trainer(
        PPOTrainer, tokenizer, reward_funcs=reward_funcs, train_dataset=train, value_model=value_model
    )
    callback = attach(trainer, run)
    trainer.train(run.checkpoint and str(run.checkpoint))
    save_model(trainer, run)
    return callback.summary()


if __name__ == "__main__":
    stage_command("ppo", main)
