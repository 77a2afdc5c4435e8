"""All stages of a recipe in one process: `python -m support.all_stages STAGE,STAGE RECIPE [key=value ...]`."""

import importlib
import sys

from rlhf_recipes.launch.start import MODULES
from rlhf_recipes.stage import run_stage

stages, recipe, *overrides = sys.argv[1:]
for stage in stages.split(","):
    main = importlib.import_module(f"rlhf_recipes.{MODULES.get(stage, stage)}").main
    code = run_stage(stage, main, recipe, overrides, overwrite=False)
    if code:
        sys.exit(f"stage {stage} ended with {code}")
