"""Rows: one loader for every kind of data reference, which makes them have our column names.

Rows keep every column that they came with, so that reward functions can read them by name.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rlhf_recipes.recipe.schema import Data, RecipeError
from rlhf_recipes.recipe.user_code import find_function, running_user_code
from rlhf_recipes.runs.references import FILE_FORMATS, PARQUET, hub_arguments, locate_data

if TYPE_CHECKING:
    from datasets import Dataset


def load_rows(data: Data, seed: int, key: str = "data") -> tuple["Dataset", "Dataset"]:
    """Training and held-out rows with our column names, filtered; held out by row, before anything is made of them.

    Args:
        data: What to load.
        seed: Draws `data.max_rows` rows.
        key: Where `data` stands in the recipe, for messages.

    Raises:
        RecipeError: No such data, split or column, or no rows; the message says what was found.
    """
    from datasets import DatasetDict

    loaded = _load(data, key)
    splits = loaded if isinstance(loaded, DatasetDict) else DatasetDict({data.train_split: loaded})
    for name in ("train_split", "eval_split"):
        wanted = getattr(data, name)
        if wanted is not None and wanted not in splits:
            raise RecipeError(f"{key}.{name}: {data.path} has no split {wanted!r}; it has: {', '.join(splits)}.")
    train = _filter(data, splits[data.train_split], key)
    if data.eval_split is not None:
        held_out = _filter(data, splits[data.eval_split], key)
    else:
        if len(train) < 2:
            raise RecipeError(f"{key}.path: {data.path} has {len(train)} row; at least 2 are needed, one to hold out.")
        # Always the same rows, whatever the recipe's seed: what one run trained on, no other may be measured on.
        held_out = min(max(1, round(len(train) * data.eval_fraction)), len(train) - 1)
        parts = train.train_test_split(test_size=held_out, seed=0)
        train, held_out = parts["train"], parts["test"]
    if data.max_rows is not None:
        train, held_out = (
            part.shuffle(seed=seed).select(range(min(len(part), data.max_rows))) for part in (train, held_out)
        )
    if data.transform is not None:
        transform = find_function(data.transform, f"{key}.transform")
        train, held_out = (_transform(data, transform, part, key) for part in (train, held_out))
    train, held_out = (_with_our_names(data, part, key) for part in (train, held_out))
    for part, name in ((train, "training"), (held_out, "held-out")):
        if len(part) == 0:
            raise RecipeError(
                f"{key}: no {name} rows are left of {data.path}; look at {key}.filter and {key}.transform."
            )
    return train, held_out


def put_column(rows: "Dataset", name: str, values: list) -> "Dataset":
    """Rows with `values` in the column `name`, whatever it held before.

    Not by `Dataset.map`, which guesses a column's type from its first thousand values: they may all be null.
    """
    from datasets import Dataset

    others = [column for column in rows.column_names if column != name]
    if not others:  # rows without any column are no rows
        return Dataset.from_dict({name: values})
    return rows.select_columns(others).add_column(name, values)


def missing_column(data: Data, rows: "Dataset", column: str, why: str, key: str) -> RecipeError:
    """What to raise when rows lack a column.

    Args:
        data: The section that the rows come from.
        rows: As loaded.
        column: Its name, other possibilities behind it.
        why: What it is needed for.
        key: Where `data` stands in the recipe.
    """
    return RecipeError(
        f"{key}: {data.path} has no column {column} ({why}); it has: {', '.join(rows.column_names)}. "
        f"If one of them is meant, say so: {key}.columns.{column.split()[0]}=NAME."
    )


def _load(data: Data, key: str):
    from datasets import load_dataset, load_from_disk

    path = locate_data(f"{key}.path", data.path)
    try:
        if path is None:
            return load_dataset(**hub_arguments(data))
        if path.is_file():
            # pandas would take the words NA, null and None for nothing.
            more = {"keep_default_na": False, "na_values": [""]} if path.suffix == ".csv" else {}
            return load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split="train", **more)
        if any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
            return load_from_disk(str(path))
        # Only a README, as in a copy of a Hub data set, gives a folder configurations.
        return load_dataset(str(path), data.config if (path / "README.md").is_file() else None)
    except Exception as error:  # datasets raises many types, for unreadable files as for unknown ids
        cause = error.__cause__ or error
        what = "empty or unreadable" if path is not None else "not to be had"
        if "scripts are no longer supported" in str(cause):
            what = f"a script, which `datasets` does not run; {key}.revision={PARQUET} is the Hub's copy of its rows"
        said = ": ".join(filter(None, (type(cause).__name__, " ".join(str(cause).split())[:300])))
        raise RecipeError(f"{key}.path: {data.path} is {what} ({said}).") from error


def _filter(data: Data, rows: "Dataset", key: str) -> "Dataset":
    for column, value in data.filter.items():
        if column not in rows.column_names:
            raise RecipeError(
                f"{key}.filter: {data.path} has no column {column!r}; it has: {', '.join(rows.column_names)}."
            )
        rows = rows.filter(lambda row, column=column, value=value: row[column] == value)
    if len(rows) == 0:
        raise RecipeError(f"{key}: {data.path} has no rows{f' that pass {key}.filter' if data.filter else ''}.")
    return rows


def _transform(data: Data, transform: Callable, rows: "Dataset", key: str) -> "Dataset":
    from pyarrow import ArrowException

    where = f"{key}.transform: {data.transform}"

    def apply(batch: Any) -> dict[str, list]:
        with running_user_code(f"{where} failed on rows with the columns {', '.join(batch)}"):
            made = transform(dict(batch))
        if not isinstance(made, dict) or not all(isinstance(values, list) for values in made.values()):
            found = {n: type(v).__name__ for n, v in made.items()} if isinstance(made, dict) else type(made).__name__
            raise RecipeError(f"{where} returned {found}; it must return a dictionary of column name -> list.")
        if len({len(values) for values in made.values()}) > 1:
            lengths = ", ".join(f"{name} {len(values)}" for name, values in made.items())
            raise RecipeError(f"{where} returned columns of several lengths: {lengths}; they must be equal.")
        return made

    try:
        # Not from the cache: it would not notice that the user changed the function.
        return rows.map(apply, batched=True, remove_columns=rows.column_names, load_from_cache_file=False)
    except (ArrowException, TypeError) as error:
        raise RecipeError(f"{where} returned columns that mix types: {str(error)[:300]}") from error


def _with_our_names(data: Data, rows: "Dataset", key: str) -> "Dataset":
    """Rows with a copy of every column, or of what lies inside of it, that `data.columns` gives a name of ours."""
    copies = {}
    for ours, theirs in data.columns.items():
        column, *path = [theirs] if theirs in rows.column_names else theirs.split(".")
        where = f"{key}.columns.{ours}: {data.path}"
        if column not in rows.column_names:
            raise RecipeError(f"{where} has no column {column!r}; it has: {', '.join(rows.column_names)}.")
        copies[ours] = [_inside(value, path, where, column) for value in rows[column]]
    for ours, values in copies.items():
        rows = put_column(rows, ours, values)
    return rows


def _inside(value: Any, path: list[str], where: str, column: str) -> Any:
    """What lies at a path of names and numbers inside of a nested value; null inside of null."""
    for i, step in enumerate(path):
        if value is None:
            return None
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            outer = ".".join([column, *path[:i]])
            if isinstance(value, dict):
                found = f"it has: {', '.join(value)}"
            else:
                found = f"it is a list of {len(value)}" if isinstance(value, list) else f"it is {str(value)[:60]!r}"
            raise RecipeError(f"{where}: {outer} has no {step!r} inside; {found}.")
    return value
