"""Stage reward: train a reward model on pairs of a chosen and a rejected text.

    accelerate launch -m rlhf_recipes.reward --recipe imdb_tiny

Reads `data` and `reward`; writes a sequence classifier with one label, its tokenizer and `scoring.json` (how it was
trained to read, which the reward function `reward_model` follows) to `<runs_dir>/<recipe>/reward/`.
"""

from rlhf_recipes.entry import stage_command
from rlhf_recipes.run import Run


def main(run: Run) -> str:
    from trl import RewardConfig, RewardTrainer
    from trl.data_utils import is_conversational

    from rlhf_recipes.adapters import adapter_args, settle, starting_point
    from rlhf_recipes.callbacks import attach
    from rlhf_recipes.checkpoints import resumable
    from rlhf_recipes.data import load_rows, pairs
    from rlhf_recipes.finish import save_model
    from rlhf_recipes.models import load_tokenizer, loading, resolve_model
    from rlhf_recipes.scoring import trained_scoring
    from rlhf_recipes.terminal import expected
    from rlhf_recipes.trainer_args import effective_batch, trainer_args

    recipe, reward = run.recipe, run.recipe.reward
    args = trainer_args(run, RewardConfig)
    adapter = adapter_args(run, args)
    model = resolve_model(recipe, "reward.model", reward.model)
    tokenizer = load_tokenizer("reward.model", model, classifier=True)
    train, held_out = load_rows(recipe)
    train = pairs(recipe, train, reward.pairs)
    held_out = pairs(recipe, held_out, reward.pairs and max(1, reward.pairs // 10))
    if args.max_steps > 0:  # tokenize no more than training will see
        train = train.select(range(min(len(train), args.max_steps * effective_batch(args))))
    with loading("reward.model", model), expected("LOAD REPORT"):  # the scalar head is new
        start = starting_point(run, args, "model", model, adapter)
        trainer = resumable(RewardTrainer)(
            **start, args=args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer
        )
    settle(trainer, start, model)
    attach(trainer, run)
    trainer.train(run.checkpoint and str(run.checkpoint))
    measured = trainer.evaluate()
    center = measured["eval_mean_reward"] if reward.center else 0.0
    if run.is_main:  # the center stands here and in no bias: the scalar head of a causal backbone has none
        trained_scoring(trainer, is_conversational(train[0]), center).write(run.path)
    run.results = {
        "eval_accuracy": measured["eval_accuracy"],
        "eval_loss": measured["eval_loss"],
        "train_pairs": len(train),
        "eval_pairs": len(held_out),
        "score_center": center,
    }
    save_model(trainer, run)
    return f"held-out accuracy {measured['eval_accuracy']:.1%} on {len(held_out)} pairs ({len(train)} to train on)"


if __name__ == "__main__":
    stage_command("reward", main)
