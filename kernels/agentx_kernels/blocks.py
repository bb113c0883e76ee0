"""How many tokens a block has, by device and head size: with the reasons.

Legend: S tokens a row, H head size.
"""

from __future__ import annotations

import dataclasses

from agentx_kernels.hardware import Hardware


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """The tokens of a block of queries and of one of keys; the path in XLA works on whole blocks.

    forward_part, backward_part: on TPU, how many tokens' scores exist at a time: of a block of keys
      in the forward pass, of one of queries in the backward, each of which it divides. None is by
      the table below.
    """

    query: int
    key: int
    forward_part: int | None = None
    backward_part: int | None = None

    def __post_init__(self) -> None:
        if min(size for size in dataclasses.astuple(self) if size is not None) < 1:
            raise ValueError(f"the blocks are {self}; each must have 1 token or more")

    def parts(self, hardware: Hardware, head_size: int) -> tuple[int, int]:
        """forward_part and backward_part, where they are None by the table."""
        forward, backward = _PARTS.get((hardware.name, -(-head_size // 128)), _OTHER_PARTS)
        return (
            self.forward_part or _halved(forward, self.key),
            self.backward_part or _halved(backward, self.query),
        )


# The most tokens of a block. On CPU the scores of a block should stay in cache: 128 measured best
# of 64 to 512 (kernels/README.md). A GPU wants matrix products that fill its units. On TPU a block
# of 1,024 keeps the matrix units busy while the next is fetched.
_MOST = {"cpu": 128, "gpu": 512, "tpu": 1024}
# Mosaic tiles arrays by 128 lanes; elsewhere a multiple of 8 is enough.
_MULTIPLE = {"cpu": 8, "gpu": 8, "tpu": 128}

# Parts of a block on TPU, forward and backward, by chip and tiles of 128 in a head: of 256, 512 and
# 1,024 those with the fewest bundles in the compiler's schedule (kernels/bench/schedule.py ours
# --part N). That is 512 but in the backward of tpu7x, where 1,024 takes 4,689 for a full block and
# 4,914 for a masked one, and 512 takes 4,704 and 5,426; with two tiles 4,751 and 5,235 against
# 4,873 and 5,724. In a forward 1,024 spill: 3,105 for 2,775 on tpu7x, 5,085 for 4,612 on v5p.
_PARTS = {("tpu7x", 1): (512, 1024), ("tpu7x", 2): (512, 1024)}
_OTHER_PARTS = 512, 512


def block_config(hardware: Hardware, length: int) -> BlockConfig:
    """The blocks for rows of `length` tokens: few and even, so that none is filling."""
    most = _MOST[hardware.platform]
    multiple = _MULTIPLE[hardware.platform]
    num_blocks = -(-length // most)
    block = -(-length // num_blocks)
    if num_blocks > 1 or hardware.platform == "tpu":
        block = min(most, -(-block // multiple) * multiple)
    return BlockConfig(block, block)


def _halved(part: int, block: int) -> int:
    """part or the largest of its halves that divides the block; the block if none does."""
    while block % part:
        part = part // 2 if part > _MULTIPLE["tpu"] else block
    return part
