"""Arguments and options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_recipes.launch.configs import launchable

Name = Annotated[str, typer.Argument(metavar="NAME", help="name of a recipe, or path of a YAML file")]
Overrides = Annotated[
    list[str],
    typer.Argument(
        metavar="[key=value]...", help="such as ppo.trainer.beta=0.1", default_factory=list, show_default=False
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--accelerate-config",
        metavar="NAME",
        callback=lambda name: name and launchable(str(name)),
        help="train as several processes: see `configs`; or path of a YAML file",
    ),
]
Push = Annotated[
    bool, typer.Option("--push", help="upload to the Hub as the recipe says; without it such a recipe is refused")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace runs with other settings; they are moved aside")]
