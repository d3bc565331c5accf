"""Config dataclasses as flags: defaults, recipe files, explicit flags, and what is refused."""

import argparse
import dataclasses

import pytest

from lora_recycle.cli.arguments import SECTIONS, add_config_arguments, build_config
from lora_recycle.distillation.config import DistillationConfig
from lora_recycle.errors import ConfigError
from lora_recycle.inversion.config import InversionConfig
from lora_recycle.pool.config import AdapterTrainingConfig
from lora_recycle.runtime.config import RecipeConfig, field


@dataclasses.dataclass
class Toy(RecipeConfig):
    """One field of each kind."""

    steps: int = field(3, "optimiser steps, 100 % of them")
    lr: float = field(0.1, "step size")
    layer: int | None = field(None, "a layer")
    mode: str = field("a", "which way", ("a", "b"))
    flip: bool = field(True, "mirror")
    weights: dict[str, float] = field({"x": 1.0}, "weights of the terms")

    def check(self):
        self.require(self.steps >= 0, f"steps must not be negative, got {self.steps}")


def parser_for(config_class=Toy, verb="invert"):
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_config_arguments(parser, config_class)
    parser.set_defaults(verb=verb)
    return parser


def build(*flags, verb="invert", config_class=Toy):
    return build_config(parser_for(config_class, verb).parse_args(flags), config_class)


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("config_class", [Toy, AdapterTrainingConfig, InversionConfig, DistillationConfig])
def test_without_flags_the_config_is_the_default_and_the_help_lists_every_field(config_class):
    assert build(config_class=config_class) == config_class()
    text = parser_for(config_class).format_help()
    for f in dataclasses.fields(config_class):
        assert f"--{f.name.replace('_', '-')}" in text


def test_help_shows_documentation_and_defaults():
    text = " ".join(parser_for().format_help().split())
    assert "optimiser steps, 100 % of them (default: 3)" in text
    assert "weights of the terms (default: x=1)" in text
    assert "mirror (default: on)" in text
    assert "a layer (default: none)" in text


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--steps", "7"], "steps", 7),
        (["--lr", "1e-3"], "lr", 1e-3),
        (["--layer", "2"], "layer", 2),
        (["--layer", "none"], "layer", None),
        (["--mode", "b"], "mode", "b"),
        (["--no-flip"], "flip", False),
        (["--flip"], "flip", True),
        (["--weights", "tv=0.1", "entropy=2"], "weights", {"tv": 0.1, "entropy": 2.0}),
        (["--weights"], "weights", {}),
    ],
)
def test_a_flag_sets_its_field_and_no_other(flags, name, value):
    assert build(*flags) == dataclasses.replace(Toy(), **{name: value})


def test_flags_override_a_flat_recipe_which_overrides_the_defaults(tmp_path):
    path = recipe(tmp_path, "steps: 5\nlr: 2e-3\nflip: false\nweights: {a: 1}\n")
    config = build("--recipe", path, "--steps", "9", "--weights", "b=2")
    assert config == Toy(steps=9, lr=2e-3, flip=False, weights={"b": 2.0})


def test_a_flag_that_repeats_the_default_still_overrides_the_recipe(tmp_path):
    assert build("--recipe", recipe(tmp_path, "steps: 5"), "--steps", "3").steps == 3


@pytest.mark.parametrize("verb", SECTIONS)
def test_each_verb_takes_its_own_section(tmp_path, verb):
    path = recipe(tmp_path, "\n".join(f"{name}: {{steps: {i + 10}}}" for i, name in enumerate(SECTIONS)))
    assert build("--recipe", path, verb=verb).steps == 10 + SECTIONS.index(verb)


def test_an_empty_section_means_the_defaults(tmp_path):
    assert build("--recipe", recipe(tmp_path, "invert:\n")) == Toy()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 5", "unknown key 'stepz'"),
        ("invert: {stepz: 5}", "unknown key 'stepz'"),
        ("invert: {steps: 5}\nsteps: 6", "unknown key 'steps' beside sections"),
        ("distill: {steps: 5}", "no section `invert:`"),
        ("invert: 5", "must be a mapping"),
        ("- 1", "a recipe is a mapping"),
        ("a: [", "not valid YAML"),
        ("steps: many", "expected int, got 'many'"),
        ("steps: -1", "must not be negative, got -1"),
        ("3: 4\nb: 5", "unknown key 3"),
    ],
)
def test_a_bad_recipe_is_a_config_error_that_names_the_fault(tmp_path, text, message):
    with pytest.raises(ConfigError, match="(?s).*" + message.replace("'", ".")):
        build("--recipe", recipe(tmp_path, text))


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml"):
        build("--recipe", str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize(
    "flags", [["--steps", "x"], ["--mode", "c"], ["--weights", "tv"], ["--weights", "=1"], ["--layer", "x"]]
)
def test_a_flag_of_the_wrong_form_is_an_argparse_error(flags):
    with pytest.raises((argparse.ArgumentError, SystemExit)):
        parser_for().parse_args(flags)
