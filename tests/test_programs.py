"""Separate layers and caches, for CPUs, against stacks of them, for accelerators."""

import jax
import numpy as np
import pytest

from agentx.model import ModelConfig, abstract_transformer, init_params
from agentx.sample.programs import Programs, Rows
from agentx.sample.sampling import SamplingParams
from agentx.sharding import MeshConfig, make_mesh

CONFIG = ModelConfig(96, 32, 2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=64)
ROWS, COLUMNS = 8, 32


def stacked(cache) -> list[np.ndarray]:
    """Keys and values, [L, B, K, S, H] each: of one place, or of each layer."""
    return [
        np.asarray(x[0]) if len(x) == 1 else np.stack([np.asarray(y) for y in x]) for x in cache
    ]


def run(separate: bool, mesh: MeshConfig, num_devices: int) -> dict[str, np.ndarray]:
    """Prompts read in two pieces, a copied row, a larger cache, and 9 sampled tokens."""
    devices = make_mesh(mesh, jax.devices()[:num_devices])
    model = abstract_transformer(CONFIG)
    params = jax.tree.map(lambda x: 2 * x, init_params(model, jax.random.key(0)))
    programs = Programs(model, devices, CONFIG.vocab_size, (5, 6), separate=separate)
    params = jax.device_put(params, programs.param_shardings)
    rng = np.random.default_rng(0)
    rows_R = np.array([3, 0, 5, 6], np.int32)
    tokens_RT = rng.integers(10, 96, (4, 12)).astype(np.int32)
    counts_R = np.array([6, 4, 6, 0], np.int32)

    cache = programs.empty(ROWS, COLUMNS)
    nothing_R = np.zeros(4, np.int32)
    cache, _ = programs.feed(params, cache, rows_R, tokens_RT[:, :6], nothing_R, counts_R)
    cache, _ = programs.feed(params, cache, rows_R, tokens_RT[:, 6:], counts_R, counts_R)
    cache = programs.copy(cache, np.array([3, 0], np.int32), np.array([7, ROWS], np.int32))
    cache = programs.resize(cache, np.array([0, 1, 2, 3, 4, 5, 6, 7], np.int32), COLUMNS + 32)

    # Row 0 rests, and what it holds stays, though decode is not told how much that is.
    used_B = np.array([8, 0, 0, 12, 0, 12, 0, 12], np.int32)
    budget_B = np.array([0, 0, 0, 9, 0, 4, 0, 9], np.int32)
    length_B = np.where(budget_B > 0, used_B, 0).astype(np.int32)
    token_B = np.full(ROWS, 11, np.int32)
    request_B = np.arange(ROWS, dtype=np.uint32)
    sampling = SamplingParams(*(np.full(ROWS, x, np.float32) for x in (1.0, 0, 1.0)))
    rows = Rows(token_B, length_B, request_B, budget_B, sampling)
    cache, decoded = programs.decode(params, cache, rows, 1, 9, 0)
    k, v = stacked(cache)
    used = np.arange(COLUMNS + 32) < used_B[:, None]
    k, v = (np.where(used[:, None, :, None], x, 0) for x in (k, v))
    sampled = {name: np.asarray(x) for name, x in decoded._asdict().items() if name != "experts"}
    return {"k": k, "v": v, **sampled}


@pytest.mark.parametrize(
    ("mesh", "num_devices"),
    [(MeshConfig(), 1), (MeshConfig(data=2, fsdp=2, tensor=2), 8)],
)
def test_separate_layers_sample_what_scanned_ones_do(mesh, num_devices):
    scanned, separate = (run(is_separate, mesh, num_devices) for is_separate in (False, True))
    assert (scanned["ids"] >= 0).sum() > 20
    np.testing.assert_array_equal(separate["ids"], scanned["ids"])
    for name in ("k", "v", "logprobs", "processed_logprobs"):
        np.testing.assert_allclose(separate[name], scanned[name], atol=2e-5, err_msg=name)
