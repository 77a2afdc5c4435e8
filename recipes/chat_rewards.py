"""Reward functions of smol_chat: has an answer done what its prompt asks for?

Each user asks for one sentence, and each row of `smol_chat.jsonl` has the other instructions as columns, so that code can
check an answer:

- `max_words`: the most words that the user wants.
- `must_include`: a word that the user wants in the answer, in upper or lower case.
- `style`: a key of `STYLES`, which the system message asks for; null in rows without a system message.

The functions have TRL's signature and give one number per completion: 1 is best, and None means that the row has no such
instruction. `satisfied` is all of them together; training does not use it.
"""

import itertools
import re
from collections.abc import Callable

from rlhf_recipes.recipe.messages import as_text

STYLES: dict[str, Callable[[str], bool]] = {
    "lower case": lambda text: text == text.lower(),
    "no comma": lambda text: "," not in text,
}
"""Value of the column `style` -> whether an answer has it."""

FEWEST_WORDS = 3
"""A shorter answer is no sentence: the word asked for must not stand alone."""


def length_asked(completions, max_words, **columns) -> list[float]:
    """1 for at most the number of words asked for; a fifth less for every word more."""
    lengths = [len(as_text(completion).split()) for completion in completions]
    return [max(0.0, 1 - max(n - most, 0) / 5) for n, most in zip(lengths, max_words, strict=True)]


def required_word(completions, must_include, **columns) -> list[float]:
    """1 if the answer has the word asked for, else 0."""
    return [
        float(re.search(rf"\b{re.escape(word)}\b", as_text(completion), re.I) is not None)
        for completion, word in zip(completions, must_include, strict=True)
    ]


def one_sentence(completions, **columns) -> list[float]:
    """1 if the answer is one line of at least `FEWEST_WORDS` words, and has its only full stop or other mark at its end."""
    texts = [as_text(completion).strip() for completion in completions]
    return [float(bool(re.fullmatch(r"[^.!?\n]+[.!?]", t)) and len(t.split()) >= FEWEST_WORDS) for t in texts]


def system_kept(completions, style, **columns) -> list[float | None]:
    """1 if the answer has the style that the system message asks for, else 0; an empty answer has none."""
    texts = [as_text(completion).strip() for completion in completions]
    return [
        None if name is None else float(bool(text) and STYLES[name](text))
        for text, name in zip(texts, style, strict=True)
    ]


def no_repetition(completions, **columns) -> list[float]:
    """1 if no two neighbouring words occur a second time, else 0."""
    values = []
    for completion in completions:
        pairs = list(itertools.pairwise(re.findall(r"\w+", as_text(completion).lower())))
        values.append(float(len(set(pairs)) == len(pairs)))
    return values


def ended(completions, finished, **columns) -> list[float]:
    """1 if the answer ended with EOS, 0 if it was cut off."""
    return [float(end) for end in finished]


def satisfied(completions, **columns) -> list[float]:
    """1 if the answer does all that is asked, has no repetition and ended with EOS; else 0."""
    functions = (length_asked, required_word, one_sentence, system_kept, no_repetition, ended)
    values = zip(*(function(completions=completions, **columns) for function in functions), strict=True)
    return [float(all(value in (None, 1.0) for value in row)) for row in values]
