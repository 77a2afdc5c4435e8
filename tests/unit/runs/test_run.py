"""Run folders: when a run is finished, when it is reused, and that nothing is lost."""

import json
import os
import signal
import tempfile
from pathlib import Path

import pytest

from rlhf_recipes.launch.setup import Setup
from rlhf_recipes.recipe.graph import input_stages, stages_to_run
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.runs.files import is_finished, read_manifest, read_metrics, require_stage
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.runs.lock import TemporaryFiles
from rlhf_recipes.system.files import MARKER, mark_complete, sha256_of


@pytest.fixture
def load(tmp_path):
    return lambda *overrides: load_recipe("imdb_tiny", [f"runs_dir={tmp_path}", *overrides])


def finish(recipe, stage) -> Run:
    run = Run(recipe, stage)
    run.start()
    run.finish()
    return run


def test_manifest_says_what_ran_where(load):
    run = Run(load(), "sft")
    run.start()
    manifest = read_manifest(run.path)
    assert manifest["status"] == "running" and not is_finished(run.path)
    run.results = {"eval_loss": 1.5}
    run.finish()
    manifest = read_manifest(run.path)
    assert manifest["status"] == "finished" and manifest["results"] == {"eval_loss": 1.5}
    assert manifest["versions"]["trl"].startswith("1.16") and manifest["seed"] == 42
    assert manifest["wall_seconds"] >= 0 and manifest["hardware"]["cores"] >= 1 and manifest["peak_memory_gib"] > 0
    assert load_recipe(str(run.path / "recipe.yaml")) == run.recipe


def test_the_manifest_says_which_files_were_loaded(load):
    run = Run(load(), "sft")
    run.start()
    assert "sources" not in read_manifest(run.path)
    run.record_sources({"data.path": {"reference": "x.jsonl", "revision": None, "path": "x.jsonl"}})
    assert read_manifest(run.path)["sources"] == {
        "data.path": {"reference": "x.jsonl", "revision": None, "path": "x.jsonl"}
    }
    other = Run(load("name=other"), "sft", is_main=False)
    other.record_sources({})
    assert not other.path.exists()


def test_a_finished_run_is_refused_when_a_user_function_has_changed(load, tmp_path):
    """Otherwise the same command would report the result of the old reward."""
    file = tmp_path / "own.py"
    file.write_text("old")
    run = Run(load(), "ppo")
    run.start()
    source = {"reference": "own.py:score", "revision": None, "path": str(file), "sha256": sha256_of(file)}
    run.record_sources({"reward_funcs.0.name": source, "data.path": {"path": "gone.csv", "sha256": "00"}})
    run.finish()
    assert Run(load(), "ppo").is_done()
    file.write_text("new")
    with pytest.raises(RecipeError, match=r"reward_funcs.0.name: .*own.py has changed since[^$]*--overwrite"):
        Run(load(), "ppo").is_done()
    assert not Run(load(), "ppo").is_done(overwrite=True)


def test_a_resumed_run_names_the_files_that_changed(killed, load, caplog):
    first, then = ({"data.path": {"reference": "org/data", "revision": commit}} for commit in ("a1", "b2"))
    for found in (first, first, then):
        run = Run(load(), "sft")
        assert run.start() is not None
        run.record_sources(found)
    manifest = read_manifest(run.path)
    assert manifest["sources"] == first and [entry.get("sources") for entry in manifest["resumed"]] == [
        None,
        None,
        then,
    ]
    assert [record.getMessage() for record in caplog.records] == [
        f"{run.path} resumes with other files than it began with: data.path.revision: 'a1' -> 'b2'"
    ]


def test_special_tokens_and_trusted_code_are_settings(load):
    for stage in ("sft", "reward", "ppo", "rloo", "eval"):
        finish(load(), stage)
        for other in ('special_tokens={pad_token: "[PAD]"}', "trust_remote_code=[org/name]"):
            with pytest.raises(RecipeError, match="other settings:\n  (special_tokens|trust_remote_code)"):
                Run(load(other), stage).is_done()
    finish(load(), "compare")
    assert Run(load('special_tokens={pad_token: "[PAD]"}'), "compare").is_done()


def test_a_finished_run_is_reused_and_changes_elsewhere_do_not_matter(load):
    finish(load(), "sft")
    assert Run(load(), "sft").is_done()
    assert Run(load("rloo.trainer.beta=0.5", "eval.num_prompts=8"), "sft").is_done()


def test_other_settings_are_refused_with_the_difference(load):
    finish(load(), "ppo")
    with pytest.raises(RecipeError) as caught:
        Run(load("ppo.trainer.beta=0.5"), "ppo").is_done()
    assert (
        "ppo.trainer.beta: " in str(caught.value)
        and "-> 0.5" in str(caught.value)
        and "--overwrite" in str(caught.value)
    )
    assert not Run(load("ppo.trainer.beta=0.5"), "ppo").is_done(overwrite=True)


def test_a_run_whose_input_ran_again_is_out_of_date(load):
    finish(load(), "sft")
    finish(load(), "reward")
    finish(load(), "ppo")
    assert Run(load(), "ppo").is_done()
    run = Run(load("sft.trainer.max_steps=9"), "sft")
    run.start()
    run.finish()
    with pytest.raises(RecipeError, match="stage sft has run again"):
        Run(load("sft.trainer.max_steps=9"), "ppo").is_done()


def test_an_earlier_attempt_is_moved_aside_not_deleted(load):
    run = Run(load(), "sft")
    run.start()
    (run.path / "metrics.jsonl").write_text("{}\n")
    run.fail(RuntimeError("boom"))
    assert read_manifest(run.path)["error"] == "RuntimeError: boom" and not is_finished(run.path)
    again = Run(load(), "sft")
    assert not again.is_done()
    again.start()
    aside = [path for path in run.path.parent.iterdir() if path.name.startswith("sft.")]
    assert len(aside) == 1 and (aside[0] / "metrics.jsonl").is_file() and not (run.path / "metrics.jsonl").exists()


@pytest.fixture
def killed(load, tmp_path):
    """A run of stage sft that was killed after its checkpoint of step 20."""
    run = Run(load(), "sft")
    run.start()
    (run.path / "checkpoint-20").mkdir()
    (run.path / "checkpoint-20" / "model.safetensors").write_bytes(b"weights")
    mark_complete(run.path / "checkpoint-20", Setup(1, "NO", mixed_precision="no").to_dict())
    return run


def test_another_precision_than_the_checkpoints_is_refused_before_models_are_loaded(killed, load):
    again = Run(load(), "sft")
    again.check_precision("bf16")  # no checkpoint to resume from yet
    again.start()
    again.check_precision("no")
    with pytest.raises(RecipeError, match="saved by 1 process in mixed_precision no, and this launch is .* bf16"):
        again.check_precision("bf16")


def test_a_killed_run_resumes_in_its_folder(killed, load):
    (killed.path / "checkpoint-30").mkdir()  # incomplete
    (killed.path / ".final").mkdir()
    again = Run(load("rloo.trainer.beta=0.5"), "sft")  # not a setting of this stage
    assert not again.is_done() and again.start() == killed.path / "checkpoint-20" == again.checkpoint
    again.finish()
    manifest = read_manifest(killed.path)
    assert manifest["id"] == killed.manifest["id"] and manifest["status"] == "finished"
    assert [entry["step"] for entry in manifest["resumed"]] == [20] and manifest["resumed"][0]["time"]
    assert not (killed.path / "checkpoint-30").exists() and not (killed.path / ".final").exists()
    assert [path.name for path in killed.path.parent.iterdir()] == ["sft"]


def test_a_run_that_failed_or_was_stopped_resumes_too(killed, load):
    for end in (lambda run: run.fail(RuntimeError("disk full")), Run.stop):
        run = Run(load(), "sft")
        run.start()
        end(run)
        assert read_manifest(run.path)["status"] in ("failed", "stopped")
    run = Run(load(), "sft")
    assert run.start() is not None and "error" not in read_manifest(run.path)
    assert [entry["step"] for entry in read_manifest(run.path)["resumed"]] == [20, 20, 20]


def test_other_settings_inputs_or_processes_do_not_resume(killed, load):
    with pytest.raises(RecipeError, match="other settings"):
        Run(load("sft.trainer.max_steps=9"), "sft").is_done()
    with pytest.raises(RecipeError, match="saved by 1 process, and this launch is 2 processes with DDP"):
        Run(load(), "sft").start(Setup(2, "MULTI"))
    other = Run(load("sft.trainer.max_steps=9"), "sft")
    assert not other.is_done(overwrite=True) and other.start() is None
    assert any((path / "checkpoint-20").is_dir() for path in killed.path.parent.iterdir() if path.name != "sft")


def forked(work) -> int:
    """The id of a forked process that does some work, and then waits to be killed."""
    done, said = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os.write(said, b"x")
            signal.pause()
        finally:
            os._exit(1)
    assert os.read(done, 1) == b"x"
    return pid


def test_a_run_of_another_process_is_refused_until_that_one_is_dead(killed, load):
    """Whatever the settings; and a worker that it forked does not keep the lock."""
    workers, said = os.pipe()
    run = Run(load(), "sft")

    def hold() -> None:
        run.lock.take()
        os.write(said, forked(lambda: None).to_bytes(4, "big"))

    other = forked(hold)
    worker = int.from_bytes(os.read(workers, 4), "big")
    try:
        for settings in ([], ["sft.trainer.max_steps=9"]):
            with pytest.raises(RecipeError, match=f"process {other} still works on this run.*kill {other};"):
                Run(load(*settings), "sft").lock.take()
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    try:
        lock = Run(load(), "sft").lock
        lock.take()
        assert lock.is_taken
        lock.release()
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"3", b"\xff\xfe", b'{"status": "running"}', b"[" * 9000, None],
    ids=["empty", "half", "list", "null", "number", "no text", "few keys", "deep", "missing"],
)
def test_a_damaged_manifest_is_replaced_by_its_copy_in_the_last_checkpoint(content, killed, load, caplog):
    file, checkpoint = killed.path / "manifest.json", killed.path / "checkpoint-20"

    def damage() -> None:
        file.unlink() if content is None else file.write_bytes(content)

    whole = file.read_bytes()
    damage()
    with pytest.raises(RecipeError, match=r"(damaged|cannot be read).*--overwrite|files that are no run"):
        Run(load(), "sft").is_done()
    file.write_bytes(whole)
    (checkpoint / MARKER).unlink()
    (checkpoint / "manifest_copy.json").write_bytes(whole)
    mark_complete(checkpoint, Setup(1, "NO", mixed_precision="no").to_dict())
    damage()
    run = Run(load(), "sft")
    assert not run.is_done() and run.start() == checkpoint
    assert read_manifest(run.path)["id"] == killed.manifest["id"]
    assert [r.getMessage() for r in caplog.records if "goes on with the copy in checkpoint-20" in r.getMessage()]
    damage()
    with pytest.raises(RecipeError, match="other settings"):
        Run(load("sft.trainer.max_steps=9"), "sft").is_done()


def test_a_damaged_manifest_without_a_copy_is_moved_aside_when_asked_to(load):
    run = finish(load(), "sft")
    (run.path / "manifest.json").write_text("{")
    again = Run(load(), "sft")
    assert not again.is_done(overwrite=True) and again.start() is None
    assert [path.name[:4] for path in sorted(run.path.parent.iterdir())] == ["sft", "sft."]


def test_logs_are_read_as_far_as_they_are_whole(tmp_path, caplog):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n\n{"step": 2}\n{"step": 3, "loss"')  # half a line of a killed writer
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}] and not caplog.records
    for harm in (b"{", b"[1]", b"null", b"\xff\xfe", b'{"stop": 2}', b"[" * 9000):
        caplog.clear()
        file.write_bytes(b'{"step": 1}\n' + harm + b'\n{"step": 3}\n')
        assert read_metrics(tmp_path) == [{"step": 1}, {"step": 3}]
        (record,) = caplog.records
        assert "1 damaged lines are left out, the first is line 2" in record.getMessage()
    file.unlink()
    assert read_metrics(tmp_path) == []


def test_temporary_files_go_beside_the_run_and_a_long_path_leaves_room_for_sockets(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    near, far = TemporaryFiles(Path("/runs/tiny/ppo")), TemporaryFiles(Path("/runs") / ("long" * 20) / "ppo")
    assert near.path == Path("/runs/tiny/.ppo.tmp") and far.path.parent == tmp_path
    second = TemporaryFiles(Path("/runs") / ("long" * 20) / "ppo")
    assert far.path == second.path  # the next start finds it
    far.use()
    assert Path(tempfile.mkdtemp()).parent == Path(os.environ["TMPDIR"]) == far.path / "0"
    monkeypatch.setenv("RANK", "1")
    second.use()
    kept = Path(tempfile.mkdtemp())
    far.leave()
    assert kept.is_dir() and list(far.path.iterdir()) == [far.path / "1"]  # its process may still delete them itself
    second.leave()
    assert list(tmp_path.iterdir()) == []
    far.use()
    far.sweep()  # the next start, after a kill
    assert list(tmp_path.iterdir()) == []


def test_the_first_error_is_not_hidden_by_a_manifest_that_cannot_be_written(killed, monkeypatch):
    monkeypatch.setattr(
        "rlhf_recipes.runs.folder.write_whole", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    killed.fail(RuntimeError("the first error"))
    with pytest.raises(RecipeError, match="the manifest could not be written.*No space left.*last: checkpoint-20"):
        killed.finish()


def test_a_start_that_was_cut_off_does_not_stand_in_the_way(load):
    run = Run(load(), "sft")
    run.path.mkdir(parents=True)
    (run.path / ".manifest.json").write_text('{"status":')
    assert not run.is_done()
    run.start()
    assert read_manifest(run.path)["status"] == "running"


def test_a_failed_attempt_does_not_stand_in_the_way_of_other_settings(load):
    run = Run(load(), "sft")
    run.start()
    run.fail(RuntimeError("boom"))
    other = Run(load("sft.trainer.max_steps=9"), "sft")
    assert not other.is_done()
    other.start()
    assert any(path.name.startswith("sft.") for path in run.path.parent.iterdir())


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="runs_dir"):
        Run(load_recipe("imdb_tiny", [f"runs_dir={tmp_path / 'file'}"]), "sft").start()


def test_a_folder_that_holds_no_run_is_not_touched(load):
    run = Run(load(), "sft")
    run.path.mkdir(parents=True)
    (run.path / "thesis.txt").write_text("years of work")
    with pytest.raises(RecipeError, match="files that are no run"):
        run.is_done()
    assert (run.path / "thesis.txt").is_file()


def test_unfinished_stages_are_not_built_upon(load):
    with pytest.raises(RecipeError, match="has not run.*rlhf-recipes sft imdb_tiny"):
        require_stage(load(), "sft", "ppo.policy")
    run = Run(load(), "sft")
    run.start()
    with pytest.raises(RecipeError, match="was not finished"):
        require_stage(load(), "sft", "ppo.policy")
    run.finish()
    assert require_stage(load(), "sft", "ppo.policy") == run.path


def test_a_damaged_manifest_is_named(load):
    run = finish(load(), "sft")
    for content in ('{"status": "fin', '{"stage": "sft"}'):
        (run.path / "manifest.json").write_text(content)
        with pytest.raises(RecipeError, match="manifest.json (cannot be read|is damaged: it has no status)"):
            is_finished(run.path)


def test_other_ranks_write_nothing(load):
    run = Run(load(), "sft", is_main=False)
    run.start()
    run.finish()
    run.fail(RuntimeError())
    assert not run.path.exists()


def test_adopted_files_arrive_whole(load):
    run = Run(load(), "sft")
    run.start()
    (run.path / ".final").mkdir()
    (run.path / ".final" / "config.json").write_text(json.dumps({"a": 1}))
    run.adopt(run.path / ".final")
    assert json.loads((run.path / "config.json").read_text()) == {"a": 1} and not (run.path / ".final").exists()


def test_stages_that_nothing_builds_on_are_left_out(load):
    assert stages_to_run(load()) == ["sft", "reward", "ppo", "rloo", "eval", "compare"]
    assert stages_to_run(load_recipe("imdb_positive")) == ["ppo", "rloo", "eval", "compare"]
    assert stages_to_run(load_recipe("imdb_positive", ["ppo.policy=stage:sft"]))[0] == "sft"
    assert input_stages(load(), "ppo") == ["sft"] and "reward" in input_stages(load(), "eval")
