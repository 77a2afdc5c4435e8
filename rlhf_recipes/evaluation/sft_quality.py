"""How good a language model's completions are after stage sft: ROUGE against the data's own completions."""

import logging
from typing import TYPE_CHECKING, Any

from rlhf_recipes.data.shapes import prompts
from rlhf_recipes.data.tokenizer import context_length, eos_token_ids, longest_prompt
from rlhf_recipes.evaluation.metrics import rouge
from rlhf_recipes.models.samples import sample, shared_out
from rlhf_recipes.recipe.messages import as_text
from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.system.files import as_lines

if TYPE_CHECKING:
    from datasets import Dataset

ROUGE_TEMPERATURE = 0.01
"""Nearly greedy, as Huang et al. 2024 (2403.17031) evaluate."""

SAMPLES = "samples.jsonl"
NUM_SAMPLES = 16

logger = logging.getLogger(__name__)


def check_rows(trainer: Any, train: "Dataset", held_out: "Dataset") -> None:
    """Warn of rows that TRL's trainer left out, and if no row teaches the model to stop.

    Raises:
        RecipeError: It left out all of them.
    """
    args = trainer.args
    for kind, given, made in (("training", train, trainer.train_dataset), ("held-out", held_out, trainer.eval_dataset)):
        out = 0 if args.packing else len(given) - len(made)
        what = f"sft.trainer.max_length: {out} of {len(given)} {kind} prompts have {args.max_length} tokens or more"
        if len(made) == 0:
            raise RecipeError(
                f"{what}, so no completion is left; raise it, or leave them out with data.max_prompt_tokens."
            )
        if out:
            logger.warning("%s and are left out", what)
    ends, labels = eos_token_ids(trainer.model, trainer.processing_class), trainer.train_dataset["labels"][:100]
    if all(set(ends).isdisjoint(row) for row in labels):
        logger.warning(
            "sft: none of the first %d training rows ends with EOS, so the model does not learn to stop; sft.trainer."
            "max_length may cut it off, or the chat template may have none.",
            len(labels),
        )


def rouge_rows(recipe: Recipe, rows: "Dataset", tokenizer: Any, most: int) -> "Dataset":
    """At most so many held-out prompts, with the data's own completions.

    Raises:
        RecipeError: The data has no completions.
    """
    data, seed = recipe.data, recipe.seed
    if "completion" not in rows.column_names:
        raise RecipeError(
            f"sft.rouge_prompts: ROUGE compares with the completions of held-out prompts, but {data.path} has no column "
            f"completion; it has: {', '.join(rows.column_names)}. Name one in data.columns, or set sft.rouge_prompts=0."
        )
    rows = prompts(data, rows, tokenizer, seed).shuffle(seed=seed)
    return rows.select(range(min(len(rows), most)))


def tokens_needed(trainer: Any, rows: "Dataset") -> int:
    """Tokens of the data's longest completion with its EOS, at most `max_length`.

    Raises:
        RecipeError: They do not fit into the model's context after the longest prompt.
    """
    tokenizer = trainer.processing_class
    gold = tokenizer(list(map(as_text, rows["gold"])), add_special_tokens=False)["input_ids"]
    longest = 1 + max(map(len, gold))
    new_tokens = min(longest, trainer.args.max_length or longest)
    prompt = longest_prompt(tokenizer, rows["prompt"])
    context = context_length(trainer.model.config, tokenizer)
    if prompt + new_tokens > context:
        raise RecipeError(
            f"sft.rouge_prompts: the longest held-out prompt has {prompt} tokens and the longest completion "
            f"{new_tokens}, more than the model's {context}; leave such rows out with "
            "data.max_prompt_tokens, or set sft.trainer.max_length lower."
        )
    return new_tokens


def measure_completions(run: Run, trainer: Any, rows: "Dataset", new_tokens: int) -> dict[str, float]:
    """ROUGE of completions sampled for held-out prompts; a few are written to the run folder."""
    import torch

    model, tokenizer = trainer.model.eval(), trainer.processing_class
    torch.manual_seed(run.recipe.seed)

    def answer(prompts: list) -> list:
        batch_size = trainer.args.per_device_eval_batch_size
        return sample(model, tokenizer, prompts, new_tokens, ROUGE_TEMPERATURE, batch_size).completions

    asked, gold = rows["prompt"][:], rows["gold"][:]
    completions = shared_out(trainer.accelerator, asked, answer)
    if run.is_main:
        columns = zip(asked, completions, gold, strict=True)
        lines = [{"prompt": p, "completion": c, "gold": g} for p, c, g in columns][:NUM_SAMPLES]
        (run.path / SAMPLES).write_text(as_lines(lines), encoding="utf-8")
    return rouge(list(map(as_text, completions)), list(map(as_text, gold)))
