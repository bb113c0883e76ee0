"""How many tokens a block has, by device: with the reasons.

Legend: S tokens a row.
"""

from __future__ import annotations

import dataclasses

from agentx_kernels.hardware import Hardware


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """The tokens of a block of queries, of one of keys, and of the part worked on at once.

    part: on TPU the tokens of a block whose scores exist at a time; it divides both blocks. The
    path in XLA works on whole blocks.
    """

    query: int
    key: int
    part: int

    def __post_init__(self) -> None:
        if min(dataclasses.astuple(self)) < 1:
            raise ValueError(f"the blocks are {self}; each must have 1 token or more")


# The most tokens of a block and of a part. On CPU the scores of a block should stay in cache: 128
# measured best of 64 to 512 (kernels/README.md). A GPU wants matrix products that fill its units.
# On TPU a block of 1,024 keeps the matrix units busy while the next is fetched, and parts of 512
# schedule in fewer bundles than 256 or 1,024.
_MOST = {"cpu": (128, 128), "gpu": (512, 512), "tpu": (1024, 512)}
# Mosaic tiles arrays by 128 lanes; elsewhere a multiple of 8 is enough.
_MULTIPLE = {"cpu": 8, "gpu": 8, "tpu": 128}


def block_config(hardware: Hardware, length: int) -> BlockConfig:
    """The blocks for rows of `length` tokens: few and even, so that none is filling."""
    most, part = _MOST[hardware.platform]
    multiple = _MULTIPLE[hardware.platform]
    num_blocks = -(-length // most)
    block = -(-length // num_blocks)
    if num_blocks > 1 or hardware.platform == "tpu":
        block = min(most, -(-block // multiple) * multiple)
    while block % part:
        part = part // 2 if part > multiple else block
    return BlockConfig(block, block, part)
