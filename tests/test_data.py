"""Every kind of data reference and column, and a clear word for each thing that can be wrong with them."""

import csv

import pytest
from conftest import REVIEWS, write_jsonl
from datasets import Dataset, DatasetDict

from rlhf_recipes.config import Data, RecipeError, Sentences
from rlhf_recipes.data import load_rows


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
    train, held_out = load_rows(Data(path=str(any_format), eval_fraction=0.2), 0)
    assert len(train) == 24 and len(held_out) == 6
    assert {row["text"] for part in (train, held_out) for row in part} == {row["text"] for row in REVIEWS}


def test_held_out_rows_are_the_same_for_every_seed(reviews_file):
    first, second = (load_rows(Data(path=str(reviews_file)), seed)[1]["text"][:] for seed in (1, 2))
    assert first == second


def test_own_columns_filter_and_splits(tmp_path):
    rows = [
        {"review": r["text"], "stars": "pos" if r["label"] else "neg", "site": "imdb" if i % 2 else "rt"}
        for i, r in enumerate(REVIEWS)
    ]
    DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:4])}).save_to_disk(tmp_path / "d")
    train, held_out = load_rows(
        Data(
            path=str(tmp_path / "d"),
            eval_split="test",
            columns={"text": "review", "label": "stars"},
            filter={"site": "imdb"},
        ),
        0,
    )
    assert len(train) == 15 and len(held_out) == 2
    assert set(train.column_names) == {"review", "stars", "site", "text", "label"}


def test_max_rows(reviews_file):
    assert len(load_rows(Data(path=str(reviews_file), max_rows=7), 0)[0]) == 7


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
        assert len(load_rows(Data(**data), 0)[0]) > 0
        return
    found = error(load_rows, Data(**data), 0)
    assert all(part in found for part in expected), found


@pytest.mark.parametrize("content", ["", "\n", "{broken", '{"text": "a", "label": 1}\n{"text": '])
def test_empty_and_broken_files(tmp_path, content):
    (tmp_path / "bad.jsonl").write_text(content)
    found = error(load_rows, Data(path=str(tmp_path / "bad.jsonl")), 0)
    assert "bad.jsonl" in found


def test_an_empty_csv_and_a_file_of_unknown_kind(tmp_path):
    with open(tmp_path / "e.csv", "w", newline="") as file:
        csv.writer(file).writerow(["text", "label"])
    assert "e.csv is empty" in error(load_rows, Data(path=str(tmp_path / "e.csv")), 0)
    (tmp_path / "notes.txt").write_text("x")
    assert ".jsonl" in error(load_rows, Data(path=str(tmp_path / "notes.txt")), 0)


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
    train, _ = load_rows(Data(path=str(file), eval_fraction=0.3, sentences=Sentences(words=[3, 6], vocabulary=1000)), 0)
    assert set(train["text"]) == {"mr bean was fun .", "was it good ?", "xylophone was fun ."}
    few, _ = load_rows(Data(path=str(file), eval_fraction=0.3, sentences=Sentences(words=[3, 6], vocabulary=9)), 0)
    assert "xylophone was fun ." not in set(few["text"])
