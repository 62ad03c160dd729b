"""A parser's error about the command line or a configuration file, in one line."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Collection

_KINDS = {
    "float": "a number",
    "int": "an integer",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "collections.abc.Sequence": "a list",
}


def brief(message: str, options: Collection[str]) -> str:
    """What is wrong, the value, and what may have been meant.

    Args:
        message: of jsonargparse or argparse.
        options: that exist, such as ``--pruner.sparsity``.
    """
    names = [option.removeprefix("--") for option in options if not option.endswith(".help")]
    unknown = re.search(r"nrecognized arguments: (\S+)", message)
    if unknown:
        if not unknown[1].startswith("-"):
            return (
                f"{unknown[1]} is not expected here. A model comes directly behind the command, other values behind options, "
                "several of one option as '[A, B]'."
            )
        name = unknown[1].partition("=")[0].removeprefix("--")
        section, _, setting = name.partition(".")
        if section == "pruner" and "settings" in names:  # sweep has one option for all of the pruner's
            outer, _, inner = setting.partition(".")
            return f"there is no option --{name}. Write --settings.{outer}" + (
                f" '{{{inner}: ...}}'." if inner else "."
            )
        return f"there is no option --{name}.{_meant(name, names, '--')} `--help` shows all."
    key = re.search(r'[Kk]ey "([\w.]+)"', message)
    value = re.search(r"(?:Given|Got) value: (.*?)(?:\. Got value: .*)?$", message, re.MULTILINE)
    unexpected = re.search(r"[Kk]ey '([\w.]+)' is not expected|Option '([\w.]+)' is not accepted", message)
    if unexpected:
        inside = f"{key[1]}." if key else ""
        name = inside + (unexpected[1] or unexpected[2])
        return f"there is no setting {name}.{_meant(name, [other for other in names if other.startswith(inside)])}"
    if key and value:
        allowed = [choice for found in re.findall(r"Literal\[(.*?)\]", message) for choice in _choices(found)]
        kinds = [
            kind
            for kind in re.findall(r"<class '([\w.]+)'>", re.split("Given|Got", message)[0])
            if kind != "NoneType" and not kind.startswith("sparsellm_lightning.")  # the class that has the setting
        ]
        wanted = list(dict.fromkeys(_KINDS.get(kind, kind) for kind in kinds))
        if allowed:
            wanted.insert(0, f"one of {', '.join(dict.fromkeys(allowed))}")
        if wanted:
            number = re.fullmatch(r"([\d.]+) ?%", value[1])
            meant = f" Write [{value[1]}]." if wanted == ["a list"] else _meant(value[1], allowed)
            if "str" in kinds and value[1].isdigit():  # 2:4, which YAML reads as a number
                meant = " Put it in quotes."
            if number:
                meant = f" Write {float(number[1]) / 100:g}."
            name = ".".join(re.findall(r'[Kk]ey "([\w.]+)"', message[: value.start()]))  # a section, then its setting
            return f"--{name} must be {' or '.join(wanted)}, got {value[1]}.{meant}"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines)[:400]


def _choices(inside: str) -> list[str]:
    try:
        return [str(choice) for choice in ast.literal_eval(f"[{inside}]")]
    except (ValueError, SyntaxError):
        return []


def _meant(name: str, names: Collection[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, names, 1)
    return f" Did you mean {prefix}{near[0]}?" if near else ""
