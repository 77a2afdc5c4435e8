"""Makes small data sets from film reviews; an example of `data.transform`, whose functions take and return columns.

`sentences` makes the data of imdb_tiny, imdb_base and length_tiny; `posts` and `comparisons` make the data of tldr_tiny;
`openings` and `openings_and_reviews` make the data of imdb_smol. A recipe names them as `film_reviews.py:sentences`, because this file is in the recipe's folder. The same reviews always give the
same rows.
"""

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

WORDS = frozenset(Path(__file__).with_name("film_reviews_words.txt").read_text(encoding="utf-8").split())
"""The 3,000 most common words and marks of the training reviews of imdb_base; the file lists the most common first."""

COMMON = 2500
"""Sentences of a post use only this many of the most common words and marks in a batch of reviews."""

_BREAK = re.compile(r"<br\s*/?>")
_WORD_OR_MARK = re.compile(r"[a-z]+(?:'[a-z]+)*|[0-9]+|[.,!?;:]")
_TITLE = re.compile(r"\b(mr|mrs|ms|dr|st|vs)\.")
_MARKS = re.compile(r"([.!?])[.!?]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_WHOLE_SENTENCE = re.compile(r"[a-z0-9 ,;:'\"-]+[.!?]+")
"""A sentence without brackets, markup and other scripts: dropping these would leave gaps."""


def sentences(batch: dict[str, list]) -> dict[str, list]:
    """One row for every sentence of 5 to 22 common words and marks, in lower case, joined by blanks; other columns stay.

    A model that trains from scratch in minutes can only learn a small language: short sentences of common words. The texts
    are in the column `text`; without it, in the first column that holds strings.
    """
    made = defaultdict(list)
    strings = [name for name, values in batch.items() if any(isinstance(value, str) for value in values)]
    texts = "text" if "text" in batch else strings[0]
    for i, text in enumerate(batch[texts]):
        for words in whole_sentences(text or ""):
            if 5 <= len(words) <= 22 and WORDS.issuperset(words):
                for column in batch:
                    made[column].append(" ".join(words) if column == texts else batch[column][i])
    return dict(made) or {column: [] for column in batch}


def openings(batch: dict[str, list]) -> dict[str, list]:
    """The first sentences of every review, 8 to 30 words in all, as they were written; other columns stay.

    Reviews whose first sentence is longer have no row.
    """
    return _rows_of(batch, lambda i, text: _opening(text))


def openings_and_reviews(batch: dict[str, list]) -> dict[str, list]:
    """`openings`, but for every fourth review its first 180 words: a reward model learns from both lengths."""
    return _rows_of(batch, lambda i, text: _opening(text) if i % 4 else " ".join(_readable(text).split()[:180]))


def _rows_of(batch: dict[str, list], cut: Callable[[int, str], str]) -> dict[str, list]:
    made = {column: [] for column in batch}
    for i, text in enumerate(batch["text"]):
        if short := cut(i, text):
            for column in batch:
                made[column].append(short if column == "text" else batch[column][i])
    return made


def _opening(text: str) -> str:
    taken = []
    for sentence in _SENTENCE_END.split(_readable(text)):
        if len(taken) + len(sentence.split()) > 30:
            break
        taken += sentence.split()
    return " ".join(taken) if len(taken) >= 8 and taken[-1][-1] in ".!?" else ""


def _readable(text: str) -> str:
    return " ".join(_BREAK.sub(" ", text).split())


def posts(batch: dict[str, list]) -> dict[str, list]:
    """Columns `subreddit`, `title`, `post` and `summary`."""
    made = {"subreddit": [], "title": [], "post": [], "summary": []}
    common = common_words(batch["text"], COMMON)
    for text in batch["text"]:
        sentences = [words for words in whole_sentences(text) if 5 <= len(words) <= 16 and common.issuperset(words)][:6]
        if len(sentences) < 3:
            continue
        content = [{word for word in words if len(word) >= 5} for words in sentences]
        shared = [sum(len(own & other) for other in content) - len(own) for own in content]
        summary = " ".join(sentences.pop(shared.index(max(shared))))
        lines = [" ".join(words) for words in sentences]
        if any(summary in line for line in lines):  # some reviews contain a sentence twice
            continue
        made["subreddit"].append("movies")
        made["title"].append(" ".join(lines[0].split()[:4]))
        made["post"].append("\n".join(" ".join(lines[i : i + 2]) for i in range(0, len(lines), 2)))
        made["summary"].append(summary)
    return made


def comparisons(batch: dict[str, list]) -> dict[str, list]:
    """Columns `info` (`subreddit`, `title`, `post`), `summaries` (two, each a `text` that begins with a blank), `choice`."""
    made = {"info": [], "summaries": [], "choice": []}
    columns = posts(batch)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    rows.sort(key=lambda row: (len(row["summary"].split()), row["summary"], row["post"]))
    others = rows[1:] + rows[-2:-1]  # the next longer summary; for the longest, the one before it
    for row, other in zip(rows, others, strict=False):
        if row["summary"] == other["summary"]:
            continue
        choice = zlib.crc32(row["post"].encode()) % 2
        pair = [{"text": " " + row["summary"]}, {"text": " " + other["summary"]}]
        made["info"].append({name: row[name] for name in ("subreddit", "title", "post")})
        made["summaries"].append(pair[::-1] if choice else pair)
        made["choice"].append(choice)
    return made


def whole_sentences(text: str) -> list[list[str]]:
    """Lower-case words and marks of every sentence of a text, without sentences that would have gaps."""
    return [_words(s) for s in _SENTENCE_END.split(_plain(text)) if _WHOLE_SENTENCE.fullmatch(s)]


def common_words(texts: Iterable[str], size: int) -> set[str]:
    """The `size` most common lower-case words and marks of texts."""
    counts = Counter()
    for text in texts:
        counts.update(_words(_plain(text)))
    return {word for word, _ in counts.most_common(size)}


def _plain(text: str) -> str:
    """Lower case, without markup; dots only at the end of sentences, and one mark there."""
    return _MARKS.sub(r"\1", _TITLE.sub(r"\1", _BREAK.sub(" ", text).lower()))


def _words(text: str) -> list[str]:
    return _WORD_OR_MARK.findall(text)
