"""How a mixture of experts routes, in numbers; what computes it is `moe.py`."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

Scores = Literal["softmax", "softmax_of_chosen", "sigmoid"]
Balance = Literal["none", "loss", "bias"]


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """How tokens choose experts, and what an expert is.

    num_experts E, experts_per_token k, d_ff F of each expert: sizes.
    scores: what a token's weights are made of and, with the correction bias added, chosen by:
      "softmax": softmax over all experts (Qwen3-MoE; with normalize, Mixtral).
      "softmax_of_chosen": chosen by logits, then softmax over those that are chosen (gpt-oss).
      "sigmoid": a sigmoid of each logit (DeepSeek-V3, arXiv:2412.19437).
    normalize: divide a token's weights by their sum. scale: then multiply them by this.
    num_groups G, groups_per_token: experts lie in G groups of neighbours, and a token takes experts
      of so many groups alone: those whose two best experts have the highest sum (DeepSeek-V3).
    shared_d_ff: F of an expert that every token takes beside its own; 0 for none.
    router_bias, expert_bias: whether the router's logits and the experts' products have biases.
    balance: what makes tokens spread evenly over experts:
      "loss": a loss on the router's probabilities (Fedus et al., 2022, arXiv:2101.03961).
      "bias": the correction bias, moved after every step (Wang et al., 2024, arXiv:2408.15664).
    balance_rate: what the loss is multiplied by, or how far a step moves the bias.

    Raises ValueError where the numbers do not fit together.
    """

    num_experts: int
    experts_per_token: int
    d_ff: int
    scores: Scores
    normalize: bool = False
    scale: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    shared_d_ff: int = 0
    router_bias: bool = False
    expert_bias: bool = False
    balance: Balance = "none"
    balance_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_experts", "experts_per_token", "d_ff", "num_groups", "groups_per_token"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.scores not in get_args(Scores):
            raise ValueError(
                f"scores is {self.scores!r}; choose one of {', '.join(get_args(Scores))}"
            )
        if self.balance not in get_args(Balance):
            raise ValueError(
                f"balance is {self.balance!r}; choose one of {', '.join(get_args(Balance))}"
            )
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token is {self.experts_per_token}, more than the "
                f"{self.num_experts} experts that there are"
            )
        if self.num_experts % self.num_groups:
            raise ValueError(
                f"num_experts {self.num_experts} is not a multiple of num_groups "
                f"{self.num_groups}: every group has the same number of experts"
            )
        group_size = self.num_experts // self.num_groups
        if self.num_groups > 1 and group_size < 2:
            raise ValueError(
                f"{self.num_experts} experts in {self.num_groups} groups are fewer than 2 in each: "
                f"a group is chosen by its two best experts"
            )
        if not self.groups_per_token <= self.num_groups:
            raise ValueError(
                f"groups_per_token is {self.groups_per_token}, more than the {self.num_groups} "
                f"groups that there are"
            )
        if self.experts_per_token > self.groups_per_token * group_size:
            raise ValueError(
                f"experts_per_token is {self.experts_per_token}, more than the "
                f"{self.groups_per_token * group_size} experts in the groups that a token chooses"
            )
        if self.shared_d_ff < 0:
            raise ValueError(f"shared_d_ff is {self.shared_d_ff}; it must be 0 or more")
        if not self.scale > 0 or not math.isfinite(self.scale):
            raise ValueError(f"scale is {self.scale}; it must be above 0")
        if not self.balance_rate >= 0 or not math.isfinite(self.balance_rate):
            raise ValueError(f"balance_rate is {self.balance_rate}; it must be 0 or more")
        if self.balance != "none" and self.balance_rate == 0:
            raise ValueError(
                f"balance is {self.balance!r} with a balance_rate of 0, which does nothing: give "
                f"it a rate above 0, or choose none"
            )

    @property
    def has_correction_bias(self) -> bool:
        """Whether experts are chosen by scores that a bias is added to."""
        return self.scores == "sigmoid" or self.balance == "bias"
