"""Words, reviews and files of them."""

import json
from pathlib import Path

WORDS = "the film was great bad good awful fun dull i liked hated it a movie plot and acting very not . !".split()


REVIEWS = [
    {"text": f"the film was {word} and {end} .", "label": label}
    for label, words, ends in (
        (1, ("great", "good", "fun", "very good", "very fun"), ("i liked it", "the plot was good", "a fun movie")),
        (0, ("bad", "awful", "dull", "very bad", "very dull"), ("i hated it", "the plot was bad", "a dull movie")),
    )
    for word in words
    for end in ends
]


HELD_OUT_REVIEWS = [row | {"text": row["text"].replace("the film", "a movie")} for row in REVIEWS]
"""The same number of other texts, for held-out pairs that no training row contains."""


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
