"""The layout: imports point down only, and the command line stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import rlhf_recipes

LAYERS = [
    {"config", "trainer_fields", "terminal", "memory", "intervals", "tables", "copying"},
    {"named_files", "verdict", "hacking"},
    {"recipe", "advantages", "kl", "metrics", "forward", "reward_calls", "on_policy_config", "disk", "user_code"}
    | {"launch", "launch_configs", "win_rate"},
    {"distributed"},
    {"run", "headers", "sampling", "checkpoints", "sweep_grid", "machine", "trackers"},
    {"references", "curves"},
    {"data", "tokenizer", "differences", "plots"},
    {"models", "scoring", "shapes", "posts", "samples", "likelihoods", "held_out", "report_tables"},
    {"reward_funcs", "hub", "diagnosis", "value_model", "adapters", "comparison"} | {"report", "markdown"},
    {"stage_plan"},
    {"on_policy", "callbacks", "trainer_args", "finish", "entry", "score", "sft_report", "reward_report"}
    | {"judge_backends"},
    {"rloo_trainer", "ppo_trainer"},
    {"sft", "reward", "ppo", "rloo", "evaluate", "compare", "sweep", "processes", "export", "plan", "workspace"}
    | {"judge"},
    {"audit"},
    {"duel"},
    {"cli"},
]
"""Modules of one layer do not import one another, and none imports a higher one."""

PACKAGE = Path(rlhf_recipes.__file__).parent


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlhf_recipes."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "rlhf_recipes":
            found |= {alias.name for alias in node.names}
    return found


def test_imports_point_down():
    height = {module: i for i, layer in enumerate(LAYERS) for module in layer}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules == set(height)
    for module in modules:
        for imported in imports(PACKAGE / f"{module}.py"):
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
