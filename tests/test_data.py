"""Every kind of data reference and column, and a clear word for each thing that can be wrong with them."""

import csv

import pytest
from conftest import REVIEWS, bpe_tokenizer, word_tokenizer, write_jsonl
from datasets import Dataset, DatasetDict

from rlhf_recipes.config import Data, Recipe, RecipeError, Sentences
from rlhf_recipes.data import load_rows, pairs, prompts, texts


def recipe(seed: int = 0, **data) -> Recipe:
    return Recipe(name="t", description="t", seed=seed, data=Data(**data), reward_funcs=[{"name": "length"}])


def error(function, *args) -> str:
    with pytest.raises(RecipeError) as caught:
        function(*args)
    return str(caught.value)


@pytest.fixture(params=["jsonl", "json", "csv", "parquet", "saved", "saved splits", "folder of files"])
def any_format(request, tmp_path):
    rows, file = Dataset.from_list(REVIEWS), tmp_path / f"reviews.{request.param}"
    if request.param == "jsonl":
        write_jsonl(file, REVIEWS)
    elif request.param == "json":
        rows.to_json(file, lines=False, orient="records")
    elif request.param == "csv":
        rows.to_csv(file)
    elif request.param == "parquet":
        rows.to_parquet(file)
    else:
        file = tmp_path / "folder"
        if request.param == "saved":
            rows.save_to_disk(file)
        elif request.param == "saved splits":
            DatasetDict({"train": rows}).save_to_disk(file)
        else:
            file.mkdir()
            write_jsonl(file / "train.jsonl", REVIEWS)
    return file


def test_every_format_gives_the_same_rows(any_format):
    train, held_out = load_rows(recipe(path=str(any_format), eval_fraction=0.2))
    assert len(train) == 24 and len(held_out) == 6
    assert {row["text"] for part in (train, held_out) for row in part} == {row["text"] for row in REVIEWS}


def test_held_out_rows_are_the_same_for_every_seed(reviews_file):
    first, second = (load_rows(recipe(seed=seed, path=str(reviews_file)))[1]["text"][:] for seed in (1, 2))
    assert first == second


def test_own_columns_filter_and_splits(tmp_path):
    rows = [
        {"review": r["text"], "stars": "pos" if r["label"] else "neg", "site": "imdb" if i % 2 else "rt"}
        for i, r in enumerate(REVIEWS)
    ]
    DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:4])}).save_to_disk(tmp_path / "d")
    train, held_out = load_rows(
        recipe(
            path=str(tmp_path / "d"),
            eval_split="test",
            columns={"text": "review", "label": "stars"},
            filter={"site": "imdb"},
        )
    )
    assert len(train) == 15 and len(held_out) == 2 and {"text", "label", "site"} == set(train.column_names)


def test_max_rows(reviews_file):
    assert len(load_rows(recipe(path=str(reviews_file), max_rows=7))[0]) == 7


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"path": "./nowhere.jsonl"}, ["data.path", "does not exist"]),
        ({"path": "FILE", "columns": {"text": "review"}}, ["data.columns.text", "review", "it has: text, label"]),
        ({"path": "FILE", "filter": {"site": "imdb"}}, ["data.filter", "site", "it has: text, label"]),
        ({"path": "FILE", "filter": {"label": 7}}, ["no rows", "data.filter"]),
        ({"path": "FILE", "train_split": "validation"}, []),
        ({"path": "FILE", "eval_split": "test"}, ["data.eval_split", "'test'", "it has: train"]),
        ({"path": "package:no_such_package/x.csv"}, ["not installed", "offline"]),
    ],
)
def test_wrong_references(reviews_file, data, expected):
    data = {key: str(reviews_file) if value == "FILE" else value for key, value in data.items()}
    if not expected:  # one file is one split, whatever its name
        assert len(load_rows(recipe(**data))[0]) > 0
        return
    found = error(load_rows, recipe(**data))
    assert all(part in found for part in expected), found


@pytest.mark.parametrize("content", ["", "\n", "{broken", '{"text": "a", "label": 1}\n{"text": '])
def test_empty_and_broken_files(tmp_path, content):
    (tmp_path / "bad.jsonl").write_text(content)
    found = error(load_rows, recipe(path=str(tmp_path / "bad.jsonl")))
    assert "bad.jsonl" in found


def test_an_empty_csv_and_a_file_of_unknown_kind(tmp_path):
    with open(tmp_path / "e.csv", "w", newline="") as file:
        csv.writer(file).writerow(["text", "label"])
    assert "e.csv is empty" in error(load_rows, recipe(path=str(tmp_path / "e.csv")))
    (tmp_path / "notes.txt").write_text("x")
    assert ".jsonl" in error(load_rows, recipe(path=str(tmp_path / "notes.txt")))


def test_pairs_have_equal_lengths_and_use_no_text_twice():
    rows = Dataset.from_list(
        [{"text": " ".join(["w"] * n) + f" {i}", "label": i % 2} for i, n in enumerate([3, 3, 5, 4, 9, 2, 7, 7, 1, 6])]
    )
    made = pairs(recipe(path="x"), rows, None)
    assert len(made) == 5
    for pair in made:
        assert len(pair["chosen"].split()) == len(pair["rejected"].split())
    assert len({pair["chosen"] for pair in made}) == 5


def test_pairs_choose_the_positive_text_and_own_pairs_are_kept():
    by_text = {row["text"]: row["label"] for row in REVIEWS}
    made = pairs(recipe(path="x"), Dataset.from_list(REVIEWS), 5)
    assert len(made) == 5
    assert all(by_text[pair["chosen"]] == 1 and by_text[pair["rejected"]] == 0 for pair in made)
    own = Dataset.from_list([{"prompt": "p", "chosen": "c", "rejected": "r", "other": 1}])
    assert pairs(recipe(path="x"), own, None)[0] == {"prompt": "p", "chosen": "c", "rejected": "r"}


def test_pairs_need_both_labels_and_known_ones():
    assert "0 negative" in error(pairs, recipe(path="x"), Dataset.from_list([{"text": "a", "label": 1}]), None)
    assert "'maybe'" in error(pairs, recipe(path="x"), Dataset.from_list([{"text": "a", "label": "maybe"}]), None)
    assert "no column label" in error(pairs, recipe(path="x"), Dataset.from_list([{"text": "a"}]), None)


@pytest.mark.parametrize("tokenizer", [word_tokenizer(), bpe_tokenizer()])
def test_prompts_are_the_first_tokens_of_texts(tokenizer):
    made = prompts(recipe(path="x", prompt_tokens=[2, 4]), Dataset.from_list(REVIEWS), tokenizer)
    lengths = {len(tokenizer(prompt)["input_ids"]) for prompt in made["prompt"]}
    assert lengths == {2, 3, 4}
    assert all(any(row["text"].startswith(prompt) for row in REVIEWS) for prompt in made["prompt"])
    assert "label" in made.column_names  # reward functions may want it


def test_own_prompts_are_kept_text_or_chat():
    chat = [[{"role": "user", "content": "hi"}]]
    for own in (["the film"], chat):
        assert (
            prompts(recipe(path="x"), Dataset.from_dict({"prompt": own, "completion": ["x"]}), word_tokenizer())[
                "prompt"
            ][0]
            == own[0]
        )
    assert "empty" in error(prompts, recipe(path="x"), Dataset.from_dict({"prompt": ["", "a"]}), word_tokenizer())


def test_texts_too_short_for_a_prompt():
    assert "2 to 8 tokens" in error(
        prompts, recipe(path="x"), Dataset.from_dict({"text": ["the", "a"]}), word_tokenizer()
    )


def test_texts_for_sft():
    assert texts(recipe(path="x"), Dataset.from_list(REVIEWS), labels=[1]).num_rows == 15
    both = Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "text": ["c"]})
    assert set(texts(recipe(path="x"), both).column_names) == {"prompt", "completion"}
    assert "data.columns.text=NAME" in error(texts, recipe(path="x"), Dataset.from_dict({"body": ["a"]}))
    assert "no row" in error(texts, recipe(path="x"), Dataset.from_dict({"text": ["a"], "label": [0]}), [1])


def test_sentences_are_whole_short_and_within_the_vocabulary(tmp_path):
    rows = [
        {
            "text": "Mr. Bean was FUN.<br /><br />I liked it (a lot). Was it good? xylophone was fun. Too long "
            + "very " * 30
            + ".",
            "label": 1,
        }
    ] * 3
    file = write_jsonl(tmp_path / "r.jsonl", rows)
    train, _ = load_rows(recipe(path=str(file), eval_fraction=0.3, sentences=Sentences(words=[3, 6], vocabulary=1000)))
    assert set(train["text"]) == {"mr bean was fun .", "was it good ?", "xylophone was fun ."}
    few, _ = load_rows(recipe(path=str(file), eval_fraction=0.3, sentences=Sentences(words=[3, 6], vocabulary=9)))
    assert "xylophone was fun ." not in set(few["text"])
