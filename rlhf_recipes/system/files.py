"""Files that are complete or absent, and one clear error for a disk that cannot be written. Nothing here imports torch."""

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf_recipes.recipe.schema import RecipeError

logger = logging.getLogger(__name__)

MARKER = "complete.json"
"""Last file of a checkpoint: names the checkpoint's files, with their sizes and checksums."""

DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""No space, quota used up, file too large, read-only: only the user can mend these."""


def write_whole(path: Path, text: str) -> None:
    """Write a file so that at every moment either the old or the new content is on the disk, never a part of one."""
    temporary = path.with_name(f".{path.name}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            _sync(file)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def stamp_of(path: Path) -> tuple[str, int, int]:
    """A file's name, bytes and time of change (ns). It tells files apart that are too large to hash, such as weights."""
    return path.name, path.stat().st_size, path.stat().st_mtime_ns


def read_json(path: Path) -> Any:
    """The value in a JSON file that a run has written.

    Raises:
        RecipeError: The file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{path} cannot be read ({error}); delete the folder {path.parent} and give its command again."
        ) from error


def read_lines(path: Path, most: int | None = None, skip_damaged: bool = False) -> list[Any]:
    """The values in a jsonl file, one a line; empty lines are skipped. A line ends at a line break only, not at U+2028.

    Args:
        path: The file.
        most: Read only the first so many lines.
        skip_damaged: Leave out lines that are not JSON, such as half a line that a killed writer left.
    """
    found = []
    with open(path, "rb") as file:
        for line in islice(filter(bytes.strip, file), most):
            try:
                found.append(json.loads(line))
            except (ValueError, RecursionError):
                if not skip_damaged:
                    raise
    return found


def as_lines(rows: Iterable[dict]) -> str:
    """The text of a jsonl file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def append_lines(path: Path, rows: Iterable[dict]) -> None:
    """Append to a jsonl file, all lines in one write."""
    text = as_lines(rows)
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def without_nan(value: Any) -> Any:
    """`value`, or None in place of NaN and infinity, which JSON cannot express."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def mark_complete(checkpoint: Path, setup: dict[str, Any]) -> None:
    """Flush every file of a checkpoint to the disk, then write `MARKER`, which says that the checkpoint is complete.

    All processes must have finished writing to it. `setup` is that of these processes.
    """
    files = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        with open(path, "r+b") as file:
            _sync(file)
            files[path.relative_to(checkpoint).as_posix()] = {"size": path.stat().st_size, "crc32": _crc32(path)}
    write_whole(checkpoint / MARKER, json.dumps({"setup": setup, "files": files}, indent=2))
    if hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder
        folder = os.open(checkpoint, os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, complete or not, by step."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def last_complete(folder: Path) -> Path | None:
    """The last checkpoint in a folder whose files are all as they were saved. Damaged ones get a warning."""
    for checkpoint in reversed(checkpoints(folder)):
        damage = _damage(checkpoint)
        if damage is None:
            return checkpoint
        logger.warning("%s is left out, it is not complete: %s.", checkpoint, damage)
    return None


def saved_setup(checkpoint: Path) -> dict[str, Any]:
    """The setup of the processes that saved a complete checkpoint."""
    return read_json(checkpoint / MARKER)["setup"]


@contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """Turns a full or read-only disk into a `RecipeError`; all code that writes to a run folder runs inside.

    `what` is the subject of the message, such as `the final model`.

    Raises:
        RecipeError: It cannot be written. The message says where, why, how much space is free and what is intact.
    """
    try:
        yield
    except Exception as error:
        if not _cannot_write(error):
            raise
        raise RecipeError(write_error(what, path, error)) from error


def write_error(what: str, path: Path, error: Exception) -> str:
    """The message for the user when `path` cannot be written."""
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    whole = [c for c in checkpoints(path) + checkpoints(path.parent) if c != path and (c / MARKER).exists()]
    kept = f"earlier checkpoints are intact (last: {whole[-1].name})" if whole else "there is no earlier checkpoint"
    # torch and safetensors have no readable reason; their text goes to log.txt.
    reason = error.strerror if isinstance(error, OSError) and error.strerror else "only a part of it was written"
    return (
        f"{what} could not be written to {path}: {reason}; {shutil.disk_usage(there).free / 2**30:.2f} GiB are free "
        f"there, {kept}. Free space or make the folder writable, then give the same command again."
    )


def _cannot_write(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno is not None  # an upload's network error has no errno
    # torch.save and safetensors raise their own errors, which hold the system's error only in their text.
    text = str(error)
    return "inline_container" in text or "PytorchStreamWriter" in text or "os error" in text


def _damage(checkpoint: Path) -> str | None:
    try:
        files = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"it has no {MARKER}, so saving it was interrupted"
    except (ValueError, KeyError):
        return f"its {MARKER} is damaged"
    for name, saved in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != saved["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {saved['size']}"
        if _crc32(path) != saved["crc32"]:
            return f"the content of {name} has changed since it was saved"
    return None


def _crc32(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(2**22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())
