"""How much of a completion is taken from its prompt, or from itself. Pure text; words are compared in small letters."""

import re
import string
from collections.abc import Sequence
from difflib import SequenceMatcher

_WORD = re.compile(r"\w+(?:['’]\w+)*")

COPIED_RUN = 4
"""Words in a row that prompt and completion share by copying rather than by chance."""

TITLE_SHARE = 0.75
"""Of a title's words, in a row: a title that loses its first or last word is copied all the same."""

SHORTEST_TITLE = 3
"""Words. Of shorter titles every text on their subject has most."""


def words(text: str) -> list[str]:
    """The words of a text in small letters, without marks."""
    return _WORD.findall(text.lower())


def longest_common_run(prompt: Sequence[str], completion: Sequence[str]) -> int:
    """Words of the longest run that stands in both."""
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


def repeated_share(completion: Sequence, n: int = 2) -> float:
    """Share of a completion's n-grams, of words or tokens, that stood in it before, 0..1; 0 where it has none.

    Pairs of words, for they repeat in texts of ten words, too, where longer n-grams hardly can.

    Source: seq-rep-n of Welleck et al. 2020 (1908.04319).
    """
    ngrams = [tuple(completion[i : i + n]) for i in range(len(completion) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def template_fields(template: str, prompt: str) -> dict[str, str] | None:
    """The values that were put into a prompt's template, by name; None where the prompt is not made of it.

    Where several splits are possible, earlier fields are as short as can be.

    Args:
        template: As `data.prompt_template`.
        prompt: A filled one.
    """
    pattern, groups = "", {}
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
