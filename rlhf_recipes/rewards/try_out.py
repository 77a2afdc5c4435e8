"""Scores texts with a recipe's reward functions, without any training."""

import json
from pathlib import Path
from typing import Any

from rlhf_recipes.recipe.messages import as_text
from rlhf_recipes.recipe.schema import ON_POLICY, Recipe, RecipeError
from rlhf_recipes.runs.files import is_finished, run_path
from rlhf_recipes.runs.inputs import check_references
from rlhf_recipes.system.files import read_lines
from rlhf_recipes.system.terminal import hush_libraries, log_to, print_table, say

Text = str | list[dict]
"""A plain text, or chat messages."""


def score_texts(recipe: Recipe, texts: list[str], file: Path | None) -> None:
    """Prints the score of every text, and the value of each reward function.

    Texts count as finished completions.

    Args:
        recipe: With ppo or rloo.
        texts: Completions without a prompt.
        file: One completion a line; or a .jsonl file whose lines have `completion` and maybe `prompt`, or `text`. Prompt
            and completion may both be lists of chat messages.

    Raises:
        RecipeError: There is nothing to score, the file cannot be read, or a reward function fails.
    """
    rows = [("", text) for text in texts] + (_read(file) if file else [])
    if not rows:
        raise RecipeError('nothing to score: give --text "..." or --file.')
    stages = recipe.on_policy_stages()
    if not stages:
        raise RecipeError(f"recipe {recipe.name} has no stage {' or '.join(ON_POLICY)}, so nothing scores its texts.")
    log_to(None)
    check_references(recipe, stages[0])
    from rlhf_recipes.rewards.calls import score_all
    from rlhf_recipes.rewards.registry import build_reward_funcs

    hush_libraries()
    functions = build_reward_funcs(recipe, recipe.reward_funcs)
    prompts, completions = (list(column) for column in zip(*rows, strict=True))
    scores, by_func = score_all(
        recipe.reward_funcs,
        functions,
        recipe.seed,
        prompts=prompts,
        completions=completions,
        completion_ids=_completion_ids(recipe, stages[0], [as_text(completion) for completion in completions]),
        finished=[True] * len(rows),
    )
    shown = []
    for i, (prompt, completion) in enumerate(rows):
        values = [scores[i], *(values[i] for values in by_func.values())]
        text = as_text(prompt) + as_text(completion)
        shown.append([*("" if value is None else f"{value:.3f}" for value in values), text[:200]])
    print_table(["score", *by_func, "text"], shown, left=["text"], wrap=True)


def _completion_ids(recipe: Recipe, stage: str, completions: list[str]) -> list[list[int]]:
    """Token ids of finished completions, EOS included. Until the policy is trained, words stand in for its tokens."""
    from rlhf_recipes.data.tokenizer import load_tokenizer

    policy = getattr(recipe, stage).policy
    if policy.startswith("stage:") and not is_finished(run_path(recipe, policy.removeprefix("stage:"))):
        say(f"note: {stage}.policy ({policy}) has not been trained yet, so its tokens are counted as words.")
        numbers: dict[str, int] = {}
        return [[numbers.setdefault(word, len(numbers) + 1) for word in text.split()] + [0] for text in completions]
    tokenizer = load_tokenizer(recipe, f"{stage}.policy", policy)
    return [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in completions]


def _read(file: Path) -> list[tuple[Text, Text]]:
    """Prompt and completion of every line."""
    try:
        if file.suffix != ".jsonl":
            with open(file, encoding="utf-8") as lines:
                return [("", line.rstrip("\n")) for line in lines if line.strip()]
        rows = read_lines(file)
    except json.JSONDecodeError as error:
        raise RecipeError(f"--file {file}: this line is no JSON ({error.msg}): {error.doc.strip()[:120]}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--file {file}: cannot be read: {error}.") from error
    return [_pair(row, f"--file {file}, line {number}") for number, row in enumerate(rows, 1)]


def _pair(row: Any, line: str) -> tuple[Text, Text]:
    if not isinstance(row, dict) or not row.keys() & {"completion", "text"}:
        raise RecipeError(f"{line}: needs an object with completion, or with text.")
    completion = row["completion"] if "completion" in row else row["text"]
    prompt = row.get("prompt", "" if isinstance(completion, str) else [])
    if type(prompt) is not type(completion):
        raise RecipeError(f"{line}: prompt and completion must both be texts, or chat messages.")
    return prompt, completion
