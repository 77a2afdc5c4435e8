"""A second virtual environment with TRL 1.12.0, the last release that has PPO."""

import argparse
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEFAULT_VENV = ROOT / ".venv-trl-1.12"
TRL = "1.12.0"


def add_venv_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--venv", type=Path, default=DEFAULT_VENV, help=f"folder of the environment with TRL {TRL}")
    parser.add_argument("--trl-1-12", type=Path, help="use a folder of `pip install --target` with TRL 1.12.0 instead")


def python_and_path(options: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """The Python that runs TRL 1.12.0, and its environment variables."""
    if options.trl_1_12 is None:
        return str(venv_python(options.venv)), {}
    path = [str(options.trl_1_12.absolute()), os.environ.get("PYTHONPATH", "")]
    return sys.executable, {"PYTHONPATH": os.pathsep.join(filter(None, path))}


def venv_python(folder: Path) -> Path:
    """The Python of the environment in `folder`; makes the environment if it does not exist."""
    python = folder.absolute() / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = folder / f".installed-trl-{TRL}"
    if done.exists():
        return python
    print(f"Installing TRL {TRL} into {folder}: a few minutes, once ...", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    # All other packages have this project's versions, so that only the trainers differ.
    pins = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("trl==")]
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(pins) + "\n", "utf-8")
    packages = [f"trl=={TRL}", "torch", "transformers", "accelerate", "peft", "datasets"]
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, "--constraint", constraints, *packages], check=True)
    done.touch()
    return python


def rerun_under_trl_1_12(script: str) -> None:
    """Run `script` again under TRL 1.12.0 and exit with its status; do nothing if this is TRL 1.12.0."""
    if version("trl") == TRL:
        return
    parser = argparse.ArgumentParser(add_help=False)
    add_venv_option(parser)
    python, variables = python_and_path(parser.parse_known_args()[0])
    done = subprocess.run([python, script, *sys.argv[1:]], env=os.environ | variables, check=False)
    raise SystemExit(done.returncode)
