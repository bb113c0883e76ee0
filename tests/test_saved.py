"""A config comes back from JSON as it was, whatever settings of its own it holds."""

import dataclasses
import json

import pytest

from agentx.model import ModelConfig
from agentx.model.config import LatentConfig
from agentx.model.moe_config import MoEConfig
from agentx.model.rope import DynamicRope, LinearRope, Llama3Rope, LongRope, YarnRope
from agentx.model.saved import config_from_json, config_to_json

PLAIN = ModelConfig(
    vocab_size=64, d_model=16, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=24
)
EXPERTS = MoEConfig(num_experts=4, experts_per_token=2, d_ff=8, scores="sigmoid", num_groups=2)
CHANGES = {
    "plain": {},
    "patterns": {"window_pattern": (4096, None, 8), "rope_pattern": ("local", "global", "none")},
    "linear": {"rope_scaling": LinearRope(4.0)},
    "dynamic": {"rope_scaling": DynamicRope(2.0, 512)},
    "yarn": {"rope_scaling": YarnRope(4.0, 512, truncate=False)},
    "llama 3": {"rope_scaling": Llama3Rope(8.0, 512, 1.0, 4.0)},
    "long": {"rope_scaling": LongRope((1.0, 1.5, 2.0, 3.25), (1.0, 2.0, 4.0, 1e3), 512)},
    "experts": {"moe": EXPERTS, "num_dense_layers": 1},
    "latent": {"latent": LatentConfig(None, 6, 4, 4, 5), "num_kv_heads": 2, "qk_norm": "none"},
    "numbers": {"norm_eps": 1e-5, "logit_softcap": 30.0, "attention_scale": 20**-0.5},
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_kind_of_setting_comes_back_as_it_was(name):
    config = dataclasses.replace(PLAIN, **CHANGES[name])
    again = config_from_json(json.loads(json.dumps(config_to_json(config))))
    assert again == config
    assert repr(again) == repr(config)
    assert hash(again) == hash(config)


def test_a_config_of_before_a_setting_is_read_with_its_default():
    about = config_to_json(PLAIN)
    for name in ("sinks", "moe", "window_pattern"):
        del about[name]
    assert config_from_json(about) == PLAIN


def test_what_is_no_config_is_refused():
    with pytest.raises(ValueError, match=r"no model that this version knows: .*colour"):
        config_from_json({**config_to_json(PLAIN), "colour": 3})
    with pytest.raises(ValueError, match="'Path' is no setting of a model"):
        config_from_json({**config_to_json(PLAIN), "moe": {"class": "Path"}})
