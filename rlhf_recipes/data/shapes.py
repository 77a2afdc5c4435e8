"""Rows as texts for fine-tuning and as prompts; `pairs.py` makes pairs."""

import random
import re
import string
from collections.abc import Callable
from typing import TYPE_CHECKING

from rlhf_recipes.data.filters import short_enough, valid_rows, warn_of_copies
from rlhf_recipes.data.rows import need_column, put_column
from rlhf_recipes.recipe.messages import as_text
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.recipe.sections import CALL_KEYWORDS, Data

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

LABELS = {
    **dict.fromkeys((1, True, "1", "pos", "positive"), 1),
    **dict.fromkeys((0, False, "0", "neg", "negative"), 0),
}
"""Values of a `label` column, in upper or lower case -> 1 for positive, 0 for negative."""

COMPLETIONS = ("completion", "chosen", "rejected", "completion_0", "completion_1")
"""Columns that hold an answer to the prompt."""


def texts(
    data: Data, rows: "Dataset", tokenizer: "PreTrainedTokenizerBase", labels: list[int] | None = None
) -> "Dataset":
    """Rows for supervised fine-tuning: `prompt` and `completion`, or `messages`, or `text`.

    Only rows with one of `labels`; None: all rows. The tokenizer measures prompts for `data.max_prompt_tokens`.
    """
    rows, columns = _texts(data, rows, labels)
    return short_enough(data, rows, columns, tokenizer, "data").select_columns(columns)


def corpus(data: Data, rows: "Dataset", labels: list[int] | None = None) -> list[str]:
    """The `texts` with prompt and completion joined, to train a tokenizer on."""
    rows, columns = _texts(data, rows, labels)
    return ["".join(map(as_text, parts)) for parts in zip(*(rows[column] for column in columns), strict=True)]


def prompts(data: Data, rows: "Dataset", tokenizer: "PreTrainedTokenizerBase", seed: int) -> "Dataset":
    """Rows with a `prompt`: the data's own (text or chat messages), or the beginning of each `text`.

    A beginning has `data.prompt_words` words or `data.prompt_tokens` tokens, every length with the same probability;
    shorter texts are left out. The answer columns are removed; `completion` stays under the name `gold`.

    Raises:
        RecipeError: No prompts, or a column that hides something else from reward functions.
    """
    rows = with_prompts(data, rows, "data")
    has_pairs = {"chosen", "rejected"} <= set(rows.column_names)
    if (
        "prompt" not in rows.column_names
        and has_pairs
        and ("text" not in rows.column_names or _is_answer(data, "text"))
    ):
        raise RecipeError(
            f"data: {data.path} has chosen and rejected, but no prompt: it is their common beginning "
            "and has no word of either answer. Make the column prompt with data.transform."
        )
    if "prompt" in rows.column_names:
        columns = [column for column in ("prompt", "completion") if column in rows.column_names]
        made = short_enough(data, valid_rows(data, rows, columns, "data"), ["prompt"], tokenizer, "data")
    else:
        made = _beginnings(data, rows, tokenizer, random.Random(seed))
    taken = [*CALL_KEYWORDS, *(["gold"] if "completion" in made.column_names else [])]
    for column in set(taken) & set(made.column_names):
        raise RecipeError(
            f"data: {data.path} has a column {column}, the name of something else that reward functions get; give it another "
            "name with data.transform."
        )
    if "completion" in made.column_names:
        made = put_column(made, "gold", made["completion"][:])
    return made.remove_columns([column for column in (*COMPLETIONS, "choice") if column in made.column_names])


def warn_of_known_prompts(data: Data, train: "Dataset", held_out: "Dataset") -> None:
    """Warn if held-out rows have prompts of training rows; prompts that are cut from texts may well be the same."""
    both = [with_prompts(data, rows, "data") for rows in (train, held_out)]
    if all("prompt" in rows.column_names for rows in both):
        warn_of_copies(both[0].select_columns("prompt"), both[1].select_columns("prompt"), "data", "prompts")


def _texts(data: Data, rows: "Dataset", labels: list[int] | None) -> tuple["Dataset", list[str]]:
    if labels is not None:
        need_column(data, rows, "label", "for sft.labels", "data")
        read = label_reader(data, "data")
        rows = rows.filter(lambda row: read(row["label"]) in labels)
        if len(rows) == 0:
            found = f"no training row or no held-out row of {data.path} has one of the labels {labels}"
            raise RecipeError(f"sft.labels: {found}; set others, or hold out more rows with data.eval_fraction.")
    rows = with_prompts(data, rows, "data")
    possible = (["prompt", "completion"], ["messages"])
    columns = next((found for found in possible if set(found) <= set(rows.column_names)), ["text"])
    need_column(data, rows, columns[0], "or prompt and completion, or messages: for sft", "data")
    return valid_rows(data, rows, columns, "data"), columns


def with_prompts(data: Data, rows: "Dataset", key: str) -> "Dataset":
    """Rows with prompts from `data.prompt_template`, and with `data.completion_prefix` before every completion.

    A null in one of the template's columns makes the prompt null.
    """
    if data.truncate is not None and (data.max_prompt_tokens is None or data.truncate not in _fields(data, key)):
        needed = f"{key}.max_prompt_tokens, and {{{data.truncate}}} in {key}.prompt_template"
        raise RecipeError(f"{key}.truncate: {data.truncate} needs {needed}.")
    if data.prompt_template is not None:
        fields = _fields(data, key)
        for field in fields:
            need_column(data, rows, field or "''", f"for {key}.prompt_template", key)
            if _is_answer(data, field):
                raise RecipeError(f"{key}.prompt_template: {{{field}}} is the answer, which a prompt must not contain.")
        filled = [
            None if None in row.values() else data.prompt_template.format_map(row)
            for row in (rows.select_columns(fields) if fields else [{}] * len(rows))
        ]
        rows = put_column(rows, "prompt", filled)
    if data.completion_prefix:
        for column in COMPLETIONS:
            if column in rows.column_names:
                values = rows[column][:]
                if any(isinstance(value, list) for value in values):
                    raise RecipeError(f"{key}.completion_prefix: the {column}s of {data.path} are chat messages.")
                rows = put_column(rows, column, [v and data.completion_prefix + v for v in values])
    return rows


def _fields(data: Data, key: str) -> list[str]:
    """The columns in `data.prompt_template`."""
    try:
        parts = list(string.Formatter().parse(data.prompt_template or ""))
    except ValueError as error:
        raise RecipeError(f"{key}.prompt_template: {error}; write {{{{ and }}}} for braces in the text.") from error
    for _, field, spec, conversion in parts:
        if spec or conversion:
            raise RecipeError(
                f"{key}.prompt_template: {{{field}}} must have no format ({(spec or conversion)!r}): write {{{{ and }}}} "
                f"for braces in the text, and format columns with {key}.transform."
            )
    return [field for _, field, _, _ in parts if field is not None]


def _is_answer(data: Data, field: str) -> bool:
    """Whether a column is a completion, is the source of one in `data.columns`, or contains that source."""
    source = data.columns.get(field, field)
    answers = [data.columns.get(column, column) for column in COMPLETIONS]
    return field in COMPLETIONS or any(f"{answer}.".startswith(f"{source}.") for answer in answers)


def _beginnings(data: Data, rows: "Dataset", tokenizer: "PreTrainedTokenizerBase", lengths: random.Random) -> "Dataset":
    """Rows with the first words or tokens of `text` as `prompt`, without `text`."""
    need_column(data, rows, "text", "or prompt: for prompts", "data")
    rows = valid_rows(data, rows, ["text"], "data")
    unit = "tokens" if data.prompt_words is None else "words"
    shortest, longest = data.prompt_words or data.prompt_tokens

    def cut(batch: dict) -> dict:
        wanted = [lengths.randint(shortest, longest) for _ in batch["text"]]
        if unit == "words":
            found = [first_words(text, n) for text, n in zip(batch["text"], wanted, strict=True)]
        else:
            # The beginning is enough: a token has at most a few dozen characters.
            ids = tokenizer([text[: 64 * longest] for text in batch["text"]], add_special_tokens=False)["input_ids"]
            found = [tokenizer.decode(i[:n]) if len(i) >= n else "" for i, n in zip(ids, wanted, strict=True)]
        return {"prompt": found}

    made = rows.map(cut, batched=True).filter(lambda row: row["prompt"].strip() != "")
    if len(made) == 0:
        raise RecipeError(f"data.prompt_{unit}: no text of {data.path} has {shortest} to {longest} {unit}.")
    return made.remove_columns("text")


def label_reader(data: Data, key: str) -> Callable[[object], int]:
    """A function from a value of the `label` column to 1 (positive) or 0 (negative). It refuses other values."""

    def read(label: object) -> int:
        known = label.lower() if isinstance(label, str) else label
        if not isinstance(known, str | int | float) or known not in LABELS:
            raise RecipeError(
                f"{key}: the label column of {data.path} holds {label!r:.60}; known: {', '.join(map(repr, LABELS))}. "
                f"Convert it with {key}.transform, which may also drop rows."
            )
        return LABELS[known]

    return read


def first_words(text: str, number: int) -> str:
    """The first `number` words of a text, with its white space; empty if it has fewer."""
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    return text[: ends[number - 1]] if len(ends) >= number else ""
