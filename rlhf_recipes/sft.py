"""Stage sft: fine-tune a language model on the recipe's texts, or train one from scratch.

    accelerate launch -m rlhf_recipes.sft --recipe imdb_tiny

Reads `data` and `sft`; writes a causal language model and its tokenizer to `<runs_dir>/<recipe>/sft/`, and with
`sft.rouge_prompts` some of its completions, `samples.jsonl`. Where rows have a prompt and a completion, the loss (and
so the perplexity) is that of the completion's tokens.
"""

import json
import math
from typing import TYPE_CHECKING, Any

from rlhf_recipes.config import RecipeError
from rlhf_recipes.entry import stage_command
from rlhf_recipes.metrics import rouge
from rlhf_recipes.reward_calls import as_text
from rlhf_recipes.run import Run

if TYPE_CHECKING:
    from datasets import Dataset

ROUGE_TEMPERATURE = 0.01
"""Nearly greedy, as Huang et al. 2024 (2403.17031) evaluate."""

SAMPLES = "samples.jsonl"
NUM_SAMPLES = 16


def main(run: Run) -> str:
    from trl import SFTConfig, SFTTrainer

    from rlhf_recipes.callbacks import attach
    from rlhf_recipes.checkpoints import resumable
    from rlhf_recipes.data import load_rows, texts
    from rlhf_recipes.finish import save_model
    from rlhf_recipes.models import load_tokenizer, loading, make_model, make_tokenizer, resolve_model
    from rlhf_recipes.trainer_args import effective_batch, trainer_args

    recipe, sft = run.recipe, run.recipe.sft
    args = trainer_args(run, SFTConfig)
    train, held_out = load_rows(recipe)
    own_rows = held_out
    train, held_out = (texts(recipe, rows, sft.labels) for rows in (train, held_out))
    if sft.scratch is not None:
        tokenizer = make_tokenizer(sft.scratch, train["text"])
        model = make_model(sft.scratch, tokenizer, seed=recipe.seed)
    else:
        model = resolve_model(recipe, "sft.model", sft.model)
        tokenizer = load_tokenizer("sft.model", model)
    asked = _rouge_rows(run, own_rows, tokenizer) if sft.rouge_prompts else None
    if args.max_steps > 0:  # tokenize no more than training will see
        train = train.shuffle(seed=recipe.seed).select(range(min(len(train), args.max_steps * effective_batch(args))))
    with loading("sft.model", str(sft.model)):
        trainer = resumable(SFTTrainer)(
            model=model, args=args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer
        )
    new_tokens = _new_tokens(trainer, asked) if asked else 0
    attach(trainer, run)
    trainer.train(run.checkpoint and str(run.checkpoint))
    loss = trainer.evaluate()["eval_loss"]
    run.results = {"eval_loss": loss, "eval_perplexity": math.exp(loss)}
    line = f"held-out loss {loss:.3f}, perplexity {math.exp(loss):.1f}"
    if asked:
        found = _rouge(run, trainer, asked, new_tokens)
        run.results |= found | {"rouge_prompts": len(asked)}
        line += f", ROUGE-1/2/L {'/'.join(f'{value:.3f}' for value in found.values())} on {len(asked)} prompts"
    save_model(trainer, run)
    return line


def _rouge_rows(run: Run, rows: "Dataset", tokenizer: Any) -> "Dataset":
    """Some held-out prompts with the data's own completions.

    Raises:
        RecipeError: The data has none.
    """
    from rlhf_recipes.samples import prompts_and_references

    if not {"prompt", "completion"} <= set(rows.column_names):
        raise RecipeError(
            f"sft.rouge_prompts: ROUGE compares with the completions of held-out prompts, but {run.recipe.data.path} "
            f"has not both columns, prompt and completion; it has: {', '.join(rows.column_names)}. Name them in "
            "data.columns, or set sft.rouge_prompts=0."
        )
    rows = prompts_and_references(run.recipe, rows, tokenizer).shuffle(seed=run.recipe.seed)
    return rows.select(range(min(len(rows), run.recipe.sft.rouge_prompts)))


def _new_tokens(trainer: Any, rows: "Dataset") -> int:
    """Tokens of the longest reference with its EOS, at most `max_length`.

    Raises:
        RecipeError: They do not fit into the model's context behind the longest prompt.
    """
    from rlhf_recipes.models import token_ids

    tokenizer = trainer.processing_class
    references = tokenizer(list(map(as_text, rows["reference"])), add_special_tokens=False)["input_ids"]
    longest = 1 + max(map(len, references))
    new_tokens = min(longest, trainer.args.max_length or longest)
    prompt = max(len(token_ids(tokenizer, prompt)) for prompt in rows["prompt"])
    context = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and prompt + new_tokens > context:
        raise RecipeError(
            f"sft.rouge_prompts: the longest held-out prompt has {prompt} tokens and the longest completion "
            f"{new_tokens}, more than the model's {context}; leave such rows out of the data, or set "
            "sft.trainer.max_length lower."
        )
    return new_tokens


def _rouge(run: Run, trainer: Any, rows: "Dataset", new_tokens: int) -> dict[str, float]:
    """ROUGE of completions sampled for held-out prompts; a few are written to the run folder."""
    import torch

    from rlhf_recipes.samples import sample, shared_out

    model, tokenizer = trainer.model.eval(), trainer.processing_class
    torch.manual_seed(run.recipe.seed)

    def answer(prompts: list) -> list:
        batch_size = trainer.args.per_device_eval_batch_size
        return sample(model, tokenizer, prompts, new_tokens, ROUGE_TEMPERATURE, batch_size).completions

    prompts, references = rows["prompt"][:], rows["reference"][:]
    completions = shared_out(trainer.accelerator, prompts, answer)
    if run.is_main:
        names = ("prompt", "completion", "reference")
        lines = [
            json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) + "\n"
            for row in zip(prompts, completions, references, strict=True)
        ]
        (run.path / SAMPLES).write_text("".join(lines[:NUM_SAMPLES]), encoding="utf-8")
    return rouge(list(map(as_text, completions)), list(map(as_text, references)))


if __name__ == "__main__":
    stage_command("sft", main)
