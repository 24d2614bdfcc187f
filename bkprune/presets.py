"""Published masks by name: the three students of BK-SDM (arXiv 2305.15798, section 3.1).

Knows which blocks each paper removed and from which topology; does not know how they are removed.
"""

from __future__ import annotations

from bkprune.blocks import Inventory, Mask

_BASE = frozenset(
    {f"down_blocks.{i}.{kind}.1" for i in (0, 1, 2) for kind in ("resnets", "attentions")}
    | {f"up_blocks.{i}.{kind}.1" for i in (1, 2, 3) for kind in ("resnets", "attentions")}
    | {"down_blocks.3.resnets.1", "up_blocks.0.resnets.1"}
)
_SMALL = _BASE | {"mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"}
_TINY = _SMALL | {"down_blocks.3.resnets.0", "up_blocks.0.resnets.0", "up_blocks.0.resnets.2"}

PRESETS: dict[str, Mask] = {"bk-sdm-base": _BASE, "bk-sdm-small": _SMALL, "bk-sdm-tiny": _TINY}

_TOPOLOGY = {
    **{f"down_blocks.{i}": 4 for i in (0, 1, 2)},
    "down_blocks.3": 2,
    "mid_block": 3,
    "up_blocks.0": 3,
    **{f"up_blocks.{i}": 6 for i in (1, 2, 3)},
}


def preset(name: str, inventory: Inventory) -> Mask:
    """The blocks a published student removes from this U-Net.

    Raises:
        ValueError: no such preset, or the U-Net has not the topology it was published for.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    topology = {unit: len(blocks) for unit, blocks in inventory.units("stage").items()}
    if topology != _TOPOLOGY:
        raise ValueError(
            f"{name} was published for the topology of Stable Diffusion v1 and v2 (4 levels, "
            f"22 residual and 16 attention blocks); this U-Net has {len(inventory)} blocks in "
            f"{len(inventory.levels)} levels"
        )
    return PRESETS[name]
