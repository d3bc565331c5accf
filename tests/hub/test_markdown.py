"""Cards of hostile names: whatever strangers wrote stays text within its cell, span, fence and line."""

import re

import pytest
import yaml
from markdown_it import MarkdownIt

from lora_recycle.evaluation.summary import markdown
from lora_recycle.hub.cards import meta_lora_card, surrogate_card
from lora_recycle.hub.licenses import inherited_license
from lora_recycle.hub.markdown import block, code, text


HOSTILE = [
    "<script>alert(1)</script>",
    "</td></table><img src=x onerror=alert(1)>",
    "a|b\n|---|\n| c",
    "\\|\\\\|x",
    "`code` ``more``",
    "x\\`<b>y</b>`",
    "\n```\n<b>out</b>\n",
    "\n~~~~\n# heading\n---\nlicense: evil\n---\n",
    "[click](javascript:alert(1)) ![](https://evil.example/x.png)",
    "[a]: https://evil.example\n\n[a]",
    "<https://evil.example>",
    "**bold** __bold__ _it_ *it* ~~gone~~",
    "&lt;b&gt; $$x$$",
    "\n\n- item\n1. item\n> quote\n# heading\n    indented",
    '"); import os  # ',
    "{{ 7 * 7 }}{% raw %}",
    "\x1b[31mred\u202e",
]
PLAIN_NAME = "a name"  # that is no repo's, which would be a link
PLAIN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def tags(rendered):
    """Tags in the order that they open and close."""
    return re.findall(r"<(?:/?\w+|!--)", rendered)


@pytest.mark.parametrize("value", HOSTILE)
def test_text_code_and_blocks_hold_whatever_they_are_given(value):
    shown = " ".join(value.split())
    line = PLAIN.render(f"before {text(value)} after")
    assert tags(line) == ["<p", "</p"]
    cells = PLAIN.render(f"| a | b |\n|---|---|\n| {text(value)} | {code(value)} |")
    assert cells.count("<td>") == 2 and cells.count("<code>") == 1 and cells.count("<tr>") == 2
    span = PLAIN.render(f"before {code(value)} after")
    assert tags(span) == ["<p", "<code", "</code", "</p"]
    (fence,) = PLAIN.parse(block(value, "yaml"))
    assert fence.type == "fence" and (fence.info, fence.content) == ("yaml", _escaped(value) + "\n")
    (paragraph,) = [token for token in PLAIN.parse(f"x {text(value)}") if token.type == "inline"]
    assert "".join(token.content for token in paragraph.children) == f"x {_escaped(shown)}"


def _escaped(value):
    return value.replace("\x1b", "\\u001b").replace("\u202e", "\\u202e")


def test_names_that_need_no_escape_have_none():
    for name in ("vit-base_patch16.224", "org/mini_imagenet@v1.0", "Zwölf Katzen (2)", "猫"):
        assert text(name) == name and code(name) == f"`{name}`"
    assert text(None) == code(None) == text(" ") == "-"


def meta_lora(value):
    """A card all of whose strangers' words are this one."""
    results = {"method": value, "data": value, "ways": 5, "shots": 1, "episodes": 2, "accuracy": 1.0, "ci95": 0.1}
    results |= {"delta_vs_frozen": 0.5, "delta_ci95": 0.2}
    source = {"name": value, "revision": value, "peft_type": value, "license": value, "sha256": value}
    settings = {
        "sources": [source, {**source, "name": "org/known"}],  # the second's revision is part of a link
        "results": [results],
        "distillation": {"init": value, "steps": 3, "comment": value},
        "inversion": {"starts": {value: 1.0}, value: value},
        "judged": {"best_step": value, "best_blend": [0.5, 0.5]},
        "versions": {"lora_recycle": value},
        "num_classes": value,
    }
    return meta_lora_card(value, value, value, value, settings, True)


def surrogate(value):
    adapter = {"name": value, "sha256": value, "license": value, "peft_type": value, "num_classes": value}
    entry = {"adapter": adapter, "num_images": 3, "accuracy": 1.0, "confidence": 1.0}
    manifest = {
        "shards": [entry],
        "backbone": {"name": "org/base", "revision": value},
        "lora_recycle_version": value,
        "config": {"starts": {value: 1.0}, "iterations": value, value: value},
    }
    return surrogate_card(value, manifest, True)


def table(value):
    rows, details = [], []
    row = {"method": value, "data": value, "ways": 5, "shots": 1, "episodes": 2, "accuracy": 1.0, "ci95": 0.1}
    rows.append({**row, "delta_vs_frozen": 0.5, "delta_ci95": 0.2})
    deltas = {f"delta_vs_{x}{end}": 0.1 for x in ("average", "best_rival") for end in ("", "_ci95")}
    details.append({**row, **deltas, "kind": "rival", "transductive": False, "pool": value, "best_rival": value})
    details[0] |= {"seconds_per_task": 1.0, "peak_memory_mb": 1.0}
    return markdown(rows, details)


@pytest.mark.parametrize("make", [meta_lora, surrogate], ids=["meta-LoRA", "surrogate data"])
@pytest.mark.parametrize("value", HOSTILE)
def test_a_card_of_hostile_names_has_the_structure_of_any_other(make, value):
    header, body = make(value).removeprefix("---\n").split("\n---\n", 1)
    plain_header, plain_body = make(PLAIN_NAME).removeprefix("---\n").split("\n---\n", 1)
    assert tags(PLAIN.render(body)) == tags(PLAIN.render(plain_body))
    assert yaml.safe_load(header).keys() <= {*yaml.safe_load(plain_header), "license", "license_name"}
    assert "\x1b" not in body and "\u202e" not in body


@pytest.mark.parametrize("value", HOSTILE)
def test_tables_of_a_benchmark_and_licences_hold_too(value):
    assert tags(PLAIN.render(table(value))) == tags(PLAIN.render(table(PLAIN_NAME)))
    for stated in ([value], [value, None], [value, "mit"]):
        _, sentence = inherited_license(stated)
        plain = inherited_license([{value: "name"}.get(name, name) for name in stated])[1]
        assert tags(PLAIN.render(sentence)) == tags(PLAIN.render(plain))


def test_code_to_copy_from_a_card_is_what_it_was():
    """A name in quotes ends no string of the Python that people copy."""
    (fence,) = (t for t in PLAIN.parse(meta_lora('x"); import os; ("')) if t.type == "fence" and t.info == "python")
    assert 'from_pretrained("x\\"); import os; (\\"")' in fence.content
    compile(fence.content, "card", "exec")
