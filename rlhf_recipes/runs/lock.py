"""Keeps a second process out of a run's folder, and keeps the temporary files of a stage beside it."""

import hashlib
import logging
import os
import platform
import tempfile
from contextlib import suppress
from pathlib import Path
from shutil import rmtree
from typing import IO

from rlhf_recipes.recipe.schema import RecipeError

logger = logging.getLogger(__name__)

LONGEST_FOLDER = 60
"""Most characters of a temporary folder: libraries make sockets below it, and the system takes 107 for their paths."""


class RunLock:
    """Keeps a second process out of a run's folder; the system releases it when this process dies.

    It is a POSIX lock (`fcntl.lockf`): forked workers do not inherit it, and it holds over NFS. Windows has none. The
    file lies beside the folder, which may be moved aside meanwhile, and stays there.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Take the lock; raises a `RecipeError` if another process has it."""
        try:
            import fcntl

            path = self._folder.with_name(f".{self._folder.name}.lock")
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - closing it releases the lock
        except (ImportError, OSError):  # Windows; or the next write to the folder reports the error
            return
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._file.seek(0)
            pid, _, host = self._file.read().partition(" ")
            self.release()
            where = "" if host == platform.node() else f" on {host}"
            raise RecipeError(
                f"{self._folder}: process {pid}{where} still works on this run. Wait for it, or stop it with "
                f"kill {pid}; then the same command resumes the run."
            ) from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): start no second process on this run.", self._folder, error)
            return
        with suppress(OSError):  # a full disk: only the message of a second process suffers
            self._file.truncate(0)
            self._file.write(f"{os.getpid()} {platform.node()}")
            self._file.flush()

    @property
    def is_taken(self) -> bool:
        return self._file is not None

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class TemporaryFiles:
    """A folder beside a run's for the temporary files of its stage, which a killed process would leave in /tmp.

    Only for a process that ends with its stage: libraries keep such files until then. Each process of a launch has a
    folder of its own below it, which another one's end leaves alone. If the path is too long, the folder lies in /tmp
    under a name that the next start of the same stage finds.
    """

    def __init__(self, folder: Path):
        self.path = folder.absolute().with_name(f".{folder.name}.tmp")
        if len(str(self.path)) > LONGEST_FOLDER:
            name = hashlib.sha256(str(self.path).encode()).hexdigest()[:12]
            self.path = Path(tempfile.gettempdir()) / f"rlhf-recipes-{name}"
        self._own: Path | None = None

    def sweep(self) -> None:
        """Delete what a killed process of this stage has left."""
        rmtree(self.path, ignore_errors=True)

    def use(self) -> None:
        """Send all temporary files that this process and its children make from now on to the folder."""
        own = self.path / os.environ.get("RANK", "0")
        with suppress(OSError):  # the next write to the run's folder reports the error
            own.mkdir(mode=0o700, parents=True, exist_ok=True)
            if own.stat().st_uid != getattr(os, "getuid", int)():  # in /tmp, another user may have made it
                return
            self._own = own
            # Compiled kernels stay where the next run finds them.
            kernels = os.path.join(tempfile.gettempdir(), f"torchinductor_{os.environ.get('USER', 'user')}")
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", kernels)
            os.environ["TMPDIR"] = tempfile.tempdir = str(own)

    def leave(self) -> None:
        """Delete this process's temporary files, and the folder after the last process."""
        if self._own is not None:
            rmtree(self._own, ignore_errors=True)
            with suppress(OSError):  # another process still has files there
                self.path.rmdir()
