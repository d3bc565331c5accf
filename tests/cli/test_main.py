"""The command line around the verbs: help without torch, exit codes, one line for each bad input."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_recycle.cli import main as command_line
from lora_recycle.cli.main import build_parser, main


VERBS = list(build_parser()._subparsers._group_actions[0].choices)


def test_help_of_every_verb_needs_no_torch():
    script = (
        "import sys\n"
        "from lora_recycle.cli.main import build_parser\n"
        f"for arguments in [['--help']] + [[verb, '--help'] for verb in {VERBS}]:\n"
        "    try: build_parser().parse_args(arguments)\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'transformers', 'peft', 'datasets'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stdout.count("examples:") == 1 + len(VERBS)


def test_importing_the_package_imports_no_library():
    script = (
        "import sys; before = set(sys.modules); import lora_recycle\n"
        "print({name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "{'lora_recycle'}\n"


def test_python_m_runs_the_same_command_line():
    done = subprocess.run([sys.executable, "-m", "lora_recycle", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("lora-recycle ")


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["invert"], ["invert", "p", "--output", "o", "--lr", "x"]])
def test_wrong_usage_exits_with_2(arguments):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["predcit", "demo"], "lora-recycle: error: there is no verb 'predcit'. Did you mean predict?"),
        (["--quiet", "zzz"], "lora-recycle: error: there is no verb 'zzz'."),
        (
            ["invert", "p", "--output", "o", "--iteration=3"],
            "invert: error: unrecognized arguments: --iteration=3. Did",
        ),
        (["predict", "demo"], "lora-recycle predict: error: the following arguments are required: IMAGES"),
    ],
)
def test_wrong_usage_names_what_was_meant_and_the_help(arguments, said, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    first, second = capsys.readouterr().err.splitlines()
    assert said in first and second.startswith("See `lora-recycle") and second.endswith("--help`.")


def test_bad_recipes_are_named(work, tmp_path, fails):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("invert: {iterationz: 3}\n")
    assert "unknown key 'iterationz'" in fails("invert", work / "pool", "--output", tmp_path / "s", "--recipe", recipe)
    assert "unknown key 'iterationz'" in fails("demo", "--pool", work / "pool", "--recipe", recipe)
    recipe.write_text("destill: {}\n")
    assert "'destill'" in fails("demo", "--pool", work / "pool", "--recipe", recipe)
    assert not (tmp_path / "s").exists()


def test_missing_folders_are_named(work, tmp_path, fails):
    nowhere = tmp_path / "nowhere"
    assert "nowhere" in fails("inspect", nowhere)
    assert "nowhere" in fails("invert", nowhere, "--output", tmp_path / "s")
    assert "nowhere" in fails("predict", work / "meta", "--support", work / "photos", nowhere)
    assert "nowhere" in fails("evaluate", work / "meta", "--data", nowhere)
    missing = ["--surrogate", work / "photos", "--output", tmp_path / "m"]
    assert "manifest.json" in fails("distill", work / "pool", *missing)


def test_a_truncated_adapter_is_named(work, tmp_path, fails):
    shutil.copytree(work / "pool", tmp_path / "pool")
    weights = tmp_path / "pool" / "photos-001" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for command in (["inspect"], ["invert", "--output", tmp_path / "s"]):
        line = fails(command[0], tmp_path / "pool", *command[1:], *(["--quiet"] if len(command) > 1 else []))
        assert "photos-001" in line and "truncated" in line


def test_too_few_classes_or_a_broken_image_are_named(evaluate_arguments, work, tmp_path, fails):
    assert "7 classes" in fails(*evaluate_arguments, "--ways", 7)
    assert "6 classes, fewer than the 10" in fails(
        "train-adapters", work / "photos", "--output", tmp_path / "p", "--base-model", work / "base"
    )
    (tmp_path / "one" / "cat").mkdir(parents=True)
    shutil.copy(work / "photos" / "class 0" / "0.png", tmp_path / "one" / "cat")
    image, broken = work / "photos" / "class 0" / "1.png", tmp_path / "broken.png"
    assert "two classes" in fails("predict", work / "meta", "--support", tmp_path / "one", image)
    broken.write_bytes(b"no image")
    assert "broken.png" in fails("predict", work / "meta", "--support", work / "photos", broken)
    assert "--device warp" in fails("invert", work / "pool", "--output", tmp_path / "s", "--device", "warp")


def test_a_pool_of_another_base_is_refused(evaluate_arguments, work, tmp_path, fails):
    shutil.copytree(work / "base", tmp_path / "other")
    shutil.copytree(work / "pool" / "photos-000", tmp_path / "pool" / "a")
    path = tmp_path / "pool" / "a" / "adapter_config.json"
    path.write_text(path.read_text().replace(str(work / "base"), str(tmp_path / "other")))
    assert "Pass --base-model" in fails(*evaluate_arguments, "--pool", tmp_path / "pool")


def test_system_errors_interrupts_and_debug(monkeypatch, fails):
    def raising(error):
        def run(_):
            raise error

        monkeypatch.setattr(command_line.inspect, "run", run)

    raising(OSError(28, "No space left on device", "out/file"))
    assert fails("inspect", "x") == "lora-recycle: error: out/file: No space left on device\n"
    with pytest.raises(OSError):
        main(["--debug", "inspect", "x"])
    with pytest.raises(OSError):
        main(["inspect", "x", "--debug"])
    raising(KeyboardInterrupt())
    assert main(["inspect", "x"]) == 130
    raising(MemoryError())
    assert fails("inspect", "x") == "lora-recycle: error: MemoryError\n"


def test_a_bug_is_one_line_too_and_debug_shows_its_trace(monkeypatch, run):
    def run_verb(_):
        raise TypeError("not\nfor users")

    monkeypatch.setattr(command_line.inspect, "run", run_verb)
    code, out, err = run("inspect", "x")
    assert code == 1 and out == "" and err.count("\n") == 1 and "Traceback" not in err
    assert err.startswith("lora-recycle: bug: TypeError: not for users (") and "--debug" in err
    with pytest.raises(TypeError):
        main(["inspect", "x", "--debug"])


def test_quiet_leaves_nothing_but_results(work, evaluate_arguments, tmp_path, run):
    photo, answers = work / "photos" / "class 0" / "0.png", {}
    for verb, *arguments in (
        ["inspect", work / "pool"],
        ["invert", work / "pool", "--output", tmp_path / "s", "--iterations", 1, "--images-per-class", 1],
        ["distill", work / "pool", "--output", tmp_path / "m", "--steps", 0, "--rank", 2],
        [*evaluate_arguments[:-1], "--queries", 5, "--no-pool"],
        ["predict", work / "meta", "--support", work / "photos", photo],
    ):
        for quiet in ([], ["--quiet"]):
            code, out, err = run(verb, *arguments, *quiet)
            assert code == 0 and out and out == answers.setdefault(verb, out)
            told = (
                verb == "invert" and "own images a low probability" in err
            )  # one iteration is too few, and that is said
            assert (told or err == "") if quiet else err.splitlines()[-1].startswith("Next: lora-recycle ")


COMPLETE = """\
source completion
for line in "lora-recycle inv" "lora-recycle invert pool --images-per" "lora-recycle distill --init " "lora-recycle in"
do
    read -ra COMP_WORDS <<< "$line"
    [[ $line == *" " ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
    $(complete -p lora-recycle | grep -oP '(?<=-F )\\S+') lora-recycle "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"
    echo "${COMPREPLY[*]}"
done
"""


def test_bash_completes_verbs_flags_and_choices(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", "bash"])
    assert end.value.code == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    done = subprocess.run(["bash", "-c", COMPLETE], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "invert",
        "--images-per-class",
        "restored undiluted group-sum average zero pissa olora corda",
        "inspect invert",
    ]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_every_verb_and_its_settings(shell, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert end.value.code == 0 and all(verb in script for verb in VERBS)
    assert "images-per-class" in script and "relational-batch" in script


def test_completion_needs_no_torch():
    script = "import sys; from lora_recycle.cli.main import main\ntry: main(['--print-completion', 'bash'])\n"
    script += "finally: print({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "set()"


def test_the_page_on_the_command_line_tells_every_verb_and_exit_code():
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
    assert all(f"`{verb}`" in page for verb in VERBS) and all(f"| {code} |" in page for code in (0, 1, 2, 130, 143))
