"""What the TPU compiler's own schedule says of the attention kernels, and of tokamax's.

    export PYTHONPATH=kernels
    python kernels/bench/schedule.py ours splash --chip v5p --head-size 128    one case, as JSON
    python kernels/bench/schedule.py ours --part 256             ... with parts of so many tokens
    python kernels/bench/schedule.py ours splash plan --write    all cases, into schedule.json
    python kernels/bench/schedule.py --table                     schedule.json as Markdown

`ours` are the kernels here. `splash` is tokamax's splash attention, in an environment of its own
that is made under ~/.cache/agentx at the first call; it is tried with three sizes of what it works
on at once, and its figures are those with the fewest bundles a visit. What is not named stays in
schedule.json as it was. All cases take some ten minutes. No TPU is needed, but libtpu
(agentx_kernels.ahead says how it is found).

A bundle is what a chip issues at once. Bundles are no time: they compare kernels on one chip, where
neither waits for memory. Of each kernel:

    full, masked   bundles of the straight stretch that works on one block of 1,024 x 1,024 tokens
                   where all of it is seen, and where a mask is computed
    walk           bundles of the loop around these two, with what only some visits run
    least_walk     those of the shortest way round the loop, past all that it can leave out
    fills, spills  loads and stores of registers, in the full stretch
    units          the share of its issue slots that each unit uses in the full stretch

What a visit of a full block takes lies between full + least_walk and full + walk. Ours is compared
by the most that it can take, splash by the least.

Of the plan, for causal rows, 32 documents and a tree of 8 rollouts that share half their length,
each in 32,768 tokens: visited blocks, blocks in which some token sees some other (counted pair by
pair), and the plan's cycles as a share of the bundles of one layer's attention, forward and
backward, of 32 heads of 128. Cycles are XLA's own estimate of each instruction, those in the plan's
loop times the rounds that the layout makes it take; a bundle is a cycle or more, so the true share
is less.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from agentx_kernels import ahead, layout, plan
from agentx_kernels.blocks import BlockConfig, block_config
from agentx_kernels.hardware import hardware

HERE = Path(__file__).parent
FIGURES = HERE / "schedule.json"
CHIPS = ("v5p", "v6e", "tpu7x", "v5e")
HEAD_SIZES = (128, 256)
PASSES = ("forward", "backward")
PEER = "tokamax==0.0.12"
# The parts of a block that splash is tried with; the figures are those of its best.
_PEER_PARTS = (256, 512, 1024)
_PLAN_LENGTH, _PLAN_HEADS, _PLAN_HEAD_SIZE = 32768, 32, 128
# The columns of the compiler's table of what each bundle issues.
_UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")
_SHOWN_UNITS = ("MXU", "XLU", "VALU", "EUP", "VLOAD", "VSTORE")

Figures = dict[str, Any]


# --------------------------------------------------------------------------------------------------
# Bundles
# --------------------------------------------------------------------------------------------------


def measure(chip: str, head_size: int, part: int | None = None) -> dict[str, Figures]:
    """The figures of our kernels, forward and backward; RuntimeError if the compiler refuses.

    part: the tokens of a block that are worked on at once; None as the kernels choose it.
    """
    return _measure(sys.executable, chip, "ours", head_size, *([part] if part else []))


def _measure(python: str, chip: str, *what: Any) -> dict[str, Figures]:
    with tempfile.TemporaryDirectory() as folder:
        _compile(python, chip, folder, *what)
        return {
            "forward": read_kernel(Path(folder), ("attention_forward", "_fwd_")),
            "backward": read_kernel(Path(folder), ("attention_backward", "_dkv_")),
        }


def _compile(python: str, *arguments: Any) -> None:
    command = [python, str(HERE / "kernels_alone.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    if library := ahead.find_libtpu():  # which the peer's environment has none of
        environment["TPU_LIBRARY_PATH"] = str(library)
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {ended.stderr[-2000:]}")


@dataclasses.dataclass
class _Stretch:
    """Bundles without a branch: from one address to before another, so deep in loops.

    regions: that are left out by whoever jumps here. skips: the region that its first bundle jumps
    over, or none.
    """

    start: int
    end: int
    depth: int
    regions: set[str]
    skips: str | None

    @property
    def size(self) -> int:
        return self.end - self.start


def read_kernel(dump: Path, names: tuple[str, ...]) -> Figures:
    """The figures of the kernel whose file has one of the names, in a folder that libtpu wrote."""
    files = [
        file
        for file in dump.glob("*final_bundles.txt")
        if "schedule-analysis" not in file.name and any(name in file.name for name in names)
    ]
    assert len(files) == 1, f"{len(files)} kernels in {dump} are called one of {names}"
    kernel = re.sub(r"-\d+-final_bundles.txt$", "", files[0].name)
    (use_file,) = (x for x in dump.iterdir() if x.name.startswith(kernel) and "static" in x.name)
    use, capacity = _read_use(use_file)
    stretches = _read_stretches(files[0])
    bodies = [at for at, x in enumerate(stretches) if use[x.start : x.end, 0].sum() > len(use) / 8]
    assert len(bodies) == 2, f"{files[0]} has {len(bodies)} stretches with matrix products, not 2"
    first, last = bodies
    depth = stretches[first].depth
    while first and stretches[first - 1].depth >= depth:
        first -= 1
    while last + 1 < len(stretches) and stretches[last + 1].depth >= depth:
        last += 1
    walked = stretches[first : last + 1]
    valu = _UNITS.index("VALU")
    full, masked = sorted(
        (stretches[at] for at in bodies), key=lambda x: use[x.start : x.end, valu].sum()
    )
    used = dict(zip(_UNITS, use[full.start : full.end].sum(0).tolist(), strict=True))
    slots = {unit: full.size * n for unit, n in zip(_UNITS, capacity, strict=True)}
    return {
        "full": full.size,
        "masked": masked.size,
        "walk": sum(x.size for x in walked) - full.size - masked.size,
        "least_walk": _shortest(walked, full) - full.size,
        "fills": used["FILL"],
        "spills": used["SPILL"],
        "units": {unit: round(used[unit] / slots[unit], 2) for unit in _SHOWN_UNITS},
    }


def _read_use(file: Path) -> tuple[np.ndarray, list[int]]:
    """[bundles, units], what each bundle issues, and how much of each unit a bundle could."""
    header, table = file.read_text().split("== UTILIZATION:\n")
    capacity = [int(x) for x in header.strip().splitlines()[-1].split()]
    return np.array([line.split() for line in table.splitlines() if line.strip()], int), capacity


def _read_stretches(file: Path) -> list[_Stretch]:
    """A label, a branch or another depth begins a stretch.

    `>`, `>>` and so on say how deep in loops a bundle is, but for empty ones.
    """
    bundle = re.compile(r"\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*(>*)\s*\{(\})?")
    stretches = [_Stretch(0, 0, 0, set(), None)]
    for line in file.read_text(errors="replace").splitlines():
        found = bundle.match(line)
        if not found:
            continue
        address, depth = int(found[1], 16), len(found[3])
        branch = re.search(r"sbr\.rel.*? target = \$region(\d+)", line)
        is_elsewhere = depth != stretches[-1].depth and not found[4]
        if found[2] or branch or is_elsewhere:
            regions = set(re.findall(r"(?:End|empty) region (\d+)", line)) if found[2] else set()
            skips = branch[1] if branch else None
            stretches.append(_Stretch(address, address, depth, regions, skips))
        stretches[-1].end = address + 1
    return stretches


def _shortest(walked: list[_Stretch], through: _Stretch) -> int:
    """The fewest bundles from the first of a loop's stretches to its last, through one of them."""
    least: dict[int, float] = {0: 0}  # to before each stretch
    for at, x in enumerate(walked):
        before = least.get(at, math.inf)
        if x is through:
            least = {}
        else:
            for there in range(at + 1, len(walked)):
                if x.skips in walked[there].regions:  # only its first bundle runs, the branch
                    least[there] = min(least.get(there, math.inf), before + 1)
        least[at + 1] = min(least.get(at + 1, math.inf), before + x.size)
    return int(least[len(walked)])


# --------------------------------------------------------------------------------------------------
# The plan
# --------------------------------------------------------------------------------------------------


def measure_plan(cases: list[Figures]) -> list[Figures]:
    """How exact the plan is and what it costs, by chip and kind of row, given kernels' cases."""
    prompt = _PLAN_LENGTH // 9
    tree = [(prompt, layout.ROOT), *[(prompt, 0)] * 8]
    rows = {
        "causal": layout.causal(1, _PLAN_LENGTH),
        "32 documents": layout.packed([_random_lengths(32, _PLAN_LENGTH)], _PLAN_LENGTH),
        "8 rollouts": layout.prefix_tree([tree], _PLAN_LENGTH),
    }
    measured = []
    for chip in CHIPS:
        config = block_config(hardware(chip), _PLAN_LENGTH)
        with tempfile.TemporaryDirectory() as folder:
            _compile(sys.executable, chip, folder, "plan", _PLAN_LENGTH)
            program = (Path(folder) / "plan.txt").read_text()
        kernels = [x for x in cases if x["chip"] == chip and x["head_size"] == _PLAN_HEAD_SIZE]
        kernels = [x for x in kernels if x["whose"] == "ours"]
        for name, tokens in rows.items():
            made, num_rounds = _make_plan(tokens, config)
            visited, full = _blocks(made)
            num_full, num_visited = int(full.sum()), int(visited.sum())
            bundles = _PLAN_HEADS * sum(
                num_full * x["full"] + (num_visited - num_full) * x["masked"] for x in kernels
            )
            cycles = _cycles(program, num_rounds)
            measured.append(
                {
                    "chip": chip,
                    "rows": name,
                    "visited": num_visited,
                    "not_empty": _num_not_empty(tokens, config),
                    "cycles": cycles,
                    "share": round(cycles / bundles, 5),
                }
            )
    return measured


def _random_lengths(number: int, total: int) -> list[int]:
    """Lengths of documents that fill a row: cut at places drawn at random, from seed 0."""
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.choice(np.arange(1, total), number - 1, replace=False))
    return np.diff([0, *cuts, total]).tolist()


def _make_plan(tokens: layout.TreeLayout, config: BlockConfig) -> tuple[plan.BlockPlan, int]:
    """A plan, and how many rounds the loop in it took, whose end depends on the layout."""
    num_rounds = 0

    def counted(is_on: Any, step: Any, state: Any) -> Any:
        nonlocal num_rounds
        while is_on(state):
            state = step(state)
            num_rounds += 1
        return state

    with mock.patch.object(plan.lax, "while_loop", counted):
        return plan.make_plan(tokens, config=config), num_rounds


def _blocks(made: plan.BlockPlan) -> tuple[np.ndarray, np.ndarray]:
    """bool[I, J] each of one row: which blocks are visited, and which of these without a mask."""
    queries = type(made.queries)(*(x[:, :, None] for x in made.queries))
    keys = type(made.keys)(*(x[:, None, :] for x in made.keys))
    visited = np.asarray(plan.visited_blocks(made))
    return visited[0], (visited & np.asarray(plan.is_full(queries, keys, None)))[0]


def _num_not_empty(tokens: layout.TreeLayout, config: BlockConfig) -> int:
    """Blocks in which some token sees some other, by looking at every pair."""
    index, end, _ = (np.asarray(x)[0] for x in tokens)
    number = 0
    for q in range(0, len(index), config.query):
        query = index[q : q + config.query, None]
        query = query[end[q : q + config.query] > 0]
        for k in range(0, len(index), config.key):
            key, key_end = index[k : k + config.key], end[k : k + config.key]
            number += bool(((key <= query) & (query < key_end)).any())
    return number


def _cycles(program: str, num_rounds: int) -> int:
    """XLA's estimate for a compiled program, the body of its loop times the rounds (and once more
    its condition)."""
    own: dict[str, int] = {}
    loops: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for line in program.splitlines():
        opened = re.match(r"(?:ENTRY )?%(\S+) \(.*\{$", line)
        if opened:
            name = "ENTRY" if line.startswith("ENTRY") else opened[1]
            own[name], loops[name] = 0, []
        estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
        own[name] = own.get(name, 0) + (int(estimate[1]) if estimate else 0)
        loop = re.search(r" while\(.*condition=%([\w.-]+), body=%([\w.-]+)", line)
        if loop:
            loops[name].append((loop[1], loop[2]))
    ((condition, body),) = loops["ENTRY"]
    assert not loops[condition] + loops[body], "the plan's loop has a loop in it"
    return own["ENTRY"] + num_rounds * own[body] + (num_rounds + 1) * own[condition]


# --------------------------------------------------------------------------------------------------
# All of it
# --------------------------------------------------------------------------------------------------


def peer_python() -> str:
    """The Python of an environment with tokamax, made where there is none yet."""
    folder = Path.home() / ".cache" / "agentx" / PEER.replace("==", "-")
    python = folder / "bin" / "python"
    if not (folder / "made").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet", PEER, f"jax=={jax.__version__}"]
        subprocess.run(install, check=True)
        (folder / "made").touch()
    return str(python)


def measure_peer(chip: str, head_size: int, part: int | None = None) -> dict[str, Figures]:
    """Splash's figures; for each pass with the part that gives it the fewest, if none is given."""
    tried = []
    for each in [part] if part else _PEER_PARTS:
        try:
            tried.append(_measure(peer_python(), chip, "splash", head_size, each))
        except RuntimeError as error:  # a large part may want more memory than the chip has
            if "vmem" not in str(error):
                raise
    return {name: min((each[name] for each in tried), key=least_visit) for name in PASSES}


def least_visit(case: Figures) -> int:
    """The fewest bundles that a visit of a full block can take."""
    return int(case["full"] + case["least_walk"])


def most_visit(case: Figures) -> int:
    """The most of them."""
    return int(case["full"] + case["walk"])


MEASURE = {"ours": measure, "splash": measure_peer}


def write(names: list[str]) -> None:
    """All cases of what is named into schedule.json, each as soon as it is there."""
    kernels = [name for name in names if name in MEASURE]
    for whose, head_size, chip in itertools.product(kernels, HEAD_SIZES, CHIPS):
        measured = MEASURE[whose](chip, head_size)
        keys = [
            {"whose": whose, "chip": chip, "head_size": head_size, "pass": name} for name in PASSES
        ]
        cases = [x for x in read()["cases"] if not any(key.items() <= x.items() for key in keys)]
        cases += [key | measured[key["pass"]] for key in keys]
        _save({"cases": sorted(cases, key=_place)})
        print(json.dumps(cases[-2:]), flush=True)
    if "plan" in names:
        _save({"plan": measure_plan(read()["cases"])})


def _place(case: Figures) -> tuple[Any, ...]:
    return case["whose"], CHIPS.index(case["chip"]), case["head_size"], PASSES.index(case["pass"])


def _save(changed: Figures) -> None:
    versions = {"jax": jax.__version__, "libtpu": ahead.LIBTPU, "tokamax": PEER.split("==")[1]}
    FIGURES.write_text(json.dumps(read() | {"versions": versions} | changed, indent=1) + "\n")


def read() -> Figures:
    """schedule.json."""
    return json.loads(FIGURES.read_text()) if FIGURES.exists() else {"cases": [], "plan": []}


def table() -> str:
    """schedule.json as Markdown: the kernels beside splash's, then the plan."""
    figures = read()
    by_case = {(x["whose"], x["chip"], x["head_size"], x["pass"]): x for x in figures["cases"]}
    lines = [
        "| chip | head size | pass | a visit, at most | full | masked | splash: a visit, at least "
        "| full | masked | ours / splash | fills, spills "
        "| MXU, XLU, VALU, EUP, loads, stores in % |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for chip, head_size, name in itertools.product(CHIPS, HEAD_SIZES, PASSES):
        ours, splash = (by_case[whose, chip, head_size, name] for whose in ("ours", "splash"))
        columns = [chip, head_size, name]
        columns += [most_visit(ours), ours["full"], ours["masked"]]
        columns += [least_visit(splash), splash["full"], splash["masked"]]
        columns += [f"{most_visit(ours) / least_visit(splash):.3f}"]
        columns += [f"{ours['fills']}, {ours['spills']}"]
        columns += [", ".join(f"{100 * x:.0f}" for x in ours["units"].values())]
        lines.append(f"| {' | '.join(map(str, columns))} |")
    lines += [
        "",
        "| chip | rows | visited | not empty | plan's cycles | of a layer's bundles |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {x['chip']} | {x['rows']} | {x['visited']} | {x['not_empty']} | {x['cycles']} "
        f"| {100 * x['share']:.2f} % |"
        for x in figures["plan"]
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[[], *MEASURE, "plan"])
    parser.add_argument("--chip", choices=CHIPS, default="v5p")
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--part", type=int, help="tokens of a block that are worked on at once")
    parser.add_argument("--write", action="store_true", help="all cases, into schedule.json")
    parser.add_argument("--table", action="store_true", help="print schedule.json as Markdown")
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if given.table:
        print(table())
    elif given.write:
        write(given.names)
    else:
        for name in given.names:
            if name in MEASURE:
                print(json.dumps(MEASURE[name](given.chip, given.head_size, given.part)))
            else:
                print(json.dumps(measure_plan(read()["cases"])))


if __name__ == "__main__":
    main()
