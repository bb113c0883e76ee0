"""The report of made-up runs: what must be on the page, and what a real browser makes of it."""

import io
import json
import math
import re
import shutil
import subprocess
import zlib

import numpy as np
import pytest
import rich.console
from pages import Page

from agentx import metrics
from agentx.eval.scores import make_score
from agentx.report import print_stage_table, trajectory_record, write_report, write_run_report
from agentx.report.charts import curve, nice_ticks
from agentx.report.tokens import token_text, visible_pieces, whole_text
from agentx.trajectory import Origin, Outcome, Role, Span, Trajectory

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "</script><img src=x onerror=alert(1)>&\"'"


# ---------------------------------------------------------------------------------------------
# A made-up run
# ---------------------------------------------------------------------------------------------


def scores(**counts):
    return {name: make_score(name, *count).to_json() for name, count in counts.items()}


def stage(name, seconds, steps, tokens, **counts):
    rate = tokens / seconds if tokens else None
    figures = {"seconds": seconds, "steps": steps, "tokens": tokens, "tokens_per_s": rate}
    return {"name": name, **figures, "scores": scores(**counts)}


def make_results():
    return {
        "seed": 0,
        "command": "agentx quickstart --out runs/first --seed 0",
        "hardware": "2 CPU cores, 8 GiB",
        "versions": {"agentx": "0.1.0", "python": "3.11.9", "jax": "0.10.2", "flax": "0.12.8"},
        "stages": [
            stage("tokenizer", 7.4, None, None),
            stage(
                "pretrain", 231.0, 550, 3_604_480,
                success=(2, 256), new_tool=(0, 128), valid_call=(180, 900),
                recovery=(0, 40), loop=(31, 256),
            ),
            stage(
                "sft", 21.0, 60, 402_000,
                success=(129, 256), new_tool=(9, 128), valid_call=(590, 700),
                recovery=(29, 60), loop=(12, 256),
            ),
            stage(
                "grpo", 141.0, 45, 1_200_000,
                success=(188, 256), new_tool=(14, 128), valid_call=(640, 655),
                recovery=(49, 62), loop=(3, 256),
            ),
        ],
        "sampler_trainer_logprob_difference": {"mean": 9.4e-07, "max": 2.1e-05},
        "promise": {
            "before": "sft", "after": "grpo", "gain": 0.2305, "low": 0.164, "high": 0.297,
            "required": 0.12, "met": True,
        },
        "ablation": {
            "name": "tool objectives",
            "stages": [
                stage(
                    "grpo", 139.0, 45, 1_200_000,
                    success=(101, 256), valid_call=(560, 690), recovery=(20, 71), loop=(17, 256),
                )
            ],
        },
    }  # fmt: skip


def make_trajectory(recovers=True):
    """An episode of real shape: a call that fails, the retry, and an answer."""
    ids = (zlib.crc32(str(n).encode()) % 1024 for n in range(10_000))
    texts, spans = [], []

    def say(role, pieces, origin=Origin.DATA, outcome=Outcome.OK):
        logprobs = None
        if origin is Origin.SAMPLED:
            logprobs = np.linspace(-0.4, -0.001, len(pieces)).astype(np.float32)
        texts.extend(pieces)
        spans.append(Span(role, np.array([next(ids) for _ in pieces]), origin, outcome, logprobs))

    def call(name, arguments, outcome=Outcome.OK):
        say(Role.CALL, ["<|call|>", *name], Origin.SAMPLED, outcome)
        say(Role.ARGUMENTS, ["<|arguments|>", *arguments, "<|end|>"], Origin.SAMPLED, outcome)

    tools = ["search", ":", " find", " a", " function", " (", "name", ")", "\n"]
    tools += ["open", ":", " read", " lines", " of", " a", " file", " (", "path", ",", " line", ")"]
    name = ["_", "check", "_", "arg", "_", "types"]
    say(Role.SYSTEM, ["<|bos|>", "<|system|>", *tools, "\n"])
    say(Role.USER, ["<|user|>", "What", " is", " the", " first", " parameter", " of ", *name, "?"])
    call(["search"], name, Outcome.FAILED)
    timed_out = ["<|observation|>", "error", ":", " timed", " out", "<|end|>"]
    say(Role.OBSERVATION, timed_out, Origin.ENVIRONMENT, Outcome.FAILED)
    if recovers:
        call(["search"], name, Outcome.RECOVERED)
        path = ["gen", "eric", "path", ".", "py"]
        found = ["<|observation|>", *path, ":", "1", "5", "6", "<|end|>"]
        say(Role.OBSERVATION, found, Origin.ENVIRONMENT)
        call(["open"], [*path, "<|sep|>", "1", "5", "6"])
        lines = ["def", " ", *name, "(", "funcname", ",", " *", "args", ")", ":", "\n"]
        lines += ["    ", "has", "str", " =", " has", "bytes", " =", " False", "\n"]
        say(Role.OBSERVATION, ["<|observation|>", *lines, "<|end|>"], Origin.ENVIRONMENT)
    answer = ["funcname"] if recovers else ["I", " don", "'", "t", " know"]
    say(Role.ANSWER, ["<|answer|>", *answer, "<|end|>"], Origin.SAMPLED)
    return Trajectory(spans, reward=float(recovers)), texts


def make_records():
    records = []
    for title, recovers, advantage in (
        ("A time-out, and the retry", True, 0.83),
        ("A time-out, and giving up", False, -1.21),
    ):
        trajectory, texts = make_trajectory(recovers)
        weights = (trajectory.per_token("origin") == Origin.SAMPLED).astype(np.float32)
        records.append(
            trajectory_record(
                trajectory, texts, weights, title=title, stage="grpo",
                task="What is the first parameter of _check_arg_types?",
                outcome="solved" if recovers else "not solved", advantage=advantage,
            )
        )  # fmt: skip
    hostile = {"text": HOSTILE, "id": 7, "role": "text", "origin": "data", "outcome": "ok",
               "weight": 0.5, "advantage": None, "logprob": None}  # fmt: skip
    records.append(
        {"title": HOSTILE, "stage": "pretrain", "task": HOSTILE, "reward": None,
         "outcome": "recorded", "tokens": [hostile, {**hostile, "text": "a b\n\tc\u2581d"}]}
    )  # fmt: skip
    return records


def make_run(out_dir, results=None):
    rng = np.random.default_rng(0)
    with metrics.MetricsWriter(out_dir / "pretrain") as writer:
        for step in range(1, 551):
            noise = rng.normal(0, 0.12)
            loss = 0.6 + 6.3 * math.exp(-step / 90) + noise
            writer.write(step, loss=loss, learning_rate=1e-3 * (1 - step / 551))
    with metrics.MetricsWriter(out_dir / "sft") as writer:
        for step in range(1, 61):
            writer.write(step, loss=0.2 + 0.8 * math.exp(-step / 12) + rng.normal(0, 0.02))
    with metrics.MetricsWriter(out_dir / "grpo") as writer:
        for step in range(1, 46):
            reward = 0.72 - 0.4 * math.exp(-step / 18) + rng.normal(0, 0.03)
            entropy = 0.5 * math.exp(-step / 30)
            writer.write(step, loss=rng.normal(0, 0.01), reward=reward, entropy=entropy)
    (out_dir / "results.json").write_text(json.dumps(results or make_results()))
    (out_dir / "trajectories.json").write_text(json.dumps(make_records()))
    return write_report(out_dir)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


# ---------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------


def test_page_is_well_formed_and_shows_the_figures(report):
    text = Page(report).text
    assert "GRPO took success from 50.4 % to 73.4 %" in text
    assert "[44.3, 56.5] · 129 of 256" in text
    assert "+23.1 points [+16.4, +29.7] · meets the +12.0 promised" in text
    assert "agentx quickstart --out runs/first --seed 0" in text
    assert "2.1e-05" in text
    assert "3,604,480" in text
    assert "jax 0.10.2" in text


def test_page_loads_nothing_from_outside_itself(report):
    page = Page(report)
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "embed"}
    assert not any({"src", "href", "srcset"} & attrs.keys() for _, attrs in page.tags)
    source = report.read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", source)


def test_every_token_of_every_trajectory_is_on_the_page_with_its_figures(report):
    marks = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥"})
    tokens = [t for record in make_records() for t in record["tokens"]]
    page = Page(report)
    assert page.tokens == [t["text"].translate(marks) for t in tokens]
    attrs = [a for _, a in page.tags if "data-id" in a]
    assert [a["data-id"] for a in attrs] == [str(t["id"]) for t in tokens]
    assert [float(a["data-weight"]) for a in attrs] == [t["weight"] for t in tokens]
    sampled = next(a for a in attrs if "data-logprob" in a)
    assert sampled["data-advantage"] == "+0.83"
    assert sampled["data-logprob"] == "-0.4000 (p = 0.670)"
    assert "data-advantage" not in attrs[0]


def test_hostile_text_is_escaped_everywhere(tmp_path):
    results = make_results()
    results["command"] = results["hardware"] = results["stages"][0]["name"] = HOSTILE
    results["versions"] = {HOSTILE: HOSTILE}
    results["ablation"]["name"] = HOSTILE
    results["stages"][0]["scores"] = scores(**{HOSTILE: (1, 2)})
    report = make_run(tmp_path, results)
    assert report.read_text(encoding="utf-8").count("</script>") == 1
    assert not any(tag == "img" for tag, _ in Page(report).tags)


def test_tokens_pushed_down_are_marked_and_the_others_are_not(report):
    attrs = [a for _, a in Page(report).tags if "data-id" in a]
    down = {a.get("data-advantage") for a in attrs if "down" in a["class"]}
    up = {a.get("data-advantage") for a in attrs if "down" not in a["class"]}
    assert down == {"-1.21"}
    assert up == {"+0.83", None}


def test_ablation_says_what_the_objectives_changed_whichever_way(tmp_path):
    for successes, verdict in ((101, "They raised success"), (190, "can't tell them apart"),
                               (230, "They lowered success")):  # fmt: skip
        results = make_results()
        results["ablation"]["stages"][0]["scores"] = scores(success=(successes, 256))
        assert verdict in Page(make_run(tmp_path, results)).text


def test_a_run_of_one_stage_without_scores_has_a_page_too(tmp_path):
    (tmp_path / "results.json").write_text('{"stages": [{"name": "pretrain"}]}')
    assert "Pretraining" in Page(write_report(tmp_path)).text


def test_a_score_without_episodes_is_left_out(tmp_path):
    stages = [stage("sft", 1.0, 1, 1, success=(1, 2), recovery=(0, 0))]
    (tmp_path / "results.json").write_text(json.dumps({"stages": stages}))
    text = Page(write_report(tmp_path)).text
    assert "Success" in text
    assert "Recovery" not in text


def test_episodes_that_were_cut_short_are_told_where_there_are_any(tmp_path):
    def shown(**counts):
        results = {"stages": [stage("sft", 1.0, 1, 1) | counts, stage("grpo", 2.0, 1, 1)]}
        (tmp_path / "results.json").write_text(json.dumps(results))
        console = rich.console.Console(file=io.StringIO(), width=80)
        print_stage_table(results, console)
        return Page(write_report(tmp_path)).text, " ".join(console.file.getvalue().split())

    page, table = shown(episodes_truncated=1200, episodes_crashed=1)
    assert "Episodes cut short" in page
    assert "1,200 ran out of context, 1 crashed" in page
    assert "sft: of its episodes 1,200 ran out of context, 1 crashed" in table
    assert "grpo: of" not in table
    page, table = shown(episodes_truncated=0, episodes_crashed=0)
    assert "cut short" not in page
    assert "of its episodes" not in table


def test_run_report_draws_the_curves_of_one_run(tmp_path):
    with metrics.MetricsWriter(tmp_path / "my_run") as writer:
        for step in range(1, 11):
            writer.write(step, loss=1 / step)
    page = Page(write_run_report(tmp_path / "my_run"))
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert labels == ["My run loss: 1 at step 1, 0.1 at step 10"]


def test_a_pause_between_two_processes_is_no_time_in_training(tmp_path):
    records = [{"step": s, "time": 1e9 + 1e6 * s, "seconds": 60.0 * s, "loss": 1.0} for s in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    page = Page(write_run_report(tmp_path))
    assert "time in training 2:00 2 steps" in page.text
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert [label.rpartition(":")[0].rpartition(" ")[2] for label in labels] == ["loss"]


def test_wrong_input_is_named_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"results\.json does not exist"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text('{"stages": [}')
    with pytest.raises(ValueError, match=r"results\.json is not JSON: .* line 1 column 13"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text('{"stages": [{"name": "sft"}, {"seconds": 1}]}')
    with pytest.raises(ValueError, match='stage 2 has no "name"'):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match='no list under "stages"'):
        write_report(tmp_path)
    with pytest.raises(ValueError, match=r"holds no metrics\.jsonl"):
        write_run_report(tmp_path)


# ---------------------------------------------------------------------------------------------
# Its parts
# ---------------------------------------------------------------------------------------------


def test_ticks_are_round_and_enclose_the_values():
    assert nice_ticks(0.3, 6.9, 4) == [0, 2, 4, 6, 8]
    assert nice_ticks(0.0, 1.0, 4) == [0, 0.25, 0.5, 0.75, 1]
    assert nice_ticks(-0.013, 0.02, 4) == [-0.02, -0.01, 0, 0.01, 0.02]
    assert nice_ticks(3.0, 3.0, 4) == [1, 2, 3, 4, 5]


def test_curve_breaks_where_a_value_is_not_finite_and_is_empty_without_values():
    svg = str(curve([1, 2, 3, 4, 5], [1.0, 2.0, math.nan, 2.0, 1.0], "loss"))
    assert svg.count('class="raw"') == 2
    assert "nan" not in svg
    assert curve([1, 2], [math.nan, math.inf], "loss") == ""


def test_ticks_are_labelled_with_what_they_are():
    def labels(*values):
        return re.findall('<text class="y"[^>]*>([^<]*)<', str(curve([1, 2], values, "rate")))

    assert labels(0.0, 3e-4) == ["0", "0.0001", "0.0002", "0.0003"]
    assert labels(0.0, 1.5e-4) == ["0", "5e-05", "0.0001", "0.00015"]
    assert labels(0.0, 25e-6) == ["0", "1e-05", "2e-05", "3e-05"]
    assert labels(-1.0, 1.0) == ["\u22121.0", "\u22120.5", "0.0", "0.5", "1.0"]
    assert labels(0, 20_000) == ["0", "5k", "10k", "15k", "20k"]


def test_curve_of_many_steps_stays_small():
    svg = curve(range(100_000), np.sin(np.arange(100_000) / 9e3), "loss")
    assert len(svg) < 10_000


def test_whitespace_is_visible():
    assert visible_pieces("a b\n") == [
        ("text", "a"), ("space", "·"), ("text", "b"), ("newline", "↵"),
    ]  # fmt: skip
    assert visible_pieces("") == []


def test_half_a_character_and_what_steers_a_terminal_show_as_codes():
    euro = "€".encode()
    assert visible_pieces(token_text(b"a" + euro[:1])) == [("text", "a"), ("code", r"\xe2")]
    assert visible_pieces(token_text(euro)) == [("text", "€")]
    assert whole_text([token_text(euro[:1]), token_text(euro[1:])]) == "€"
    assert visible_pieces("\x1b[2J\u202e") == [
        ("code", r"\u001b"), ("text", "[2J"), ("code", r"\u202e"),
    ]  # fmt: skip


def test_trajectory_record_refuses_weights_of_another_length():
    trajectory, texts = make_trajectory()
    with pytest.raises(ValueError, match="1 weights"):
        trajectory_record(trajectory, texts, np.ones(1), title="", stage="", task="", outcome="")


def test_stage_table_fits_80_columns_and_holds_every_stage_and_its_scores():
    console = rich.console.Console(file=io.StringIO(), width=80)
    print_stage_table(make_results(), console)
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    assert "stage time steps /s success tool call recovery loop" in lines
    assert "tokenizer 0:07" in lines
    assert "sft 0:21 60 19.1k 50.4 [44.3, 56.5] 7.0 84.3 48.3 4.7" in lines
    assert "grpo 2:21 45 8.5k 73.4 [67.7, 78.5] 10.9 97.7 79.0 1.2" in lines


# ---------------------------------------------------------------------------------------------
# In a browser
# ---------------------------------------------------------------------------------------------


def browse(url, tmp_path, *arguments):
    flags = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}",
    )  # fmt: skip
    command = [CHROMIUM, *flags, *arguments, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")


@needs_chromium
def test_script_runs_without_error_and_the_address_chooses_the_colours(report, tmp_path):
    for fragment, colour in (("", "roles"), ("#weights", "weights"), ("#scores", "roles")):
        dom = browse(report.as_uri() + fragment, tmp_path, "--dump-dom")
        root = re.search("<html[^>]*>", dom).group()
        assert 'data-ready="true"' in root
        assert "data-error" not in root
        assert f'data-colour="{colour}"' in root


@needs_chromium
def test_pointing_at_a_token_shows_its_figures_and_clicking_the_switch_recolours(report, tmp_path):
    clicks = """<script>
      document.querySelector("input[value=weights]").click();
      const token = document.querySelector("[data-logprob]");
      token.dispatchEvent(new Event("pointerover", {bubbles: true}));
    </script></body>"""
    page = tmp_path / "clicked.html"
    page.write_text(report.read_text(encoding="utf-8").replace("</body>", clicks), encoding="utf-8")
    dom = browse(page.as_uri(), tmp_path, "--dump-dom")
    tip = re.search('<div id="tip".*?</div>', dom, re.DOTALL).group()
    assert " hidden" not in tip
    fields = re.findall("<b>(.*?)</b>", tip)
    assert fields[0] == "&lt;|call|&gt;"
    assert fields[2:] == ["call · sampled · failed", "1", "+0.83", "-0.4000 (p = 0.670)"]
    assert 'data-colour="weights"' in dom


@needs_chromium
def test_screenshot_is_not_blank_and_the_toggle_recolours_the_tokens(report, tmp_path):
    from matplotlib.image import imread

    def shot(fragment):
        path = tmp_path / f"{fragment or 'roles'}.png"
        browse(f"{report.as_uri()}{fragment}", tmp_path, f"--screenshot={path}",
               "--window-size=1280,4000")  # fmt: skip
        return imread(path)[..., :3]

    roles, weights = shot(""), shot("#weights")
    paper = roles[0, 0]
    inked = (np.abs(roles - paper) > 0.02).any(axis=-1)
    assert 0.03 < inked.mean() < 0.9
    # Curves and cards stand in the middle of the page as well as at its top.
    assert inked[1000:1600].any()
    changed = (np.abs(roles - weights) > 0.02).any(axis=-1)
    assert changed.mean() > 0.005
    # Only the trajectories, below everything else, change with the toggle.
    assert not changed[:1000].any()
