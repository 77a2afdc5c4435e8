"""Score texts with a recipe's reward functions, outside of any training."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlhf_recipes.config import Recipe, RecipeError
from rlhf_recipes.hub import prepare_hub
from rlhf_recipes.terminal import hush_libraries, log_to


def score_texts(recipe: Recipe, texts: list[str], file: Path | None) -> None:
    """Print the score of every text, and what each reward function says about it.

    Texts count as finished completions. With `file`, its lines are texts; lines of a .jsonl file are objects with
    `completion` and maybe `prompt`, or with `text`.

    Raises:
        RecipeError: Nothing to score, an unreadable file, or what reward functions raise.
    """
    rows = [("", text) for text in texts] + (_read(file) if file else [])
    if not rows:
        raise RecipeError('nothing to score: give --text "..." or --file.')
    log_to(None)
    stage = "ppo" if recipe.ppo else "rloo"
    prepare_hub(recipe, stage)
    from rlhf_recipes.models import load_tokenizer, resolve_model
    from rlhf_recipes.reward_funcs import build_reward_funcs, score_all

    hush_libraries()
    functions = build_reward_funcs(recipe, recipe.reward_funcs)
    tokenizer = load_tokenizer(f"{stage}.policy", resolve_model(recipe, f"{stage}.policy", getattr(recipe, stage).policy))
    prompts, completions = (list(column) for column in zip(*rows, strict=True))
    scores, by_func = score_all(
        recipe.reward_funcs,
        functions,
        prompts=prompts,
        completions=completions,
        completion_ids=[tokenizer(c, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for c in completions],
        finished=[True] * len(rows),
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("score", *by_func):
        table.add_column(heading, justify="right")
    table.add_column("text")
    for i, (prompt, completion) in enumerate(rows):
        values = [scores[i], *(values[i] for values in by_func.values())]
        table.add_row(*("" if value is None else f"{value:.3f}" for value in values), (prompt + completion)[:200])
    Console().print(table)


def _read(file: Path) -> list[tuple[str, str]]:
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--file {file}: cannot be read: {error}.") from error
    if file.suffix != ".jsonl":
        return [("", line) for line in lines]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append((row.get("prompt", ""), row["completion"] if "completion" in row else row["text"]))
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise RecipeError(f"--file {file}, line {number}: needs an object with completion, or with text.") from error
    return rows
