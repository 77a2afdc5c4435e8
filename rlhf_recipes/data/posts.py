"""Posts with summaries and comparisons, made of film reviews: small stand-ins for TL;DR, for recipe tldr_tiny.

Of a review's sentences, in lower case, those of 5 to 16 common words are taken: the first six, if there are three. The
one that shares most words of five letters and more with the others is the **summary**; the others are the **post**, in
paragraphs of two, whose first four words are its **title**. So a summary is a sentence that a person wrote about the
same film, but not as a summary: what a model learns here says that the code works, no more.

In a comparison the post's own summary is **chosen** over that of another review which is as long or nearly so; which of
the two comes first is decided by a checksum of the post. Its columns lie as in openai/summarize_from_feedback.

Used by `data.transform: rlhf_recipes.data.posts:posts` and `reward.data.transform: rlhf_recipes.data.posts:comparisons`; both take
reviews in a column `text`, and make the same of the same reviews.
"""

import zlib

from rlhf_recipes.data.rows import common_words, whole_sentences

COMMON = 2500
"""Sentences may consist of this many most common words and marks of a batch of reviews."""


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
        if any(summary in line for line in lines):  # some reviews come with a sentence twice
            continue
        made["subreddit"].append("movies")
        made["title"].append(" ".join(lines[0].split()[:4]))
        made["post"].append("\n".join(" ".join(lines[i : i + 2]) for i in range(0, len(lines), 2)))
        made["summary"].append(summary)
    return made


def comparisons(batch: dict[str, list]) -> dict[str, list]:
    """Columns `info` (`subreddit`, `title`, `post`), `summaries` (two: `text`, with a blank in front) and `choice`."""
    made = {"info": [], "summaries": [], "choice": []}
    columns = posts(batch)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    rows.sort(key=lambda row: (len(row["summary"].split()), row["summary"], row["post"]))
    others = rows[1:] + rows[-2:-1]  # the next in length; the last one has the one before, if there is any
    for row, other in zip(rows, others, strict=False):
        if row["summary"] == other["summary"]:
            continue
        choice = zlib.crc32(row["post"].encode()) % 2
        pair = [{"text": " " + row["summary"]}, {"text": " " + other["summary"]}]
        made["info"].append({name: row[name] for name in ("subreddit", "title", "post")})
        made["summaries"].append(pair[::-1] if choice else pair)
        made["choice"].append(choice)
    return made
