"""Stage sft: fine-tune a language model on the recipe's texts, or train one from scratch.

    accelerate launch -m rlhf_recipes.sft --recipe imdb_tiny

Reads `data` and `sft`. Writes a causal language model and its tokenizer to `<runs_dir>/<recipe>/sft/` and, with
`sft.rouge_prompts`, some of its completions to `samples.jsonl`. If rows have a prompt and a completion, loss and
perplexity are those of the completion's tokens.
"""

import math

from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.stage import stage_command

LARGEST_LOSS = 700.0
"""In nats per token. The logarithm of a vocabulary's size is about 10; above 700 the perplexity overflows."""


def main(run: Run) -> str:
    from trl import SFTConfig, SFTTrainer

    from rlhf_recipes.data.filters import warn_of_copies
    from rlhf_recipes.data.rows import load_rows
    from rlhf_recipes.data.shapes import corpus, texts
    from rlhf_recipes.data.tokenizer import load_tokenizer, make_tokenizer
    from rlhf_recipes.evaluation.bound import announce, drawn, usual_rows
    from rlhf_recipes.evaluation.sft_quality import check_rows, measure_completions, rouge_rows, tokens_needed
    from rlhf_recipes.models.limits import fit_length
    from rlhf_recipes.models.new_weights import make_model
    from rlhf_recipes.models.start import Start
    from rlhf_recipes.runs.callbacks import attach, save_model
    from rlhf_recipes.runs.checkpoints import resumable
    from rlhf_recipes.trainers.args import rows_of_training, trainer_args
    from rlhf_recipes.trainers.sft_head import score_labels_only

    recipe, sft = run.recipe, run.recipe.sft
    args = trainer_args(run, SFTConfig)
    if args.dataset_text_field != "text":
        raise RecipeError("sft.trainer.dataset_text_field: leave it out; data.columns.text names the column of texts.")
    start = Start(run, args, "model")
    train, held_out = load_rows(recipe.data, recipe.seed)
    if sft.scratch is not None:
        tokenizer = make_tokenizer(sft.scratch, corpus(recipe.data, train, sft.labels))
        start.model = make_model(sft.scratch, tokenizer, seed=recipe.seed)
        config = start.model.config
    else:
        config = start.config
        tokenizer = load_tokenizer(recipe, "sft.model", sft.model)
    fit_length(recipe, "sft", config, tokenizer, args)
    asked = rouge_rows(recipe, held_out, tokenizer, sft.rouge_prompts) if sft.rouge_prompts else None
    train, held_out = (texts(recipe.data, part, tokenizer, sft.labels) for part in (train, held_out))
    if "prompt" in train.column_names:  # short texts repeat in any language
        warn_of_copies(train, held_out, "data")
    score_labels_only(prompts="prompt" in train.column_names)
    held_out = drawn(held_out, sft.eval_rows or usual_rows(args, len(train)), recipe.seed)
    if args.max_steps > 0:  # tokenize only the rows of the training
        train = rows_of_training(args, train.shuffle(seed=recipe.seed))
    trainer = start.trainer(resumable(SFTTrainer), tokenizer, train_dataset=train, eval_dataset=held_out)
    check_rows(trainer, train, held_out)
    new_tokens = tokens_needed(trainer, asked) if asked else 0
    attach(trainer, run)
    seconds = trainer.train(run.checkpoint and str(run.checkpoint)).metrics["train_runtime"]
    announce(run, trainer, seconds, {"held-out texts": len(trainer.eval_dataset)})
    loss = trainer.evaluate()["eval_loss"]
    if not loss < LARGEST_LOSS:  # or NaN
        raise RecipeError(
            f"sft.trainer: the held-out loss of the trained model is {loss:.3g}, so training has diverged; lower "
            "learning_rate, or max_grad_norm."
        )
    run.results = {"eval_loss": loss, "eval_perplexity": math.exp(loss)}
    line = f"held-out loss {loss:.3f}, perplexity {math.exp(loss):.1f}"
    if asked:
        found = measure_completions(run, trainer, asked, new_tokens)
        run.results |= found | {"rouge_prompts": len(asked)}
        line += f", ROUGE-1/2/L {'/'.join(f'{value:.3f}' for value in found.values())} on {len(asked)} prompts"
    save_model(trainer, run)
    return line


if __name__ == "__main__":
    stage_command("sft", main)
