"""How much of a completion is copied from its prompt."""

import re
import string
from collections.abc import Sequence
from difflib import SequenceMatcher

WORD = re.compile(r"\w+(?:['’]\w+)*")

COPIED_RUN = 4
"""Words in a row: a shorter run may stand in prompt and completion by chance."""

TITLE_SHARE = 0.75
"""Of a title's words, in a row: a copied title may lose its first or last word."""

SHORTEST_TITLE = 3
"""Words. Every text on the same subject has most words of a shorter title."""


def words(text: str) -> list[str]:
    """The words of a text in small letters, without marks."""
    return WORD.findall(text.lower())


def longest_common_run(prompt: Sequence[str], completion: Sequence[str]) -> int:
    """Number of words in the longest run that both have."""
    return SequenceMatcher(None, prompt, completion, autojunk=False).find_longest_match().size


def copied_share(prompt: Sequence[str], completion: Sequence[str], shortest: int = COPIED_RUN) -> float:
    """Share of a completion's words that lie in a run of at least `shortest` words of the prompt; 0 without words."""
    runs = {tuple(prompt[i : i + shortest]) for i in range(len(prompt) - shortest + 1)}
    copied: set[int] = set()
    for i in range(len(completion) - shortest + 1):
        if tuple(completion[i : i + shortest]) in runs:
            copied.update(range(i, i + shortest))
    return len(copied) / len(completion) if completion else 0.0


def copies_title(title: Sequence[str], completion: Sequence[str]) -> bool | None:
    """Whether a run of `TITLE_SHARE` of the title's words stands in the completion; None for a title too short."""
    if len(title) < SHORTEST_TITLE:
        return None
    return longest_common_run(title, completion) >= TITLE_SHARE * len(title)


def template_fields(template: str, prompt: str) -> dict[str, str] | None:
    """The values in a prompt that was made from a template, by field; None where it was not.

    Where several splits are possible, earlier fields are as short as possible.

    Args:
        template: `data.prompt_template`.
    """
    pattern = ""
    groups: dict[str, str] = {}
    for literal, field, _, _ in string.Formatter().parse(template):
        pattern += re.escape(literal)
        if field is None:
            continue
        if field in groups:
            pattern += f"(?P={groups[field]})"
        else:
            groups[field] = f"field_{len(groups)}"
            pattern += f"(?P<{groups[field]}>.*?)"
    match = re.fullmatch(pattern, prompt, re.DOTALL)
    return match and {field: match[group] for field, group in groups.items()}
