"""Paths of this repository and of the data of its tests."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
DATA = TESTS / "data"
SAMPLES = TESTS / "hub_samples"
CONFIGS = ROOT / "accelerate_configs"
