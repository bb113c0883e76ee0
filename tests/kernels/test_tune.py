"""Blocks by measurement: on a CPU, which is what tests run on."""

import pytest

from agentx_kernels.blocks import BlockConfig
from agentx_kernels.hardware import hardware
from agentx_kernels.tune import candidates, tune

SHAPE = {"length": 64, "heads": 2, "kv_heads": 1, "head_size": 8, "dtype": "float32", "repeats": 1}


def test_candidates_are_timed_and_the_fastest_comes_first():
    configs = [BlockConfig(8, 8), BlockConfig(32, 32)]
    timings = tune(hardware("cpu"), **SHAPE, configs=configs)
    assert {timing.config for timing in timings} == set(configs)
    assert 0 < timings[0].seconds <= timings[1].seconds
    assert all(timing.forward_seconds > 0 for timing in timings)
    assert not any(timing.error for timing in timings)


def test_candidates_fit_the_row_and_parts_divide_blocks():
    found = candidates(hardware("v5p"), 1024)
    assert BlockConfig(1024, 1024, 512, 512) in found
    assert all(c.query <= 1024 and c.query % c.backward_part == 0 for c in found)
    assert candidates(hardware("cpu"), 128) == [BlockConfig(n, n) for n in (64, 128)]


@pytest.mark.parametrize(
    ("chip", "change", "sentence"),
    [
        ("v5p", {}, "v5p is a tpu, and this process runs on a cpu"),
        ("cpu", {"length": 32}, "a row of 32 tokens is shorter than every block"),
    ],
)
def test_what_cannot_be_timed_here_is_refused(chip, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        tune(hardware(chip), **(SHAPE | change))
