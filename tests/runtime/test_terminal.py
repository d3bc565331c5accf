"""What strangers wrote, in the terminal and in spreadsheets: nothing in it is obeyed, nothing else is changed."""

import json

import pytest

from lora_recycle.runtime.terminal import csv_cell, printable, single_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", r"\u001b[31mred\u001b[0m"),
        ("\x1b]0;title\x07", r"\u001b]0;title\u0007"),
        ("\x9b2J", r"\u009b2J"),  # the same in one character
        ("over\rwritten\b\x7f", r"over\u000dwritten\u0008\u007f"),
        ("photo\u202egnp.exe", r"photo\u202egnp.exe"),
        ("line\u2028end\x85\x0b\x0c", r"line\u2028end\u0085\u000b\u000c"),
        ("name-\udcff.png\ud800", r"name-\udcff.png\ud800"),
        ("über 猫 👩‍🔬 C:\\dir\ta\nb", "über 猫 👩‍🔬 C:\\dir\ta\nb"),
    ],
)
def test_control_characters_are_shown(text, shown):
    assert printable(text) == shown
    shown.encode()


def test_one_line_stays_one():
    assert single_line("cat\n  error: \x1b[1mall fine\t!") == r"cat\n  error: \u001b[1mall fine\t!"


def test_printable_json_is_the_same_json():
    value = {"\x1b\x7f": "a\u2028b\x9b\n"}
    for ascii_only in (True, False):
        assert json.loads(printable(json.dumps(value, ensure_ascii=ascii_only, indent=1))) == value


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20"])
def test_no_cell_is_a_formula(start):
    assert csv_cell(f"{start}1+1") == "'" + single_line(f"{start}1+1")
    assert csv_cell(f"cat {start}") == single_line(f"cat {start}") and csv_cell("") == ""
