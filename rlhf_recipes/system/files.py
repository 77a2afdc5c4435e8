"""Files that are whole or not there, and one clear error for a disk that takes no more. Nothing here imports torch."""

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf_recipes.recipe.schema import RecipeError

logger = logging.getLogger(__name__)

MARKER = "complete.json"
"""Last file of a checkpoint: says which files belong to it, with their sizes and checksums."""

DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""No space, quota used up, file too large, read-only: for the user to mend, whoever was writing."""


def write_whole(path: Path, text: str) -> None:
    """Write a file so that at every moment the old or the new one stands there, never half of one."""
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


def read_json(path: Path) -> Any:
    """What a finished stage has written.

    Raises:
        RecipeError: The file is not there any more, or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read ({error}); delete {path.parent} and make it again.") from error


def read_lines(path: Path, most: int | None = None) -> list[Any]:
    """What the lines of a jsonl file hold, or the first so many; a line ends with a line break, and not at U+2028."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, most)]


def append_lines(path: Path, lines: list[dict]) -> None:
    """Append to a jsonl file, all lines in one write."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def without_nan(value: Any) -> Any:
    """`value`, or None for a NaN or an infinity, which JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def mark_complete(checkpoint: Path, setup: dict[str, Any]) -> None:
    """Bring every file of a checkpoint to the disk, then say in `MARKER` that it is whole.

    Args:
        checkpoint: Its folder; all processes are done with it.
        setup: How the processes that saved it were set up.
    """
    files = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        with open(path, "r+b") as file:
            _sync(file)
            files[path.relative_to(checkpoint).as_posix()] = {"size": path.stat().st_size, "crc32": _crc32(path)}
    write_whole(checkpoint / MARKER, json.dumps({"setup": setup, "files": files}, indent=2))
    if hasattr(os, "O_DIRECTORY"):  # not on Windows: there a folder cannot be opened
        folder = os.open(checkpoint, os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, by step."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def last_complete(folder: Path) -> Path | None:
    """The last checkpoint in a folder whose files are all as they were saved; torn ones are left out with a warning."""
    for checkpoint in reversed(checkpoints(folder)):
        damage = _damage(checkpoint)
        if damage is None:
            return checkpoint
        logger.warning("%s is left out, it is not whole: %s.", checkpoint, damage)
    return None


def saved_setup(checkpoint: Path) -> dict[str, Any]:
    """How the processes were set up that saved a whole checkpoint."""
    return json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["setup"]


@contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """Around everything that writes to a run folder.

    Args:
        what: Subject of the message: `checkpoint-20`, `the final model`.
        path: File or folder that is written, inside the run folder or it.

    Raises:
        RecipeError: It cannot be written; says where, why, how much is free and what is still there.
    """
    try:
        yield
    except Exception as error:
        if not _cannot_write(error):
            raise
        raise RecipeError(write_error(what, path, error)) from error


def write_error(what: str, path: Path, error: Exception) -> str:
    """What the user has to know when `path` cannot be written."""
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    whole = [c for c in checkpoints(path) + checkpoints(path.parent) if c != path and (c / MARKER).exists()]
    kept = f"earlier checkpoints are intact (last: {whole[-1].name})" if whole else "there is no earlier checkpoint"
    # What torch and safetensors say instead of the system's word is for log.txt.
    reason = error.strerror if isinstance(error, OSError) and error.strerror else "only a part of it was taken"
    return (
        f"{what} could not be written to {path}: {reason}; {shutil.disk_usage(there).free / 2**30:.2f} GiB are free "
        f"there, {kept}. Make it writable, with room for that, then give the same command again."
    )


def _cannot_write(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno is not None  # without: the network's, from uploading
    # torch.save and safetensors have errors of their own, with the system's only in their text.
    text = str(error)
    return "inline_container" in text or "PytorchStreamWriter" in text or "os error" in text


def _damage(checkpoint: Path) -> str | None:
    try:
        files = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"without {MARKER}, so saving it did not come to its end"
    except (ValueError, KeyError):
        return f"its {MARKER} is damaged"
    for name, saved in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != saved["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {saved['size']}"
    for name, saved in files.items():
        if _crc32(checkpoint / name) != saved["crc32"]:
            return f"{name} has another content than was saved"
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
