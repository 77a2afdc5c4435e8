"""One sentence about an error that a library raised, with the place in the recipe that it can be traced to."""

import re
import traceback
from collections.abc import Mapping
from typing import Any

LONGEST = 600
"""Characters of the library's own text that the sentence keeps."""

INNERMOST = 4
"""Frames, from the one that raised, whose source lines may read a key."""


def explain(error: BaseException, stage: str, trainer: dict[str, Any]) -> str:
    """Say where a library's error comes from and what it says.

    The place is a key of the stage's `trainer` section that the error's text names or the source lines that raised it read,
    else the row that `datasets` was mapping, else the stage. A key is found by its name: it is where to look first.

    Args:
        error: What was raised.
        stage: Name of the stage.
        trainer: The stage's `trainer` section, as the recipe has it.
    """
    text = " ".join(str(error).split())
    shown = f"{type(error).__name__}: {text[:LONGEST]}" if text else type(error).__name__
    key = _named_key(text, trainer) or _read_key(error, trainer)
    if key is not None:
        return f"{stage}.trainer.{key}: {shown}"
    row = _mapped_row(error)
    return f"{stage}: {row}: {shown}" if row else f"{stage}: {shown}"


def _named_key(text: str, trainer: dict[str, Any]) -> str | None:
    """The key of which `text` has the name, or an option that its value sets, as a whole word."""
    words = {key: [str(key)] for key in trainer}
    for key, value in trainer.items():
        if isinstance(value, dict):
            words[key] += map(str, value)
        elif isinstance(value, str):
            words[key] += re.findall(r"(\w+)\s*=", value)  # such as optim_args: "betas=0.9"
    for key, names in words.items():
        if any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) for name in names):
            return key
    return None


def _read_key(error: BaseException, trainer: dict[str, Any]) -> str | None:
    """The key that the innermost source lines read, as `args.KEY`."""
    frames = traceback.extract_tb(error.__traceback__)[-INNERMOST:]
    lines = "\n".join(frame.line or "" for frame in frames)
    return next((key for key in trainer if re.search(rf"\bargs\.{re.escape(str(key))}\b", lines)), None)


def _mapped_row(error: BaseException) -> str | None:
    """The row that `Dataset.map` was at, with the beginning of its content."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module, found = frame.f_globals.get("__name__", ""), frame.f_locals
        index, row = found.get("indices"), found.get("inputs")  # a list and a batch where it maps batches
        if module.startswith("datasets.") and isinstance(index, int) and isinstance(row, Mapping):
            return f"row {index} of the data, {dict(row)!r:.200}"
    return None
