"""Recipes are checked where they are made, and errors give the numbers."""

import json

import pytest

from lora_recycle.distillation.config import DistillationConfig
from lora_recycle.errors import ConfigError
from lora_recycle.evaluation.config import EvaluationConfig
from lora_recycle.inversion.config import InversionConfig
from lora_recycle.pool.config import AdapterTrainingConfig
from lora_recycle.runtime.config import read_yaml


def test_values_as_yaml_and_the_command_line_give_them():
    config = InversionConfig(lr="1e-3", images_per_class=4.0, starts={"noise": 1, "fractal": "0.5"}, max_classes=None)
    assert config.lr == 1e-3 and type(config.images_per_class) is int and config.images_per_class == 4
    assert config.starts == {"noise": 1.0, "fractal": 0.5} and type(config.starts["noise"]) is float
    assert config.max_classes is None


def test_defaults_are_not_shared():
    one, two = InversionConfig(), InversionConfig()
    one.starts["noise"] = 2.0
    assert "noise" not in two.starts


def test_a_recipe_survives_yaml(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("steps: 7\nlr: 2e-3\ninit: zero\nuse_masks: false\n")
    config = DistillationConfig.from_yaml(path)
    assert (config.steps, config.lr, config.init, config.use_masks) == (7, 2e-3, "zero", False)
    assert DistillationConfig.from_dict(config.to_dict()) == config


def test_an_empty_recipe_is_the_default(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert DistillationConfig.from_yaml(tmp_path / "empty.yaml") == DistillationConfig()


def test_an_unknown_key_is_named_with_the_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("stepps: 7\n")
    with pytest.raises(ConfigError, match=r"recipe.yaml: unknown key 'stepps' for DistillationConfig.*steps"):
        DistillationConfig.from_yaml(path)


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (DistillationConfig, {"steps": "many"}, "DistillationConfig.steps: expected int, got 'many'"),
        (DistillationConfig, {"steps": 1.5}, "expected int, got 1.5"),
        (DistillationConfig, {"steps": True}, "expected int, got True"),
        (DistillationConfig, {"lr": "fast"}, "expected float, got 'fast'"),
        (DistillationConfig, {"use_masks": "yes"}, "expected bool, got 'yes'"),
        (InversionConfig, {"priors": ["tv"]}, r"InversionConfig.priors: expected"),
        (InversionConfig, {"priors": {"tv": "strong"}}, "expected float, got 'strong'"),
        (DistillationConfig, {"lr": None}, "expected float, got None"),
    ],
)
def test_wrong_types(config, values, message):
    with pytest.raises(ConfigError, match=message):
        config(**values)


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (DistillationConfig, {"rank": 0}, "rank must be at least 1, got 0"),
        (DistillationConfig, {"steps": -3}, "steps must not be negative, got -3"),
        (DistillationConfig, {"ways": 1}, "ways must be at least 2, got 1"),
        (DistillationConfig, {"relational_batch": 3}, "relational_batch must be at least 4, got 3"),
        (DistillationConfig, {"relational_weight": 0.0}, "all loss weights are 0"),
        (DistillationConfig, {"lr": 0.0}, "lr and temperature must be positive"),
        (DistillationConfig, {"schedule": "linear"}, "schedule must be one of cosine, cyclic, got 'linear'"),
        (InversionConfig, {"keep_ratio": 1.5}, r"keep_ratio must be in \(0, 1\], got 1.5"),
        (InversionConfig, {"keep_ratio": float("nan")}, r"keep_ratio must be in \(0, 1\], got nan"),
        (InversionConfig, {"prune": {"two": 0.5}}, "InversionConfig.prune: expected int as key, got 'two'"),
        (InversionConfig, {"prune": {-1: 0.5}}, "prune: layers are numbered from 0, got -1"),
        (
            InversionConfig,
            {"prune": {3: 1.0}},
            "prune: fractions must be between 0 and 1 and decrease from layer to layer, got",
        ),
        (InversionConfig, {"prune": {3: 0.0}}, "prune: fractions must be between 0 and 1 and decrease"),
        (InversionConfig, {"prune": {3: 0.25, 1: 0.25}}, "prune: fractions must be between 0 and 1 and decrease"),
        (InversionConfig, {"prune_start": -1}, "prune_start must not be negative, got -1"),
        (InversionConfig, {"stop_at": 0.0}, r"stop_at must be in \(0, 1\], got 0.0"),
        (InversionConfig, {"max_classes": 1}, "max_classes must be at least 2, got 1"),
        (InversionConfig, {"iterations": -1}, "iterations must not be negative, got -1"),
        (InversionConfig, {"priors": {"nope": 1.0}}, "priors: 'nope' is unknown; choose from tv, patch_entropy"),
        (InversionConfig, {"priors": {"tv": -2.0}}, "the weight of tv must not be negative, got -2.0"),
        (InversionConfig, {"starts": {"noise": 0.0}}, "at least one fraction must be positive"),
        (InversionConfig, {"starts": {"images": 1.0}}, "`images` needs `start_images`"),
        (InversionConfig, {"parameterization": "svg"}, "parameterization must be one of multires, pixels"),
        (AdapterTrainingConfig, {"classes": 1}, "classes must be at least 2, got 1"),
        (AdapterTrainingConfig, {"peft_type": "IA3"}, "peft_type must be one of LORA, DORA"),
        (AdapterTrainingConfig, {"epochs": 0}, "epochs must be at least 1, got 0"),
    ],
)
def test_values_out_of_range(config, values, message):
    with pytest.raises(ConfigError, match=message):
        config(**values)


def test_layers_are_numbers_wherever_they_come_from():
    config = InversionConfig(prune={"4": "0.25", 2: 0.5})  # the command line and JSON write numbers as text
    assert config.prune == {4: 0.25, 2: 0.5}
    assert InversionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_no_steps_needs_no_loss():
    assert DistillationConfig(steps=0, relational_weight=0.0).steps == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"steps: [1, 2", "recipe.yaml: not valid YAML"),
        (b"\xff\xfe\x00", "recipe.yaml: not valid YAML"),
        (b"steps: " + b"[" * 5000, "recipe.yaml: not valid YAML"),
        (b"- steps\n- lr\n", "a recipe is a mapping of settings, got a list"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        read_yaml(path)


def test_a_missing_recipe(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml: cannot be read"):
        DistillationConfig.from_yaml(tmp_path / "nowhere.yaml")


def test_settings_of_earlier_versions_are_read_where_they_changed_nothing():
    assert InversionConfig.from_dict({"hard_weight": 0.0, "hard_reference": "average", "lr": 0.1}).lr == 0.1
    with pytest.raises(ConfigError, match="old.json: hard_weight was removed, as it made results worse"):
        InversionConfig.from_dict({"hard_weight": 5.0}, where="old.json")


@pytest.mark.parametrize("text", ["lr: 1" + "0" * 400, "steps: 1" + "0" * 400, "steps: -1" + "0" * 30])
def test_numbers_that_no_computer_holds(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="DistillationConfig.(lr: expected float|steps: must lie between)"):
        DistillationConfig.from_yaml(path)


@pytest.mark.parametrize("text", ["steps: 1" + "0" * 5000, "start: 2026-99-99", "[" * 3000])
def test_yaml_that_python_cannot_hold(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match="recipe.yaml: not valid YAML"):
        read_yaml(tmp_path / "recipe.yaml")


def test_a_dictionary_is_taken_for_a_config():
    given = EvaluationConfig(ways=3)
    assert EvaluationConfig.of({"ways": 3}) == given and EvaluationConfig.of(given) is given
    assert EvaluationConfig.of(None) == EvaluationConfig()
    with pytest.raises(ConfigError, match="unknown key 'way'"):
        EvaluationConfig.of({"way": 3})
    with pytest.raises(ConfigError, match="must be EvaluationConfig or a dictionary, got a list"):
        EvaluationConfig.of([3])
