"""Stage sft: fine-tune a language model on the recipe's texts, or train one from scratch.

    accelerate launch -m rlhf_recipes.sft --recipe imdb_tiny

Reads `data` and `sft`; writes a causal language model and its tokenizer to `<runs_dir>/<recipe>/sft/`.
"""

import math

from rlhf_recipes.entry import stage_command
from rlhf_recipes.run import Run


def main(run: Run) -> str:
    from trl import SFTConfig, SFTTrainer

    from rlhf_recipes.adapters import adapter_args, settle, starting_point
    from rlhf_recipes.callbacks import attach
    from rlhf_recipes.checkpoints import resumable
    from rlhf_recipes.data import load_rows, texts
    from rlhf_recipes.finish import save_model
    from rlhf_recipes.models import load_tokenizer, loading, make_model, make_tokenizer, resolve_model
    from rlhf_recipes.trainer_args import effective_batch, trainer_args

    recipe, sft = run.recipe, run.recipe.sft
    args = trainer_args(run, SFTConfig)
    adapter = adapter_args(run, args)
    train, held_out = (texts(recipe, rows, sft.labels) for rows in load_rows(recipe))
    if sft.scratch is not None:
        tokenizer = make_tokenizer(sft.scratch, train["text"])
        model = make_model(sft.scratch, tokenizer, seed=recipe.seed)
    else:
        model = resolve_model(recipe, "sft.model", sft.model)
        tokenizer = load_tokenizer("sft.model", model)
    if args.max_steps > 0:  # tokenize no more than training will see
        train = train.shuffle(seed=recipe.seed).select(range(min(len(train), args.max_steps * effective_batch(args))))
    with loading("sft.model", str(sft.model)):
        start = {"model": model} if sft.scratch is not None else starting_point(run, args, "model", model, adapter)
        trainer = resumable(SFTTrainer)(
            **start, args=args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer
        )
    settle(trainer, start, model)
    attach(trainer, run)
    trainer.train(run.checkpoint and str(run.checkpoint))
    loss = trainer.evaluate()["eval_loss"]
    run.results = {"eval_loss": loss, "eval_perplexity": math.exp(loss)}
    save_model(trainer, run)
    return f"held-out loss {loss:.3f}, perplexity {math.exp(loss):.1f}"


if __name__ == "__main__":
    stage_command("sft", main)
