"""Preference pairs for the reward model, made of pairs, of choices, or of texts with labels."""

import math
import random
from collections import defaultdict
from typing import TYPE_CHECKING

from rlhf_recipes.data.filters import short_enough, valid_rows
from rlhf_recipes.data.rows import need_column, put_column
from rlhf_recipes.data.shapes import first_words, label_reader, with_prompts
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.recipe.sections import Data

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def pairs(
    data: Data,
    rows: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    limit: int | None,
    seed: int,
    chosen_label: int = 1,
    apart_from: "Dataset | None" = None,
    key: str = "data",
) -> "Dataset":
    """Pairs for the reward model: `chosen` and `rejected`, and `prompt` and `margin` if the data has them.

    TRL subtracts a pair's margin from the difference of its scores in the loss; none (null) is 0.

    If the data has labels instead, a pair has a text of either label, with the same number of words, so that length
    predicts nothing. No text is used twice.

    Args:
        data: The section that the rows were loaded by.
        rows: From `load_rows`.
        tokenizer: Measures prompts for `data.max_prompt_tokens`.
        limit: Most pairs; None: all.
        seed: Draws the pairs of texts with labels.
        chosen_label: Label of the chosen texts: 1 (positive) or 0 (negative).
        apart_from: Rows whose texts no pair may have: for held-out pairs, the training rows.
        key: The section's key in the recipe, for messages.
    """
    rows = with_prompts(data, rows, key)
    if "chosen" in rows.column_names and "rejected" in rows.column_names:
        made = rows
    elif all(column in rows.column_names for column in ("completion_0", "completion_1", "choice")):
        made = _by_choice(data, rows, key)
    else:
        made = _by_label(data, rows, seed, chosen_label, apart_from, key)
    columns = [column for column in ("prompt", "chosen", "rejected") if column in made.column_names]
    made = short_enough(data, valid_rows(data, made, columns, key), columns, tokenizer, key)
    if "margin" in made.column_names:
        columns.append("margin")
        made = put_column(made, "margin", [_margin(data, value, key) for value in made["margin"]])
    made = made.select_columns(columns)
    return made.select(range(min(len(made), limit))) if limit else made


def _margin(data: Data, value: object, key: str) -> float:
    if value is None:
        return 0.0
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    raise RecipeError(
        f"{key}: the margin column of {data.path} holds {value!r:.60}, which is no finite number; convert it "
        f"with {key}.transform, which may also leave the column out."
    )


def _by_choice(data: Data, rows: "Dataset", key: str) -> "Dataset":
    for wrong in (choice for choice in rows["choice"] if choice not in (0, 1)):
        found = f"the choice column of {data.path} holds {wrong!r}"
        raise RecipeError(f"{key}: {found}; it must be 0 or 1, for completion_0 or completion_1.")
    both = list(zip(rows["completion_0"], rows["completion_1"], rows["choice"], strict=True))
    rows = put_column(rows, "chosen", [second if choice else first for first, second, choice in both])
    return put_column(rows, "rejected", [first if choice else second for first, second, choice in both])


def _by_label(
    data: Data, rows: "Dataset", seed: int, chosen_label: int, apart_from: "Dataset | None", key: str
) -> "Dataset":
    from datasets import Dataset

    need_column(data, rows, "text", "or chosen and rejected, or completion_0, completion_1 and choice: for pairs", key)
    need_column(data, rows, "label", "for pairs of positive and negative texts", key)
    rows = valid_rows(data, rows, ["text"], key)
    read = label_reader(data, key)
    others = set() if apart_from is None else set(apart_from["text"])
    used = set(others)
    by_label: dict[int, list[str]] = {0: [], 1: []}
    for text, label in zip(rows["text"], rows["label"], strict=True):
        if text not in used:
            used.add(text)
            by_label[read(label)].append(text)
    made: list[dict[str, str]] = []
    seen = set(others)
    for pair in _match_lengths(by_label[chosen_label], by_label[1 - chosen_label], random.Random(seed)):
        if pair["chosen"] != pair["rejected"] and seen.isdisjoint(pair.values()):  # cut texts may be equal
            seen.update(pair.values())
            made.append(pair)
    if not made:
        found = f"{key}: {data.path} has {len(by_label[1])} positive and {len(by_label[0])} negative"
        if apart_from is None:
            raise RecipeError(f"{found} texts; pairs need both: check {key}.columns, {key}.filter and {key}.max_rows.")
        fix = f"hold out more rows with {key}.eval_fraction, or set another {key}.eval_split"
        raise RecipeError(f"{found} held-out texts that are no training texts; pairs need both: {fix}.")
    return Dataset.from_list(made)


def _match_lengths(chosen: list[str], rejected: list[str], order: random.Random) -> list[dict[str, str]]:
    """Pair texts with the same number of words. Texts without a partner are paired by order of length, and cut."""
    buckets = []
    for texts in (chosen, rejected):
        by_length = defaultdict(list)
        for text in order.sample(texts, len(texts)):
            by_length[len(text.split())].append(text)
        buckets.append(by_length)
    made: list[dict[str, str]] = []
    left: tuple[list[str], list[str]] = ([], [])
    for length in sorted(buckets[0].keys() | buckets[1].keys()):
        both = [bucket[length] for bucket in buckets]
        paired = min(map(len, both))
        made += [{"chosen": c, "rejected": r} for c, r in zip(both[0][:paired], both[1][:paired], strict=True)]
        for rest, texts in zip(left, both, strict=True):
            rest += texts[paired:]
    for c, r in zip(*left, strict=False):
        length = min(len(c.split()), len(r.split()))
        made.append({"chosen": first_words(c, length), "rejected": first_words(r, length)})
    order.shuffle(made)
    return made
