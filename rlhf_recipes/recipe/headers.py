"""What a recipe's file begins with: a header for whoever reads it, and for the table of recipes in the README."""

from dataclasses import dataclass
from pathlib import Path

from rlhf_recipes.recipe.load import load_recipe, recipe_files
from rlhf_recipes.recipe.schema import RecipeError

HEADER_LABELS = ("Source", "Hardware", "Minutes", "Expected")
"""What the header of a recipe says, in this order, behind its first line and free text."""


@dataclass
class Header:
    """The comment that a recipe which can be run begins with.

    # NAME: what it does in one sentence.
    # Free text, as many lines as it takes.
    # Source: where its numbers are from; what stands before the first semicolon is for the README's table.
    # Hardware: ...
    # Minutes: ...          (of all its stages; "not measured" is a value)
    # Expected: ...
    #   rlhf-recipes run NAME
    """

    what: str
    text: str
    source: str
    hardware: str
    minutes: str
    expected: str
    commands: list[str]


def recipe_header(path: Path) -> Header:
    """Read the header of a recipe's file.

    Raises:
        RecipeError: A part of it is missing; every finding.
    """
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" ").rstrip())
    commands = []
    while lines and lines[-1].startswith("  "):
        commands.insert(0, lines.pop().strip())
    # Text before the first label belongs to the first line; a label's text runs on to the next one.
    parts: dict[str, list[str]] = {"": []}
    for line in lines:
        label, colon, rest = line.partition(": ")
        if colon and label in HEADER_LABELS and label not in parts:
            parts[label] = [rest]
        else:
            parts[list(parts)[-1]].append(line)
    said = {label.lower(): " ".join(" ".join(parts.get(label, [])).split()) for label in HEADER_LABELS}
    name, colon, what = (parts[""] or [""])[0].partition(": ")
    findings = [f"a line '# {label}: ...'" for label in HEADER_LABELS if not said[label.lower()]]
    if not commands:
        findings.append(f"an indented command in its last line, such as '#   rlhf-recipes run {path.stem}'")
    if name != path.stem or not what:
        findings.insert(0, f"'# {path.stem}: what it does in one sentence.' as its first line")
    if not findings and [label for label in parts if label] != list(HEADER_LABELS):
        findings.append(f"the order {', '.join(HEADER_LABELS)}")
    if findings:
        raise RecipeError("\n".join(f"{path}: its header is without {finding}." for finding in findings))
    return Header(what=what, text="\n".join(parts[""][1:]), commands=commands, **said)


def recipe_table() -> str:
    """Markdown table of all recipes that can be run by name, from their headers.

    Raises:
        RecipeError: A recipe cannot be read, or its header lacks a part; every finding.
    """
    rows = ["| recipe | what | hardware | minutes | expected | source |", "|---|---|---|---|---|---|"]
    findings = []
    for name, path in recipe_files().items():
        try:
            header, what = recipe_header(path), load_recipe(name).description
        except RecipeError as error:
            findings.append(str(error))
            continue
        source = header.source.partition(";")[0].removesuffix(".")
        cells = [what, *(text.removesuffix(".") for text in (header.hardware, header.minutes, header.expected)), source]
        rows.append(" | ".join([f"| `{name}`", *(cell.replace("|", "\\|") for cell in cells)]) + " |")
    if findings:
        raise RecipeError("\n".join(findings))
    return "\n".join(rows)
