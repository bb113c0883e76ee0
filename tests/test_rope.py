"""RoPE's scalings against transformers: frequencies, logits past the original length, both ways."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_interop import LLAMA, TOKENIZER, edit_config, make_model, our_logits
from test_model import decode, forward

from agentx.interop.huggingface import export_huggingface, import_huggingface
from agentx.model.cache import init_cache
from agentx.model.config import ModelConfig
from agentx.model.rope import DynamicRope, LinearRope, Llama3Rope, LongRope, YarnRope, unscaled
from agentx_kernels.layout import causal

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Rows of 128 tokens, of models that were first trained on 32; heads of 16.
LENGTH, ORIGINAL = 128, 32
FACTORS = tuple(1 + 0.5 * i for i in range(8)), tuple(1 + 2.0 * i for i in range(8))
KINDS = {
    "linear": LinearRope(4.0),
    "dynamic": DynamicRope(3.0, ORIGINAL),
    "yarn": YarnRope(4.0, ORIGINAL),
    "yarn, all numbers": YarnRope(
        4.0, ORIGINAL, 4.0, 0.5, mscale=0.7, mscale_all_dim=1.0, truncate=False
    ),
    "yarn, attention factor": YarnRope(4.0, ORIGINAL, attention_factor=1.5),
    "llama3": Llama3Rope(8.0, ORIGINAL, 1.0, 4.0),
    "longrope": LongRope(*FACTORS, ORIGINAL),
    "longrope, factor": LongRope(*FACTORS, ORIGINAL, factor=2.0),
}


def scaled(scaling) -> ModelConfig:
    return dataclasses.replace(LLAMA, max_length=LENGTH, rope_scaling=scaling)


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def exported(request, tmp_path_factory):
    config = scaled(request.param)
    model = make_model(config)
    folder = tmp_path_factory.mktemp("rope") / "model"
    export_huggingface(nnx.state(model), config, TOKENIZER, folder)
    return config, model, folder


def test_transformers_computes_the_same_logits_past_the_original_length(exported):
    config, model, folder = exported
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, LENGTH))
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(tokens)).logits.numpy()
    found = np.asarray(our_logits(model, jnp.asarray(tokens)))
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)
    unlike = dataclasses.replace(config, rope_scaling=None)
    other = make_model(unlike)
    assert np.abs(np.asarray(our_logits(other, jnp.asarray(tokens))) - wanted).max() > 1e-2


def test_decoding_past_the_original_length_equals_the_full_forward(exported):
    config, model, _ = exported
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 48), np.int32)
    full = forward(model, tokens, causal(2, 48))
    at, cache = 0, init_cache(config, 2, 48)
    for pieces in (20, 11, 1, 1, 15):  # over the original length by one token at a time
        lengths = jnp.array([pieces, pieces])
        hidden, cache = decode(model, tokens[:, at : at + pieces], cache, lengths)
        np.testing.assert_allclose(hidden, full[:, at : at + pieces], atol=1e-4)
        at += pieces
    assert at == 48 > ORIGINAL


def test_what_is_exported_is_imported_as_the_same_config(exported):
    config, _, folder = exported
    found, _ = import_huggingface(folder)
    # transformers has one number for the original length and for the longest, if scaling is dynamic
    is_dynamic = isinstance(config.rope_scaling, DynamicRope)
    assert found == dataclasses.replace(config, max_length=ORIGINAL if is_dynamic else LENGTH)


def test_the_form_of_transformers_5_is_read_too(exported, tmp_path):
    config, _, folder = exported
    theirs = transformers.AutoConfig.from_pretrained(folder)
    theirs.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_scaling" not in written
    assert written["rope_parameters"]["rope_theta"] == config.rope_theta
    (folder / "config.json").write_text(json.dumps(written))
    found, _ = import_huggingface(folder)
    assert found.rope_scaling == config.rope_scaling
    assert found.rope_theta == config.rope_theta


def test_up_to_the_original_length_some_scalings_change_nothing():
    plain = unscaled(1e4, 16)
    for scaling in (DynamicRope(3.0, ORIGINAL), LongRope((1.0,) * 8, (9.0,) * 8, ORIGINAL)):
        frequencies, factor = scaling.frequencies(1e4, 16, ORIGINAL)
        np.testing.assert_array_equal(frequencies, plain)
        assert factor == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LinearRope(0.5), r"LinearRope: factor is 0\.5; it must be 1 or more"),
        (lambda: DynamicRope(2.0, 1), "original_length is 1; it must be over 1"),
        (lambda: Llama3Rope(8.0, 32, 4.0, 4.0), "low_freq_factor must be above 0 and below"),
        (lambda: YarnRope(4.0, 32, 1.0, 2.0), "beta_slow must be above 0 and below beta_fast"),
        (lambda: LongRope((0.0,), (1.0,), 32), "short_factor and long_factor must be above 0"),
        (
            lambda: scaled(LongRope((1.0,) * 4, (1.0,) * 8, 32)),
            r"rope_scaling\.short_factor has 4 numbers; a head of 16 has 8 pairs",
        ),
    ],
)
def test_numbers_that_cannot_be_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "spiral"}, "rope_type is 'spiral'; only linear, .* and default can be read"),
        ({"rope_type": "yarn"}, "rope_type 'yarn' lacks factor"),
        ({"rope_type": "linear", "factor": 2.0, "beta": 1}, "beta is no number of rope_type"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "a part is rotated"),
    ],
)
def test_a_scaling_that_cannot_be_read_is_refused(tmp_path, rope, words):
    config = scaled(None)
    folder = export_huggingface(nnx.state(make_model(config)), config, TOKENIZER, tmp_path / "m")
    edit_config(folder, rope_scaling=rope)
    with pytest.raises(ValueError, match=words):
        import_huggingface(folder)
