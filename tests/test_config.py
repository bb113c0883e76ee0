"""Run files, overrides and their errors, on toy dataclasses registered for these tests."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from typing import Literal

import pytest

from agentx.cli import config, registry
from agentx.cli.annotations import describe
from agentx.cli.config import ConfigError, load_config, save_config
from agentx.cli.resolved import format_config
from agentx.model.sizes import num_params


@dataclasses.dataclass(frozen=True)
class ToyOptimizer:
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Literal["cosine", "constant"] = "cosine"


@dataclasses.dataclass(frozen=True)
class ToyModel:
    width: int
    num_heads: int = 2
    name: str = "toy"
    window: int | None = None
    tokenizer: Path | None = None
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")


@dataclasses.dataclass(frozen=True)
class ToyRun:
    model: ToyModel
    optimizer: ToyOptimizer = ToyOptimizer()
    others: tuple[ToyOptimizer, ...] = ()
    num_steps: int = 10


@pytest.fixture(autouse=True)
def toy_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in (ToyOptimizer, ToyModel, ToyRun):
        monkeypatch.setitem(registry.REGISTRY, cls.__name__, f"{__name__}.{cls.__name__}")


MINIMAL = "ToyRun.model = @ToyModel()\nToyModel.width = 8\n"


def write(folder: Path, text: str, name: str = "run.gin") -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def load(folder: Path, text: str, *overrides: str) -> ToyRun:
    return load_config(write(folder, text), overrides, root="ToyRun")


def error(folder: Path, text: str, *overrides: str) -> str:
    """The sentence, with the folder taken off its front."""
    with pytest.raises(ConfigError) as info:
        load(folder, text, *overrides)
    message = str(info.value)
    assert "\n" not in message
    return message.replace(f"{folder}/", "")


# What a file can say


def test_a_file_binds_nested_dataclasses_and_leaves_the_rest_at_their_defaults(tmp_path):
    text = """
        WIDTH = 8
        ToyRun.model = @ToyModel()
        ToyRun.optimizer = @ToyOptimizer()
        ToyRun.others = [@ToyOptimizer(), @slow/ToyOptimizer()]
        ToyModel:
            width = %WIDTH
            sizes = [1, 2]
            tokenizer = "a/b.model"
        ToyOptimizer.learning_rate = 1
        slow/ToyOptimizer.schedule = "constant"
    """
    assert load(tmp_path, text) == ToyRun(
        model=ToyModel(width=8, sizes=(1, 2), tokenizer=Path("a/b.model")),
        optimizer=ToyOptimizer(learning_rate=1.0),
        others=(ToyOptimizer(learning_rate=1.0), ToyOptimizer(1.0, (0.9, 0.95), "constant")),
    )


def test_an_include_is_found_beside_the_file_and_then_in_the_configs_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "configs_folder", lambda: tmp_path / "configs")
    write(tmp_path, "ToyModel.width = 8\n", "configs/models/toy.gin")
    write(tmp_path, "include 'models/toy.gin'\nToyModel.name = 'beside'\n", "runs/base.gin")
    run = load(tmp_path / "runs", "include 'base.gin'\nToyRun.model = @ToyModel()\n")
    assert run.model == ToyModel(width=8, name="beside")


def test_a_run_is_found_by_its_name_below_the_configs_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "configs_folder", lambda: tmp_path)
    write(tmp_path, MINIMAL, "runs/toy/train.gin")
    assert load_config("runs/toy/train.gin", root="ToyRun") == ToyRun(ToyModel(8))
    assert load_config("runs/toy/train", root="ToyRun") == ToyRun(ToyModel(8))
    with pytest.raises(ConfigError) as info:
        load_config("runs/toy/trian.gin", root="ToyRun")
    assert str(info.value) == (
        "runs/toy/trian.gin: there is no such run file; did you mean 'runs/toy/train.gin'?"
    )


def test_the_last_override_wins_over_the_file_and_over_its_macros(tmp_path):
    text = "WIDTH = 8\nToyRun.model = @ToyModel()\nToyModel.width = %WIDTH\n"
    overrides = ("--gin.WIDTH=4", "--gin.ToyRun.num_steps=1", "ToyRun.num_steps=2")
    assert load(tmp_path, text, *overrides) == ToyRun(ToyModel(4), num_steps=2)


def test_a_macro_can_stand_for_a_folder(tmp_path):
    text = "OUT = 'a/b'\nToyModel.tokenizer = %OUT/deep/tokenizer.model\n" + MINIMAL
    assert load(tmp_path, text).model.tokenizer == Path("a/b/deep/tokenizer.model")
    assert load(tmp_path, text, "OUT=/c-d").model.tokenizer == Path("/c-d/deep/tokenizer.model")
    assert error(tmp_path, text, "OUT=3") == (
        "run.gin:2: %OUT/deep/tokenizer.model wants %OUT to be a string, not 3 (int)"
    )
    assert error(tmp_path, "deep/OUT = 3\n") == "run.gin:1: deep/OUT: a macro can't have a scope"


def test_an_override_that_is_no_literal_is_a_string(tmp_path):
    overrides = ("--gin.ToyModel.tokenizer=/a-b/c.model", "--gin.ToyModel.name='quoted'")
    run = load(tmp_path, MINIMAL, *overrides)
    assert (run.model.tokenizer, run.model.name) == (Path("/a-b/c.model"), "quoted")


# The resolved config


def test_the_resolved_config_has_every_parameter(tmp_path):
    run = load(
        tmp_path, MINIMAL, "ToyRun.others=[@slow/ToyOptimizer()]", "slow/ToyOptimizer.betas=(0, 1)"
    )
    assert format_config(run).splitlines()[2:] == [
        "",
        "ToyRun.model = @ToyModel()",
        "ToyRun.optimizer = @optimizer/ToyOptimizer()",
        "ToyRun.others = (@others_0/ToyOptimizer(),)",
        "ToyRun.num_steps = 10",
        "",
        "ToyModel.width = 8",
        "ToyModel.num_heads = 2",
        "ToyModel.name = 'toy'",
        "ToyModel.window = None",
        "ToyModel.tokenizer = None",
        "ToyModel.sizes = ()",
        "",
        "optimizer/ToyOptimizer.learning_rate = 0.001",
        "optimizer/ToyOptimizer.betas = (0.9, 0.95)",
        "optimizer/ToyOptimizer.schedule = 'cosine'",
        "",
        "others_0/ToyOptimizer.learning_rate = 0.001",
        "others_0/ToyOptimizer.betas = (0.0, 1.0)",
        "others_0/ToyOptimizer.schedule = 'cosine'",
    ]


def test_the_resolved_config_alone_gives_equal_objects(tmp_path):
    run = ToyRun(
        model=ToyModel(6, 3, 'it\'s "quoted"\n', 5, Path("a b"), (1,)),
        optimizer=ToyOptimizer(1e-12),
        others=(ToyOptimizer(2.5), ToyOptimizer(), ToyOptimizer(2.5)),
    )
    save_config(run, tmp_path / "run" / "config.gin")
    again = load_config(tmp_path / "run" / "config.gin", root="ToyRun")
    assert again == run
    assert format_config(again) == format_config(run)


# What a file can get wrong


def test_an_unknown_configurable_is_named_with_its_line_and_the_nearest(tmp_path):
    assert error(tmp_path, MINIMAL + "ToyModle.width = 4\n") == (
        "run.gin:3: there is no configurable 'ToyModle'; did you mean 'ToyModel'?"
    )
    assert error(tmp_path, "ToyRun.model = @ToyModl()\n") == (
        "run.gin:1: there is no configurable 'ToyModl'; did you mean 'ToyModel'?"
    )


def test_an_unknown_parameter_is_named_with_the_nearest(tmp_path):
    assert error(tmp_path, MINIMAL + "ToyModel.num_head = 4\n") == (
        "run.gin:3: ToyModel has no parameter 'num_head'; did you mean 'num_heads'?"
    )
    assert error(tmp_path, MINIMAL, "--gin.ToyModel.q=4") == (
        "--gin.ToyModel.q=4: ToyModel has no parameter 'q'; "
        "choose from width, num_heads, name, window, tokenizer, sizes"
    )


@pytest.mark.parametrize(
    ("binding", "sentence"),
    [
        ("ToyModel.width = '8'", "ToyModel.width wants int, not '8' (str)"),
        ("ToyModel.width = 8.5", "ToyModel.width wants int, not 8.5 (float)"),
        ("ToyModel.width = True", "ToyModel.width wants int, not True (bool)"),
        ("ToyModel.width = None", "ToyModel.width wants int, not None"),
        ("ToyModel.window = 'a'", "ToyModel.window wants int or None, not 'a' (str)"),
        ("ToyModel.sizes = [1, 'a']", "ToyModel.sizes wants tuple[int, ...], not [1, 'a'] (list)"),
        ("ToyRun.model = 3", "ToyRun.model wants a ToyModel, not 3 (int)"),
        ("ToyRun.model = @ToyOptimizer()", "ToyRun.model wants a ToyModel, not a ToyOptimizer"),
    ],
)
def test_a_wrong_type_names_the_field_the_wanted_type_and_the_value(tmp_path, binding, sentence):
    assert error(tmp_path, MINIMAL + binding) == f"run.gin:3: {sentence}"


def test_a_wrong_choice_names_the_choices(tmp_path):
    text = MINIMAL + "ToyRun.optimizer = @ToyOptimizer()\nToyOptimizer.schedule = 'linear'\n"
    assert error(tmp_path, text) == (
        "run.gin:4: ToyOptimizer.schedule wants one of 'cosine', 'constant', not 'linear' (str)"
    )


def test_a_tuple_of_the_wrong_length_is_refused(tmp_path):
    text = MINIMAL + "ToyRun.optimizer = @ToyOptimizer()\nToyOptimizer.betas = (0.9,)\n"
    assert error(tmp_path, text) == (
        "run.gin:4: ToyOptimizer.betas wants tuple[float, float], not (0.9,) (tuple)"
    )


def test_a_value_that_the_class_refuses_is_named_with_the_place_of_its_bindings(tmp_path):
    assert error(tmp_path, MINIMAL, "ToyModel.num_heads=3") == (
        "run.gin:2: ToyModel: width=8 is not a multiple of num_heads=3"
    )


def test_a_missing_parameter_is_named(tmp_path):
    assert error(tmp_path, "ToyRun.model = @ToyModel()\n") == (
        "run.gin:1: ToyModel.width is not set; bind it to int"
    )
    assert error(tmp_path, "ToyRun.num_steps = 3\n") == (
        "run.gin: ToyRun.model is not set; bind it to a ToyModel"
    )
    assert error(tmp_path, MINIMAL + "ToyModel.width = %gin.REQUIRED\n") == (
        "run.gin:3: ToyModel.width is not set; the file leaves it to you"
    )


def test_a_missing_include_is_named_with_its_line(tmp_path):
    message = error(tmp_path, "\ninclude 'nowhere.gin'\n")
    assert message.startswith("run.gin:2: there is no file 'nowhere.gin' beside run.gin or in ")


def test_an_error_in_an_included_file_names_that_file(tmp_path):
    write(tmp_path, "\n\nToyModel.widht = 3\n", "base.gin")
    assert error(tmp_path, "include 'base.gin'\n" + MINIMAL) == (
        "base.gin:3: ToyModel has no parameter 'widht'; did you mean 'width'?"
    )


def test_a_file_that_includes_itself_is_refused(tmp_path):
    write(tmp_path, "include 'run.gin'\n", "base.gin")
    message = error(tmp_path, "include 'base.gin'\n")
    assert message == "run.gin: the file includes itself, by way of base.gin"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("ToyModel.width = \n", "run.gin:1: Unable to parse value in 'ToyModel.width ='"),
        (
            "\nToyModel width\n",
            "run.gin:2: Couldn't parse statement, expected ':' or '=' in 'ToyModel width'",
        ),
        ("ToyModel.sizes = [1,\n", "run.gin:2: EOF in multi-line statement"),
        ("ToyModel.name = 'open\n", "run.gin:1: Unable to parse value"),
        ("import os\n", "run.gin:1: a run file can't import Python; it can name "),
    ],
)
def test_broken_syntax_is_named_with_its_line(tmp_path, text, sentence):
    assert error(tmp_path, text).startswith(sentence)


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "latin.gin").write_bytes(b"ToyModel.name = '\xe9'\n")
    with pytest.raises(ConfigError) as info:
        load_config(tmp_path / "latin.gin", root="ToyRun")
    assert str(info.value) == f"{tmp_path}/latin.gin: byte 17 is not UTF-8; save it as UTF-8"


def test_an_unknown_macro_is_named_with_the_nearest(tmp_path):
    assert error(tmp_path, "WIDTH = 8\nToyRun.model = @ToyModel()\nToyModel.width = %WIDHT\n") == (
        "run.gin:3: there is no macro %WIDHT; did you mean 'WIDTH'?"
    )
    assert error(tmp_path, "WIDTH = 8\n" + MINIMAL, "--gin.WIDHT=3") == (
        "--gin.WIDHT=3: no file defines a macro 'WIDHT'; did you mean 'WIDTH'?"
    )


def test_circles_are_refused(tmp_path):
    assert error(tmp_path, "A = %B\nB = %A\nToyRun.model = %A\n") == (
        "run.gin:2: the macro %A refers to itself"
    )
    assert error(tmp_path, "ToyRun.model = @ToyModel()\nToyModel.width = @ToyRun()\n") == (
        "run.gin:2: @ToyRun() refers to itself"
    )


def test_a_reference_without_brackets_is_refused(tmp_path):
    assert error(tmp_path, "ToyRun.model = @ToyModel\n") == (
        "run.gin:1: write @ToyModel() with brackets, for the object it makes"
    )


def test_a_binding_that_nothing_reads_is_refused(tmp_path):
    assert error(tmp_path, MINIMAL, "--gin.ToyOptimizer.learning_rate=1.0") == (
        "--gin.ToyOptimizer.learning_rate=1.0: ToyOptimizer.learning_rate is set, but nothing in "
        "ToyRun refers to @ToyOptimizer(); refer to it or take the line out"
    )


def test_an_override_without_a_value_is_refused(tmp_path):
    assert error(tmp_path, MINIMAL, "--gin.ToyModel.width") == (
        "--gin.ToyModel.width: write an override as --gin.Name.field=value"
    )
    assert (
        error(tmp_path, MINIMAL, "--gin.a b=3")
        == "--gin.a b=3: 'a b' is not of the form Name.field"
    )


# What agentx itself registers and ships


def test_every_registered_name_is_a_dataclass_whose_annotations_can_be_checked():
    for name in registry.REGISTRY:
        cls = registry.find_class(name, "here")
        assert registry.name_of(cls) == name
        for wanted in typing.get_type_hints(cls).values():
            assert describe(wanted)


def test_every_run_file_that_is_shipped_loads_and_repeats_from_its_resolved_text(tmp_path):
    """All but those that others include: what a file leaves out, the includer has to set."""
    files = sorted(config.configs_folder().glob("runs/**/*.gin"))
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    included = {
        name
        for text in texts.values()
        for name in re.findall('^include "(.*)"', text, re.MULTILINE)
    }
    whole = [file for file in files if file.name not in {Path(name).name for name in included}]
    assert whole
    for file in whole:
        assert texts[file].startswith("#"), f"{file} has no opening comment"
        resolved = load_config(file, root=("TrainConfig", "QuickstartConfig"))
        save_config(resolved, tmp_path / file.name)


def test_every_file_that_is_run_says_on_what_it_runs_and_what_comes_of_it():
    files = sorted(config.configs_folder().glob("**/*.gin"))
    run = [text for file in files if "# Command:" in (text := file.read_text(encoding="utf-8"))]
    assert len(run) >= 8
    for text in run:
        assert re.findall("^# (Command|Hardware|Expected): ", text, re.MULTILINE) == (
            ["Command", "Hardware", "Expected"]
        )


def test_every_model_file_that_is_shipped_loads():
    files = sorted(config.configs_folder().glob("models/*.gin"))
    assert files
    for file in files:
        assert num_params(load_config(file, root="ModelConfig")) > 0
