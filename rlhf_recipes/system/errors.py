"""One sentence about a library's error, with the place in the recipe that it comes from."""

import re
import traceback
from collections.abc import Mapping
from typing import Any

LONGEST = 600
"""Most characters of the library's own text in the sentence."""

INNERMOST = 4
"""Number of innermost frames to search for a key."""


def explain(error: BaseException, stage: str, trainer: dict[str, Any]) -> str:
    """The text of a library's error, after the place in the recipe where the user should look first.

    The place is a key of the stage's `trainer` section that the error's text or the innermost frames name, else the
    row that `datasets` was mapping, else the stage. `trainer` is the stage's `trainer` section in the recipe.
    """
    text = " ".join(str(error).split())
    shown = f"{type(error).__name__}: {text[:LONGEST]}" if text else type(error).__name__
    key = _named_key(text, trainer) or _read_key(error, trainer)
    if key is not None:
        return f"{stage}.trainer.{key}: {shown}"
    row = _mapped_row(error)
    return f"{stage}: {row}: {shown}" if row else f"{stage}: {shown}"


def _named_key(text: str, trainer: dict[str, Any]) -> str | None:
    """The key whose name, or an option in its value, is a whole word of `text`."""
    words = {key: [str(key)] for key in trainer}
    for key, value in trainer.items():
        if isinstance(value, dict):
            words[key] += map(str, value)
        elif isinstance(value, str):
            words[key] += re.findall(r"(\w+)\s*=", value)  # such as optim_args: "betas=0.9"
            words[key] += [value] if "/" in value else []  # a path, or a Hub id
    for key, names in words.items():
        if any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) for name in names):
            return key
    return None


def _read_key(error: BaseException, trainer: dict[str, Any]) -> str | None:
    """The key that the innermost source lines read as `args.KEY`, or that their functions' names contain."""
    frames = traceback.extract_tb(error.__traceback__)[-INNERMOST:]
    lines = "\n".join(frame.line or "" for frame in frames)
    names = " ".join(frame.name for frame in frames)
    read = [key for key in trainer if re.search(rf"\bargs\.{re.escape(str(key))}\b", lines)]
    return next(iter(read + [key for key in trainer if f"_{key}" in names]), None)


def _mapped_row(error: BaseException) -> str | None:
    """The row that `Dataset.map` was processing, with the beginning of its content."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module, found = frame.f_globals.get("__name__", ""), frame.f_locals
        index, row = found.get("indices"), found.get("inputs")  # in batched mode, a list and a batch
        if module.startswith("datasets.") and isinstance(index, int) and isinstance(row, Mapping):
            return f"row {index} of the data, {dict(row)!r:.200}"
    return None
