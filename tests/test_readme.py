"""What README.md tells a newcomer to type is run here, small, and the files it names are sought.

The commands run in this process, by `main`, in a folder where a tiny quickstart has finished. What
installs packages or runs for minutes (make's targets) is asked of make with --dry-run.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from test_imports import EVERYTHING, MAY_IMPORT

from agentx.cli.main import main
from agentx.data.formats import read_documents

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)

# What makes any run of the quickstart's files take seconds.
TINY_MODEL = (
    "num_layers=1",
    "d_model=16",
    "num_heads=2",
    "num_kv_heads=1",
    "head_dim=8",
    "d_ff=16",
)
TINY_RUN = (
    *(f"ModelConfig.{size}" for size in TINY_MODEL),
    "TrainConfig.num_steps=1",
    "OptimizerConfig.warmup_steps=0",
)
TINY_DATA = ("DatasetSource.rows=8", "DatasetSource.length=384")
TINY_ROLLOUTS = (
    "RolloutSource.num_groups=2",
    "RolloutSource.group_size=4",
    "RolloutSource.rows=32",
    "RolloutLimits.max_new_tokens=4",
)
TINY_QUICKSTART = (
    "RecordingConfig.num_sessions=60",
    "RecordingConfig.num_repetitions=10",
    "RecordingConfig.num_demonstrations=20",
    "RecordingConfig.text_characters=60000",
    "QuickstartConfig.num_episodes=2",
    "QuickstartConfig.num_slots=8",
    "QuickstartConfig.required_gain=0.0",
    "RolloutLimits.max_new_tokens=4",
    *(f"pretrain/{setting}" for setting in (*TINY_RUN, *TINY_DATA)),
    *(f"sft/{setting}" for setting in (*TINY_RUN, *TINY_DATA)),
    *(f"grpo/{setting}" for setting in (*TINY_RUN, *TINY_ROLLOUTS)),
)


def commands(block: str) -> list[list[str]]:
    """The words of each command of a block; lines of nothing but a comment have none."""
    return [words for line in block.splitlines() if (words := shlex.split(line, comments=True))]


def inline_commands() -> list[list[str]]:
    """The commands of ours that stand within a sentence."""
    return [shlex.split(text) for text in re.findall(r"`(agentx [^`]+)`", README)]


def all_commands() -> list[list[str]]:
    return [words for block in BLOCKS for words in commands(block)]


def tree_under(heading: str) -> list[str]:
    """The names in the indented tree whose first line is `heading`, or that of a section."""
    lines = README[README.index(heading) :].splitlines()[1:]
    names = []
    for line in lines:
        if line.startswith("    "):
            # A name ends where two spaces part it from its description.
            names += re.split(r"\s{2,}", line.strip())[0].split()
        elif line.strip():
            break
    return names


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which a tiny quickstart has run, and what it printed. There are texts, too."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "texts").mkdir()
    source = Path(shlex.__file__).read_text(encoding="utf-8")
    (folder / "texts" / "shlex.txt").write_text(source, encoding="utf-8")
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        code = main(["quickstart", *(f"--gin.{setting}" for setting in TINY_QUICKSTART)])
    assert code == 0, printed.getvalue()
    return folder, printed.getvalue()


def in_small(words: list[str]) -> list[str]:
    """The arguments of a command of ours, with what makes it quick."""
    quick = {
        "train": [f"--gin.{setting}" for setting in (*TINY_RUN, *TINY_ROLLOUTS)],
        "eval": ["--episodes", "2", "--save", "episodes.jsonl"],
        "sample": ["--max-tokens", "4"],
    }
    return [*words[1:], *quick.get(words[1], [])]


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_every_command_of_the_readme_works(finished, block, monkeypatch, capsys):
    monkeypatch.chdir(finished[0])
    for words in commands(BLOCKS[block]):
        if words[0] == "agentx":
            assert main(in_small(words)) == 0, f"{shlex.join(words)}\n{capsys.readouterr().err}"
            if words[1] == "eval":  # what a policy did is data
                assert len(list(read_documents("episodes.jsonl"))) == 2
        elif words[0] == "make":
            dry = subprocess.run([*words, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
            assert dry.returncode == 0, dry.stderr
        else:
            assert words == ["source", ".venv/bin/activate"], f"nothing runs {shlex.join(words)!r}"


def test_the_two_first_commands_lead_to_the_quickstart():
    assert commands(BLOCKS[0]) == [["make", "install"], ["make", "quickstart"]]
    # The tests may run under make themselves, whose variables would have this one tell its folder.
    alone = {k: v for k, v in os.environ.items() if k not in ("MAKELEVEL", "MAKEFLAGS", "MFLAGS")}
    everything = ["make", "--always-make", "--dry-run", "quickstart"]
    dry = subprocess.run(everything, cwd=ROOT, env=alone, capture_output=True, text=True)
    assert "--editable '.'" in dry.stdout
    assert dry.stdout.rstrip().endswith(".venv/bin/agentx quickstart --seed 0")


def test_every_option_in_the_readme_is_in_its_commands_help(capsys):
    for words in [*all_commands(), *inline_commands()]:
        options = {w for w in words if w.startswith("--") and w[:6] not in ("--gin.", "--help")}
        if words[0] != "agentx" or not options:
            continue
        name = [w for w in words[1:3] if w.isalpha()]
        name = name if name[0] in ("tokenizer", "data", "model", "env") else name[:1]
        assert main([*name, "--help"]) == 0
        missing = options - set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        assert not missing, f"agentx {' '.join(name)} has no {missing}"


def test_the_quickstart_leaves_what_the_readme_lists(finished):
    names = tree_under("All of it is in `quickstart/`:")
    assert names[0] == "quickstart/"
    assert {"report.html", "results.json", "grpo/", "stores/"} <= set(names)
    left = {p.name for p in (finished[0] / "quickstart").iterdir()}
    assert {name.rstrip("/") for name in names[1:]} <= left
    for name in ("config.gin", "checkpoints", "metrics.jsonl", "evaluation.json"):
        assert name in README
        assert (finished[0] / "quickstart" / "grpo" / name).exists()


def test_the_quickstart_prints_the_table_that_the_readme_shows(finished):
    shown = re.search(r"^ +stage +time.*$", README, re.MULTILINE)
    printed = re.search(r"^stage +time.*$", finished[1], re.MULTILINE)
    assert shown
    assert printed
    assert shown[0].split() == printed[0].split()
    assert [line.split()[0] for line in finished[1].splitlines() if " [" in line] == [
        *("pretrain", "sft", "grpo")
    ]


def test_the_tree_of_the_readme_is_the_tree():
    names = tree_under("## The tree")
    assert {"agentx/", "train.py", "env/", "configs/"} <= set(names)
    folders = [ROOT, ROOT / "agentx"]
    missing = [n for n in names if not any((folder / n).exists() for folder in folders)]
    assert missing == []
    unlisted = {p.name for p in (ROOT / "agentx").iterdir() if not p.name.startswith("_")}
    unlisted -= {name.rstrip("/") for name in names}
    assert unlisted <= {"py.typed"}


@pytest.mark.parametrize("file", ["README.md", "docs/design.md", "docs/log.md", "docs/sweeps.md"])
def test_every_link_leads_to_a_file(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)\)", text)
    missing = [t for t in targets if not ((ROOT / file).parent / t).exists()]
    assert missing == []


def test_the_design_has_the_import_table_that_is_tested():
    table = re.findall(r"^    (\w+) <- (.*)$", DESIGN, re.MULTILINE)
    written = {name: set(rooms.replace("(nothing)", "").split()) for name, rooms in table}
    assert written == {name: set(rooms.split()) for name, rooms in MAY_IMPORT.items()} | {
        name: {"(everything)"} for name in EVERYTHING
    }
