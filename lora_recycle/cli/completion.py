"""`lora-recycle --print-completion SHELL`: a completion script, made of the parser by shtab. Nothing imports torch."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from .common import echo


SHELLS = ("bash", "zsh", "fish")
#: What an argument is called in the help where it may be a file or a folder.
FOLDERS = ("DIR", "FOLDER")
PATHS = ("DATA", "FILE", "IMAGES", "MODEL", "PATH", "POOL", "WHAT")


class PrintCompletion(argparse.Action):
    """Prints the completion script of the whole command line and ends, as `--version` does."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, choices=SHELLS, metavar="SHELL", **options)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        import shtab

        for action in _actions(parser):
            if action.metavar in FOLDERS:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]  # where shtab looks for it
            elif action.metavar in PATHS:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        echo(shtab.complete(parser, str(values)))
        parser.exit()


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument of a parser and of the verbs below it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from _actions(verb)
