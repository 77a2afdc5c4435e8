"""A run folder, `<runs_dir>/<recipe>/<stage>/`, and its manifest, which records what ran there.

A run is finished only when its manifest says so. The manifest is written last.
"""

import json
import logging
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from rlhf_recipes.launch.checks import require_setup
from rlhf_recipes.launch.setup import Setup, launched
from rlhf_recipes.recipe.graph import stage_settings
from rlhf_recipes.recipe.load import to_yaml
from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.recipe.secrets import redacted
from rlhf_recipes.runs.changes import changed_files, differences
from rlhf_recipes.runs.files import COPY, MANIFEST, PARTS, read_manifest, run_path
from rlhf_recipes.runs.inputs import input_ids
from rlhf_recipes.runs.lock import RunLock, TemporaryFiles
from rlhf_recipes.system import environment
from rlhf_recipes.system.files import checkpoints, last_complete, read_json, step_of, write_whole, writing

logger = logging.getLogger(__name__)

NEEDED = {"settings": dict, "inputs": dict, "id": str}
"""Keys without which a run cannot go on, and the types of their values."""

ALONE = Setup(1, "NO")  # a process without a launcher


class Run:
    """One stage of one recipe, from the empty folder to the finished manifest.

    Args:
        recipe: The checked recipe.
        stage: One of `STAGES`.
        is_main: Whether this process writes; the other ranks of a distributed launch only read.

    Attributes:
        checkpoint: The checkpoint from which the started run resumes; None: a new run.
        lock: The process that runs the stage takes it before `is_done`, and releases it at the end.
        temporary: The place for the temporary files of its process.
    """

    checkpoint: Path | None = None
    _copy: dict[str, Any] | None = None

    def __init__(self, recipe: Recipe, stage: str, is_main: bool = True):
        self.recipe, self.stage, self.is_main = recipe, stage, is_main
        self.path = run_path(recipe, stage)
        self.settings = redacted(json.loads(json.dumps(stage_settings(recipe, stage))))  # as the manifest holds them
        self.inputs = input_ids(recipe, stage)
        self.lock, self.temporary = RunLock(self.path), TemporaryFiles(self.path)
        self.manifest: dict[str, Any] = {}
        self.results: dict[str, Any] = {}
        self.findings: list[str] = []
        """What a reader of the finished run must know, such as a collapse; shown wherever the run is shown."""
        self._started = time.monotonic()

    def is_done(self, overwrite: bool = False) -> bool:
        """Whether this very run has finished already.

        Raises:
            RecipeError: The folder holds another run, and `overwrite` is False.
        """
        manifest = self._earlier(overwrite)
        if manifest is None:
            if self.path.exists() and any(p.name != f".{MANIFEST}" for p in self.path.iterdir()) and not overwrite:
                raise RecipeError(f"{self.path} holds files that are no run. Set another runs_dir or name.")
            return False
        found = self._differences_to(manifest)
        if manifest["status"] == "finished":  # an unfinished run only warns, see record_sources
            found += changed_files(manifest)
        if found and not overwrite and manifest["status"] != "failed":  # a failed run is not worth keeping
            raise RecipeError(
                f"{self.path} holds a run with other settings:\n  "
                + "\n  ".join(found)
                + f"\nKeep both: add name={self.recipe.name}-2 (or runs_dir=...). Move the old one aside: add --overwrite."
            )
        return manifest["status"] == "finished" and not found

    def _earlier(self, overwrite: bool) -> dict[str, Any] | None:
        """The manifest in the folder; in place of a damaged or missing one, the copy in the last complete checkpoint.

        Raises:
            RecipeError: It is damaged, there is no copy, and `overwrite` is False.
        """
        file, manifest = self.path / MANIFEST, None
        with suppress(RecipeError):
            manifest = read_manifest(self.path)
        if manifest and all(isinstance(manifest.get(key), kind) for key, kind in NEEDED.items()):
            return manifest
        found = f"{file} is {'damaged' if file.is_file() else 'missing'}"
        if self._copy is None and (checkpoint := last_complete(self.path)) and (checkpoint / COPY).is_file():
            self._copy = read_json(checkpoint / COPY)
            logger.warning("%s; the run goes on with the copy in %s.", found, checkpoint.name)
        if self._copy is None and file.is_file() and not overwrite:
            raise RecipeError(f"{found}, and no checkpoint has a copy of it. Begin anew: add --overwrite.")
        return self._copy

    def start(self, setup: Setup = ALONE) -> Path | None:
        """Resume this very run from its last complete checkpoint or its `PARTS`, or else make the folder of a new run.

        Returns the checkpoint, None for a new run. A new run begins with the resolved recipe and a manifest that says `running`. The files of an earlier attempt
        move to `<stage>.<time>`; nothing is deleted.

        Args:
            setup: The setup of this launch.

        Raises:
            RecipeError: Another setup saved the checkpoint, or the folder cannot be written.
        """
        if not self.is_main:
            return None
        earlier = self._earlier(overwrite=True)  # `is_done` has refused what must not be moved aside
        with writing("runs_dir: the run's folder", self.path):
            if earlier is not None and self._can_resume(earlier):
                if self.checkpoint is not None:
                    require_setup(self.checkpoint, setup)
                self._resume(earlier)
            else:
                self._begin()
        return self.checkpoint

    def _can_resume(self, manifest: dict[str, Any]) -> bool:
        if manifest["status"] == "finished" or self._differences_to(manifest):
            return False
        self.checkpoint = last_complete(self.path)
        return self.checkpoint is not None or (self.path / PARTS).is_dir()

    def _resume(self, manifest: dict[str, Any]) -> None:
        step = 0 if self.checkpoint is None else step_of(self.checkpoint)
        for later in checkpoints(self.path):
            if step_of(later) > step:  # damaged, or it would be the last complete one
                shutil.rmtree(later)
        shutil.rmtree(self.path / ".final", ignore_errors=True)  # an incomplete final model
        manifest.pop("error", None)
        manifest.setdefault("resumed", []).append({"time": _now()} | ({"step": step} if self.checkpoint else {}))
        self.manifest = manifest | {"status": "running"}
        self._write()

    def _begin(self) -> None:
        if self.path.exists() and any(self.path.iterdir()):
            self.path.rename(self.path.with_name(f"{self.stage}.{datetime.now():%Y%m%d-%H%M%S-%f}"))
        self.path.mkdir(parents=True, exist_ok=True)
        self.manifest = {
            "recipe": self.recipe.name,
            "stage": self.stage,
            "status": "running",
            "id": uuid4().hex,
            "settings": self.settings,
            "inputs": self.inputs,
            "seed": self.recipe.seed,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "started": _now(),
            "versions": environment.versions(),
            "git_commit": environment.git_commit(),
            "hardware": environment.hardware(),
        }
        self._write()  # first: `is_done` refuses a folder that has files but no manifest
        (self.path / "recipe.yaml").write_text(to_yaml(self.recipe), encoding="utf-8")

    def check_precision(self, mixed_precision: str) -> None:
        """Refuse to resume in another precision. Call it before models are loaded: DeepSpeed would crash."""
        if self.checkpoint is not None:
            require_setup(self.checkpoint, replace(launched(), mixed_precision=mixed_precision))

    def record_setup(self, setup: Setup) -> None:
        """Write the setup in which the run trains into the manifest."""
        if self.is_main:
            self.manifest["setup"] = setup.to_dict()
            self._write()

    def record_sources(self, sources: dict[str, Any]) -> None:
        """Write the files that the run loads into the manifest; warn if a resumed run loads different ones."""
        if not self.is_main:
            return
        earlier = self.manifest.get("sources")
        if earlier is None:
            self.manifest["sources"] = sources
        elif earlier != sources:
            self.manifest["resumed"][-1]["sources"] = sources
            changed = "; ".join(differences(earlier, sources))
            logger.warning("%s resumes with other files than it began with: %s", self.path, changed)
        self._write()

    def finish(self) -> None:
        """Write into the manifest that the run is finished. Nothing may be written to the folder after this."""
        if self.is_main:
            self._end("finished")

    def stop(self) -> None:
        """Write into the manifest that the run was asked to stop. The same command resumes it."""
        self._give_up("stopped")

    def fail(self, error: BaseException) -> None:
        """Write the error that ended the run into the manifest. All files stay."""
        self._give_up("failed", error=f"{type(error).__name__}: {error}"[:2000])

    def _give_up(self, status: str, **more: str) -> None:
        if not self.is_main or not self.manifest or self.manifest["status"] == "finished":
            return
        self.manifest |= more
        try:
            self._end(status)
        except RecipeError as error:  # the caller has the more important error
            logger.info("the manifest still says that the run is running: %s", error)

    def adopt(self, folder: Path) -> None:
        """Move the complete files of `folder` into the run folder, so that it never holds a partly written model."""
        for path in sorted(folder.iterdir()):
            target = self.path / path.name
            if target.is_dir():  # left by a killed attempt; `replace` takes an empty folder only
                shutil.rmtree(target)
            path.replace(target)
        folder.rmdir()

    @property
    def seconds(self) -> float:
        """Wall time since this object was made."""
        return time.monotonic() - self._started

    def _end(self, status: str) -> None:
        self.manifest |= {
            "status": status,
            "results": self.results,
            "findings": self.findings,
            "wall_seconds": round(self.seconds, 1),
            "peak_memory_gib": environment.peak_memory_gib(),
            "peak_gpu_memory_gib": environment.peak_gpu_memory_gib(),
        }
        self._write()

    def _write(self) -> None:
        with writing("the manifest", self.path / MANIFEST):
            write_whole(self.path / MANIFEST, json.dumps(redacted(self.manifest), indent=2))

    def _differences_to(self, manifest: dict[str, Any]) -> list[str]:
        found = {"settings": redacted(manifest["settings"]), "inputs": manifest["inputs"]}
        return differences(found, {"settings": self.settings, "inputs": self.inputs})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
