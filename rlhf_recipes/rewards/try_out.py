"""Score texts with a recipe's reward functions, outside of any training."""

import json
from pathlib import Path

from rlhf_recipes.recipe.messages import as_text
from rlhf_recipes.recipe.schema import ON_POLICY, Recipe, RecipeError
from rlhf_recipes.runs.files import is_finished, run_path
from rlhf_recipes.runs.inputs import check_references
from rlhf_recipes.system.terminal import hush_libraries, log_to, print_table, say


def score_texts(recipe: Recipe, texts: list[str], file: Path | None) -> None:
    """Print the score of every text, and what each reward function says about it.

    Texts count as finished completions. With `file`, its lines are texts; lines of a .jsonl file are objects with
    `completion` and maybe `prompt`, or with `text`; prompt and completion may both be lists of chat messages.

    Raises:
        RecipeError: Nothing to score, an unreadable file, or what reward functions raise.
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
    """Token ids of finished completions under the policy's tokenizer, EOS included."""
    from rlhf_recipes.data.tokenizer import load_tokenizer

    policy = getattr(recipe, stage).policy
    if policy.startswith("stage:") and not is_finished(run_path(recipe, policy.removeprefix("stage:"))):
        say(f"note: {stage}.policy ({policy}) has not been trained yet, so its tokens are counted as words.")
        numbers: dict[str, int] = {}
        return [[numbers.setdefault(word, len(numbers) + 1) for word in text.split()] + [0] for text in completions]
    tokenizer = load_tokenizer(recipe, f"{stage}.policy", policy)
    return [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in completions]


def _read(file: Path) -> list[tuple[str | list[dict], str | list[dict]]]:
    try:
        with open(file, encoding="utf-8") as opened:  # splitlines() would part texts at U+2028
            lines = [line.rstrip("\n") for line in opened if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--file {file}: cannot be read: {error}.") from error
    if file.suffix != ".jsonl":
        return [("", line) for line in lines]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            completion = row["completion"] if "completion" in row else row["text"]
            prompt = row.get("prompt", "" if isinstance(completion, str) else [])
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise RecipeError(
                f"--file {file}, line {number}: needs an object with completion, or with text."
            ) from error
        if type(prompt) is not type(completion):
            raise RecipeError(
                f"--file {file}, line {number}: prompt and completion must both be texts, or chat messages."
            )
        rows.append((prompt, completion))
    return rows
