"""The command line as a newcomer meets it: its help, its endings, the sentence for each mistake.

Commands run in this process, by `main`, so that jax is imported once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from agentx.cli import main as cli
from agentx.cli.main import main
from agentx.tokenizer import Tokenizer
from agentx.train import RunSummary


@pytest.fixture
def sentence(capsys):
    """Runs a command that must fail with one sentence on stderr; returns that sentence."""

    def run(*arguments: object) -> str:
        code = main([str(a) for a in arguments])
        printed = capsys.readouterr().err
        assert code == 2, printed
        assert re.fullmatch(r"error: [^\n]+\n", printed), printed
        return printed.removeprefix("error: ").rstrip("\n")

    return run


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    Tokenizer.bytes().save(file)
    return file


# --------------------------------------------------------------------------------------------------
# Help and endings
# --------------------------------------------------------------------------------------------------


def test_help_takes_less_than_half_a_second_and_loads_no_jax():
    code = (
        "import sys; from agentx.cli.main import main; main(['--help']);"
        "sys.exit(bool({'jax', 'numpy', 'gin'} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(5):
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        after = os.times()
        used = after.children_user + after.children_system
        seconds.append(used - before.children_user - before.children_system)
        assert done.returncode == 0, done.stderr
        assert "Usage: agentx" in done.stdout
    # Of processor time, and the least: other processes on the machine can only add to it.
    assert min(seconds) < 0.5


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    commands = re.findall(r"^  ([a-z]+)  ", printed, re.MULTILINE)
    assert commands == COMMANDS


COMMANDS = [
    *("quickstart", "train", "eval", "sample", "import", "export", "report", "sweep"),
    *("tokenizer", "data", "model", "env"),
]


@pytest.mark.parametrize("flag", ["-v", "--version"])
def test_the_version_is_printed(capsys, flag):
    assert main([flag]) == 0
    assert re.fullmatch(r"agentx \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_an_unknown_command_or_option_is_named(sentence):
    assert sentence("trian").startswith("No such command 'trian'")
    assert sentence("train").startswith("Missing argument 'config'")
    assert sentence("train", "--rum", "x").startswith("No such option: --rum")


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def refuse(context: object) -> None:
        raise error

    monkeypatch.setattr(cli, "_refuse_overrides", refuse)


def test_ctrl_c_ends_with_130(monkeypatch, capsys):
    fail_with(monkeypatch, KeyboardInterrupt())
    assert main(["report", "x"]) == 130
    assert capsys.readouterr().err.strip() == "stopped"


@pytest.mark.parametrize("error", [AssertionError("ours"), TypeError("ours"), ValueError("jax's")])
def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, error):
    """The ValueError is raised in this file, which is no part of agentx: so are jax's."""
    fail_with(monkeypatch, error)
    with pytest.raises(type(error)):
        main(["report", "x"])


def test_a_mistake_shows_its_traceback_on_request(monkeypatch, tmp_path):
    monkeypatch.setenv("AGENTX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="there is no tokenizer"):
        main(["tokenizer", "info", str(tmp_path / "nothing")])


# --------------------------------------------------------------------------------------------------
# Run files
# --------------------------------------------------------------------------------------------------

MODEL = """
ModelConfig:
    vocab_size = 271
    d_model = 16
    num_layers = 1
    num_heads = 2
    num_kv_heads = 1
    head_dim = 8
    d_ff = 32
    max_length = 32
"""


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    file = tmp_path / "model.gin"
    file.write_text(MODEL, encoding="utf-8")
    return file


def test_a_missing_run_file_is_named(sentence):
    assert sentence("train", "nowhere.gin").startswith("nowhere.gin: there is no such run file")


def test_an_unknown_gin_name_is_named_with_file_and_line_and_the_nearest(sentence, tmp_path):
    file = tmp_path / "run.gin"
    file.write_text("\nModelConfg.d_model = 3\n", encoding="utf-8")
    assert sentence("train", file) == (
        f"{file}:2: there is no configurable 'ModelConfg'; did you mean 'ModelConfig'?"
    )


def test_a_wrong_type_is_named_with_the_wanted_one(sentence, model_file):
    assert sentence("model", "info", model_file, "--gin.ModelConfig.d_model='wide'") == (
        "--gin.ModelConfig.d_model='wide': ModelConfig.d_model wants int, not 'wide' (str)"
    )


def test_sizes_that_do_not_fit_together_are_named(sentence, model_file):
    assert sentence("model", "info", model_file, "--gin.ModelConfig.num_kv_heads=4") == (
        f"{model_file}:3: ModelConfig: num_heads 2 is not a multiple of num_kv_heads 4: "
        "each KV head serves the same number of heads"
    )


def test_an_override_for_a_command_that_reads_no_run_file_is_refused(sentence):
    assert sentence("report", "x", "--gin.ModelConfig.d_model=3") == (
        "--gin.ModelConfig.d_model=3: `agentx report` reads no run file to override"
    )


def test_model_info_counts_parameters_and_memory(capsys, model_file):
    assert main(["model", "info", str(model_file), "--gin.ModelConfig.vocab_size=300"]) == 0
    printed = capsys.readouterr().out
    # 300 x 16 embeddings; q and o 16 x 16 each, k and v 16 x 8 each, two norms of 8 for QK;
    # 3 x 16 x 32 feed-forward; three norms of 16.
    assert re.search(r"^parameters +7,168$", printed, re.MULTILINE), printed
    assert f"That was the model of {model_file}" in printed


# --------------------------------------------------------------------------------------------------
# Tokenizers, data, reports
# --------------------------------------------------------------------------------------------------


def test_a_tokenizer_is_trained_and_shown(capsys, tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat " * 40, encoding="utf-8")
    out = tmp_path / "deep" / "tokenizer.model"
    arguments = ["tokenizer", "train", str(tmp_path / "text.txt"), "--out", str(out)]
    assert main([*arguments, "--vocab-size", "290"]) == 0
    assert f"Next: agentx tokenizer info {out}" in capsys.readouterr().out
    assert main(["tokenizer", "info", str(out), "--text", "the cat"]) == 0
    assert "pieces       290" in capsys.readouterr().out


def test_a_text_that_is_not_utf8_is_named(sentence, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    message = sentence("tokenizer", "train", tmp_path / "latin.txt", "--out", tmp_path / "t.model")
    assert message.startswith(f"{tmp_path}/latin.txt")
    assert "UTF-8" in message


def test_a_text_file_that_is_not_there_is_named(sentence, tmp_path):
    message = sentence("tokenizer", "train", tmp_path / "no.txt", "--out", tmp_path / "t.model")
    assert message == f"there is no file or folder {tmp_path}/no.txt"


def test_a_tokenizer_that_is_not_there_or_is_none_is_named(sentence, tmp_path, model_file):
    assert (
        sentence("tokenizer", "info", tmp_path / "no") == f"there is no tokenizer at {tmp_path}/no"
    )
    assert sentence("tokenizer", "info", model_file) == (
        f"{model_file}: this is not a SentencePiece model"
    )


CONVERSATION = {
    "messages": [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
    ]
}


def build(sentence, tmp_path: Path, tokenizer_file: Path, content: str, *options: object) -> str:
    file = tmp_path / "data.jsonl"
    file.write_text(content, encoding="utf-8")
    arguments = ("data", "build", file, "--tokenizer", tokenizer_file, "--out", tmp_path / "store")
    return sentence(*arguments, *options).replace(f"{tmp_path}/", "")


def test_malformed_jsonl_is_named_with_its_line(sentence, tmp_path, tokenizer_file):
    good = json.dumps(CONVERSATION)
    message = build(sentence, tmp_path, tokenizer_file, f"{good}\n{good[:-2]}\n")
    assert message.startswith("data.jsonl:2: ")
    message = build(sentence, tmp_path, tokenizer_file, f'{good}\n{{"texts": 3}}\n')
    assert message == "data.jsonl:2: there is no list 'messages'"
    message = build(sentence, tmp_path, tokenizer_file, f"{good}\n", "--field", "text")
    assert message == "data.jsonl:1: there is no string 'text'"


def test_an_empty_data_set_is_named(sentence, tmp_path, tokenizer_file):
    message = build(sentence, tmp_path, tokenizer_file, "")
    assert message == (
        "data.jsonl holds no document: the data set is empty: "
        "1 records read = 0 kept + 1 skipped (1 empty file)"
    )


def test_a_store_is_built_and_shown(capsys, tmp_path, tokenizer_file):
    file, store = tmp_path / "data.jsonl", tmp_path / "store"
    file.write_text(json.dumps(CONVERSATION) + "\n", encoding="utf-8")
    arguments = ["--tokenizer", str(tokenizer_file)]
    assert main(["data", "build", str(file), *arguments, "--out", str(store)]) == 0
    assert "Documents: 1, tokens: 12, in " in capsys.readouterr().out
    assert main(["data", "inspect", str(store), *arguments]) == 0
    shown = capsys.readouterr().out
    assert "<|user|>hello" in shown
    assert "hi<|end|>" in shown


def test_a_store_of_another_tokenizer_is_refused(sentence, tmp_path, tokenizer_file):
    (tmp_path / "text.txt").write_text("the cat sat on the mat " * 40, encoding="utf-8")
    other, store = tmp_path / "other.model", tmp_path / "store"
    Tokenizer.train(["the cat sat on the mat " * 40], 290).save(other)
    arguments = ["data", "build", str(tmp_path / "text.txt"), "--tokenizer", str(tokenizer_file)]
    assert main([*arguments, "--out", str(store)]) == 0
    message = sentence("data", "inspect", store, "--tokenizer", other)
    assert "was written with another tokenizer" in message
    message = sentence("data", "inspect", store, "--tokenizer", tokenizer_file, "--index", 1)
    assert message == f"--index 1: {store} holds documents 0 to 0"


def test_a_report_of_nothing_is_refused(sentence, tmp_path):
    assert sentence("report", tmp_path / "no") == (
        f"{tmp_path}/no: there is no such folder; give what `agentx train --run` wrote to"
    )
    assert sentence("report", tmp_path) == (
        f"{tmp_path} holds no metrics.jsonl: it is not the folder of a run"
    )


# --------------------------------------------------------------------------------------------------
# Environments
# --------------------------------------------------------------------------------------------------


def test_an_environment_that_keeps_its_contract_passes_the_check(capsys):
    assert main(["env", "check", "LibraryTasks"]) == 0
    assert re.search(
        r"^tools +search, open, list, calculate$", capsys.readouterr().out, re.MULTILINE
    )


def test_a_name_that_is_no_environment_is_refused(sentence):
    assert sentence("env", "check", "MeshConfig") == (
        "MeshConfig is no task set: give one of LibraryTasks"
    )


# --------------------------------------------------------------------------------------------------
# A run, and what can be wrong with one
# --------------------------------------------------------------------------------------------------

RUN = """
include "model.gin"
FOLDER = "."
TrainConfig:
    model = @ModelConfig()
    source = @DatasetSource()
    loss = @NextTokenLoss()
    optimizer = @OptimizerConfig()
    mesh = @MeshConfig()
    tokenizer = %FOLDER/tokenizer.model
    num_steps = 2
    log_every = 1
DatasetSource:
    datasets = [@Dataset()]
    rows = 8
    length = 32
Dataset.store = %FOLDER/store
Dataset.objective = @PlainText()
OptimizerConfig.learning_rate = 1e-3
MeshConfig.data = 8
"""


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run file, the override that tells it where its inputs are, and the run that it made."""

    file: Path
    inputs: str
    run: Path

    def train(self, *arguments: object, run: Path | None = None) -> list[str]:
        folder = self.run if run is None else run
        return ["train", str(self.file), "--run", str(folder), self.inputs, *map(str, arguments)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("run")
    (folder / "model.gin").write_text(MODEL, encoding="utf-8")
    (folder / "run.gin").write_text(RUN, encoding="utf-8")
    (folder / "text.txt").write_text("a text of some length, more than a row. " * 20)
    Tokenizer.bytes().save(folder / "tokenizer.model")
    build = ["data", "build", str(folder / "text.txt"), "--out", str(folder / "store")]
    assert main([*build, "--tokenizer", str(folder / "tokenizer.model")]) == 0
    made = Trained(folder / "run.gin", f"--gin.FOLDER={folder}", folder / "first")
    assert main(made.train()) == 0
    return made


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_train_prints_the_resolved_config_and_a_run_repeats_from_it_alone(
    trained, tmp_path, capsys
):
    saved = trained.run / "config.gin"
    assert main(["train", str(saved), "--run", str(tmp_path / "again")]) == 0
    printed = capsys.readouterr().out
    assert saved.read_text(encoding="utf-8") in printed
    assert f"agentx report {tmp_path}/again" in printed
    assert (tmp_path / "again" / "config.gin").read_bytes() == saved.read_bytes()
    assert len(losses(trained.run)) == 2
    assert losses(tmp_path / "again") == losses(trained.run)


def test_what_to_type_next_is_quoted(trained, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("agentx.train.train", lambda *_: RunSummary(1, 9, 0.1, interrupted=True))
    command = trained.train("--gin.TrainConfig.seed= 3", run=tmp_path / "my run")
    monkeypatch.setattr("sys.argv", ["agentx", *command])
    assert main() == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(said) == ["Next:", "agentx", *command]


def test_a_run_is_reported(trained, capsys):
    assert main(["report", str(trained.run)]) == 0
    assert f"The report is {trained.run}/report.html" in capsys.readouterr().out


def test_a_run_is_exported(trained, tmp_path, capsys):
    assert main(["export", str(trained.run), str(tmp_path / "model")]) == 0
    assert (tmp_path / "model" / "config.json").exists()
    assert f"vllm serve {tmp_path}/model" in capsys.readouterr().out


def test_a_run_is_written_as_programs(trained, tmp_path, capsys, sentence):
    command = ["model", "stablehlo", trained.run, tmp_path / "programs", "--tokens", 16]
    assert main([*map(str, command), "--rows", "2"]) == 0
    assert f"The programs are in {tmp_path}/programs" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "programs" / "manifest.json").read_text())
    assert [manifest[x] for x in ("rows", "tokens", "columns")] == [2, 16, 32]
    assert (
        sentence(*command) == f"{tmp_path}/programs exists and is not empty; give another directory"
    )
    assert sentence(*command[:3], tmp_path / "more", "--columns", 64).endswith("the model's 32")


def test_an_export_in_eight_bits_says_what_that_costs(trained, tmp_path, capsys, sentence):
    export = ["export", str(trained.run), "--quantize", "int8"]
    assert main([*export, str(tmp_path / "random")]) == 0
    printed = capsys.readouterr().out
    assert "What int8 changes" in printed
    assert "random tokens" in printed
    assert re.search(r"^mlp\.w_gate +0\.\d{4}%$", printed, re.MULTILINE)
    assert re.search(r"^KL, nats a token +-?0\.0\d{5}$", printed, re.MULTILINE)
    about = json.loads((tmp_path / "random" / "config.json").read_text())
    assert about["quantization_config"]["format"] == "pack-quantized"
    store = trained.run.parent / "store"
    assert main([*export, "--rows", str(store), str(tmp_path / "text")]) == 0
    assert f"next tokens of {store}:" in capsys.readouterr().out
    none = trained.run.parent / "none"
    message = sentence(*export, "--rows", none, tmp_path / "out")
    assert message == f"{none} holds no token store: build it"
    assert not (tmp_path / "out").exists()
    message = sentence("export", trained.run, "--rows", store, tmp_path / "out")
    assert message.startswith(f"--rows {store} measures what --quantize costs")


@pytest.mark.parametrize("options", [[], ["--raw"]])
def test_a_checkpoint_answers(trained, capsys, options):
    said = ["sample", "--checkpoint", str(trained.run), "--max-tokens", "2", *options, "hi"]
    assert main(said) == 0
    assert capsys.readouterr().out.startswith("<|bos|>")


def test_a_prompt_longer_than_the_context_is_named(sentence, trained):
    """The tools of the environment alone are longer than this model's rows."""
    message = sentence("sample", "--checkpoint", trained.run, "--suite", "library_dev", "hi")
    assert re.match(r"the prompt has \d+ tokens", message)
    assert "32" in message


def test_a_run_folder_of_another_config_is_refused(sentence, trained):
    message = sentence(*trained.train("--gin.OptimizerConfig.learning_rate=0.5"))
    assert message == (
        f"{trained.run}/config.gin is of another config, which has "
        "'OptimizerConfig.learning_rate = 0.001': give another folder, or delete this one to "
        "start over"
    )


def test_a_missing_checkpoint_is_named(sentence, trained, tmp_path):
    missing = f"{tmp_path}/no is no run: it has no checkpoints folder"
    assert sentence("export", tmp_path / "no", tmp_path / "out") == missing
    assert sentence("sample", "--checkpoint", tmp_path / "no", "hi") == missing
    options = ["--checkpoint", tmp_path / "no", "--suite", "library"]
    assert sentence("eval", *options) == missing
    start = f"--gin.TrainConfig.init_from={tmp_path}/no"
    assert sentence(*trained.train(start, run=tmp_path / "run")) == missing


def test_an_unknown_suite_is_named(sentence, trained):
    assert sentence("eval", "--checkpoint", trained.run, "--suite", "libary") == (
        "--suite libary: there is no such suite; did you mean 'library'?"
    )


def test_a_tokenizer_that_the_model_does_not_fit_is_named(sentence, trained, tmp_path):
    other = tmp_path / "other.model"
    Tokenizer.train(["the cat sat on the mat " * 40], 290).save(other)
    setting = f"--gin.TrainConfig.tokenizer={other}"
    message = sentence(*trained.train(setting, run=tmp_path / "run"))
    assert message.startswith(
        f"the tokenizer {other} has 290 pieces but the model's vocab_size is 271"
    )
    settings = [setting, "--gin.ModelConfig.vocab_size=290"]
    message = sentence(*trained.train(*settings, run=tmp_path / "other"))
    assert "was written with another tokenizer" in message


def test_a_mesh_that_does_not_divide_the_devices_is_named(sentence, trained, tmp_path):
    message = sentence(*trained.train("--gin.MeshConfig.data=3", run=tmp_path / "run"))
    assert "does not divide 8 devices" in message


def test_rows_that_do_not_divide_over_the_mesh_are_named(sentence, trained, tmp_path):
    message = sentence(*trained.train("--gin.DatasetSource.rows=3", run=tmp_path / "run"))
    assert message.startswith("a batch of 3 rows of 32 tokens does not divide into")


def test_a_sequence_longer_than_the_context_is_named(sentence, trained, tmp_path):
    message = sentence(*trained.train("--gin.DatasetSource.length=64", run=tmp_path / "run"))
    assert message == "rows of 64 tokens are longer than the model's max_length of 32"


def test_a_store_that_is_not_there_is_named(sentence, trained, tmp_path):
    setting = f"--gin.Dataset.store={tmp_path}/no"
    message = sentence(*trained.train(setting, run=tmp_path / "run"))
    assert message.startswith(f"{tmp_path}/no holds no token store")
