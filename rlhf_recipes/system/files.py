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
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.recipe.secrets import without_known

logger = logging.getLogger(__name__)

CHECKSUM = "crc32"  # key of a JSON object's own checksum

MARKER = "complete.json"
"""Last file of a checkpoint: names the checkpoint's files, with their sizes and checksums."""

DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""No space, quota used up, file too large, read-only: only the user can mend these."""


def write_whole(path: Path, text: str) -> None:
    """Write a file so that at every moment either the old or the new content is on the disk, never a part of one."""
    temporary = path.with_name(f".{path.name}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(without_known(text))
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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file that a run has written; in a file of `sealed` text, without its checksum.

    Raises:
        RecipeError: The file is missing or damaged.
    """
    try:
        value = json.loads(path.read_bytes())
        checksum = value.pop(CHECKSUM, None)  # earlier versions wrote none
        if checksum not in (None, _checksum(value)):
            raise ValueError("its content has changed since it was written")
        return value
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise RecipeError(
            f"{path} cannot be read ({error}); move the folder {path.parent} aside and give its command again."
        ) from error


def sealed(value: dict[str, Any]) -> str:
    """The text of a JSON file with a checksum, by which `read_json` finds any damage."""
    value = json.loads(without_known(json.dumps(value)))
    return json.dumps(value | {CHECKSUM: _checksum(value)}, indent=2)


def read_lines(path: Path, most: int | None = None) -> list[Any]:
    """The values in a jsonl file, one a line; empty lines are skipped. A line ends at a line break only, not at U+2028.

    Args:
        path: The file.
        most: Read only the first so many lines.
    """
    with open(path, "rb") as file:
        return [json.loads(line) for line in islice(filter(bytes.strip, file), most)]


def read_log(path: Path, needed: Collection[str], most: int | None = None) -> list[dict[str, Any]]:
    """The whole lines of a jsonl file that a run has written; none without a file.

    A warning says which other lines are left out. A killed writer leaves half a line at the end, which gets no warning.

    Args:
        path: The file.
        needed: Keys that every whole line has.
        most: Read only the first so many lines.
    """
    if not path.is_file():
        return []
    kept, lost = [], []
    with open(path, "rb") as file:
        for number, line in enumerate(islice(file, most), 1):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if isinstance(value, dict) and value.keys() >= set(needed):
                kept.append(value)
            elif line.strip() and line.endswith(b"\n"):
                lost.append(number)
    if lost:
        logger.warning("%s: %d damaged lines are left out, the first is line %d.", path, len(lost), lost[0])
    return kept


def as_lines(rows: Iterable[dict]) -> str:
    """The text of a jsonl file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def append_lines(path: Path, rows: Iterable[dict]) -> None:
    """Append to a jsonl file, all lines in one write."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(without_known(as_lines(rows)))


def without_nan(value: Any) -> Any:
    """`value`, or None in place of NaN and infinity, which JSON cannot express."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def mark_complete(checkpoint: Path, setup: dict[str, Any]) -> None:
    """Flush every file of a checkpoint to the disk, then write `MARKER`, which says that the checkpoint is complete.

    All processes must have finished writing to it. `setup` is that of these processes.
    """
    files = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        files[path.relative_to(checkpoint).as_posix()] = flushed(path)
    write_whole(checkpoint / MARKER, sealed({"setup": setup, "files": files}))
    if hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder
        folder = os.open(checkpoint, os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)


def flushed(path: Path) -> dict[str, int]:
    """Flushes a file to the disk; returns its size and checksum."""
    with open(path, "r+b") as file:
        _sync(file)
    return {"size": path.stat().st_size, "crc32": crc32_of(path)}


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
    except RecipeError:
        raise
    except Exception as error:
        is_systems = isinstance(error, OSError) and error.errno is not None  # an upload's network error has no errno
        if not (is_systems or is_disk_error(error) or "os error" in str(error)):  # safetensors' words
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


def is_disk_error(error: BaseException | None) -> bool:
    """Whether an error, or one that it comes from, says that a disk takes no more; libraries have own errors for that."""
    if error is None:
        return False
    said = ["PytorchStreamWriter", "inline_container", *map(os.strerror, DISK_ERRNOS)]
    is_one = any(part in str(error) for part in said) or getattr(error, "errno", None) in DISK_ERRNOS
    return is_one or is_disk_error(error.__cause__ or error.__context__)


def _damage(checkpoint: Path) -> str | None:
    if not (checkpoint / MARKER).is_file():
        return f"it has no {MARKER}, so saving it was interrupted"
    try:
        for name, saved in read_json(checkpoint / MARKER)["files"].items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != saved["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {saved['size']}"
            if crc32_of(path) != saved["crc32"]:
                return f"the content of {name} has changed since it was saved"
    except OSError as error:
        return f"it cannot be read ({error})"
    except (RecipeError, LookupError, AttributeError, TypeError):  # a list where an object should be, and the like
        return f"its {MARKER} is damaged"
    return None


def _checksum(value: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def crc32_of(path: Path) -> int:
    """The checksum of a file, of any size."""
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(2**22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())
