"""What the command line understands besides options: recipes by name, and a model without its option."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

PREFIX = "recipe:"
TAKES_A_MODEL = ("prune", "fit", "evaluate", "validate", "test")


def recipes() -> dict[str, Path]:
    """The recipes by name, such as ``finetune/one-shot``."""
    inside = Path(__file__).parent / "recipes"
    folder = inside if inside.is_dir() else Path(__file__).parents[1] / "recipes"  # of a source tree
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def catalogue() -> str:
    """The names of the recipes, and the first line of each."""
    found = recipes()
    width = max(map(len, found), default=0)
    lines = [f"  {name:<{width}}  {_purpose(path)}" for name, path in found.items()]
    use = "Use one by its name, also on top of another: sparsellm prune --config recipe:quickstart --config recipe:2-4"
    return "\n".join([*lines, "", use])


def expanded(arguments: Sequence[str]) -> list[str]:
    """Arguments in which a model behind the command has its option, and ``recipe:NAME`` is the path of the recipe.

    The model's option comes last, because later options win over earlier ones, and a recipe may name a model too.
    """
    given, found = [*arguments], recipes()
    if len(given) > 1 and given[0] in TAKES_A_MODEL and not given[1].startswith("-"):
        if given[1].startswith(PREFIX) or given[1].endswith((".yaml", ".yml")):
            _refuse(f"{given[1]} is a configuration, not a model. Write --config {given[1]}.")
        given += ["--model.pretrained", given.pop(1)]

    def path_of(name: str) -> str:
        if name not in found:
            _refuse(f"there is no recipe {name!r}. Choose one of {', '.join(found)}.")
        return str(found[name])

    changed = []
    for argument in given:
        before, prefix, name = argument.partition(PREFIX)
        takes = prefix and before in ("", "--config=", "-c=")
        changed.append(before + path_of(name) if takes else argument)
    return changed


def _refuse(message: str) -> NoReturn:
    print(f"sparsellm: {message}", file=sys.stderr)
    sys.exit(2)


def _purpose(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip()
