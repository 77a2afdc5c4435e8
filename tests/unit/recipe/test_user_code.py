"""A recipe alone runs no code: which of the user's files may run, and what is found out without running them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhf_recipes.cli import app
from rlhf_recipes.launch.configs import find_config
from rlhf_recipes.recipe import named_files
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.recipe.trust import add_trusted
from rlhf_recipes.recipe.user_code import find_function, signature_of
from rlhf_recipes.rewards.registry import build_reward_funcs, check_functions

CODE = """
from pathlib import Path
from typing import Literal
Path(__file__).with_name("ran").touch()
from os import system
from functools import partial

def plain(completions, **kwargs):
    return [1.0] * len(completions)

def factory(model, unit: Literal["words", "tokens"] = "words", *, scale=1.0):
    return plain

if True:
    made = partial(plain)

@staticmethod
def decorated(*args):
    return [1.0]

def transform(batch):
    return batch
"""


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """The current folder, a stranger's folder beside it, and an empty list of what the user trusts."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("RLHF_RECIPES_ALLOW_CODE", raising=False)
    monkeypatch.setattr(named_files, "_announced", set())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = set(sys.modules)
    write_code(tmp_path / "there")
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("mine", "pkg"):
            del sys.modules[name]


def write_code(folder: Path, files: tuple[str, ...] = ("mine.py", "pkg/__init__.py", "pkg/sub/rewards.py")) -> None:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(CODE)


def recipe_file(folder: Path, *names: str, transform: str = "null") -> str:
    functions = ", ".join(f"{{name: '{name}'}}" for name in names)
    file = folder / "r.yaml"
    file.write_text(f"extends: imdb_tiny\nreward_funcs: [{functions}]\ndata: {{transform: {transform}}}\n")
    return str(file)


def ran(places: Path) -> list[Path]:
    return sorted(places.rglob("ran"))


STRANGE = [
    "os:system",
    "subprocess:check_output",
    "os.path:join",
    "sys:exit",
    "__main__:main",
    "rlhf_recipes.cli:main",
    "THERE/mine.py:plain",
    "../there/mine.py:plain",
    "./../there/pkg/sub/rewards.py:plain",
    "link.py:check_output",
    ".venv/lib/python3.12/site-packages/tool.py:plain",
    "env/lib/python3.12/shutil.py:plain",
]


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("where", ["reward_funcs", "eval.held_out_funcs", "data.transform", "reward.data.transform"])
def test_code_that_the_user_did_not_put_here_is_refused_unrun(places, name, where):
    (places / "here" / "link.py").symlink_to(subprocess.__file__)  # in Python's own library
    write_code(places / "here", (".venv/lib/python3.12/site-packages/tool.py", "env/lib/python3.12/shutil.py"))
    name = name.replace("THERE", str(places / "there"))
    value = f"[{{name: '{name}'}}]" if where.endswith("funcs") else f"'{name}'"
    recipe = load_recipe("imdb_tiny", ["reward.data={path: x.jsonl}", f"{where}={value}"])
    (finding,) = check_functions(recipe)
    assert where in finding and ("rlhf-recipes trust" in finding or "no such module" in finding)
    with pytest.raises(RecipeError, match=r"trust|no such module"):
        find_function(name, "")
    assert ran(places) == []


@pytest.mark.parametrize(
    "name", ["mine.py:plain", "mine:plain", "pkg:factory", "pkg.sub.rewards:plain", "pkg/sub/rewards.py:made"]
)
@pytest.mark.parametrize("folder", ["here", "there"])
def test_code_below_the_current_folder_or_beside_the_recipe_runs_and_is_announced_once(places, name, folder, capsys):
    if folder == "here":
        write_code(places / "here")
    args = "{model: m}" if "factory" in name else "{}"
    recipe = load_recipe(recipe_file(places / folder, name), [f"reward_funcs.0.args={args}"])
    assert check_functions(recipe) == []
    assert ran(places) == [] and capsys.readouterr().err == ""  # checked, not run
    for _ in range(2):
        (function,) = build_reward_funcs(recipe, recipe.reward_funcs)
    assert function(prompts=["a"], completions=["b"], completion_ids=[[1]], finished=[True]) == [1.0]
    assert ran(places)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"your code runs: {places / folder}") and name.partition("/")[2] in line


def test_a_parent_elsewhere_or_a_copy_in_a_run_folder_brings_no_trust(places):
    """The copy of a recipe names the full path of code beside the recipe. It runs again only where the recipe would."""
    parent = recipe_file(places / "there", "mine.py:plain", transform="'mine.py:transform'")
    (places / "here" / "child.yaml").write_text(f"extends: {parent}\n")
    first, second = check_functions(load_recipe("child.yaml"))
    assert f"rlhf-recipes trust {places}/there/mine.py" in first and "reward_funcs.0" in second
    assert check_functions(load_recipe(parent)) == []


def test_only_the_user_trusts_a_package(places, monkeypatch):
    """By the list in the user's configuration, or by the variable that every process inherits."""
    strange = load_recipe(recipe_file(places / "here", "json:JSONDecoder", f"{places}/there/mine.py:plain"))
    assert len(check_functions(strange)) == 2
    monkeypatch.setenv("RLHF_RECIPES_ALLOW_CODE", f"jso, {places}/there/mine.py")
    (finding,) = check_functions(strange)
    assert "'json:JSONDecoder'" in finding
    monkeypatch.delenv("RLHF_RECIPES_ALLOW_CODE")
    assert CliRunner().invoke(app, ["trust", "json", f"{places}/there"]).exit_code == 0
    assert CliRunner().invoke(app, ["trust", "json"]).output.splitlines()[:2] == ["json", f"{places}/there"]
    assert check_functions(strange) == [] and find_function("json.decoder:JSONDecoder", "") is not None
    for wrong in ("./nowhere.py", "no package", "a/b/c"):
        with pytest.raises(RecipeError, match="no existing file"):
            add_trusted([wrong])


def test_a_recipe_cannot_trust_the_code_of_a_model(places, monkeypatch):
    """Whatever it says; a model's code is Python from the Hub, or of a folder elsewhere."""
    (places / "there" / "model").mkdir()
    for model in ("org/name@v1", f"{places}/there/model"):
        entry = model.partition("@")[0]
        (finding,) = check_functions(load_recipe("imdb_tiny", [f"trust_remote_code=['{model}']"]))
        assert f"rlhf-recipes trust {entry}" in finding
        monkeypatch.setenv("RLHF_RECIPES_ALLOW_CODE", entry)
        assert check_functions(load_recipe("imdb_tiny", [f"trust_remote_code=['{model}']"])) == []
        monkeypatch.delenv("RLHF_RECIPES_ALLOW_CODE")
    kernel = ["ppo.trainer.model_init_kwargs={attn_implementation: org/kernel, allow_all_kernels: true}"]
    assert "ppo.trainer.model_init_kwargs: own code: org/kernel" in check_functions(load_recipe("imdb_tiny", kernel))[0]
    args = f"{{model: {places}/there/model, trust_remote_code: true}}"
    (places / "there" / "model" / "config.json").write_text("{}")
    (places / "there" / "model" / "model.safetensors").touch()
    recipe = load_recipe("imdb_tiny", [f"reward_funcs=[{{name: reward_model, args: {args}}}]"])
    with pytest.raises(RecipeError, match=r"reward_funcs.0.args: .*rlhf-recipes trust"):
        build_reward_funcs(recipe, recipe.reward_funcs)


@pytest.mark.parametrize("command", [["validate"], ["show"], ["plan", "--gpu", "1x80"], ["wandb"]])
def test_commands_that_only_look_run_nothing(places, command):
    write_code(places / "here")
    file = recipe_file(places / "here", "mine.py:plain", "pkg.sub.rewards:factory", transform="'pkg:transform'")
    CliRunner().invoke(app, [command[0], file, *command[1:]])
    assert ran(places) == [] and not {"mine", "pkg"} & set(sys.modules)


def test_the_source_tells_names_and_arguments(places):
    write_code(places / "here")

    def finding(function: str, args: str = "{}") -> str:
        made = load_recipe("imdb_tiny", [f"reward_funcs=[{{name: 'mine.py:{function}', args: {args}}}]"])
        return "".join(check_functions(made))

    assert "it has: plain, factory, decorated, transform" in finding("plian")
    assert "no function 'system'" in finding("system")  # or a file of the user's would serve as a door to Python's
    assert "needs the argument 'model'" in finding("factory")
    assert "no argument 'modle'; nearest: model" in finding("factory", "{model: m, modle: n}")
    assert "unit must be one of words, tokens, not 'letters'" in finding("factory", "{model: m, unit: letters}")
    for right in (finding("factory", "{model: m, scale: 2}"), finding("plain", "{anything: 1}"), finding("made")):
        assert right == ""
    assert signature_of("mine.py:decorated", "") is None
    (places / "here" / "mine.py").write_text("def plain(completions:\n")
    assert "SyntaxError" in finding("plain") and ran(places) == []


def test_a_sweep_of_a_recipe_elsewhere_hands_its_folder_on(places, monkeypatch):
    """Its jobs read copies of the recipe in folders of their own."""
    from rlhf_recipes.experiments import jobs
    from rlhf_recipes.experiments.sweep import plan_sweep, run_sweep

    found = []

    def launch(stage, file, *more):
        script = (
            "import sys; from rlhf_recipes.stage import load_checked; "
            "from rlhf_recipes.recipe.user_code import find_function; "
            "find_function(load_checked(sys.argv[1], []).reward_funcs[0].name, 'reward')"
        )
        found.append(subprocess.run([sys.executable, "-c", script, file], capture_output=True, text=True, check=False))
        return 1

    monkeypatch.setattr(jobs, "launch_stage", launch)
    file = recipe_file(places / "there", "mine.py:plain")
    run_sweep(plan_sweep(file, ["rloo.policy=nowhere", "runs_dir=runs"], ["rloo"], "1", with_eval=False))
    assert [(done.returncode, f"runs: {places}/there/mine.py" in done.stderr) for done in found] == [(0, True)]


@pytest.mark.cold
def test_a_stage_takes_libraries_from_where_they_are_installed(places):
    """Not from the current folder, where a stranger's recipe may bring a torch.py."""
    for name in ("yaml", "ruamel", "pydantic", "torch", "psutil"):
        (places / "here" / f"{name}.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    command = [sys.executable, "-m", "rlhf_recipes.ppo", "--recipe", "imdb_tiny", "ppo=null"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "has no stage ppo" in done.stderr and ran(places) == []


def test_a_file_that_hides_a_shipped_one_is_said_in_one_line(places, capsys):
    here = places / "here"
    (here / "recipes").mkdir()
    text = "description: x\ndata: {path: x.jsonl, transform: 'film_reviews.py:posts'}\nreward_funcs: [{name: length}]\n"
    (here / "recipes" / "imdb_tiny.yaml").write_text(text)
    (here / "film_reviews.py").write_text("def posts(batch): return batch\n")
    (here / "accelerate_configs").mkdir()
    (here / "accelerate_configs" / "cpu_ddp_2.yaml").write_text("")
    load_recipe("length_tiny")
    assert capsys.readouterr().err.splitlines() == [
        f"{here}/film_reviews.py is used in place of the film_reviews.py that comes with rlhf_recipes"
    ]
    for _ in range(2):
        load_recipe("imdb_tiny")
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{here}/recipes/imdb_tiny.yaml is used in place of the imdb_tiny.yaml that comes with rlhf_recipes"
    (here / "imdb_tiny.yaml").write_text(text)
    (here / "child.yaml").write_text("extends: imdb_tiny\n")
    load_recipe("child.yaml")
    find_config("cpu_ddp_2")
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"{here}/imdb_tiny.yaml is used") and "cpu_ddp_2.yaml is used" in second


def test_a_recipe_alone_uploads_nothing(places, monkeypatch):
    """The command says it too, for run and for a stage's own command; sweep and duel never upload."""
    from rlhf_recipes.commands import stages
    from rlhf_recipes.experiments.sweep import plan_sweep
    from rlhf_recipes.stage import run_stage

    launched = []
    monkeypatch.setattr(stages, "launch_stage", lambda *given: launched.append(given) or 2)
    uploads = ["rloo.trainer.push_to_hub=true", "rloo.trainer.hub_model_id=me/mine"]
    for command in ("run", "rloo"):
        refused = CliRunner().invoke(app, [command, "imdb_tiny", *uploads])
        assert "rloo.trainer.push_to_hub: a recipe alone uploads nothing. Add --push" in str(refused.exception)
        assert launched == []
        CliRunner().invoke(app, [command, "imdb_tiny", *uploads, "--push"])
        assert launched.pop()[-1] is True
    with pytest.raises(RecipeError, match="sweep and duel never upload"):
        plan_sweep("imdb_tiny", uploads, ["rloo"], "1")
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert run_stage("rloo", lambda run: "", "imdb_tiny", ["rloo.trainer.trackio_space_id=me/mine"], False) == 2


def test_an_export_takes_no_file_from_outside_of_the_run(places):
    from rlhf_recipes.deploy.export import export_run

    run = places / "here" / "sft"
    (run / "value_model").mkdir(parents=True)
    (run / "manifest.json").write_text('{"stage": "sft", "status": "finished"}')
    (run / "model.safetensors").touch()
    (run / "same.json").symlink_to(run / "manifest.json")
    for link in ("tokenizer.json", "value_model/config.json", "base"):
        (run / link).symlink_to(places / "there")
        with pytest.raises(RecipeError, match=f"{link} is a link to {places}/there, outside of the run"):
            export_run(run, places / "out", False, None)
        (run / link).unlink()
    assert not (places / "out").exists()


def test_telemetry_is_off_unless_the_user_says_otherwise():
    """Before huggingface_hub is imported, which reads the variable then."""
    script = "import rlhf_recipes.stage, huggingface_hub.constants as c; print(c.HF_HUB_DISABLE_TELEMETRY)"
    others = {key: value for key, value in os.environ.items() if "TELEMETRY" not in key}
    for own, off in (({}, "True"), ({"HF_HUB_DISABLE_TELEMETRY": "0"}, "False")):
        done = subprocess.run(
            [sys.executable, "-c", script], env=others | own, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == off


def test_a_link_below_the_current_folder_is_a_file_of_the_users(places):
    (places / "here" / "case").symlink_to(places / "there")
    assert find_function("./case/mine.py:plain", "").__name__ == "plain"
