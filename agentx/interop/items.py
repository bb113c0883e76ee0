"""Items of a config.json: some of its keys, and the settings of ours that they are.

Each is read and written, so that no name stands twice. families.py puts them together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from agentx.interop.ropes import read_rope, write_rope
from agentx.model.config import LatentConfig, ModelConfig
from agentx.model.moe_config import MoEConfig


class Item(Protocol):
    """Some keys of config.json and the settings of ours that they are."""

    def read(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """Our settings. Raises ValueError for what we lack, KeyError for a key that is missing."""

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Their keys."""


@dataclasses.dataclass(frozen=True)
class Same:
    """A number that both have. default: where the key is missing or null; `_REQUIRED` for none."""

    ours: str
    theirs: str
    default: Any = ...

    def read(self, about: Mapping[str, Any]) -> dict[str, Any]:
        value = about.get(self.theirs)
        if value is None:
            if self.default is ...:
                raise KeyError(self.theirs)
            value = self.default(about) if callable(self.default) else self.default
        return {self.ours: value}

    def write(self, config: Any) -> dict[str, Any]:
        return {self.theirs: getattr(config, self.ours)}


@dataclasses.dataclass(frozen=True)
class Either(Same):
    """A number that config.json has under one of two names, and that is written under both."""

    also: str = ""

    def read(self, about: Mapping[str, Any]) -> dict[str, Any]:
        return super().read({self.theirs: about.get(self.also), **about})

    def write(self, config: Any) -> dict[str, Any]:
        written = super().write(config)
        return written | {self.also: written[self.theirs]}


@dataclasses.dataclass(frozen=True)
class Ours:
    """What every model of the family has, and config.json does not say."""

    settings: Mapping[str, Any]

    def read(self, about: Mapping[str, Any]) -> dict[str, Any]:
        return dict(self.settings)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {}


@dataclasses.dataclass(frozen=True)
class Theirs:
    """What config.json may say, and we have in one way alone."""

    settings: Mapping[str, Any]

    def read(self, about: Mapping[str, Any]) -> dict[str, Any]:
        for name, value in self.settings.items():
            if about.get(name, value) not in (value, None):
                raise ValueError(f"{name} is {about[name]!r}; only {value!r} can be read")
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return dict(self.settings)


@dataclasses.dataclass(frozen=True)
class Biases:
    """attention_bias: of queries, keys, values and output together."""

    default: bool = False

    def read(self, about: Mapping[str, Any]) -> dict[str, Any]:
        has = bool(about.get("attention_bias", self.default))
        return {"qkv_bias": has, "output_bias": has}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"attention_bias": config.qkv_bias}


@dataclasses.dataclass(frozen=True)
class Rope:
    """rope_theta and its scaling, in the form of transformers 5 (rope_parameters) or before."""

    theta: float = 10_000.0

    def read(self, about: Mapping[str, Any]) -> dict[str, Any]:
        theta, scaling = read_rope(about, self.theta)
        return {"rope_theta": theta, "rope_scaling": scaling}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return write_rope(config)


@dataclasses.dataclass(frozen=True)
class TwoRopes:
    """Gemma 3's: layers with a window turn by a base of their own, without scaling."""

    theta: float = 1_000_000.0
    local_theta: float = 10_000.0

    def read(self, about: Mapping[str, Any]) -> dict[str, Any]:
        local = about.get("rope_local_base_freq") or self.local_theta
        both = about.get("rope_parameters")
        if both:
            of_windows = dict(both.get("sliding_attention") or {})
            if of_windows.pop("rope_type", "default") != "default":
                raise ValueError("layers with a window have a scaled rotation, which is not ours")
            local = of_windows.get("rope_theta") or local
            about = {**about, "rope_parameters": both.get("full_attention")}
        theta, scaling = read_rope(about, self.theta)
        return {"rope_theta": theta, "local_rope_theta": local, "rope_scaling": scaling}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        # Both forms: transformers 5 reads the first, servers of before the others.
        written = write_rope(config)
        of_all = {"rope_type": "default", **written.get("rope_scaling", {})}
        return {
            **written,
            "rope_parameters": {
                "full_attention": {**of_all, "rope_theta": config.rope_theta},
                "sliding_attention": {
                    "rope_type": "default",
                    "rope_theta": config.local_rope_theta,
                },
            },
            "rope_local_base_freq": config.local_rope_theta,
        }


@dataclasses.dataclass(frozen=True)
class Window:
    """sliding_window: of every layer, or none where it is null."""

    default: int | None

    def read(self, about: Mapping[str, Any]) -> dict[str, Any]:
        return {"window_pattern": (about.get("sliding_window", self.default),)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"sliding_window": config.window_pattern[0]}


@dataclasses.dataclass(frozen=True)
class LayerTypes:
    """layer_types: which layers have the window, by name; or by a period where that is missing.

    period: one layer of so many has none, the last of them; 0 where only `layer_types`, or Qwen's
    use_sliding_window and max_window_layers, say so. ropes: layers with a window turn locally.
    """

    period: int = 0
    ropes: bool = False
    default_window: int | None = 4096

    def read(self, about: Mapping[str, Any]) -> dict[str, Any]:
        num_layers = about["num_hidden_layers"]
        window = about.get("sliding_window", self.default_window)
        types = about.get("layer_types")
        if types is None and self.period:
            # What transformers before layer_types called this period.
            period = about.get("sliding_window_pattern") or self.period
            types = [(i + 1) % period and "sliding_attention" for i in range(num_layers)]
        elif types is None:
            first = about.get("max_window_layers", num_layers)
            has_window = about.get("use_sliding_window") and window is not None
            types = [has_window and i >= first and "sliding_attention" for i in range(num_layers)]
        if len(types) != num_layers:
            raise ValueError(f"layer_types has {len(types)} layers, and the model {num_layers}")
        is_local = [kind == "sliding_attention" for kind in types]
        settings: dict[str, Any] = {
            "window_pattern": shortest_period([window if local else None for local in is_local])
        }
        if self.ropes:
            kinds = ["local" if local else "global" for local in is_local]
            settings["rope_pattern"] = shortest_period(kinds)
        return settings

    def write(self, config: ModelConfig) -> dict[str, Any]:
        windows = [kind.window for kind in config.kinds]
        types = ["full_attention" if w is None else "sliding_attention" for w in windows]
        written = {"layer_types": types, "sliding_window": max((w or 0) for w in windows) or None}
        if self.period:
            return written
        return {**written, "use_sliding_window": any(windows)}


@dataclasses.dataclass(frozen=True)
class RopeLayers:
    """SmolLM3's no_rope_layers: 1 for a layer that is rotated, which is most of them."""

    interval: int = 4

    def read(self, about: Mapping[str, Any]) -> dict[str, Any]:
        num_layers = about["num_hidden_layers"]
        interval = about.get("no_rope_layer_interval") or self.interval
        rotated = about.get("no_rope_layers")
        if rotated is None:
            rotated = [(i + 1) % interval for i in range(num_layers)]
        kinds = ["global" if x else "none" for x in rotated[:num_layers]]
        return {"rope_pattern": shortest_period(kinds)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"no_rope_layers": [int(kind.rope != "none") for kind in config.kinds]}


@dataclasses.dataclass(frozen=True)
class QueryScale:
    """Gemma's query_pre_attn_scalar: the dot products are divided by its square root."""

    def read(self, about: Mapping[str, Any]) -> dict[str, Any]:
        return {"attention_scale": about.get("query_pre_attn_scalar", 256) ** -0.5}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        scalar = config.softmax_scale**-2
        whole = round(scalar)
        return {"query_pre_attn_scalar": whole if whole**-0.5 == config.softmax_scale else scalar}


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts, all of whose keys have one value each.

    ours: what every model of the family has. theirs: our settings of `MoEConfig`, and the keys that
    hold them. shared: experts that every token takes are counted in n_shared_experts.
    """

    ours: Mapping[str, Any]
    theirs: tuple[Same, ...]
    shared: bool = False

    def read(self, about: Mapping[str, Any]) -> dict[str, Any]:
        settings = dict(self.ours)
        for same in self.theirs:
            settings |= same.read(about)
        if self.shared:  # several shared experts are one of their total width
            settings["shared_d_ff"] = (about.get("n_shared_experts") or 0) * settings["d_ff"]
        return {"moe": MoEConfig(**settings)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        if config.moe is None:
            return {}
        written: dict[str, Any] = {}
        for same in self.theirs:
            written |= same.write(config.moe)
        if self.shared:
            written["n_shared_experts"] = config.moe.shared_d_ff // config.moe.d_ff
        return written


@dataclasses.dataclass(frozen=True)
class Latent:
    """DeepSeek's multi-head latent attention."""

    def read(self, about: Mapping[str, Any]) -> dict[str, Any]:
        plain, rotated = about["qk_nope_head_dim"], about["qk_rope_head_dim"]
        rank = about.get("q_lora_rank")
        latent = LatentConfig(rank, about["kv_lora_rank"], plain, rotated, about["v_head_dim"])
        return {"latent": latent, "head_dim": plain + rotated}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        latent = config.latent
        if latent is None:
            return {}
        return {
            "q_lora_rank": latent.query_rank,
            "kv_lora_rank": latent.key_value_rank,
            "qk_nope_head_dim": latent.plain_dim,
            "qk_rope_head_dim": latent.rotated_dim,
            "v_head_dim": latent.value_dim,
        }


def shortest_period(values: Sequence[Any]) -> tuple[Any, ...]:
    """The shortest pattern that, repeated, gives the values: (1, 2) of [1, 2, 1, 2, 1]."""
    for period in range(1, len(values) + 1):
        if all(value == values[i % period] for i, value in enumerate(values)):
            return tuple(values[:period])
    return ()
