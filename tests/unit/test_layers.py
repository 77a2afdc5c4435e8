"""Contracts about imports, and that each is able to fail: the command line stays light, too."""

import shutil
import subprocess
import sys

import pytest

from support.places import ROOT


@pytest.fixture(scope="module")
def lint(tmp_path_factory):
    """Add a line to a module of a copy of the package, and check the copy's contracts."""
    copy = tmp_path_factory.mktemp("lint")
    shutil.copytree(
        ROOT / "rlhf_recipes", copy / "rlhf_recipes", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors")
    )
    shutil.copy(ROOT / "pyproject.toml", copy)

    def check(module: str = "", line: str = "") -> subprocess.CompletedProcess:
        file = copy / "rlhf_recipes" / (module or "cli.py")
        before = file.read_text(encoding="utf-8")
        file.write_text(f"{before}\n{line}\n", encoding="utf-8")
        program = "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command as run; run(['--no-cache'])"
        try:
            return subprocess.run(
                [sys.executable, "-c", program], cwd=copy, capture_output=True, text=True, check=False
            )
        finally:
            file.write_text(before, encoding="utf-8")

    return check


def test_contracts_hold(lint):
    done = lint()
    assert done.returncode == 0 and "3 kept, 0 broken" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("recipe/schema.py", "from rlhf_recipes.system import files", "Imports point down the list of packages BROKEN"),
        (
            "pages/tables.py",
            "def late():\n    from rlhf_recipes.runs import folder",
            "Imports point down the list of packages BROKEN",
        ),
        (
            "experiments/grid.py",
            "def late():\n    from rlhf_recipes import ppo",
            "Doors are imported by nobody but the command line BROKEN",
        ),
        ("ppo.py", "def late():\n    from rlhf_recipes.planning import plan", "No stage imports the planner BROKEN"),
    ],
)
def test_an_import_that_breaks_a_contract_is_named(lint, module, line, contract):
    done = lint(module, line)
    assert done.returncode == 1 and contract in done.stdout, done.stdout + done.stderr


def test_help_list_show_and_validate_import_no_torch():
    program = (
        "import sys; sys.argv = ['rlhf-recipes'] + {args!r}; from rlhf_recipes.cli import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "heavy = {{'torch', 'transformers', 'trl', 'datasets', 'matplotlib'}} & set(sys.modules); assert not heavy, heavy"
    )
    for args in (
        ["--help"],
        ["list"],
        ["show", "imdb_tiny"],
        ["validate"],
        ["rewards"],
        ["configs"],
        ["sweep", "--help"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", program.format(args=args)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
