"""What `mkdocs build` does beyond Markdown: the help of every verb in docs/verbs.md, docstrings in its own form."""

import argparse
import os
import re

from griffe import Extension

from lora_recycle.cli.main import build_parser


#: What docs/verbs.md holds in the place of the help.
MARK = "<!-- the help of every verb -->"
COLUMNS = "80"  # of the help: what a page shows without scrolling


def on_page_markdown(markdown: str, **_) -> str:
    return markdown.replace(MARK, help_of_every_verb()) if MARK in markdown else markdown


def help_of_every_verb() -> str:
    """A section for each verb with what `lora-recycle VERB --help` prints."""
    os.environ["COLUMNS"] = COLUMNS
    (verbs,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return "\n\n".join(f"## {name}\n\n```text\n{verb.format_help()}```" for name, verb in verbs.choices.items())


class PlainDocstrings(Extension):
    """Docstrings are written as Hugging Face's are: [`Name`] for a link, and marked-up types before a colon."""

    def on_object(self, *, obj, **_) -> None:
        if obj.docstring:
            text = re.sub(r"\[`~?([\w.]+)`\]", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"^(\s+[\w, ]+ )\((`.*)\):", _plain_type, text, flags=re.M)


def _plain_type(match: re.Match) -> str:
    return f"{match[1]}({match[2].replace('`', '').replace('*', '')}):"
