"""Which pruned U-Nets have an exact equal in stock diffusers, and under which config and names.

Knows what a `UNet2DConditionModel` config can say (layers per level, attention by stage, mid block
by type, depth of each transformer) and walks both skip stacks to see whether every kept up block
would read what it reads in the pruned network. Works on inventories and configs: it needs no torch,
and does not know weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bkprune.blocks import Block, Inventory

# what stock configs hold once for each level, from the outermost in; and once for each up stage
_BY_LEVEL = (
    "block_out_channels",
    "down_block_types",
    "attention_head_dim",
    "num_attention_heads",
    "cross_attention_dim",
    "only_cross_attention",
    "transformer_layers_per_block",
)
_BY_UP_STAGE = ("up_block_types", "reverse_transformer_layers_per_block")
_CROSS_MID, _PLAIN_MID = "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"


class NoTwinError(ValueError):
    """Stock diffusers has no equal of this pruned U-Net; the message says why."""


@dataclass(frozen=True)
class Twin:
    """A stock `UNet2DConditionModel` that equals a pruned one.

    Attributes:
        config: for `UNet2DConditionModel.from_config`.
        modules: the twin's name of every kept block and sampler -> the teacher's.
        padded: removed attention blocks, by the twin's names, that stay as transformers of depth 0
            with a zeroed output projection.
    """

    config: dict[str, Any]
    modules: dict[str, str]
    padded: tuple[str, ...] = ()

    def teacher_key(self, key: str) -> str:
        """The teacher's name of one of the twin's tensors."""
        parts = key.split(".")
        for n in (4, 3):
            module = ".".join(parts[:n])
            if module in self.modules:
                return ".".join([self.modules[module], *parts[n:]])
        return key


def find_twin(
    inventory: Inventory,
    plan: Mapping[str, str],
    config: Mapping[str, Any],
    *,
    padded: bool = False,
) -> Twin:
    """The stock equal of a teacher's U-Net under a plan.

    Args:
        inventory: of the teacher.
        plan: what is bypassed.
        config: the teacher's own.
        padded: allow removed attention blocks to stay as empty transformers where the config has
            no other way of leaving them out.

    Raises:
        NoTwinError: there is none; the first reason found is given.
    """
    return _Walk(inventory, plan, config, padded).twin()


class _Walk:
    """Level by level from the outermost in: what is kept, what it reads, how it is called."""

    def __init__(
        self, inventory: Inventory, plan: Mapping[str, str], config: Mapping[str, Any], padded: bool
    ) -> None:
        self.inventory, self.plan, self.teacher, self.may_pad = inventory, plan, config, padded
        self.stages: dict[str, list[Block]] = {}
        for block in inventory:
            self.stages.setdefault(block.stage, []).append(block)
        self.n_levels = len(inventory.levels)
        dead = [level for level in inventory.levels if level.downsampler in plan]
        self.n_alive = self.n_levels - len(dead)
        self.modules: dict[str, str] = {}
        self.padded: list[str] = []
        self.layers: list[int] = []
        self.down_types: list[str] = []
        self.up_types: list[str] = []
        self.down_depths: list[list[int]] = []
        self.up_depths: list[list[int]] = []

    def twin(self) -> Twin:
        for name, kind in self.plan.items():
            if kind == "shortcut":
                raise NoTwinError(f"{name} leaves its 1x1 conv_shortcut behind")
        for level in range(self.n_alive):
            self._level(level)
        mid_type, mid_depth = self._mid()
        return Twin(self._config(mid_type, mid_depth), self.modules, tuple(self.padded))

    def _level(self, level: int) -> None:
        down, up = f"down_blocks.{level}", f"up_blocks.{self.n_levels - 1 - level}"
        own_up = f"up_blocks.{self.n_alive - 1 - level}"
        kept_down, kept_up = self._kept(down), self._kept(up)
        # what lies in the skip slots of this level: its input, then the output of each pair
        slots = [-1]
        for index in range(len(self._pairs(down))):
            slots.append(index if index in kept_down else slots[-1])
        read = [slots[len(slots) - 1 - index] for index in kept_up]
        offered = [*reversed(kept_down), -1]
        if read != offered:
            raise NoTwinError(
                f"the kept blocks of {up} read other skips than those that {down} would leave "
                f"({len(kept_down)} kept pairs there ask for {len(kept_down) + 1} here, in step)"
            )
        self.layers.append(len(kept_down))
        down_type = self.teacher["down_block_types"][level]
        up_type = self.teacher["up_block_types"][self.n_levels - 1 - level]
        for name, twin_name, kept, kind, types, depths in (
            (down, down, kept_down, down_type, self.down_types, self.down_depths),
            (up, own_up, kept_up, up_type, self.up_types, self.up_depths),
        ):
            types.append(self._attention_type(name, kept, kind))
            depths.append(self._take(name, twin_name, kept, keeps=types[-1] == kind))
        if level < self.n_alive - 1:
            self.modules[f"{down}.downsamplers.0"] = f"{down}.downsamplers.0"
        if level > 0:
            self.modules[f"{own_up}.upsamplers.0"] = f"{up}.upsamplers.0"

    def _pairs(self, stage: str) -> dict[int, tuple[Block, Block | None]]:
        """Residual block and the attention behind it, by index."""
        blocks = self.stages.get(stage, [])
        attention = {b.index: b for b in blocks if b.kind == "attention"}
        return {b.index: (b, attention.get(b.index)) for b in blocks if b.kind == "residual"}

    def _kept(self, stage: str) -> list[int]:
        kept = []
        for index, (residual, attention) in self._pairs(stage).items():
            if residual.name not in self.plan:
                kept.append(index)
            elif attention is not None and attention.name not in self.plan:
                raise NoTwinError(f"{attention.name} stays without the residual block before it")
        return kept

    def _attention_type(self, stage: str, kept: Sequence[int], kind: str) -> str:
        """The stage's type with or without attention, whichever says what is left."""
        pairs = self._pairs(stage)
        attentions = [a for index in kept if (a := pairs[index][1]) is not None]
        if not any(a is not None for _, a in pairs.values()):
            return kind
        left = [a for a in attentions if a.name not in self.plan]
        if not left:
            return "DownBlock2D" if stage.startswith("down") else "UpBlock2D"
        if len(left) < len(attentions) and not self.may_pad:
            gone = next(a.name for a in attentions if a.name in self.plan)
            raise NoTwinError(f"{gone} goes while other attention blocks of its stage stay")
        return kind

    def _take(self, stage: str, twin: str, kept: Sequence[int], *, keeps: bool) -> list[int]:
        """Name the kept pairs anew; returns the depth of each one's transformer."""
        pairs, depths = self._pairs(stage), []
        for new, old in enumerate(kept):
            residual, attention = pairs[old]
            self.modules[f"{twin}.resnets.{new}"] = residual.name
            if attention is None or not keeps:
                depths.append(attention.depth if attention is not None else 1)
                continue
            own = f"{twin}.attentions.{new}"
            self.modules[own] = attention.name
            is_gone = attention.name in self.plan
            depths.append(0 if is_gone else attention.depth)
            if is_gone:
                self.padded.append(own)
        return depths

    def _mid(self) -> tuple[str | None, int | None]:
        """The mid block's type, and the depth of its transformer if that must be said."""
        blocks = self.stages.get("mid_block", [])
        kind: str | None = self.teacher.get("mid_block_type")
        left = [b for b in blocks if b.name not in self.plan]
        if not left or self.n_alive < self.n_levels:
            return None, None
        if len(left) == len(blocks):
            self.modules |= {b.name: b.name for b in blocks}
            return kind, None
        if len(left) == 1 and left[0].kind == "residual" and kind == _CROSS_MID:
            self.modules["mid_block.resnets.0"] = left[0].name
            return _PLAIN_MID, None
        gone = [b for b in blocks if b.name in self.plan]
        if self.may_pad and kind == _CROSS_MID and all(b.kind == "attention" for b in gone):
            self.modules |= {b.name: b.name for b in blocks}
            self.padded += [b.name for b in gone]
            return kind, 0
        raise NoTwinError(f"no stock mid block is without {gone[0].name} alone")

    def _config(self, mid_type: str | None, mid_depth: int | None) -> dict[str, Any]:
        n = self.n_alive
        config = {k: v for k, v in self.teacher.items() if not k.startswith("_") and k != "plan"}
        for key in _BY_LEVEL:
            if isinstance(config.get(key), list | tuple):
                config[key] = list(config[key])[:n]
        for key in _BY_UP_STAGE:
            if isinstance(config.get(key), list | tuple):
                config[key] = list(config[key])[self.n_levels - n :]
        config["down_block_types"] = self.down_types
        config["up_block_types"] = self.up_types[::-1]
        config["mid_block_type"] = mid_type
        config["layers_per_block"] = self.layers
        if len(set(self.layers)) == 1:
            config["layers_per_block"] = self.layers[0]
        if self.padded:
            self._say_depths(config, mid_type, mid_depth)
        return config

    def _say_depths(
        self, config: dict[str, Any], mid_type: str | None, mid_depth: int | None
    ) -> None:
        """Depths layer by layer; the mid block reads the first of the innermost down stage."""
        down = [list(depths) for depths in self.down_depths]
        if mid_type == _CROSS_MID:
            mid = next(b for b in self.stages["mid_block"] if b.kind == "attention")
            depth = mid.depth if mid_depth is None else mid_depth
            is_free = not self.down_types[-1].startswith("CrossAttn")
            if is_free:
                down[-1] = [depth] * max(len(down[-1]), 1)
            elif not down[-1] or down[-1][0] != depth:
                raise NoTwinError(
                    f"{mid.name} and the first attention block of the innermost down stage share "
                    "one depth in stock configs"
                )
        config["transformer_layers_per_block"] = down
        config["reverse_transformer_layers_per_block"] = self.up_depths[::-1]
