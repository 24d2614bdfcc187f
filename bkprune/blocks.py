"""Which blocks a U-Net is made of, and what a set of removed blocks means for each module.

Knows the Stable Diffusion topology: stages, levels, the skip stack, which bypass fits which block,
and when a level is dead. Reads a live U-Net by attribute names alone and keeps plain data: it does
not know torch, weights, or how a bypass is carried out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

Kind = Literal["residual", "attention"]
Grain = Literal["stage", "pair", "block"]
Bypass = Literal["attention_identity", "identity", "drop_skip", "shortcut"]
Mask = frozenset[str]
Plan = dict[str, Bypass]

GRAINS: tuple[Grain, ...] = get_args(Grain)


@dataclass(frozen=True)
class Block:
    """One `ResnetBlock2D` or `Transformer2DModel`, named by its diffusers module path.

    `hidden`, `skip` and `out` count channels: a residual block of an up stage reads
    `[B, hidden + skip, H, W]`. `level` counts from 0, the outermost; the block runs at
    `1 / resolution_factor` of the latents' height and width. `heads` and `depth` (transformer
    layers) are 0 for residual blocks.
    """

    name: str
    kind: Kind
    level: int
    resolution_factor: int
    hidden: int
    skip: int
    out: int
    bypass: Bypass
    heads: int = 0
    depth: int = 0

    @property
    def stage(self) -> str:
        """`down_blocks.0`, `mid_block` or `up_blocks.3`."""
        return self.name.rsplit(".", 2)[0]

    @property
    def index(self) -> int:
        """Position in the stage's list of residual or attention blocks."""
        return int(self.name.rsplit(".", 1)[1])


@dataclass(frozen=True)
class Level:
    """The blocks at one resolution and the pair of samplers that leads there and back."""

    blocks: frozenset[str]
    downsampler: str | None
    upsampler: str | None


@dataclass(frozen=True)
class Inventory:
    """Every block of one U-Net in order of execution, and its levels from the outermost in.

    Take it of the teacher: a bypass has no channels to read.
    """

    blocks: tuple[Block, ...]
    levels: tuple[Level, ...]

    @classmethod
    def of(cls, unet: Any) -> Inventory:
        """Read a live `UNet2DConditionModel`; weights are never touched, the meta device will do.

        Raises:
            ValueError: the network is not a Stable Diffusion U-Net, or is pruned already.
        """
        return _Reader(unet).inventory()

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    def __getitem__(self, name: str) -> Block:
        for block in self.blocks:
            if block.name == name:
                return block
        raise KeyError(name)

    @property
    def names(self) -> tuple[str, ...]:
        """Block names in order of execution."""
        return tuple(block.name for block in self.blocks)

    def units(self, grain: Grain = "block") -> dict[str, Mask]:
        """What is removed together, `{unit name: block names}`, in order of execution.

        `stage` gives `down_blocks.0`, `mid_block`, ...; `pair` a residual block and the attention
        behind it, `down_blocks.0.pairs.1`, with the mid block as one unit as in BK-SDM; `block`
        every block alone.
        """
        if grain not in GRAINS:
            raise ValueError(f"unknown grain {grain!r}: choose one of {', '.join(GRAINS)}")
        units: dict[str, set[str]] = {}
        for block in self.blocks:
            units.setdefault(_unit_name(block, grain), set()).add(block.name)
        return {name: frozenset(blocks) for name, blocks in units.items()}

    def expand(self, mask: Collection[str]) -> Mask:
        """The blocks a mask removes; it may name units of any grain, or globs of block names.

        Raises:
            ValueError: a name fits nothing; the nearest names are given.
        """
        if isinstance(mask, str):
            raise ValueError(f"a mask is a set of names, not one string: use {{{mask!r}}}")
        known: dict[str, Mask] = {}
        for grain in GRAINS:
            known |= self.units(grain)
        removed: set[str] = set()
        for name in mask:
            fits = known.get(name) or [n for n in self.names if fnmatchcase(n, name)]
            if not fits:
                near = get_close_matches(name, known, n=3, cutoff=0.5) or list(self.names[:2])
                raise ValueError(f"unknown block {name!r}; nearest names: {', '.join(near)}")
            removed.update(fits)
        return frozenset(removed)

    def plan(self, mask: Collection[str], *, keep_shortcuts: bool = False) -> Plan:
        """What stands in for every bypassed module, `{module name: bypass}`.

        The keys are exactly the modules that are bypassed. Once every block of the innermost
        level is removed the level is dead, and the samplers that lead there and back become
        identity too; the level outside it is then the innermost. `keep_shortcuts` lets residual
        blocks of the up stages keep the teacher's 1x1 `conv_shortcut` rather than drop the skip.
        """
        removed = self.expand(mask)
        plan: Plan = {}
        for block in self.blocks:
            if block.name in removed:
                widened = keep_shortcuts and block.bypass == "drop_skip"
                plan[block.name] = "shortcut" if widened else block.bypass
        for level in self.dead_levels(removed):
            for sampler in (level.downsampler, level.upsampler):
                assert sampler is not None
                plan[sampler] = "identity"
        return plan

    def dead_levels(self, removed: Collection[str]) -> list[Level]:
        """Innermost levels without any block left, from the inside out."""
        dead: list[Level] = []
        for level in reversed(self.levels):
            if not level.blocks <= frozenset(removed) or level.downsampler is None:
                break
            dead.append(level)
        return dead

    def rows(self) -> list[dict[str, Any]]:
        """One row a block for tables, with the unit it belongs to at the coarser grains."""
        return [
            {**asdict(block), "stage": block.stage, "pair": _unit_name(block, "pair")}
            for block in self.blocks
        ]

    def kinds(self) -> dict[Bypass, int]:
        """How many blocks take each bypass."""
        return {kind: sum(b.bypass == kind for b in self.blocks) for kind in get_args(Bypass)}


def _unit_name(block: Block, grain: Grain) -> str:
    if grain == "block":
        return block.name
    if grain == "stage" or block.stage == "mid_block":
        return block.stage
    return f"{block.stage}.pairs.{block.index}"


class _Reader:
    """Walks a U-Net in order of execution, keeping the skip stack as diffusers does."""

    def __init__(self, unet: Any) -> None:
        for attribute in ("conv_in", "down_blocks", "up_blocks"):
            if not hasattr(unet, attribute):
                raise ValueError(
                    f"{type(unet).__name__} has no {attribute}: not a U-Net of the Stable "
                    "Diffusion family (UNet2DConditionModel is expected)"
                )
        if _pruned_plan(unet):
            raise ValueError(
                "this U-Net is pruned already: take the inventory of the teacher it came from"
            )
        self.unet = unet
        self.n_levels = len(unet.down_blocks)
        self.blocks: list[Block] = []
        self.hidden = int(unet.conv_in.out_channels)
        self.skips = [self.hidden]

    def inventory(self) -> Inventory:
        for level, stage in enumerate(self.unet.down_blocks):
            self._stage(f"down_blocks.{level}", stage, level, pushes=True)
            if stage.downsamplers is not None:
                self.skips.append(self.hidden)
        if self.unet.mid_block is not None:
            self._mid(self.unet.mid_block)
        for index, stage in enumerate(self.unet.up_blocks):
            self._stage(f"up_blocks.{index}", stage, self.n_levels - 1 - index, pops=True)
        return Inventory(tuple(self.blocks), tuple(self._levels()))

    def _stage(
        self, name: str, stage: Any, level: int, *, pushes: bool = False, pops: bool = False
    ) -> None:
        attentions: Iterable[Any] = getattr(stage, "attentions", None) or [None] * len(
            stage.resnets
        )
        for index, (resnet, attention) in enumerate(zip(stage.resnets, attentions, strict=True)):
            skip = self.skips.pop() if pops else 0
            self._residual(f"{name}.resnets.{index}", resnet, level, skip)
            if attention is not None:
                self._attention(f"{name}.attentions.{index}", attention, level)
            if pushes:
                self.skips.append(self.hidden)

    def _mid(self, mid: Any) -> None:
        level = self.n_levels - 1
        self._residual("mid_block.resnets.0", mid.resnets[0], level, 0)
        attentions = getattr(mid, "attentions", None) or []
        for index, attention in enumerate(attentions):
            if attention is not None:
                self._attention(f"mid_block.attentions.{index}", attention, level)
            self._residual(f"mid_block.resnets.{index + 1}", mid.resnets[index + 1], level, 0)

    def _residual(self, name: str, module: Any, level: int, skip: int) -> None:
        _expect(name, module, "ResnetBlock2D")
        hidden, out = self.hidden, int(module.out_channels)
        if hidden + skip != module.in_channels:
            raise ValueError(
                f"{name} reads {module.in_channels} channels where the skip stack gives "
                f"{hidden} + {skip}: not a U-Net of the Stable Diffusion family"
            )
        bypass: Bypass = "shortcut" if hidden != out else "drop_skip" if skip else "identity"
        self.hidden = out
        self.blocks.append(Block(name, "residual", level, 2**level, hidden, skip, out, bypass))

    def _attention(self, name: str, module: Any, level: int) -> None:
        _expect(name, module, "Transformer2DModel")
        layers = module.transformer_blocks
        self.blocks.append(
            Block(
                name,
                "attention",
                level,
                2**level,
                self.hidden,
                0,
                self.hidden,
                "attention_identity",
                heads=int(layers[0].attn1.heads) if len(layers) else 0,
                depth=len(layers),
            )
        )

    def _levels(self) -> Iterator[Level]:
        for level in range(self.n_levels):
            up_index = self.n_levels - 1 - level
            outer = self.unet.down_blocks[level - 1] if level else None
            paired = (
                outer is not None
                and outer.downsamplers is not None
                and self.unet.up_blocks[up_index].upsamplers is not None
            )
            yield Level(
                frozenset(block.name for block in self.blocks if block.level == level),
                f"down_blocks.{level - 1}.downsamplers.0" if paired else None,
                f"up_blocks.{up_index}.upsamplers.0" if paired else None,
            )


def _expect(name: str, module: Any, class_name: str) -> None:
    if type(module).__name__ != class_name:
        raise ValueError(
            f"{name} is a {type(module).__name__}, not a {class_name}: only U-Nets of the Stable "
            "Diffusion family can be taken apart"
        )


def _pruned_plan(unet: Any) -> Mapping[str, str] | None:
    config = getattr(unet, "config", None)
    plan: Mapping[str, str] | None = config.get("plan") if isinstance(config, Mapping) else None
    return plan
