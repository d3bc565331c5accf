"""Adapters named by repo ids on the command line, and the commands of docs/hub.md, section Pull, as they stand."""

import contextlib
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers_adapters import edit_tensors
from helpers_hub import CONFIG, publish

from lora_recycle.cli.main import main


PAGE = Path(__file__).parents[2] / "docs" / "hub.md"
BASE = "google/vit-base-patch16-224"
SLUG = "someone/vit-loras-64f9a55bb3115b4f513ec026"


@pytest.fixture
def someone(hub, work, tmp_path, monkeypatch):
    """The repos that the page names, made of the pool in `work`, which has no adapter for another base."""
    monkeypatch.chdir(tmp_path)
    birds, flowers, trees = (work / "pool" / name for name in sorted(p.name for p in (work / "pool").iterdir()))
    hub.put(BASE, work / "base")
    publish(hub, "someone/vit-lora-birds", birds, BASE)
    publish(hub, "someone/vit-lora-flowers", trees, BASE)
    publish(hub, "someone/vit-lora-flowers", flowers, BASE, revision="v1")
    for name in ("birds", "flowers"):
        card = f"---\nlibrary_name: peft\nbase_model: {BASE}\ntags: [{name}]\n---\n# {name}\n"
        hub.put(f"someone/vit-lora-{name}", {"README.md": card})
    publish(hub, "someone/elsewhere", birds, "someone/other-base")
    hub.put("someone/empty", {"README.md": f"---\nbase_model: {BASE}\n---\n", CONFIG: "{}"})
    models = ("vit-lora-birds", "empty", "elsewhere")
    items = [{"_id": f"{i:024x}", "id": f"someone/{m}", "type": "model", "position": i} for i, m in enumerate(models)]
    told = {"slug": SLUG, "title": "ViT LoRAs", "owner": {"name": "someone"}, "items": items, "private": False}
    hub.collections[SLUG] = told | {"lastUpdated": hub.tick(), "theme": "green", "position": 0, "upvotes": 0}
    return hub


def test_inspect_describes_repos_for_people_and_machines(someone, run):
    code, out, err = run("inspect", "someone/vit-lora-birds", "someone/vit-lora-flowers@v1", "--quiet")
    commits = [someone.repo(f"someone/vit-lora-{n}").resolve(r).sha for n, r in (("birds", "main"), ("flowers", "v1"))]
    rows = [line.split() for line in out.splitlines()]
    assert code == 0 and [row[0] for row in rows[1:]] == ["someone/vit-lora-birds", "someone/vit-lora-flowers"]
    assert [row[-1] for row in rows[1:]] == [commit[:12] for commit in commits]
    assert all(BASE in row and "LORA" in row and "no" in row for row in rows[1:])
    code, out, err = run("inspect", f"collection:{SLUG}", "someone/none", "--on-error", "skip", "--json", "--quiet")
    birds, elsewhere, empty, none = json.loads(out)
    assert code == 0 and (birds["revision"], birds["converted"], birds["base_revision"]) == (commits[0], False, None)
    assert (birds["num_classes"], birds["rank"], birds["generation"]) == (4, 2, 5) and birds["size_bytes"] > 1000
    assert elsewhere["base_model"] == "someone/other-base"
    assert [(row["kind"], row["name"].split("@")[0]) for row in (empty, none)] == [
        ("skipped", "someone/empty"),  # with its commit, where there is one
        ("skipped", "someone/none"),
    ]
    assert "2 of 4 adapters skipped:" in err and "someone/none: no such folder or repo" in err


def test_a_bad_adapter_stops_a_command_with_one_line(someone, fails, tmp_path):
    (tmp_path / "ids.txt").write_text("someone/vit-lora-birds\nsomeone/empty\n")
    assert "error: someone/empty@" in fails("inspect", "ids.txt", "--quiet")
    line = fails("distill", "ids.txt", "--steps", 0, "--output", "average", "--quiet")
    assert "adapter_config.json has peft_type None" in line


def test_adapters_that_cannot_be_inverted_are_told_before_the_first_image(someone, run, fails, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name, data in someone.files("someone/vit-lora-birds").items():
        (bare / name).write_bytes(data)
    edit_tensors(bare, lambda tensors: {k: t + 0.01 for k, t in tensors.items() if "classifier" not in k})
    (tmp_path / "ids.txt").write_text("someone/vit-lora-birds\n./bare\nsomeone/none\n")
    quick = ["--images-per-class", 1, "--iterations", 1, "--quiet"]
    (tmp_path / "two.txt").write_text("someone/vit-lora-birds\n./bare\n")
    assert "error: bare: has no classification head" in fails("invert", "two.txt", "--output", "images", *quick)
    assert not (tmp_path / "images").exists()
    code, out, err = run("invert", "ids.txt", "--output", "images", "--on-error", "skip", *quick)
    assert code == 0 and len(out.splitlines()) == 2 and out.splitlines()[1].startswith("someone/vit-lora-birds")
    assert "2 of 3 adapters skipped:" in err and "bare: has no classification head" in err
    distill = ["distill", "two.txt", "--surrogate", "images", "--steps", 1, "--rank", 2, "--quiet"]
    assert "holds no images of the adapter bare" in fails(*distill, "--output", "none")
    code, _, err = run(*distill, "--output", "meta", "--on-error", "skip")
    assert code == 0 and "1 of 2 adapters skipped:" in err and "images has no images of it" in err
    sources = json.loads((tmp_path / "meta" / "meta_lora_config.json").read_text())["sources"]
    assert [source["name"] for source in sources] == ["someone/vit-lora-birds"]


def test_evaluate_takes_adapters_of_the_hub(someone, evaluate_arguments, run, work):
    pool = ["someone/vit-lora-birds", "someone/vit-lora-flowers@v1", "someone/none"]
    code, out, err = run(*evaluate_arguments, "--pool", *pool, "--on-error", "skip", "--base-model", work / "base")
    assert code == 0 and "ensemble" in out
    assert "1 of 3 adapters skipped:" in err and "someone/none: no such folder or repo" in err


def blocks(section: str) -> list[tuple[str, str]]:
    """Language and text of the code blocks of one section of the page."""
    text = PAGE.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def shell(line: str) -> None:
    """One command: ours in this process, with its redirection, the rest by the shell."""
    words = shlex.split(line)
    if words[0] != "lora-recycle":
        subprocess.run(["bash", "-ec", line], check=True)
    elif ">" in words:
        with open(words[words.index(">") + 1], "w") as file, contextlib.redirect_stdout(file):
            assert main(words[1 : words.index(">")]) == 0
    else:
        assert main(words[1:]) == 0, line


@pytest.mark.filterwarnings("default")
def test_the_page_does_what_it_says(someone, tmp_path, capsys):
    names = {}
    found = blocks("Pull")
    assert [language for language, _ in found] == ["bash", "bash", "python", "bash", "python", "bash", "python"]
    for i, (language, text) in enumerate(found):
        if language == "bash":
            for line in text.splitlines():
                shutil.rmtree("average", ignore_errors=True)  # a new run, not the last one resumed
                shell(line)
        else:
            exec(compile(text, f"{PAGE.name}, block {i}", "exec"), names)  # noqa: S102
        if i == 2:
            assert [info.revision for info in names["pool"].infos] == [
                someone.repo("someone/vit-lora-birds").resolve("main").sha,
                someone.repo("someone/vit-lora-flowers").resolve("v1").sha,
            ]
            assert names["pool"].backbone.revision == someone.repo(BASE).resolve("main").sha
    out, err = capsys.readouterr()
    assert json.loads(Path("birds.json").read_text())[0]["name"] == "someone/vit-lora-birds"
    manifest = json.loads(Path("surrogate", "manifest.json").read_text())
    assert [s["adapter"]["revision"] for s in manifest["shards"]] == [info.revision for info in names["pool"].infos]
    assert all(Path(folder, "adapter_model.safetensors").is_file() for folder in ("meta_lora", "average"))
    assert "1 of 3 adapters skipped:" in err and "someone/empty" in err
    assert len(names["pool"]) == 2 and "someone/empty" in out  # what the page prints of pool.skipped
