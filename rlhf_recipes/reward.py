"""Stage reward: train a reward model on pairs of a chosen and a rejected text.

    accelerate launch -m rlhf_recipes.reward --recipe imdb_tiny

Reads `data` (or `reward.data`) and `reward`. Writes to `<runs_dir>/<recipe>/reward/`: a sequence classifier with one
label, its tokenizer, `scoring.json` (how it reads a text, for the reward function `reward_model`) and
`reward_report.json` (its quality).
"""

import json

from rlhf_recipes.runs.folder import Run
from rlhf_recipes.stage import stage_command


def main(run: Run) -> str:
    from trl import RewardConfig, RewardTrainer
    from trl.data_utils import is_conversational

    from rlhf_recipes.data.filters import warn_of_copies
    from rlhf_recipes.data.pairs import pairs
    from rlhf_recipes.data.rows import load_rows
    from rlhf_recipes.data.tokenizer import load_tokenizer
    from rlhf_recipes.evaluation.bound import announce, drawn, usual_rows
    from rlhf_recipes.evaluation.reward_quality import gold_texts, kept_pairs, lengths_of, measure, scorer
    from rlhf_recipes.models.limits import fit_length
    from rlhf_recipes.models.new_weights import scale_head
    from rlhf_recipes.models.start import Start
    from rlhf_recipes.rewards.scoring import trained_scoring
    from rlhf_recipes.runs.callbacks import attach, save_model
    from rlhf_recipes.runs.checkpoints import resumable
    from rlhf_recipes.runs.files import REWARD_REPORT
    from rlhf_recipes.system.terminal import expected
    from rlhf_recipes.trainers.args import rows_of_training, trainer_args

    recipe, reward = run.recipe, run.recipe.reward
    args = trainer_args(run, RewardConfig)
    start = Start(run, args, "model")
    tokenizer = load_tokenizer(recipe, "reward.model", reward.model, classifier=True)
    fit_length(recipe, "reward", start.config, tokenizer, args)
    data, key = (recipe.data, "data") if reward.data is None else (reward.data, "reward.data")
    rows, held_out = load_rows(data, recipe.seed, key)
    limits = (reward.pairs, reward.pairs and max(1, reward.pairs // 10))
    train, held_out = (
        pairs(data, part, tokenizer, limit, recipe.seed, reward.chosen_label, apart_from, key)
        for part, limit, apart_from in zip((rows, held_out), limits, (None, rows), strict=True)
    )
    warn_of_copies(train, held_out, key)
    chat = is_conversational(train[0])
    usual = usual_rows(args, len(train))
    most = reward.eval_rows or usual
    held_out, gold = drawn(held_out, most, recipe.seed), gold_texts(recipe, reward.center, tokenizer, chat, most)
    if args.max_steps > 0:  # tokenize only the pairs of the training
        train = rows_of_training(args, train)
    # TRL leaves out pairs that are too long; the row numbers show which ones it keeps.
    args.remove_unused_columns = False  # `group_by_length` reads the column of lengths
    train, held_out = (
        part.add_column("row", range(len(part))).add_column(args.length_column_name, lengths_of(part))
        for part in (train, held_out)
    )
    with expected("LOAD REPORT"):  # the scalar head is new
        trainer = start.trainer(resumable(RewardTrainer), tokenizer, train_dataset=train, eval_dataset=held_out)
    train, held_out = kept_pairs(train, trainer.train_dataset, args), kept_pairs(held_out, trainer.eval_dataset, args)
    if reward.scale_head:
        scale_head(trainer.model, recipe.seed)
    attach(trainer, run)
    seconds = trainer.train(run.checkpoint and str(run.checkpoint)).metrics["train_runtime"]
    scoring = trained_scoring(trainer, chat, center=0.0)
    sample = drawn(train, min(len(held_out), usual), recipe.seed)
    numbers = {"held-out pairs": len(held_out), "training pairs": len(sample), "gold texts": len(gold)}
    announce(run, trainer, seconds, numbers)
    coefficient = args.center_rewards_coefficient or 0.0
    report = measure(scorer(run, trainer, scoring), sample, held_out, gold, reward.center, coefficient)
    trainer.log({name: report[name] for name in ("eval_loss", "eval_accuracy")})
    report = {"train_pairs": len(train), "eval_pairs": len(held_out)} | report
    if run.is_main:  # not in a bias: the scalar head of a causal backbone has none
        scoring.model_copy(update={"center": report["score_center"]}).write(run.path)
        (run.path / REWARD_REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    run.results = {name: value for name, value in report.items() if not isinstance(value, list)}
    save_model(trainer, run)
    return (
        f"held-out accuracy {report['eval_accuracy']:.1%} on {len(held_out)} pairs, calibration error "
        f"{report['eval_ece']:.3f}; training accuracy {report['train_accuracy']:.1%} ({len(train)} pairs)"
    )


if __name__ == "__main__":
    stage_command("reward", main)
