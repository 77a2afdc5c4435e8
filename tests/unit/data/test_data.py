"""Every kind of data path and column, and a clear error for everything that can be wrong with them."""

import csv

import pytest
from datasets import Dataset, DatasetDict, load_dataset

from rlhf_recipes.data.rows import load_rows
from rlhf_recipes.recipe.load import load_recipe, shipped_recipes
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.recipe.sections import Data
from rlhf_recipes.runs.references import locate_data
from support.texts import REVIEWS, write_jsonl


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


def test_images_are_left_out_with_a_word(tmp_path, caplog):
    """TRL would give them to the model, which reads text only."""
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"q {i}", "image": f"{i}.png"} for i in range(4)])
    assert load_rows(Data(path=str(file)), 0)[0].column_names == ["prompt"]
    assert "data: image of" in caplog.text and "is left out: models here read text only" in caplog.text


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


def test_data_beside_the_recipe_is_found_from_any_folder(tmp_path, monkeypatch):
    """A file in the current folder comes first in an override, whose path the user has just typed."""
    (tmp_path / "project").mkdir()
    beside = write_jsonl(tmp_path / "project" / "rows.jsonl", [{"text": f"a {i}"} for i in range(4)])
    (tmp_path / "project" / "mine.yaml").write_text("extends: imdb_tiny\ndata: {path: rows.jsonl}\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("project/mine.yaml").data.path == str(beside)
    here = write_jsonl(tmp_path / "rows.jsonl", [{"text": "b"}])
    typed = load_recipe("project/mine.yaml", ["data.path=rows.jsonl"]).data.path
    assert locate_data("data.path", typed).resolve() == here.resolve()
    assert locate_data("data.path", "smol_chat.jsonl") == shipped_recipes() / "smol_chat.jsonl"


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


def test_columns_are_copied_and_may_be_swapped(tmp_path):
    file = write_jsonl(tmp_path / "d.jsonl", [{"chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(4)])
    rows, _ = load_rows(Data(path=str(file), columns={"completion": "chosen"}), 0)
    assert rows["completion"][:] == rows["chosen"][:]
    swapped, _ = load_rows(Data(path=str(file), columns={"chosen": "rejected", "rejected": "chosen"}), 0)
    assert all(row["chosen"].startswith("bad") and row["rejected"].startswith("good") for row in swapped)


NESTED = [
    {"info": {"post": f"p{i}", "to": None}, "summaries": [{"text": "a"}, {"text": "b"}], "a.b": i} for i in range(4)
]


def test_paths_into_columns(tmp_path):
    columns = {"post": "info.post", "second": "summaries.1.text", "number": "a.b", "nothing": "info.to.name"}
    rows, _ = load_rows(Data(path=str(write_jsonl(tmp_path / "d.jsonl", NESTED)), columns=columns), 0)
    for row in rows:
        assert row["post"] == f"p{row['number']}" and row["second"] == "b" and row["nothing"] is None


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("meta.post", "has no column 'meta'; it has: info, summaries, a.b"),
        ("info.text", "info has no 'text' inside; it is {'post'"),
        ("summaries.2.text", "summaries has no '2' inside; it is [{'text'"),
        ("summaries.0.note", "summaries.0 has no 'note' inside; it is {'text'"),
        ("info.post.word", "info.post has no 'word' inside; it is p"),
    ],
)
def test_paths_that_lead_nowhere(path, expected, tmp_path):
    data = Data(path=str(write_jsonl(tmp_path / "d.jsonl", NESTED)), columns={"text": path})
    found = error(load_rows, data, 0)
    assert found.startswith("data.columns.text: ") and expected in found
    assert error(load_rows, data, 0, "reward.data").startswith("reward.data.columns.text: ")


TRANSFORMS = """
def doubled(batch):
    return {"body": [text for text in batch["text"] for _ in range(2)]}

def positive(batch):
    return {"text": [text for text, label in zip(batch["text"], batch["label"]) if label]}

def fails(batch):
    return {"text": batch["review"]}

def leaves(batch):
    raise SystemExit(0)

def a_list(batch):
    return batch["text"]

def no_lists(batch):
    return {"text": "all of it"}

def ragged(batch):
    return {"text": batch["text"], "label": batch["label"][1:]}

def mixed(batch):
    return {"text": [i if i % 2 else str(i) for i in range(len(batch["text"]))]}

def nothing(batch):
    return {name: [] for name in batch}
"""


def test_a_transform_makes_more_or_fewer_rows_before_columns_are_looked_for(reviews_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # code below the current folder runs unasked
    (tmp_path / "my_rows.py").write_text(TRANSFORMS)
    doubled = Data(path=str(reviews_file), transform=f"{tmp_path}/my_rows.py:doubled", columns={"text": "body"})
    rows, held_out = load_rows(doubled, 0)
    assert len(rows) == 56 and len(held_out) == 4 and set(rows.column_names) == {"body", "text"}
    assert set(rows["text"]).isdisjoint(held_out["text"])  # rows are held out before the transform
    rows, _ = load_rows(Data(path=str(reviews_file), transform="my_rows:positive", eval_fraction=0.5), 0)
    positive = {row["text"] for row in REVIEWS if row["label"]}
    assert 0 < len(rows) < 15 and set(rows["text"]) <= positive
    (tmp_path / "my_rows.py").write_text("def doubled(batch): return {'body': ['new']}\n")
    assert load_rows(doubled, 0)[0]["text"][:] == ["new"]  # without a cache of earlier results


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("absent", "no function 'absent'"),
        ("fails", "failed on rows with the columns text, label: KeyError: 'review'"),
        (
            "leaves",
            "failed on rows with the columns text, label: SystemExit: 0",
        ),  # and does not end the run with code 0
        ("a_list", "must return a dict of lists of equal length: "),
        ("no_lists", "must return a dict of lists of equal length: "),
        ("ragged", "expected length 28 but got length 27"),
        ("mixed", "must return a dict of lists"),
        ("nothing", "no training rows are left"),
    ],
)
def test_transforms_that_fail(name, expected, reviews_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rows.py").write_text(TRANSFORMS)
    found = error(load_rows, Data(path=str(reviews_file), transform=f"{tmp_path}/my_rows.py:{name}"), 0)
    assert "data.transform" in found and expected in found


def test_transforms_that_are_not_there(reviews_file):
    for name in ("no_such_module:f", "./nowhere.py:f", "no_colon"):
        found = error(load_rows, Data(path=str(reviews_file), transform=name), 0)
        assert found.startswith("data.transform"), found


def test_a_configuration_of_the_hubs_copy_is_a_folder(monkeypatch, tmp_path):
    for config, column in (("comparisons", "text"), ("axis", "score")):
        for split in ("train", "validation"):
            (tmp_path / config / split).mkdir(parents=True)
            Dataset.from_dict({column: ["a", "b"]}).to_parquet(tmp_path / config / split / "0000.parquet")
    asked = []

    def hub(path, name=None, revision=None, **more):
        asked.append((path, revision))
        return load_dataset(str(tmp_path), name, **more)

    monkeypatch.setattr("datasets.load_dataset", hub)
    data = Data(path="some/data", config="comparisons", revision="refs/convert/parquet", eval_split="validation")
    assert load_rows(data, 0)[0].column_names == ["text"]
    assert asked == [("some/data", "refs/convert/parquet")]


def test_a_data_set_that_is_a_script_is_named(monkeypatch):
    def hub(*args, **more):
        raise RuntimeError("Dataset scripts are no longer supported, but found data.py")

    monkeypatch.setattr("datasets.load_dataset", hub)
    assert "data.revision=refs/convert/parquet" in error(load_rows, Data(path="some/data"), 0)


def test_words_that_pandas_takes_for_nothing_are_texts(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nNA,1\nnull,0\n,1\nNone,\n", encoding="utf-8")
    train, held_out = load_rows(Data(path=str(tmp_path / "a.csv")), 0)
    rows = {row["text"]: row["label"] for part in (train, held_out) for row in part}
    assert rows == {"NA": 1, "null": 0, None: 1, "None": None}


@pytest.mark.parametrize(("fraction", "held_out"), [(0.01, 1), (0.3, 2), (0.99, 4)])
def test_neither_part_is_ever_empty(tmp_path, fraction, held_out):
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(5)])
    parts = load_rows(Data(path=str(file), eval_fraction=fraction), 0)
    assert list(map(len, parts)) == [5 - held_out, held_out]
