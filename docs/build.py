"""Writes the parts of the documentation that come from the code: `make docs`."""

import ast
import dataclasses
import inspect
import itertools
import json
import re
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from rlhf_recipes import PPOConfig
from rlhf_recipes.commands.recipes import recipe_table
from rlhf_recipes.pages.metrics import EVAL, TRAINING, markdown
from rlhf_recipes.recipe import schema, sections, stages
from rlhf_recipes.recipe.checks import OURS
from rlhf_recipes.trainers.config import OnPolicyConfig

ROOT = Path(__file__).parents[1]

HEAD = """# The keys of a recipe

`make docs` writes this page from the code. An unknown key is an error. `rlhf-recipes show NAME` prints a recipe with every
default filled in. YAML writes None as `null`.

`trainer:`, `peft:` and `quantization:` take the keys of other libraries under their own names: TRL's `SFTConfig`,
`RewardConfig` and, for `ppo` and `rloo`, `RLOOConfig`; peft's `LoraConfig`; transformers' `BitsAndBytesConfig`. The last
tables list the keys that this project adds to `RLOOConfig`, and those whose default it changes.
"""

SECTIONS = vars(sections) | vars(stages) | vars(schema)
"""Name -> class of every section of a recipe."""

TYPES = {"string": "text", "integer": "whole number", "boolean": "true or false", "object": "mapping"}
LIMITS = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below"}


def documents() -> dict[Path, str]:
    """File -> the text that it should hold."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, table in {
        "recipes": f"{recipe_table()}\n",
        "training metrics": f"\n{markdown(TRAINING)}\n",
        "eval metrics": f"\n{markdown(EVAL)}\n",
    }.items():
        before, rest = readme.split(f"<!-- {name} -->\n")
        _, after = rest.split(f"<!-- /{name} -->")
        readme = f"{before}<!-- {name} -->\n{table}<!-- /{name} -->{after}"
    return {ROOT / "README.md": readme, ROOT / "docs" / "recipe_keys.md": recipe_keys()}


def recipe_keys() -> str:
    """A table for every section of a recipe, then one for each trainer's own keys."""
    found = schema.Recipe.model_json_schema()
    tables = {"Recipe": found}
    for name in (names := ["Recipe"]):
        tables[name] = section = found["$defs"].get(name, found)
        names += [other for other in re.findall(r"#/\$defs/(\w+)", str(section["properties"])) if other not in names]
    parts = [HEAD]
    for name, section in tables.items():
        owner = SECTIONS[name]
        meanings = {key: text for parent in reversed(owner.__mro__) for key, text in docstrings(parent).items()}
        rows = [_row(key, value, meanings.get(key) or _purpose(value)) for key, value in section["properties"].items()]
        title = ", ".join(f"`{path}`" for path in _paths(name, tables)) or "At the top"
        parts.append(f"## {title}\n\n{inspect.getdoc(owner)}\n\n{_table(rows)}")
    for title, config in (("ppo.trainer` and `rloo.trainer", OnPolicyConfig), ("ppo.trainer", PPOConfig)):
        rows = [
            _row(field.name, TypeAdapter(field.type).json_schema() | {"default": field.default}, field.metadata["help"])
            for field in dataclasses.fields(config)
            if field.name in config.__annotations__ and field.name not in OURS
        ]
        parts.append(f"## `{title}`\n\n{inspect.getdoc(config)}\n\n{_table(rows)}")
    return "\n".join(parts)


def docstrings(section: type) -> dict[str, str]:
    """The text under each field of a class of the schema."""
    if not section.__module__.startswith("rlhf_recipes.recipe."):
        return {}
    body = ast.parse(inspect.getsource(section)).body[0].body
    return {
        ast.unparse(field.target): text.value.value
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def _purpose(value: dict[str, Any]) -> str:
    """The first line of the docstring of the section that a key holds; "" where it holds none."""
    section = re.search(r"#/\$defs/(\w+)", str(value))
    return inspect.getdoc(SECTIONS[section[1]]).split("\n")[0] if section else ""


def _paths(name: str, sections: dict[str, Any]) -> list[str]:
    """Where a section stands in a recipe, such as `data` and `reward.data`."""
    return [
        f"{path}.{key}" if path else key
        for owner, section in sections.items()
        for key, value in section["properties"].items()
        if f"/{name}'" in str(value)
        for path in (_paths(owner, sections) or [""])
    ]


def _row(key: str, value: dict[str, Any], meaning: str) -> str:
    default = f"`{json.dumps(value['default'])}`" if "default" in value else "required"
    cells = [
        f"`{key}`",
        _kind(value),
        "" if "$ref" in value and "default" in value else default,
        " ".join(meaning.split()),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _table(rows: list[str]) -> str:
    return "".join(["| key | value | default | meaning |\n|---|---|---|---|\n", *rows])


def _kind(value: dict[str, Any]) -> str:
    """What a key takes, in words."""
    if "anyOf" in value:
        return " or ".join(_kind(one) for one in value["anyOf"] if one.get("type") != "null")
    if "enum" in value:
        return ", ".join(f"`{one}`" for one in value["enum"])
    if "$ref" in value:
        return "section"
    if value.get("type") == "array":
        return f"list of {value.get('maxItems', '')} {_kind(value['items'])}s".replace("  ", " ")
    limits = [f"{words} {value[limit]:g}" for limit, words in LIMITS.items() if limit in value]
    return ", ".join([TYPES.get(value["type"], value["type"]), *limits])


if __name__ == "__main__":
    for file, text in documents().items():
        file.write_text(text, encoding="utf-8")
