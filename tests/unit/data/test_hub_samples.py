"""The Hub's data sets that recipes load, by small samples with their columns, through the mapping that recipes use."""

import json

import pytest

from rlhf_recipes.data.pairs import pairs
from rlhf_recipes.data.rows import load_rows
from rlhf_recipes.data.shapes import prompts, texts
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.recipe.sections import Data
from support.places import SAMPLES
from support.texts import write_jsonl
from support.tiny_models import word_tokenizer

DATA = {
    "imdb": load_recipe("imdb_positive").data,
    "tldr": Data(path="trl-lib/tldr", eval_split="validation"),
    "tldr-preference": Data(path="trl-lib/tldr-preference", eval_split="validation"),
    "summarize_from_feedback_tldr_3_filtered": load_recipe("tldr_1b").data,
    "summarize_from_feedback": load_recipe("tldr_1b").reward.data,
    "synthetic-instruct-gptj-pairwise": load_recipe("length_short").data,
}
"""Folder -> how it is read: by a recipe's own data section; trl-lib's two layouts, which no recipe loads, as they are."""


def section(name: str, **changes) -> Data:
    return DATA[name].model_copy(update={"path": str(SAMPLES / name)} | changes)


def raw(name: str, split: str) -> list[dict]:
    return [json.loads(line) for line in open(SAMPLES / name / f"{split}.jsonl", encoding="utf-8")]


def test_every_sample_is_tested_and_documented():
    folders = {path.name for path in SAMPLES.iterdir() if path.is_dir()}
    table = (SAMPLES / "README.md").read_text(encoding="utf-8")
    assert folders == set(DATA)
    assert all(f"| `{name}` |" in table for name in folders)


def test_imdb():
    data = section("imdb")
    train, held_out = load_rows(data, 0)
    assert len(texts(data, train, word_tokenizer())) == 6
    made = prompts(data, train, word_tokenizer(), 0)
    assert len(made) == 6 and "text" not in made.column_names
    both = pairs(data, train, word_tokenizer(), None, 0)
    assert len(both) == 3
    # Of four held-out reviews one positive one is in training too.
    apart = pairs(data, held_out, word_tokenizer(), None, 0, apart_from=train)
    assert len(apart) == 1 and apart[0]["chosen"].startswith("One of the best small films")


@pytest.mark.parametrize("name", ["tldr", "summarize_from_feedback_tldr_3_filtered"])
def test_posts_and_summaries(name):
    data = section(name)
    for rows, split in zip(load_rows(data, 0), ("train", "validation"), strict=True):
        made = texts(data, rows, word_tokenizer())
        assert made.column_names == ["prompt", "completion"]
        # Both data sets are the same posts, in two layouts.
        assert list(made) == raw("tldr", split)
        own = prompts(data, rows, word_tokenizer(), 0)
        assert own["prompt"][:] == made["prompt"][:] and own["gold"][:] == made["completion"][:]
        assert not any(answer.strip() in prompt for prompt, answer in zip(own["prompt"], own["gold"], strict=True))


@pytest.mark.parametrize("name", ["tldr-preference", "summarize_from_feedback"])
def test_comparisons_of_summaries(name):
    data = section(name)
    rows, held_out = load_rows(data, 0)
    made = pairs(data, rows, word_tokenizer(), None, 0)
    assert made.column_names == ["prompt", "chosen", "rejected"]
    summaries = {row["completion"] for row in raw("tldr", "train")}
    assert set(made["chosen"]) == summaries and summaries.isdisjoint(made["rejected"])
    assert all(prompt.startswith("SUBREDDIT: r/") and prompt.endswith("TL;DR:") for prompt in made["prompt"])
    news = name == "tldr-preference"  # it has a prompt of its own for them; the other one's have no post
    assert len(pairs(data, held_out, word_tokenizer(), None, 0)) == 2 + news


def test_news_in_the_comparisons_are_refused_unless_dropped():
    data = section("summarize_from_feedback", invalid_rows="refuse")
    with pytest.raises(RecipeError, match=r"1 of 3 rows .* with an empty prompt.*invalid_rows: drop"):
        pairs(data, load_rows(data, 0)[1], word_tokenizer(), None, 0)


def test_instructions():
    data = section("synthetic-instruct-gptj-pairwise")
    rows, held_out = load_rows(data, 0)
    assert (len(rows), len(held_out)) == (4, 1)
    assert pairs(data, rows, word_tokenizer(), None, 0).column_names == ["prompt", "chosen", "rejected"]
    answers = [f" {answer}" for answer in rows["chosen"]]
    assert texts(data, rows, word_tokenizer())["completion"][:] == answers
    made = prompts(data, rows, word_tokenizer(), 0)
    assert made.column_names == ["prompt", "gold"] and made["gold"][:] == answers


RENAMED = [
    ("imdb", {"text": "review"}, "review, label"),
    ("imdb", {"label": "sentiment"}, "text, sentiment"),
    ("tldr", {"completion": "summary"}, "prompt, summary"),
    ("tldr-preference", {"rejected": "worse"}, "prompt, chosen, worse"),
    ("summarize_from_feedback_tldr_3_filtered", {"summary": "tldr"}, "id, subreddit, title, post, tldr"),
    ("summarize_from_feedback_tldr_3_filtered", {"title": "head"}, "id, subreddit, head, post, summary, completion"),
    ("summarize_from_feedback", {"info": "meta"}, "meta, summaries, choice, worker, batch, split, extra"),
    ("summarize_from_feedback", {"choice": "chosen_one"}, "info, summaries, chosen_one, worker, batch, split, extra"),
    ("synthetic-instruct-gptj-pairwise", {"chosen": "better"}, "prompt, better, rejected"),
]


@pytest.mark.parametrize(("name", "names", "found"), RENAMED)
def test_a_renamed_column_fails_with_those_found(name, names, found, tmp_path):
    for split in ("train", "validation", "test"):
        if (SAMPLES / name / f"{split}.jsonl").exists():
            write_jsonl(
                tmp_path / f"{split}.jsonl", [{names.get(k, k): v for k, v in row.items()} for row in raw(name, split)]
            )
    data = section(name, path=str(tmp_path))

    def walk():
        rows, _ = load_rows(data, 0)
        if name in ("tldr", "summarize_from_feedback_tldr_3_filtered"):
            texts(data, rows, word_tokenizer())
        else:
            pairs(data, rows, word_tokenizer(), None, 0)

    with pytest.raises(RecipeError, match=f"it has: {found}"):
        walk()
