"""The shapes under configs/models beside what their makers publish, to the last parameter."""

import math
from typing import NamedTuple

import pytest

from agentx.cli.config import configs_folder, load_config
from agentx.interop.families import family_of
from agentx.model import sizes
from agentx.model.config import ModelConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Where a published count is from.
HUB = "the count of parameters that the hub shows beside the model's safetensors"
HUB_TWICE = "the hub's, less lm_head.weight, which the file repeats though it is tied"
HUB_WHOLE = "the hub's of the whole, less its vision tower and projector"
REPORT = "the model card's table, to the digits it has; every digit by transformers' own model"


class Published(NamedTuple):
    """num_params: of all. source: who says so. in_file: how many the files hold, if others."""

    num_params: int
    source: str
    in_file: int | None = None


PUBLISHED = {
    "llama3.1-8b": Published(8_030_261_248, HUB),
    "llama3.1-70b": Published(70_553_706_496, HUB),
    "qwen3-0.6b": Published(596_049_920, HUB_TWICE, 751_632_384),
    "qwen3-1.7b": Published(1_720_574_976, HUB_TWICE, 2_031_739_904),
    "qwen3-8b": Published(8_190_735_360, HUB),
    "qwen3-32b": Published(32_762_123_264, HUB),
    "qwen3-30b-a3b": Published(30_532_122_624, HUB),
    "qwen3-235b-a22b": Published(235_093_634_560, HUB),
    "gemma3-1b": Published(999_885_952, HUB),
    "gemma3-27b": Published(27_009_346_304, HUB_WHOLE, 27_432_406_640),
    # The hub counts the experts as they are packed, two numbers of four bits in a byte.
    "gpt-oss-20b": Published(20_914_757_184, REPORT),
    "gpt-oss-120b": Published(116_829_156_672, REPORT),
    # Of 684.5 B in the files 671 are the model's; the rest is the layer of the second token, and
    # the scales of the weights.
    "deepseek-v3-671b": Published(671_026_419_200, REPORT),
    "olmo2-7b": Published(7_298_617_344, REPORT),
}
# Parameters that a token meets, in 10^9, as published; and whether the look-up of the embedding is
# counted. Qwen3-30B-A3B has 3.353, so that its maker cuts digits off.
ACTIVE = {
    "qwen3-30b-a3b": (3_353_032_704, "3.3", True),
    "qwen3-235b-a22b": (22_190_763_520, "22", True),
    "gpt-oss-20b": (3_608_307_264, "3.6", False),
    "gpt-oss-120b": (5_132_849_472, "5.1", False),
    "deepseek-v3-671b": (36_625_618_432, "37", False),
}


def config_of(name: str) -> ModelConfig:
    return load_config(f"models/{name}", root="ModelConfig")


def theirs(name: str):
    """The config that transformers makes of what we write for it."""
    config = config_of(name)
    about = family_of(config).write(config)
    return transformers.AutoConfig.for_model(**about), about


def count(model) -> int:
    """Each parameter once, however many places it is tied to; and what routing adds to scores,
    which transformers keeps as a buffer."""
    biases = [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    return sum(p.numel() for p in [*model.parameters(), *biases])


def test_every_shape_has_its_published_count():
    files = {file.stem for file in configs_folder().glob("models/*.gin")}
    assert files - {"quickstart"} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_has_as_many_parameters_as_is_published(name):
    assert sizes.num_params(config_of(name)) == PUBLISHED[name].num_params


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_builds_as_many_parameters(name):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs(name)[0])
    assert count(model) == PUBLISHED[name].num_params


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_takes_the_config_that_is_written(name):
    config, about = theirs(name)
    rope = about.pop("rope_parameters")
    for before_5 in ("rope_theta", "rope_scaling", "rope_local_base_freq"):  # they say the same
        about.pop(before_5, None)
    for key, value in about.items():
        assert getattr(config, key) == value, key
    assert {k: config.rope_parameters[k] for k in rope} == rope


@pytest.mark.parametrize(
    ("name", "cls", "differs"),
    [
        ("gpt-oss-120b", "GptOssConfig", set()),
        # By default it is the model as it was before its rows were made longer.
        (
            "deepseek-v3-671b",
            "DeepseekV3Config",
            {"rope_scaling", "rope_parameters", "max_position_embeddings"},
        ),
    ],
)
def test_what_a_class_of_transformers_has_by_default_is_the_shape(name, cls, differs):
    config = config_of(name)
    family = family_of(config)
    ours = family.write(config)
    by_default = family.write(family.read(getattr(transformers, cls)().to_dict(), cls))
    assert {key for key in ours if ours[key] != by_default.get(key)} == differs


@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen3-1.7b"])
def test_the_file_of_a_tied_model_repeats_its_embedding(name):
    config, published = config_of(name), PUBLISHED[name]
    repeated = config.vocab_size * config.d_model
    assert published.in_file == published.num_params + repeated


def test_the_rest_of_gemma_is_what_sees():
    config, _ = theirs("gemma3-27b")
    vision = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
        "vision_use_head": False,
    }
    both = transformers.Gemma3Config(text_config=config.to_dict(), vision_config=vision)
    with torch.device("meta"):
        whole = transformers.Gemma3ForConditionalGeneration(both)
    sees = count(whole.model.vision_tower) + count(whole.model.multi_modal_projector)
    published = PUBLISHED["gemma3-27b"]
    assert count(whole) == published.in_file
    assert published.in_file - sees == published.num_params


@pytest.mark.parametrize("name", ACTIVE)
def test_a_mixture_has_as_many_active_parameters_as_is_published(name):
    exact, published, looks_up = ACTIVE[name]
    config = config_of(name)
    active = sizes.num_active_params(config)
    if not looks_up:
        active -= config.vocab_size * config.d_model
    assert active == exact
    digits = len(published.partition(".")[2])
    cut = math.floor(active / 1e9 * 10**digits) / 10**digits
    assert float(published) in (cut, round(active / 1e9, digits))
