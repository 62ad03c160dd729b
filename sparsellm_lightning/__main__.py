"""The ``sparsellm`` command. What it shows without a model needs no other package, so that it comes at once."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib.metadata import version

from sparsellm_lightning.shorthand import catalogue

COMMANDS = {
    "prune": "prune a model, measure it before and after, and write it to a folder",
    "fit": "prune MODEL and, if --pruner.finetune is true, train it; or train the sparse --model.weights; training keeps zeros",
    "evaluate": "perplexity and sparsity of any causal language model",
    "verify": "compare an exported folder with its report",
    "inspect": "show what would be pruned in a model, and what that takes",
    "benchmark": "speed and size of a model, beside another",
    "sweep": "several sparsities and methods on one model, into a table and a curve",
    "recipes": "list the recipes that come with the package",
    "validate": "Lightning's validation loop",
    "test": "Lightning's test loop",
}


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``sparsellm``."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # of encodings without Greek letters
    arguments = [*sys.argv[1:]] if args is None else [*args]
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(overview())
    elif command == "--version":
        print(version("sparsellm_lightning"))
    elif command == "recipes":
        print(catalogue())
    elif command not in COMMANDS and not command.startswith("-"):
        near = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"Did you mean {near[0]}?" if near else f"Choose one of {', '.join(COMMANDS)}."
        print(f"sparsellm: there is no command {command!r}. {hint}", file=sys.stderr)
        sys.exit(2)
    else:
        try:
            from sparsellm_lightning.cli import main as run  # takes seconds
        except KeyboardInterrupt:
            print("sparsellm: ended by Ctrl-C", file=sys.stderr)
            sys.exit(130)
        run(None if args is None else arguments)


def overview() -> str:
    """The commands, one line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sparsellm COMMAND [MODEL or FOLDER] [--config FILE or recipe:NAME] [--SECTION.SETTING VALUE] ...",
            "",
            "Prune causal language models. MODEL is a hub id, a folder, a GGUF file, or package:NAME.",
            "",
            *lines,
            "",
            "sparsellm COMMAND --help shows the settings of a command, sparsellm --version the version.",
        ]
    )


if __name__ == "__main__":
    main()
