"""Run folders: when a run is finished, when it is reused, and that nothing is lost."""

import json
import os

import psutil
import pytest

from rlhf_recipes.launch.setup import Setup
from rlhf_recipes.recipe.graph import input_stages, stages_to_run
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.runs.files import is_finished, read_manifest, require_stage
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.system.files import mark_complete, sha256_of


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


def change_manifest(run: Run, **process) -> None:
    manifest = read_manifest(run.path)
    manifest["process"] |= process
    (run.path / "manifest.json").write_text(json.dumps(manifest))


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


def test_a_run_of_another_process_is_refused(killed, load, caplog):
    parent = psutil.Process(os.getppid())
    change_manifest(killed, pid=parent.pid, since=parent.create_time())
    for settings in ([], ["sft.trainer.max_steps=9"]):
        with pytest.raises(RecipeError, match=f"process {parent.pid} still works on this run"):
            Run(load(*settings), "sft").start()
    change_manifest(killed, since=parent.create_time() - 100)  # a later process with the same number
    assert Run(load(), "sft").start() is not None and not caplog.records
    change_manifest(killed, host="elsewhere")
    assert Run(load(), "sft").start() is not None
    assert "was started on elsewhere" in caplog.text


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
    (run.path / "manifest.json").write_text('{"status": "fin')
    with pytest.raises(RecipeError, match="manifest.json cannot be read"):
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
