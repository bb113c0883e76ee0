"""Models of others as runs: imported, trained, exported again, and refused where they are none.

Folders are written by transformers, or by hand where they are large. Commands run in this process,
but where memory is measured or one is killed.
"""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import others
import pytest
from flax import nnx
from runs import MODEL
from safetensors.numpy import load_file, save_file

from agentx.checkpoint import newest_checkpoint
from agentx.cli import exporting
from agentx.cli.importing import import_run
from agentx.cli.main import main
from agentx.cli.runs import load_run
from agentx.data.store import TokenStore
from agentx.interop.huggingface import export_huggingface, import_huggingface, read_config
from agentx.interop.tensors import family_tensors, flatten_params
from agentx.model import Transformer
from agentx.model.saved import config_from_json
from agentx.tokenizer import Tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 902,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
MOE = {
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
# Name: the class of the config, what it is made with, and the tokenizer beside it.
CASES = {
    "qwen3": ("Qwen3Config", {"head_dim": 12, "rope_parameters": YARN}, "qwen3"),
    "llama3": ("LlamaConfig", {"tie_word_embeddings": True}, "llama3"),
    "moe": ("Qwen3MoeConfig", {"head_dim": 12, **MOE}, "qwen3"),
    "gpt-oss": (
        "GptOssConfig",
        {
            "head_dim": 12,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 7,
            "rope_parameters": {**YARN, "truncate": False},
        },
        "qwen3",
    ),
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "eos_token_id": [902, 900]}
NUM_IDS = {"qwen3": 909, "llama3": 905}


def write_folder(folder, name, dtype="float32", rows=1024):
    """A model as its makers publish it; `rows` of the embedding."""
    kind, changes, tokenizer = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**SIZES, "vocab_size": rows, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="60KB")
    (folder / "tokenizer.json").write_text(others.file(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps(SAMPLING))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every case as a folder, and as the run that it was imported to."""
    made = {}
    for name in CASES:
        folder = write_folder(tmp_path_factory.mktemp("theirs") / name, name)
        assert main(["import", str(folder), str(folder.with_name("run"))]) == 0
        made[name] = folder, folder.with_name("run")
    return made


@pytest.fixture
def sentence(capsys):
    """Runs a command that must fail with one sentence on stderr; returns that sentence."""

    def run(*arguments):
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        printed = capsys.readouterr().err
        assert code == 2, printed
        found = re.search(r"^error: ([^\n]+)\n\Z", printed, re.MULTILINE)
        assert found, printed
        return found[1]

    return run


# --------------------------------------------------------------------------------------------------
# What is imported
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_run_has_the_parameters_that_importing_into_memory_gives(folders, name):
    folder, run = folders[name]
    config, arrays = import_huggingface(folder)
    policy = load_run(run)
    assert policy.config == config
    found = flatten_params(policy.params)
    assert found.keys() == arrays.keys()
    for param, array in arrays.items():
        assert np.asarray(found[param]).tobytes() == array.tobytes(), param


def test_the_embedding_has_rows_for_our_markers_or_grows_by_them(tmp_path):
    folder = write_folder(tmp_path / "m", "llama3", rows=NUM_IDS["llama3"])
    said = import_run(folder, tmp_path / "run", "float32")
    assert "grows from 905 to 1,024 rows: it had none for 15 of 920 ids, our 15 markers" in said[1]
    policy = load_run(tmp_path / "run")
    embed = np.asarray(flatten_params(policy.params)["embed"])
    before = import_huggingface(folder)[1]["embed"]
    np.testing.assert_array_equal(embed[:905], before)
    assert np.abs(embed[905:] - before.mean(0)).max() < 0.1 * before.std()
    assert len(np.unique(embed[905:], axis=0)) == 1024 - 905
    # With room in the padding nothing grows.
    said = import_run(write_folder(tmp_path / "n", "llama3"), tmp_path / "other", "float32")
    assert "15 markers have the ids 905 to 919" in said[1]
    assert load_run(tmp_path / "other").config.vocab_size == 1024


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
def test_every_float_type_is_read_and_kept_as_asked(tmp_path, stored, kept):
    folder = write_folder(tmp_path / "m", "qwen3", dtype=stored)
    assert main(["import", str(folder), str(tmp_path / "run"), "--dtype", kept]) == 0
    _, arrays = import_huggingface(folder)
    policy = load_run(tmp_path / "run")
    assert policy.config.param_dtype == kept
    for name, leaf in flatten_params(policy.params).items():
        assert leaf.dtype == jnp.dtype(kept)
        assert np.asarray(leaf).tobytes() == arrays[name].astype(jnp.dtype(kept)).tobytes(), name


def test_a_parameter_of_many_blocks_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("agentx.interop.blocks.BLOCK_BYTES", 3000)
    for name, rows in (("llama3", NUM_IDS["llama3"]), ("gpt-oss", 1024)):
        folder = write_folder(tmp_path / name, name, rows=rows)
        import_run(folder, tmp_path / "run" / name, "float32")
        found = flatten_params(load_run(tmp_path / "run" / name).params)
        for param, array in import_huggingface(folder)[1].items():
            rows = slice(len(array) if param == "embed" else None)
            assert np.asarray(found[param])[rows].tobytes() == array.tobytes(), param


def test_an_unembedding_that_is_stored_twice_is_read_where_it_is_the_embedding(tmp_path, sentence):
    folder = write_folder(tmp_path / "m", "llama3")
    arrays = {}
    for file in folder.glob("*.safetensors"):
        arrays |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    embed = arrays["model.embed_tokens.weight"]
    save_file({**arrays, "lm_head.weight": embed.copy()}, folder / "model.safetensors")
    import_run(folder, tmp_path / "run", "float32")
    save_file({**arrays, "lm_head.weight": embed + 1}, folder / "model.safetensors")
    message = sentence("import", folder, tmp_path / "other")
    assert "lm_head.weight is not model.embed_tokens.weight" in message


# --------------------------------------------------------------------------------------------------
# And out again
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_imported_model_is_exported_as_it_was_and_transformers_runs_the_same(
    folders, name, dtype, tmp_path, capsys
):
    folder, run = folders[name]
    out = tmp_path / "out"
    options = ["--check", "--dtype", dtype, "--shard-size", "100KB"]
    assert main(["export", str(run), str(out), *options]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^logits +at most \S+ from transformers' in float32", said, re.MULTILINE)
    assert re.search(r"^greedy text +the same: ", said, re.MULTILINE)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / file).read_bytes() == (folder / file).read_bytes()
    assert json.loads((out / "generation_config.json").read_text()).items() >= SAMPLING.items()
    before, after = (transformers.AutoConfig.from_pretrained(f).to_dict() for f in (folder, out))
    differs = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
    assert differs <= {"_name_or_path", "dtype"}
    if dtype == "float32":
        wanted, found = (import_huggingface(f)[1] for f in (folder, out))
        assert {k: v.tobytes() for k, v in wanted.items()} == {
            k: v.tobytes() for k, v in found.items()
        }


def test_a_model_that_transformers_runs_otherwise_ends_the_check_with_1(
    folders, tmp_path, capsys, monkeypatch
):
    _, run = folders["qwen3"]
    export_policy = exporting.export_policy

    def then_scaled(policy, *arguments, **options):
        folder = export_policy(policy, *arguments, **options)
        policy.params["final_norm"]["scale"] = policy.params["final_norm"]["scale"] * 1.01
        return folder

    monkeypatch.setattr(exporting, "export_policy", then_scaled)
    assert main(["export", str(run), str(tmp_path / "out"), "--check"]) == 1
    assert "transformers runs another one" in capsys.readouterr().out


def test_a_check_without_transformers_is_refused_before_anything_is_written(
    folders, tmp_path, sentence, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = sentence("export", folders["qwen3"][1], tmp_path / "out", "--check")
    assert message.startswith("--check loads the folder with transformers, and torch is not inst")
    assert not (tmp_path / "out").exists()


def test_a_size_that_is_none_is_refused(folders, tmp_path, sentence):
    for size in ("five", "0GB", "-3", "5XB"):
        message = sentence("export", folders["qwen3"][1], tmp_path / "o", f"--shard-size={size}")
        assert message == f"--shard-size {size}: give a size such as 5GB or 500MB"


def test_an_imported_model_goes_on_with_a_text(folders, capsys):
    said = ["sample", "--checkpoint", str(folders["qwen3"][1]), "--raw", "--max-tokens", "2", "a"]
    assert main(said) == 0
    assert capsys.readouterr().out.startswith("<|bos|>a")


def test_what_we_exported_is_imported_with_its_markers(tmp_path, capsys):
    tokenizer = Tokenizer.train(["the cat sat on the mat, " * 40], 300)
    config = dataclasses.replace(MODEL, vocab_size=300)
    params = nnx.state(Transformer(config, nnx.Rngs(0)))
    export_huggingface(params, config, tokenizer, tmp_path / "ours", dtype="bfloat16")
    assert main(["import", str(tmp_path / "ours"), str(tmp_path / "run")]) == 0
    assert "The tokenizer has all our markers" in capsys.readouterr().out
    assert load_run(tmp_path / "run").tokenizer.special == tokenizer.special
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "again"), "--check"]) == 0
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


@pytest.mark.parametrize("kind", ["fallback", "sentencepiece"])
def test_tokenizers_with_byte_fallback_come_along(tmp_path, kind):
    folder = write_folder(tmp_path / "m", "llama3")
    (folder / "tokenizer.json").unlink()
    if kind == "fallback":
        (folder / "tokenizer.json").write_text(others.fallback_json())
    else:
        Tokenizer.train(["the cat sat on the mat, " * 40], 300).save(folder / "tokenizer.model")
    import_run(folder, tmp_path / "run", "float32")
    policy = load_run(tmp_path / "run")
    assert policy.tokenizer.fingerprint == Tokenizer.load(folder).fingerprint
    name = "tokenizer.json" if kind == "fallback" else "tokenizer.model"
    assert (policy.imported / name).read_bytes() == (folder / name).read_bytes()


# --------------------------------------------------------------------------------------------------
# Training from it
# --------------------------------------------------------------------------------------------------

RUN = """
include "{run}/model.gin"
TrainConfig:
    model = @ModelConfig()
    source = @DatasetSource()
    loss = @NextTokenLoss()
    optimizer = @OptimizerConfig()
    mesh = @MeshConfig()
    tokenizer = "{run}/tokenizer.model"
    init_from = "{run}"
    num_steps = 2
DatasetSource:
    datasets = [@Dataset()]
    rows = 8
    length = 64
Dataset.store = "{store}"
Dataset.objective = @NextToken()
OptimizerConfig.learning_rate = {rate}
MeshConfig.data = 8
"""
CONVERSATION = {
    "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
}


@pytest.mark.parametrize("name", ["qwen3", "moe"])
@pytest.mark.parametrize("renderer", ["chatml", "tool"])
def test_a_run_from_an_imported_model_exports_in_the_format_it_was_trained_in(
    folders, name, renderer, tmp_path, sentence
):
    folder, run = folders[name]
    (tmp_path / "data.jsonl").write_text((json.dumps(CONVERSATION) + "\n") * 40)
    build = f"""
        BuildConfig.inputs = (@Input(),)
        BuildConfig.tokenizer = "{run}/tokenizer.model"
        BuildConfig.out = "{tmp_path}/store"
        BuildConfig.renderer = "{renderer}"
        Input.path = "{tmp_path}/data.jsonl"
    """
    (tmp_path / "build.gin").write_text("\n".join(map(str.strip, build.splitlines())) + "\n")
    assert main(["data", "build", str(tmp_path / "build.gin")]) == 0
    assert TokenStore.open(tmp_path / "store").num_tokens > 0
    file = tmp_path / "run.gin"
    file.write_text(RUN.format(run=run, store=tmp_path / "store", rate=1e-9))
    assert main(["train", str(file), "--run", str(tmp_path / "trained")]) == 0
    assert main(["train", str(file), "--run", str(tmp_path / "trained")]) == 0
    assert load_run(tmp_path / "trained").config == load_run(run).config
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "trained"), str(out), "--check"]) == 0
    is_theirs = renderer == "chatml"
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert ((out / name).read_bytes() == (folder / name).read_bytes()) is is_theirs
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["temperature"] == 0.6
    assert (generation["eos_token_id"] == [902, 900]) is is_theirs
    message = sentence("train", file, "--run", run)
    assert "is an imported model, which has no state of training" in message


# --------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(folders, tmp_path):
    """A copy of a good folder, to be broken, and a check that nothing comes of it."""
    shutil.copytree(folders["qwen3"][0], tmp_path / "broken")
    yield tmp_path / "broken"
    assert {p.name for p in tmp_path.iterdir()} == {"broken"}


def refuse(sentence, folder):
    return sentence("import", folder, folder.with_name("out"))


def test_rubbish_folders_are_refused_by_what_is_wrong(broken, sentence):
    about = json.loads((broken / "config.json").read_text())
    index = broken / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    first = broken / min(listed["weight_map"].values())

    def with_config(text):
        (broken / "config.json").write_bytes(text)
        return refuse(sentence, broken)

    assert "config.json is no JSON" in with_config(b"{")
    assert "config.json is no JSON" in with_config(b"\xff\xfe\x00")
    assert "config.json is no JSON object" in with_config(b"[1]")
    assert "is of a None model; only llama" in with_config(b"{}")
    wrong = {**about, "hidden_size": "wide"}
    assert "config.json has a value of another kind" in with_config(json.dumps(wrong).encode())
    wrong = {**about, "model_type": "mamba"}
    assert "is of a 'mamba' model; only llama" in with_config(json.dumps(wrong).encode())
    (broken / "config.json").write_text(json.dumps(about))

    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    assert f"{first} is no whole safetensors file" in refuse(sentence, broken)
    first.write_bytes(os.urandom(1000))
    assert f"{first} is no whole safetensors file" in refuse(sentence, broken)
    first.unlink()
    assert f"{first} is missing, though the index names it" in refuse(sentence, broken)
    first.write_bytes(whole)
    arrays = load_file(first)
    name = min(arrays)
    save_file({**arrays, name: arrays[name].astype(np.int8)}, first)
    assert f"{name} is I8; only F32, BF16, F16 are read" in refuse(sentence, broken)
    save_file({**arrays, name: arrays[name][:1]}, first)
    assert f"{name} has shape" in refuse(sentence, broken)
    save_file({k: v for k, v in arrays.items() if k != name}, first)
    assert f"has no tensor {name}, though the index says so" in refuse(sentence, broken)
    first.write_bytes(whole)
    del listed["weight_map"][name]
    index.write_text(json.dumps(listed))
    assert f"has no tensor {name}" in refuse(sentence, broken)
    listed["weight_map"] |= {name: first.name, "model.vision.weight": first.name}
    index.write_text(json.dumps(listed))
    message = refuse(sentence, broken)
    assert "has a tensor that the model has not: model.vision.weight" in message
    index.write_text("{}")
    assert "has no weight_map" in refuse(sentence, broken)
    for file in broken.glob("*.safetensors*"):
        file.unlink()
    (broken / "pytorch_model.bin").write_bytes(b"")
    assert "has its weights in pytorch_model.bin, a pickle" in refuse(sentence, broken)


def test_tokenizers_that_cannot_be_read_are_refused(broken, sentence):
    (broken / "tokenizer.json").write_text("{}")
    assert "tokenizer.json: this is not a tokenizer.json" in refuse(sentence, broken)
    (broken / "tokenizer.json").unlink()
    assert "has no tokenizer.json and no tokenizer.model" in refuse(sentence, broken)
    (broken / "tekken.json").write_text("{}")
    assert "has its tokenizer as tekken.json alone" in refuse(sentence, broken)


def test_the_tokenizer_of_another_model_is_refused(tmp_path, sentence):
    folder = write_folder(tmp_path / "m", "qwen3", rows=800)
    message = refuse(sentence, folder)
    assert "has ids up to 899 and the embedding 800 rows: this is not the tokenizer" in message


def test_a_folder_that_is_full_and_a_disk_that_is_are_refused(
    folders, tmp_path, sentence, monkeypatch
):
    folder, run = folders["qwen3"]
    assert sentence("import", folder, run) == f"{run} exists and is not empty; give another folder"
    assert "--dtype int8: choose" in sentence("import", folder, tmp_path / "a", "--dtype", "int8")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = sentence("import", folder, tmp_path / "out")
    assert re.search(r"has 0\.0 GB free, and the parameters may take 0\.\d GB", message)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# Memory, kills, disks
# --------------------------------------------------------------------------------------------------

LARGE = {
    "vocab_size": 65536,
    "d_model": 2048,
    "num_layers": 12,
    "num_heads": 16,
    "num_kv_heads": 8,
    "head_dim": 128,
    "d_ff": 8192,
}
_MEASURED = r"""
import pathlib, re, sys
import jax
from agentx.cli.importing import import_run
def peak():
    # As ru_maxrss, which also counts what the parent of a process took.
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024
jax.devices()
before = peak()
import_run(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), "float32")
print(peak() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """2.0 GB of bfloat16 in four files: a Llama without weights that mean anything."""
    if shutil.disk_usage(tmp_path_factory.getbasetemp()).free < 8e9:
        pytest.skip("a checkpoint of 2 GB and its import need 8 GB of disk")
    folder = tmp_path_factory.mktemp("large")
    (folder / "tokenizer.json").write_text(others.file("llama3"))
    about = {
        "model_type": "llama",
        "vocab_size": LARGE["vocab_size"],
        "hidden_size": LARGE["d_model"],
        "num_hidden_layers": LARGE["num_layers"],
        "num_attention_heads": LARGE["num_heads"],
        "num_key_value_heads": LARGE["num_kv_heads"],
        "head_dim": LARGE["head_dim"],
        "intermediate_size": LARGE["d_ff"],
        "max_position_embeddings": 128,
    }
    (folder / "config.json").write_text(json.dumps(about))
    family, config = read_config(folder)
    tensors = list(family_tensors(family, config).values())
    noise = np.random.default_rng(0).standard_normal(1 << 24, np.float32)
    noise = (0.02 * noise).astype(ml_dtypes.bfloat16)
    index, count = {}, -(-len(tensors) // 4)
    for number in range(4):
        some = tensors[number * count : (number + 1) * count]
        arrays = {t.name: np.resize(np.roll(noise, i), t.shape) for i, t in enumerate(some)}
        save_file(arrays, folder / f"{number}.safetensors")
        index |= dict.fromkeys(arrays, f"{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    yield folder
    shutil.rmtree(folder)


def start(arguments, **changes):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "XLA_FLAGS": ""}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **changes,
    )


def test_an_import_never_holds_its_largest_tensor_and_a_file(large, tmp_path):
    out = tmp_path / "run"
    process = start(["-c", _MEASURED, large, out])
    said, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    largest = 2 * LARGE["vocab_size"] * LARGE["d_model"]
    shard = max(file.stat().st_size for file in large.glob("*.safetensors"))
    total = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    assert total > 1e9
    peak = int(said)
    print(f"peak {peak / 1e6:.0f} MB above the start, largest tensor {largest / 1e6:.0f} MB")
    assert peak < 1.2 * largest + shard
    saved = newest_checkpoint(out / "checkpoints")
    assert config_from_json(saved.extras["model"]).d_ff == LARGE["d_ff"]
    shutil.rmtree(out)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_import_that_is_stopped_leaves_no_folder_that_looks_whole(large, tmp_path, how):
    out, partial = tmp_path / "run", tmp_path / "run.partial"
    code = "from agentx.cli.main import main; raise SystemExit(main())"
    # Who is started in the background by a shell has inherited to ignore it.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = start(["-c", code, "import", large, out], preexec_fn=heed)
    deadline = time.monotonic() + 120
    while not list(partial.rglob("ocdbt.process_0/d/*")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-how if how == signal.SIGKILL else 130), errors
    assert not out.exists()
    assert partial.exists() is (how == signal.SIGKILL)


def test_an_import_goes_where_a_killed_one_was(folders, tmp_path):
    (tmp_path / "run.partial" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run.partial" / "checkpoints" / "rubbish").write_text("x")
    import_run(folders["qwen3"][0], tmp_path / "run", "float32")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    load_run(tmp_path / "run")


def test_a_write_that_fails_ends_in_a_sentence_and_leaves_nothing(folders, tmp_path):
    folder, _ = folders["qwen3"]
    code = (
        "import resource, agentx.cli.importing; from agentx.cli.main import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, 90_000)); raise SystemExit(main())"
    )
    process = start(["-c", code, "import", folder, tmp_path / "out"])
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert re.search(r"^error: .*the disk may be full", errors, re.MULTILINE), errors
    assert not list(Path(tmp_path).iterdir())
