"""The compiler's schedule of the attention kernels against kernels/bench/schedule.json."""

import importlib.util
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "kernels" / "bench"
FIGURES = json.loads((BENCH / "schedule.json").read_text())
CASES = [x for x in FIGURES["cases"] if x["whose"] == "ours"]
SPLASH = [x for x in FIGURES["cases"] if x["whose"] == "splash"]
COUNTS = ("full", "masked", "walk", "fills", "spills")


def load_schedule():
    spec = importlib.util.spec_from_file_location("schedule", BENCH / "schedule.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["schedule"] = module  # where dataclasses look for what annotations name
    spec.loader.exec_module(module)
    return module


schedule = load_schedule()


KERNELS = sorted({(x["chip"], x["head_size"]) for x in CASES})


@pytest.fixture(scope="module")
def measured(remembered):
    """The figures of today, by chip and head size: two at a time, for none takes two cores."""

    def measure(chip, head_size):
        return remembered(f"schedule {chip} {head_size}", lambda: schedule.measure(chip, head_size))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(KERNELS, pool.map(measure, *zip(*KERNELS, strict=True)), strict=True))


@pytest.mark.parametrize(("chip", "head_size"), KERNELS)
def test_no_kernel_takes_over_5_percent_more_than_is_recorded(measured, chip, head_size):
    recorded = {x["pass"]: x for x in CASES if (x["chip"], x["head_size"]) == (chip, head_size)}
    worse = {
        (name, what): (was[what], measured[chip, head_size][name][what])
        for name, was in recorded.items()
        for what in COUNTS
        if measured[chip, head_size][name][what] > 1.05 * was[what]
    }
    assert not worse, f"more than recorded, (recorded, measured): {worse}"


@pytest.mark.parametrize("chip", ["v5p", "v6e", "tpu7x"])
def test_a_visit_takes_no_more_bundles_than_with_tokamax(chip):
    """The most that ours can take against the least that splash can."""
    splash = {(x["head_size"], x["pass"]): x for x in SPLASH if x["chip"] == chip}
    ours = {(x["head_size"], x["pass"]): x for x in CASES if x["chip"] == chip}
    assert set(ours) == set(splash)
    assert len(ours) == 2 * 2  # head sizes, passes
    for case, x in ours.items():
        assert x["full"] + x["walk"] <= splash[case]["full"] + splash[case]["least_walk"], case


def test_every_kernel_is_recorded_and_every_plan():
    assert len(CASES) == 4 * 2 * 2  # chips, head sizes, passes
    assert len(FIGURES["plan"]) == 4 * 3  # chips, kinds of rows


@pytest.mark.parametrize("case", FIGURES["plan"], ids=lambda x: f"{x['chip']}-{x['rows']}")
def test_a_plan_is_exact_and_takes_under_2_percent_of_one_layer(case):
    assert case["visited"] <= 1.15 * case["not_empty"]
    assert case["share"] < 0.02


def test_the_readme_has_the_table_that_the_figures_make():
    assert schedule.table() in (BENCH.parent / "README.md").read_text()
