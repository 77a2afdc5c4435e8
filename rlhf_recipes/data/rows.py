"""Loads rows from the Hub, local files or packages, and gives them our column names.

Rows keep all their columns, so that reward functions can read them by name. In this package, `data` is a section of the
recipe that describes data, and `key` is the section's key, for messages.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.recipe.sections import Data
from rlhf_recipes.recipe.user_code import find_function, running_user_code
from rlhf_recipes.runs.references import (
    FILE_FORMATS,
    PARQUET,
    check_cache,
    hub_arguments,
    hub_cache,
    locate_data,
)

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


def load_rows(data: Data, seed: int, key: str = "data") -> tuple["Dataset", "Dataset"]:
    """Filtered training and held-out rows with our column names; `seed` draws `data.max_rows` of them.

    Raises:
        RecipeError: The data, a split or a column does not exist, or no rows are left.
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
        if len(train) == 1:
            raise RecipeError(f"{key}.path: {data.path} has 1 row; at least 2 are needed, one to hold out.")
        # The same rows for every seed: no run may be measured on rows that another run trained on.
        size = min(max(1, round(len(train) * data.eval_fraction)), len(train) - 1)
        parts = train.train_test_split(test_size=size, seed=0)
        train, held_out = parts["train"], parts["test"]
    transform = find_function(data.transform, f"{key}.transform") if data.transform is not None else None
    made = []
    for part, name in ((train, "training"), (held_out, "held-out")):
        if data.max_rows is not None:
            part = part.shuffle(seed=seed).select(range(min(len(part), data.max_rows)))
        if transform is not None:
            part = _transform(transform, part, f"{key}.transform: {data.transform}")
        part = _with_our_names(data, part, key)
        images = [column for column in ("image", "images") if column in part.column_names]
        if images and name == "training":  # TRL would give them to the model
            logger.warning(
                "%s: %s of %s is left out: models here read text only.", key, " and ".join(images), data.path
            )
        part = part.remove_columns(images)
        if len(part) == 0:
            raise RecipeError(f"{key}: no {name} rows are left of {data.path}; check {key}.filter and {key}.transform.")
        made.append(part)
    return made[0], made[1]


def put_column(rows: "Dataset", name: str, values: list) -> "Dataset":
    """Rows with `values` as the column `name`, new or replaced.

    `Dataset.map` would guess the type from the first thousand values, which may all be null.
    """
    from datasets import Dataset

    others = [column for column in rows.column_names if column != name]
    if not others:  # a data set without columns has no length
        return Dataset.from_dict({name: values})
    return rows.select_columns(others).add_column(name, values)


def need_column(data: Data, rows: "Dataset", column: str, purpose: str, key: str) -> None:
    """Refuse rows without a column; the message says its purpose, and the alternatives."""
    if column not in rows.column_names:
        raise RecipeError(
            f"{key}: {data.path} has no column {column} ({purpose}); it has: {', '.join(rows.column_names)}. "
            f"To use one of them, set {key}.columns.{column}=NAME."
        )


def _load(data: Data, key: str) -> Any:
    import datasets
    from datasets import load_dataset, load_from_disk

    path = locate_data(f"{key}.path", data.path)
    try:
        if path is None:
            return load_dataset(**hub_arguments(data))
        if path.is_file():
            # pandas would read the words NA, null and None as missing values.
            more = {"keep_default_na": False, "na_values": [""]} if path.suffix == ".csv" else {}
            return load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split="train", **more)
        if any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
            return load_from_disk(str(path))
        # Only a README, as in a copy of a Hub data set, defines configurations.
        return load_dataset(str(path), data.config if (path / "README.md").is_file() else None)
    except Exception as error:  # datasets raises many types, such as for unreadable files and unknown ids
        cause = error.__cause__ or error
        check_cache(cause, Path(datasets.config.HF_DATASETS_CACHE), "HF_DATASETS_CACHE")
        check_cache(cause, hub_cache(), "HF_HUB_CACHE")
        what = "empty or unreadable" if path is not None else "not available"
        if "scripts are no longer supported" in str(cause):
            what = f"a script, which `datasets` does not run; take the Hub's copy of its rows: {key}.revision={PARQUET}"
        said = ": ".join(filter(None, (type(cause).__name__, " ".join(str(cause).split())[:300])))
        raise RecipeError(f"{key}.path: {data.path} is {what} ({said}).") from error


def _filter(data: Data, rows: "Dataset", key: str) -> "Dataset":
    has = ", ".join(rows.column_names)
    for column, value in data.filter.items():
        if column not in rows.column_names:
            raise RecipeError(f"{key}.filter: {data.path} has no column {column!r}; it has: {has}.")
        rows = rows.filter(lambda row, column=column, value=value: row[column] == value)
    if len(rows) == 0:
        raise RecipeError(f"{key}: {data.path} has no rows{f' that pass {key}.filter' if data.filter else ''}.")
    return rows


def _transform(transform: Callable, rows: "Dataset", where: str) -> "Dataset":
    from pyarrow import ArrowException

    def apply(batch: Any) -> dict[str, list]:
        with running_user_code(f"{where} failed on rows with the columns {', '.join(batch)}"):
            return transform(dict(batch))

    try:
        # Without the cache, which would miss a change of the user's function.
        return rows.map(apply, batched=True, remove_columns=rows.column_names, load_from_cache_file=False)
    except (ArrowException, TypeError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{where} must return a dict of lists of equal length: {str(error)[:400]}") from error


def _with_our_names(data: Data, rows: "Dataset", key: str) -> "Dataset":
    """Rows with a copy of every column or nested value that `data.columns` maps to one of our names."""
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


def _inside(value: Any, path: list[str], where: str, outer: str) -> Any:
    """The value at a path of names and indices in a nested value; null inside null."""
    for step in path:
        if value is None:
            return None
        try:
            value = value[int(step)] if isinstance(value, list) else value[step]
        except (KeyError, IndexError, ValueError, TypeError):
            raise RecipeError(f"{where}: {outer} has no {step!r} inside; it is {str(value)[:100]}.") from None
        outer = f"{outer}.{step}"
    return value
