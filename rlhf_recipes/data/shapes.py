"""Texts and prompts, made of rows: one function per use, `texts` and `prompts`; `pairs.py` makes pairs."""

import logging
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rlhf_recipes.data.rows import missing_column, put_column
from rlhf_recipes.data.tokenizer import token_ids
from rlhf_recipes.recipe.messages import as_text
from rlhf_recipes.recipe.schema import Data, RecipeError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

LABELS = {
    **dict.fromkeys((1, True, "1", "pos", "positive"), 1),
    **dict.fromkeys((0, False, "0", "neg", "negative"), 0),
}
"""What a `label` column may hold, in small letters or capitals -> 1 for positive, 0 for negative."""

COMPLETIONS = ("completion", "chosen", "rejected", "completion_0", "completion_1")
"""Columns of ours that may stand behind a prompt."""

logger = logging.getLogger(__name__)


def texts(
    data: Data, rows: "Dataset", tokenizer: "PreTrainedTokenizerBase", labels: list[int] | None = None
) -> "Dataset":
    """Rows for supervised fine-tuning: `prompt` and `completion`, or `messages`, or `text`.

    Args:
        data: What the rows were loaded by.
        rows: From `load_rows`.
        tokenizer: Measures prompts, where `data.max_prompt_tokens` limits them.
        labels: Keep only rows with one of these labels; None keeps all.
    """
    rows, columns = _texts(data, rows, labels)
    return short_enough(data, rows, tokenizer, "data").select_columns(columns)


def corpus(data: Data, rows: "Dataset", labels: list[int] | None = None) -> list[str]:
    """The texts of `texts`, prompt and completion joined, for a tokenizer that is yet to be made."""
    rows, columns = _texts(data, rows, labels)
    return ["".join(map(as_text, parts)) for parts in zip(*(rows[column] for column in columns), strict=True)]


def prompts(data: Data, rows: "Dataset", tokenizer: "PreTrainedTokenizerBase", seed: int) -> "Dataset":
    """Rows with a `prompt`: the data's own (text or chat messages), or the beginning of each `text`.

    Prompts cut from a text have `data.prompt_words` words or `data.prompt_tokens` tokens, every length equally likely;
    shorter texts are left out. Nothing of a row's answer stays but its `completion`, under the name `reference`.

    Args:
        data: What the rows were loaded by.
        rows: From `load_rows`.
        tokenizer: Cuts and measures prompts.
        seed: Draws lengths.
    """
    rows = with_prompts(data, rows, "data")
    if "prompt" in rows.column_names:
        columns = [column for column in ("prompt", "completion") if column in rows.column_names]
        made = short_enough(data, valid_rows(data, rows, columns, "data"), tokenizer, "data")
    else:
        made = _beginnings(data, rows, tokenizer, random.Random(seed))
    if "completion" in made.column_names:
        made = put_column(made, "reference", made["completion"][:])
    return made.remove_columns([column for column in (*COMPLETIONS, "choice") if column in made.column_names])


def warn_of_copies(train: "Dataset", held_out: "Dataset", key: str) -> None:
    """Say how many held-out rows are also training rows: what is measured on them is no measure of anything new."""

    def lines(rows: "Dataset") -> Iterator[str]:
        return map(repr, zip(*(rows[column][:] for column in sorted(rows.column_names)), strict=True))

    seen = set(lines(train))
    copies = sum(line in seen for line in lines(held_out))
    if copies:
        logger.warning(
            "%s: %d of %d held-out rows are training rows too, so held-out numbers flatter; take duplicates out of the "
            "data.",
            key,
            copies,
            len(held_out),
        )


def _texts(data: Data, rows: "Dataset", labels: list[int] | None) -> tuple["Dataset", list[str]]:
    if labels is not None:
        need_column(data, rows, "label", "sft.labels selects by it", "data")
        read = label_reader(data, "data")
        rows = rows.filter(lambda row: read(row["label"]) in labels)
        if len(rows) == 0:
            raise RecipeError(
                f"sft.labels: no training row of {data.path}, or no held-out one, has one of the labels {labels}; set "
                "others, or hold out more rows with data.eval_fraction."
            )
    rows = with_prompts(data, rows, "data")
    for columns in (["prompt", "completion"], ["messages"], ["text"]):
        if all(column in rows.column_names for column in columns):
            return valid_rows(data, rows, columns, "data"), columns
    raise missing_column(data, rows, "text (or prompt and completion, or messages)", "sft needs it", "data")


def with_prompts(data: Data, rows: "Dataset", key: str) -> "Dataset":
    """Rows with the `prompt` of `data.prompt_template`, and with completions that begin with `data.completion_prefix`.

    A null in one of the template's columns makes the prompt null.
    """
    if data.truncate is not None and (data.max_prompt_tokens is None or data.truncate not in _fields(data, key)):
        raise RecipeError(
            f"{key}.truncate: {data.truncate} must stand in {key}.prompt_template, as {{{data.truncate}}}, and "
            f"{key}.max_prompt_tokens say how long a prompt may be."
        )
    if data.prompt_template is not None:
        fields = _fields(data, key)
        for field in fields:
            if field not in rows.column_names:
                raise missing_column(data, rows, field or "''", f"{key}.prompt_template names it", key)
            if _is_answer(data, field):
                raise RecipeError(f"{key}.prompt_template: {{{field}}} is the answer, which no prompt may contain.")
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
    """Columns that `data.prompt_template` names."""
    try:
        parts = list(string.Formatter().parse(data.prompt_template or ""))
    except ValueError as error:
        raise RecipeError(f"{key}.prompt_template: {error}; a brace that is meant is written twice.") from error
    for _, field, spec, conversion in parts:
        if spec or conversion:
            raise RecipeError(
                f"{key}.prompt_template: {{{field}}} takes the column as it is, without {(spec or conversion)!r} behind "
                f"it; a brace that is meant is written twice, and other forms are made by {key}.transform."
            )
    return [field for _, field, _, _ in parts if field is not None]


def _is_answer(data: Data, field: str) -> bool:
    """Whether a column is a completion, is what `data.columns` makes one of, or holds that inside."""
    source = data.columns.get(field, field)
    answers = [data.columns.get(column, column) for column in COMPLETIONS]
    return field in COMPLETIONS or any(f"{answer}.".startswith(f"{source}.") for answer in answers)


def short_enough(data: Data, rows: "Dataset", tokenizer: "PreTrainedTokenizerBase", key: str) -> "Dataset":
    """Rows whose prompts have at most `data.max_prompt_tokens` tokens, after `data.truncate`.

    Raises:
        RecipeError: None has; or they are chat messages, and the tokenizer has no template for them.
    """
    first = next((rows[0][name] for name in ("messages", "prompt", "chosen") if name in rows.column_names), "")
    if isinstance(first, list) and not tokenizer.chat_template:
        raise RecipeError(
            f"{key}: {data.path} has chat messages, but the model's tokenizer has no chat template; save one beside the "
            f"model as chat_template.jinja, or make plain texts of the messages with {key}.transform."
        )
    if data.max_prompt_tokens is None or "prompt" not in rows.column_names:
        return rows
    fitting = [_fitting(data, row, tokenizer) for row in rows]
    kept = [i for i, prompt in enumerate(fitting) if prompt is not None]
    if len(kept) < len(rows):
        what = f"{len(rows) - len(kept)} of {len(rows)} prompts have more than {data.max_prompt_tokens} tokens"
        if not kept:
            raise RecipeError(f"{key}.max_prompt_tokens: {what}, so no row of {data.path} is left.")
        logger.warning("%s.max_prompt_tokens: %s and are left out", key, what)
    return put_column(rows.select(kept), "prompt", [fitting[i] for i in kept])


def _fitting(data: Data, row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> str | list[dict] | None:
    """A row's prompt, without as many last paragraphs as it takes, and characters of the only one; None if none is left.

    A character has four tokens at most (its bytes), so a quarter of the excess can go at once.

    Source: Huang et al. 2024 (2403.17031), whose code cuts at the last line break, or else the last character.
    """
    prompt = row["prompt"]
    while (excess := len(token_ids(tokenizer, prompt)) - data.max_prompt_tokens) > 0:
        text = str(row[data.truncate]) if data.truncate else ""
        end = max(0, len(text) - max(1, excess // 4))
        paragraph = text.rfind("\n", 0, end + 1)
        shorter = text[: paragraph if paragraph > 0 else end]
        if not shorter or shorter.isspace():
            return None
        row = row | {data.truncate: shorter}
        prompt = data.prompt_template.format_map(row)
    return prompt


def valid_rows(data: Data, rows: "Dataset", columns: list[str], key: str) -> "Dataset":
    """Rows with something in each of `columns`, and with two texts in a pair; others as `data.invalid_rows` says.

    Raises:
        RecipeError: A value is neither text nor chat messages, a row has both, or rows cannot be used.
    """
    faults = {}
    for i, row in enumerate(rows.select_columns(columns)):
        kinds = {column: _kind(data, row, column, key) for column in columns if row[column] is not None}
        if len(set(kinds.values())) > 1:
            found = ", ".join(f"{column} {kind}" for column, kind in kinds.items())
            raise RecipeError(f"{key}: {data.path} mixes {found}; make them of one kind with {key}.transform.")
        empty = [column for column in columns if _is_blank(row[column])]
        if empty:
            faults[i] = f"an empty {empty[0]}"
        elif "chosen" in row and row["chosen"] == row["rejected"]:
            faults[i] = "equal chosen and rejected"
    if not faults:
        return rows
    counts = ", ".join(f"{number} with {fault}" for fault, number in Counter(faults.values()).items())
    what = f"{len(faults)} of {len(rows)} rows of {data.path} cannot be used ({counts})"
    if data.invalid_rows == "drop" and len(faults) < len(rows):
        logger.warning("%s: %s and are left out", key, what)
        return rows.select([i for i in range(len(rows)) if i not in faults])
    first = min(faults)
    content = ", ".join(f"{column} {rows[first][column]!r:.60}" for column in columns)
    raise RecipeError(
        f"{key}: {what}; the first is row {first + 1} of these: {content}. Correct them, or leave them out with "
        f"{key}.invalid_rows: drop."
    )


def _kind(data: Data, row: dict[str, Any], column: str, key: str) -> str:
    """Which of the two kinds a value is."""
    value = row[column]
    if isinstance(value, str) and column != "messages":
        return "text"
    if isinstance(value, list) and column != "text" and all(map(_is_message, value)):
        return "chat messages"
    wanted = {"text": "text", "messages": "a list of {role, content}"}.get(column, "text or a list of {role, content}")
    raise RecipeError(
        f"{key}: the column {column} of {data.path} holds {value!r:.80}, and must hold {wanted}; make that of it with "
        f"{key}.transform."
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and {"role", "content"} <= value.keys() and isinstance(value["content"], str | None)


def _is_blank(value: str | list[dict] | None) -> bool:
    """Whether a text has nothing but blanks, or no message has more."""
    if isinstance(value, list):
        return all(not message["content"] or message["content"].isspace() for message in value)
    return not value or value.isspace()


def _beginnings(data: Data, rows: "Dataset", tokenizer: "PreTrainedTokenizerBase", lengths: random.Random) -> "Dataset":
    """Rows with the first words or tokens of `text` as `prompt`, in its place."""
    need_column(data, rows, "text", "prompts are cut from it (or name a prompt column)", "data")
    rows = valid_rows(data, rows, ["text"], "data")
    unit, (shortest, longest) = (
        ("tokens", data.prompt_tokens) if data.prompt_words is None else ("words", data.prompt_words)
    )

    def cut(batch: dict) -> dict:
        wanted = [lengths.randint(shortest, longest) for _ in batch["text"]]
        if unit == "words":
            found = [first_words(text, n) for text, n in zip(batch["text"], wanted, strict=True)]
        else:
            # Only the beginning is needed; a token is at most a few dozen characters long.
            ids = tokenizer([text[: 64 * longest] for text in batch["text"]], add_special_tokens=False)["input_ids"]
            found = [tokenizer.decode(i[:n]) if len(i) >= n else "" for i, n in zip(ids, wanted, strict=True)]
        return {"prompt": found}

    made = rows.map(cut, batched=True).filter(lambda row: row["prompt"].strip() != "")
    if len(made) == 0:
        raise RecipeError(f"data.prompt_{unit}: no text of {data.path} has {shortest} to {longest} {unit}.")
    return made.remove_columns("text")


def need_column(data: Data, rows: "Dataset", column: str, why: str, key: str) -> None:
    """Refuse rows without a column; arguments as in `missing_column`."""
    if column not in rows.column_names:
        raise missing_column(data, rows, column, why, key)


def label_reader(data: Data, key: str) -> Callable[[object], int]:
    """A function from a value of the `label` column to 1 (positive) or 0 (negative); it refuses any other value."""

    def read(label: object) -> int:
        known = label.lower() if isinstance(label, str) else label
        if not isinstance(known, str | int | float) or known not in LABELS:
            raise RecipeError(
                f"{key}: the label column of {data.path} holds {label!r:.60}; known: {', '.join(map(repr, LABELS))}. Make "
                f"these of it with {key}.transform, which may leave rows out."
            )
        return LABELS[known]

    return read


def first_words(text: str, number: int) -> str:
    """The beginning of a text up to its last of `number` words; empty where it has fewer."""
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    return text[: ends[number - 1]] if len(ends) >= number else ""
