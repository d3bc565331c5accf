"""What the command line prints of strangers' names: escaped at the one place where it prints, on lines of its own."""

import ast
import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_recycle import cli
from lora_recycle.cli import main as command_line
from lora_recycle.cli.common import echo, note, table
from lora_recycle.cli.main import main
from lora_recycle.errors import AdapterError
from lora_recycle.evaluation.results import format_table


RED = "\x1b[31m"
FAKE = f"{RED}cat\nNext: rm -rf ~"
DOG = f"-{RED}dog\nphoto.png,cat,1.0"


def test_verbs_print_in_one_place_alone():
    for path in Path(cli.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
        assert names.count("print") == (2 if path.name == "common.py" else 0), path.name
        writes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "write"]
        assert not writes, path.name


def test_results_and_remarks_are_escaped(capsys):
    echo(f"a {RED} b")
    note(f"c {RED} d")
    assert capsys.readouterr() == ("a \\u001b[31m b\n", "c \\u001b[31m d\n")


def test_a_cell_stays_on_its_line():
    row = {"method": FAKE, "data": FAKE, "ways": 5, "shots": 1, "accuracy": 1.0, "ci95": 0.1}
    row |= {"delta_vs_frozen": 0.5, "delta_ci95": 0.2}
    for text in (table(("name", "n"), [(FAKE, 1)]), format_table([row])):
        lines = text.splitlines()
        assert len(lines) == 2 and lines[1].startswith(r"\u001b[31mcat\nNext: rm -rf ~")


def raising(monkeypatch, error):
    def run(_):
        raise error

    monkeypatch.setattr(command_line.inspect, "run", run)


def test_errors_are_escaped_on_one_line(monkeypatch, fails, capsys):
    raising(monkeypatch, AdapterError(f"{FAKE}: damaged"))
    assert fails("inspect", "x") == "lora-recycle: error: \\u001b[31mcat Next: rm -rf ~: damaged\n"
    raising(monkeypatch, OSError(2, "No such file", FAKE))
    assert fails("inspect", "x") == "lora-recycle: error: \\u001b[31mcat Next: rm -rf ~: No such file\n"
    with pytest.raises(SystemExit):
        main(["inspect", "x", f"--{RED}cat\nNext:"])
    usage = capsys.readouterr().err.splitlines()
    assert len(usage) == 2 and r"--\u001b[31mcat\nNext:" in usage[0]


def test_traces_and_log_records_are_escaped():
    script = (
        "import logging, sys\n"
        "from lora_recycle.cli import main as command_line\n"
        "def run(args):\n"
        "    logging.getLogger('lora_recycle.x').warning('%s is damaged', sys.argv[1])\n"
        "    raise ValueError(sys.argv[1])\n"
        "command_line.inspect.run = run\n"
        "command_line.main(['inspect', 'x', '--debug'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, f"a{RED}b"], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "\x1b" not in done.stderr
    assert "a\\u001b[31mb is damaged" in done.stderr and "ValueError: a\\u001b[31mb" in done.stderr


@pytest.fixture
def hostile(work, tmp_path):
    """Examples of classes with hostile names, and an image of one."""
    examples = tmp_path / "examples"
    for number, name in enumerate(("=HYPERLINK(1)", DOG)):
        shutil.copytree(work / "photos" / f"class {number}", examples / name)
    photo = tmp_path / f"@SUM{RED}.png"
    shutil.copy(work / "photos" / "class 0" / "0.png", photo)
    return ["predict", work / "meta", "--support", examples, photo, "--quiet"]


def test_a_table_of_hostile_names_is_a_table(hostile, run):
    code, out, err = run(*hostile)
    assert code == 0 and err == "" and "\x1b" not in out and len(out.splitlines()) == 2


def test_csv_of_hostile_names_has_no_formula_and_no_further_line(hostile, run, monkeypatch):
    monkeypatch.chdir(hostile[4].parent)
    code, out, _ = run(*hostile[:4], hostile[4].name, "--csv", "--quiet")
    header, row = csv.reader(io.StringIO(out))
    assert code == 0 and "\x1b" not in out and len(out.splitlines()) == 2
    assert row[:2] == ["'@SUM\\u001b[31m.png", "'=HYPERLINK(1)"]
    assert header == ["file", "label", "probability", "p(-\\u001b[31mdog\\nphoto.png,cat,1.0)", "p(=HYPERLINK(1))"]
    assert all(not cell.startswith(("=", "+", "-", "@")) for cell in header + row)


def test_json_of_hostile_names_has_them_whole(hostile, run):
    _, out, _ = run(*hostile, "--json")
    (row,) = json.loads(out)
    assert row["file"] == str(hostile[4]) and set(row["probabilities"]) == {"=HYPERLINK(1)", DOG}


def test_inspect_shows_hostile_settings_on_one_line_each(work, tmp_path, run):
    shutil.copytree(work / "pool" / "photos-000", tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "base_model_name_or_path": FAKE, "revision": FAKE}))
    code, out, err = run("inspect", tmp_path / "a", "--quiet")
    assert code == 0 and "\x1b" not in out + err
    lines = out.splitlines()  # header, row, and why it is not known to be usable
    assert len(lines) == 4 and lines[3].startswith("usable: ")
