"""Filters for rows: complete ones, of one kind, with short enough prompts; and a warning about copies."""

import logging
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlhf_recipes.data.rows import put_column
from rlhf_recipes.data.tokenizer import through_template, token_ids
from rlhf_recipes.recipe.messages import as_text
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.recipe.sections import Data

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


ROLES = dict.fromkeys(("human", "prompter"), "user") | dict.fromkeys(
    ("gpt", "bot", "chatgpt", "bard", "model"), "assistant"
)
"""Role in other formats of conversations -> its name in chat templates."""


def valid_rows(data: Data, rows: "Dataset", columns: list[str], key: str) -> "Dataset":
    """Rows without an empty value in `columns` or a pair of equal texts. `data.invalid_rows` decides about the others.

    Raises:
        RecipeError: A value is neither text nor chat messages, a row mixes both, or rows are invalid.
    """
    faults = {}
    for i, row in enumerate(rows.select_columns(columns)):
        kinds = {column: _kind(data, row, column, key) for column in columns if row[column] is not None}
        if len(set(kinds.values())) > 1:
            found = ", ".join(f"{column} {kind}" for column, kind in kinds.items())
            raise RecipeError(f"{key}: {data.path} mixes {found}; convert them to one kind with {key}.transform.")
        empty = [column for column in columns if not as_text(row[column] or "").strip()]
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
        f"{key}: {what}; the first is row {first + 1} of these: {content}. Correct them, or drop them with "
        f"{key}.invalid_rows: drop."
    )


def _kind(data: Data, row: dict[str, Any], column: str, key: str) -> str:
    """The kind of a value: "text" or "chat messages"."""
    value = row[column]
    if isinstance(value, str) and column != "messages":
        return "text"
    if isinstance(value, list) and column != "text" and all(map(_is_message, value)):
        for role in {message["role"] for message in value} & ROLES.keys():
            raise RecipeError(
                f"{key}: the column {column} of {data.path} has messages of the role {role}, which chat templates do not "
                f"know: make it {ROLES[role]} with {key}.transform."
            )
        return "chat messages"
    wanted = {"text": "text", "messages": "a list of {role, content}"}.get(column, "text or a list of {role, content}")
    raise RecipeError(
        f"{key}: the column {column} of {data.path} holds {value!r:.80}, but must hold {wanted}; convert it with "
        f"{key}.transform."
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and {"role", "content"} <= value.keys() and isinstance(value["content"], str | None)


def short_enough(
    data: Data, rows: "Dataset", columns: list[str], tokenizer: "PreTrainedTokenizerBase", key: str
) -> "Dataset":
    """Rows whose prompts have at most `data.max_prompt_tokens` tokens, after `data.truncate`.

    Raises:
        RecipeError: No row is left; or `columns` hold chat messages, and the tokenizer has no chat template for them.
    """
    first = next((rows[0][name] for name in ("messages", "prompt", "chosen") if name in rows.column_names), "")
    if isinstance(first, list):
        if not tokenizer.chat_template:
            raise RecipeError(
                f"{key}: {data.path} has chat messages, but the model's tokenizer has no chat template; save one beside "
                f"the model as chat_template.jinja, or convert the messages to plain texts with {key}.transform."
            )
        _check_template(data, rows.select_columns(columns), tokenizer, key)
    if data.max_prompt_tokens is None or "prompt" not in rows.column_names:
        return rows
    fitting = [_fitting(data, data.max_prompt_tokens, row, tokenizer) for row in rows]
    kept = [i for i, prompt in enumerate(fitting) if prompt is not None]
    if len(kept) < len(rows):
        what = f"{len(rows) - len(kept)} of {len(rows)} prompts have more than {data.max_prompt_tokens} tokens"
        if not kept:
            raise RecipeError(f"{key}.max_prompt_tokens: {what}, so no row of {data.path} is left.")
        logger.warning("%s.max_prompt_tokens: %s and are left out", key, what)
    return put_column(rows.select(kept), "prompt", [fitting[i] for i in kept])


def _check_template(data: Data, rows: "Dataset", tokenizer: "PreTrainedTokenizerBase", key: str) -> None:
    """Refuse messages that the chat template refuses or leaves out; one conversation of each order of roles is tried."""
    tried = set()
    for number, row in enumerate(rows, 1):
        start = row.pop("prompt", [])
        for answer in row.values() or [[]]:
            messages = start + answer if isinstance(start, list) and isinstance(answer, list) else []
            roles = tuple(message["role"] for message in messages)
            if roles and roles not in tried:
                tried.add(roles)
                text = through_template(tokenizer, messages, f"{key}: row {number} of {data.path}", tokenize=False)
                for message in messages:
                    said = (message["content"] or "").strip()
                    if said not in text and "</think>" not in said:  # templates leave out earlier thoughts
                        raise RecipeError(
                            f"{key}: the chat template of {tokenizer.name_or_path} leaves out the messages of the role "
                            f"{message['role']}, as in row {number} of {data.path}; make other messages with {key}.transform."
                        )


def _fitting(
    data: Data, limit: int, row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase"
) -> str | list[dict] | None:
    """A row's prompt, cut to `limit` tokens; None if nothing is left.

    The column `data.truncate` loses its last paragraphs, or the end of its only paragraph. A character has at most four
    tokens (its bytes), so each step can cut a quarter of the excess.

    Source: Huang et al. 2024 (2403.17031), whose code cuts at the last line break, or else the last character.
    """
    prompt = row["prompt"]
    while (excess := len(token_ids(tokenizer, prompt)) - limit) > 0:
        if data.truncate is None or data.prompt_template is None:
            return None
        text = str(row[data.truncate])
        end = max(0, len(text) - max(1, excess // 4))
        paragraph = text.rfind("\n", 0, end + 1)
        shorter = text[: paragraph if paragraph > 0 else end]
        if not shorter or shorter.isspace():
            return None
        row = row | {data.truncate: shorter}
        prompt = data.prompt_template.format_map(row)
    return prompt


def warn_of_copies(train: "Dataset", held_out: "Dataset", key: str, what: str = "rows") -> None:
    """Warn if held-out rows (or prompts) are also training rows: they make held-out numbers too good."""

    def lines(rows: "Dataset") -> Iterator[str]:
        return map(repr, zip(*(rows[column][:] for column in sorted(rows.column_names)), strict=True))

    seen = set(lines(train))
    copies = sum(line in seen for line in lines(held_out))
    if copies:
        found = f"{copies} of {len(held_out)} held-out {what} are training {what} too"
        logger.warning("%s: %s, which makes held-out numbers too good; remove the duplicates.", key, found)
