"""The wheel holds recipes and configurations; the pinned versions are within pyproject's ranges."""

import shutil
import tomllib

import pytest
from packaging.requirements import Requirement

from rlhf_recipes.launch import configs as launch_configs
from rlhf_recipes.recipe import load as recipe
from support.places import ROOT


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_dependency_is_pinned_within_its_range(project):
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}
    assert pins["torch"] == "2.13.0" and pins["trl"] == "1.16.0"
    extras = project["project"]["optional-dependencies"]
    wanted = [Requirement(r) for r in (*project["project"]["dependencies"], *extras["offline"], *extras["test"])]
    for requirement in wanted:
        if requirement.name != "rlhf-recipes":
            assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")]), requirement


def test_recipes_and_configurations_travel_in_the_wheel_where_they_are_looked_up(project, tmp_path, monkeypatch):
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {"recipes": "rlhf_recipes/recipes", "accelerate_configs": "rlhf_recipes/accelerate_configs"}
    for module, find in ((recipe, recipe.recipe_files), (launch_configs, launch_configs.config_files)):
        names = set(find())
        assert len(names) >= 9
        monkeypatch.setattr(module, "__file__", str(tmp_path / "rlhf_recipes" / "package" / "module.py"))
        for folder, inside in included.items():
            shutil.copytree(ROOT / folder, tmp_path / inside, dirs_exist_ok=True)
        monkeypatch.chdir(tmp_path)
        assert set(find()) == names and all(path.is_relative_to(tmp_path) for path in find().values())


def test_the_base_model_is_small_and_no_pickle():
    base = ROOT / "rlhf_recipes" / "base"
    assert sum(path.stat().st_size for path in base.iterdir()) < 12e6
    assert {path.suffix for path in base.iterdir()} <= {".json", ".safetensors", ".yaml"}
