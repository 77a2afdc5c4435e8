"""A run folder, `<runs_dir>/<recipe>/<stage>/`, and the manifest in it that says what happened there.

A folder counts as finished only when its manifest says so, and the manifest is written last.
"""

import json
import logging
import os
import platform
import shutil
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from rlhf_recipes.launch.setup import Setup, launched, require_setup
from rlhf_recipes.recipe.graph import eval_models, input_stages, stage_settings
from rlhf_recipes.recipe.load import to_yaml
from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.runs.files import MANIFEST, PARTS, read_manifest, run_path
from rlhf_recipes.system.environment import (
    git_commit,
    hardware,
    is_alive,
    peak_gpu_memory_gib,
    peak_memory_gib,
    this_process,
    versions,
)
from rlhf_recipes.system.files import (
    checkpoints,
    last_complete,
    sha256_of,
    step_of,
    write_whole,
    writing,
)

logger = logging.getLogger(__name__)

ALONE = Setup(1, "NO")
"""The setup of a launch without a launcher."""


class Run:
    """One stage of one recipe, from the empty folder to the finished manifest.

    Args:
        recipe: The checked recipe.
        stage: One of `STAGES`.
        is_main: Whether this process writes; the other ranks of a distributed launch only read.

    Attributes:
        checkpoint: Where the run goes on from, once it has started; None when it starts anew.

    Raises:
        RecipeError: The folder holds a run with other settings, and `overwrite` was not asked for.
    """

    checkpoint: Path | None = None

    def __init__(self, recipe: Recipe, stage: str, is_main: bool = True):
        self.recipe, self.stage, self.is_main = recipe, stage, is_main
        self.path = run_path(recipe, stage)
        self.settings = stage_settings(recipe, stage)
        self.inputs = _inputs(recipe, stage)
        self.results: dict[str, Any] = {}
        self._started = time.monotonic()

    def is_done(self, overwrite: bool = False) -> bool:
        """Whether this very run has finished already.

        Raises:
            RecipeError: Another run is in the folder, and `overwrite` is False.
        """
        manifest = read_manifest(self.path)
        if manifest is None:
            if self.path.exists() and any(p.name != f".{MANIFEST}" for p in self.path.iterdir()) and not overwrite:
                raise RecipeError(f"{self.path} holds files of something else. Set another runs_dir or name.")
            return False
        differences = self._differences_to(manifest)
        if manifest["status"] == "finished":  # one that goes on warns of it, see record_sources
            differences += _changed_files(manifest)
        if differences and not overwrite and manifest["status"] != "failed":  # a failed attempt is nothing to keep
            raise RecipeError(
                f"{self.path} holds a run with other settings:\n  "
                + "\n  ".join(differences)
                + f"\nKeep both: add name={self.recipe.name}-2 (or runs_dir=...). Move the old one aside: add --overwrite."
            )
        return manifest["status"] == "finished" and not differences

    def start(self, setup: Setup = ALONE) -> Path | None:
        """Go on with this very run from its last whole checkpoint or with its `PARTS`, or make the folder for a new one.

        A new one begins with the resolved recipe and a manifest that says `running`; what an earlier attempt left is
        moved to `<stage>.<time>`, never deleted.

        Args:
            setup: Of this launch.

        Returns:
            The checkpoint to go on from, None for a new run.

        Raises:
            RecipeError: Another process is at this run, the checkpoint was saved by processes in another setup,
                or the folder cannot be written.
        """
        if not self.is_main:
            return None
        earlier = read_manifest(self.path)
        if earlier is not None:
            self._refuse_company(earlier)
        goes_on = False
        if earlier is not None and earlier["status"] != "finished" and not self._differences_to(earlier):
            self.checkpoint = last_complete(self.path)
            goes_on = self.checkpoint is not None or (self.path / PARTS).is_dir()
        with writing("runs_dir: the run's folder", self.path):
            if not goes_on:
                self._begin()
            else:
                if self.checkpoint is not None:
                    require_setup(self.checkpoint, setup)
                self._go_on(earlier)
        return self.checkpoint

    def _refuse_company(self, manifest: dict[str, Any]) -> None:
        process = manifest.get("process")
        if manifest["status"] != "running" or process is None:
            return
        if process["host"] != platform.node():
            logger.warning(
                "%s was started on %s (process %d) and has not ended in its manifest; should it still run there, stop "
                "one of the two.",
                self.path,
                process["host"],
                process["pid"],
            )
        elif process["pid"] != os.getpid() and is_alive(process):
            raise RecipeError(
                f"{self.path}: process {process['pid']} is still at this run. Wait for it, or stop it with "
                f"kill {process['pid']}; after that, the same command goes on with it."
            )

    def _go_on(self, manifest: dict[str, Any]) -> None:
        step = 0 if self.checkpoint is None else step_of(self.checkpoint)
        for later in checkpoints(self.path):
            if step_of(later) > step:  # torn, or it would be the one to go on from
                shutil.rmtree(later)
        shutil.rmtree(self.path / ".final", ignore_errors=True)  # half a final model
        manifest.pop("error", None)
        manifest.setdefault("resumed", []).append({"time": _now()} | ({"step": step} if self.checkpoint else {}))
        self.manifest = manifest | {"status": "running", "process": this_process()}
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
            "settings": _plain(self.settings),
            "inputs": self.inputs,
            "seed": self.recipe.seed,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "started": _now(),
            "process": this_process(),
            "versions": versions(),
            "git_commit": git_commit(),
            "hardware": hardware(),
        }
        self._write()  # first: without a manifest, a folder is taken for something else's
        (self.path / "recipe.yaml").write_text(to_yaml(self.recipe), encoding="utf-8")

    def check_precision(self, mixed_precision: str) -> None:
        """Refuse to go on from a checkpoint in another precision; before models are loaded, for DeepSpeed dies of it.

        Raises:
            RecipeError: Says both.
        """
        if self.checkpoint is not None:
            require_setup(self.checkpoint, replace(launched(), mixed_precision=mixed_precision))

    def record_setup(self, setup: Setup) -> None:
        """Write into the manifest in what setup the run trains."""
        if self.is_main:
            self.manifest["setup"] = setup.to_dict()
            with writing("the manifest", self.path / MANIFEST):
                self._write()

    def record_sources(self, sources: dict[str, Any]) -> None:
        """Write into the manifest which files the run loads; a run that goes on warns where they are others by now."""
        if not self.is_main:
            return
        earlier = self.manifest.get("sources")
        if earlier is None:
            self.manifest["sources"] = sources
        elif earlier != sources:
            self.manifest["resumed"][-1]["sources"] = sources
            logger.warning(
                "%s goes on with other files than it began with: %s",
                self.path,
                "; ".join(_differences(earlier, sources)),
            )
        with writing("the manifest", self.path / MANIFEST):
            self._write()

    def finish(self) -> None:
        """Say in the manifest that the run is complete; nothing may be written to the folder after this."""
        if self.is_main:
            with writing("the manifest", self.path / MANIFEST):
                self._end("finished")

    def stop(self) -> None:
        """Say in the manifest that the run was asked to stop; the same command goes on with it."""
        self._give_up("stopped")

    def fail(self, error: BaseException) -> None:
        """Say in the manifest what stopped the run; everything written so far stays."""
        self._give_up("failed", error=f"{type(error).__name__}: {error}"[:2000])

    def _give_up(self, status: str, **more: str) -> None:
        if not self.is_main or not hasattr(self, "manifest") or self.manifest["status"] == "finished":
            return
        self.manifest |= more
        try:
            self._end(status)
        except OSError as error:  # the caller has something more important to say
            logger.info("the manifest still says that the run is running: %s", error)

    def adopt(self, folder: Path) -> None:
        """Move the files of `folder`, complete by now, into the run folder: no half-written model ever stands there."""
        for path in sorted(folder.iterdir()):
            target = self.path / path.name
            if target.is_dir():  # of an attempt that was killed here; only an empty folder can be replaced
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
            "wall_seconds": round(self.seconds, 1),
            "peak_memory_gib": peak_memory_gib(),
            "peak_gpu_memory_gib": peak_gpu_memory_gib(),
        }
        self._write()

    def _write(self) -> None:
        write_whole(self.path / MANIFEST, json.dumps(self.manifest, indent=2))

    def _differences_to(self, manifest: dict[str, Any]) -> list[str]:
        found = {"settings": manifest["settings"], "inputs": manifest["inputs"]}
        return _differences(found, {"settings": _plain(self.settings), "inputs": self.inputs})


def _inputs(recipe: Recipe, stage: str) -> dict[str, str | None]:
    """What a stage builds on -> the id of its run: stages by name; by path, runs elsewhere that eval measures."""
    found = {name: run_path(recipe, name) for name in input_stages(recipe, stage)}
    if stage == "eval":
        named = [*eval_models(recipe).values(), recipe.eval.perplexity_model]
        found |= {path: Path(path) for path in named if path and (Path(path) / MANIFEST).is_file()}
    return {name: _run_id(path) for name, path in found.items()}


def _run_id(path: Path) -> str | None:
    manifest = read_manifest(path)
    return manifest["id"] if manifest and manifest["status"] == "finished" else None


def _plain(values: Any) -> Any:
    return json.loads(json.dumps(values))


def _differences(found: Any, wanted: Any, key: str = "") -> list[str]:
    """`key: found -> wanted` for every leaf in which two nested mappings differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        lines = []
        for name in sorted(found.keys() | wanted.keys()):
            lines += _differences(found.get(name), wanted.get(name), f"{key}.{name}".lstrip("."))
        return lines
    if found == wanted:
        return []
    if key.startswith("inputs."):
        return [f"stage {key.removeprefix('inputs.')} has run anew since"]
    return [f"{key.removeprefix('settings.')}: {found!r} -> {wanted!r}"]


def _changed_files(manifest: dict[str, Any]) -> list[str]:
    """Files of data and of own functions that are there, but not as the run last found them."""
    sources = [part["sources"] for part in (manifest, *manifest.get("resumed", [])) if "sources" in part]
    lines = []
    for key, source in sources[-1].items() if sources else ():
        path = Path(source["path"])
        if "sha256" in source and path.is_file() and sha256_of(path) != source["sha256"]:
            lines.append(f"{key}: {path} has changed since")
    return lines


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
