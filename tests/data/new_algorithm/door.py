"""Stage reinforce: train the policy with REINFORCE."""

from rlhf_recipes.runs.folder import Run
from rlhf_recipes.stage import stage_command


def main(run: Run) -> str:
    from rlhf_recipes.data.rows import load_rows
    from rlhf_recipes.data.shapes import prompts
    from rlhf_recipes.data.tokenizer import load_tokenizer
    from rlhf_recipes.models.start import Start
    from rlhf_recipes.rewards.registry import build_reward_funcs
    from rlhf_recipes.runs.callbacks import attach, save_model
    from rlhf_recipes.trainers.args import trainer_args
    from rlhf_recipes.trainers.reinforce import ReinforceConfig, ReinforceTrainer

    recipe = run.recipe
    args = trainer_args(run, ReinforceConfig)
    start = Start(run, args, "policy")
    reward_funcs = build_reward_funcs(recipe, recipe.reward_funcs)
    tokenizer = load_tokenizer(recipe, "reinforce.policy", recipe.reinforce.policy)
    train = prompts(recipe.data, load_rows(recipe.data, recipe.seed)[0], tokenizer, recipe.seed)
    trainer = start.trainer(ReinforceTrainer, tokenizer, reward_funcs=reward_funcs, train_dataset=train)
    callback = attach(trainer, run)
    trainer.train(run.checkpoint and str(run.checkpoint))
    save_model(trainer, run)
    return callback.summary()


if __name__ == "__main__":
    stage_command("reinforce", main)
