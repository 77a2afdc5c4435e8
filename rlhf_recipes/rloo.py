"""Stage rloo: train the policy with RLOO.

    accelerate launch -m rlhf_recipes.rloo --recipe imdb_positive

Reads `data`, `reward_funcs`, `missing_eos`, `episodes` and `rloo`. Writes the trained policy and its tokenizer to
`<runs_dir>/<recipe>/rloo/`.
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
    from rlhf_recipes.trainers.args import check_enough_prompts, trainer_args
    from rlhf_recipes.trainers.rloo import RLOOConfig, RLOOTrainer

    recipe, rloo = run.recipe, run.recipe.rloo
    args = trainer_args(run, RLOOConfig)
    start = Start(run, args, "policy")
    reward_funcs = build_reward_funcs(recipe, recipe.reward_funcs)
    tokenizer = load_tokenizer(recipe, "rloo.policy", rloo.policy)
    train = prompts(recipe.data, load_rows(recipe.data, recipe.seed)[0], tokenizer, recipe.seed)
    check_enough_prompts(run, args, train)
    check_context(recipe, "rloo.policy", rloo.policy, train, tokenizer, args.max_completion_length)
    trainer = start.trainer(RLOOTrainer, tokenizer, reward_funcs=reward_funcs, train_dataset=train)
    callback = attach(trainer, run)
    trainer.train(run.checkpoint and str(run.checkpoint))
    save_model(trainer, run)
    return callback.summary()


if __name__ == "__main__":
    stage_command("rloo", main)
