"""The layout: imports point down only, and the command line stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import rlhf_recipes

LAYERS = [
    {
        "recipe.schema",
        "recipe.trainer_keys",
        "system.terminal",
        "system.errors",
        "system.environment",
        "planning.memory",
        "evaluation.intervals",
        "pages.tables",
        "evaluation.audit.copying",
    },
    {"recipe.named_files", "comparison.verdict", "evaluation.audit.signs"},
    {
        "recipe.load",
        "trainers.advantages",
        "trainers.kl",
        "evaluation.metrics",
        "models.forward",
        "rewards.calls",
        "trainers.config",
        "system.files",
        "recipe.user_code",
    }
    | {"launch.start", "launch.configs", "evaluation.judge.win_rate"},
    {"launch.setup", "launch.processes"},
    {
        "runs.folder",
        "recipe.headers",
        "models.sampling",
        "runs.checkpoints",
        "experiments.grid",
        "models.hardware",
        "runs.trackers",
    },
    {"runs.references", "comparison.runs"},
    {"runs.inputs", "data.rows", "data.tokenizer", "comparison.differences", "pages.plots"},
    {
        "models.load",
        "rewards.reader",
        "data.shapes",
        "data.posts",
        "models.samples",
        "models.likelihoods",
        "comparison.held_out",
        "pages.rows",
    },
    {
        "rewards.functions",
        "trainers.kl_diagnosis",
        "trainers.batches",
        "trainers.state",
        "trainers.vllm",
        "trainers.value_network",
        "models.adapters",
        "comparison.build",
    }
    | {"pages.html", "pages.markdown"},
    {"planning.stage"},
    {
        "trainers.on_policy",
        "runs.callbacks",
        "trainers.args",
        "stage",
        "rewards.try_out",
        "evaluation.sft_quality",
        "evaluation.reward_quality",
    }
    | {"evaluation.judge.backends"},
    {"trainers.rloo", "trainers.ppo"},
    {
        "sft",
        "reward",
        "ppo",
        "rloo",
        "evaluate",
        "compare",
        "experiments.sweep",
        "deploy.export",
        "planning.plan",
        "runs.workspace",
    }
    | {"evaluation.judge.ask"},
    {"evaluation.audit.audit"},
    {"experiments.duel"},
    {"cli"},
]
"""Modules of one layer do not import one another, and none imports a higher one."""

PACKAGE = Path(rlhf_recipes.__file__).parent


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlhf_recipes."):
            module = node.module.removeprefix("rlhf_recipes.")
            is_package = (PACKAGE / module.replace(".", "/")).is_dir()
            found |= {f"{module}.{alias.name}" for alias in node.names} if is_package else {module}
        elif isinstance(node, ast.ImportFrom) and node.module == "rlhf_recipes":
            found |= {alias.name for alias in node.names}
    return found


def test_imports_point_down():
    height = {module: i for i, layer in enumerate(LAYERS) for module in layer}
    files = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py") if path.stem != "__init__"]
    modules = {".".join(file.parts) for file in files}
    assert modules == set(height)
    for module in modules:
        for imported in imports(PACKAGE / f"{module.replace('.', '/')}.py"):
            assert height[imported] < height[module], f"{module} imports {imported}"


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
