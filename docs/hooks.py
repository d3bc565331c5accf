"""What `mkdocs build` does beyond Markdown: the help of every verb in docs/verbs.md, and docstring names as code."""

import argparse
import re

from griffe import Extension

from lora_recycle.commands.main import build_parser


#: What docs/verbs.md holds in the place of the help.
MARK = "<!-- the help of every verb -->"


def on_page_markdown(markdown: str, **_) -> str:
    return markdown.replace(MARK, help_of_every_verb()) if MARK in markdown else markdown


def help_of_every_verb() -> str:
    """A section for each verb with what `lora-recycle VERB --help` prints."""
    (verbs,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return "\n\n".join(f"## {name}\n\n```text\n{verb.format_help()}```" for name, verb in verbs.choices.items())


class PlainNames(Extension):
    """Docstrings write [`Name`] as Hugging Face's do: a link there, plain code here."""

    def on_object(self, *, obj, **_) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"\[`~?([\w.]+)`\]", r"`\1`", obj.docstring.value)
