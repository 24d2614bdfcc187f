"""Which blocks of a teacher a student has left, even if somebody else made it.

Knows how a pruned U-Net is recognised: by its own plan, or by walking every mask whose stock twin
has the student's config and taking the one whose kept weights lie nearest to the teacher's. It does
not know how students are made or trained.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from bkprune.blocks import Inventory, Mask, Plan
from bkprune.bypass import PrunedUNet
from bkprune.models import load
from bkprune.presets import PRESETS
from bkprune.twin import NoTwinError, Twin, find_twin

_TOLD_APART = 1e-6  # similarities nearer than this say nothing


@dataclass(frozen=True)
class Identified:
    """A student as its teacher sees it.

    Attributes:
        mask: blocks that are gone.
        plan: what stands in for them.
        twin: names and config where the student is in a stock form that differs from the teacher's.
        preset: the published mask that this is, if any.
    """

    mask: Mask
    plan: Plan
    twin: Twin | None
    preset: str | None

    def teacher_key(self, key: str) -> str:
        """The teacher's name of one of the student's tensors."""
        return key if self.twin is None else self.twin.teacher_key(key)


def identify(teacher: nn.Module, student: nn.Module) -> Identified:
    """Which of the teacher's blocks the student has left.

    Raises:
        ValueError: it is no pruned form of this teacher.
    """
    inventory = Inventory.of(teacher)
    ours = {name: tensor.shape for name, tensor in teacher.state_dict().items()}
    theirs = {name: tensor.shape for name, tensor in student.state_dict().items()}
    config: Any = student.config
    own: Any = teacher.config
    if isinstance(student, PrunedUNet) or config.get("plan"):
        plan: Plan = dict(config["plan"])
        strange = sorted(name for name in theirs if ours.get(name) != theirs[name])
        unknown = sorted(set(plan) - {n for n, _ in teacher.named_modules()})
        if strange or unknown:
            raise ValueError(_no_student(f"{(strange or unknown)[0]} does not fit the teacher"))
        mask = frozenset(plan) & frozenset(inventory.names)
        return Identified(mask, plan, None, _preset(mask))
    if ours == theirs:
        return Identified(frozenset(), {}, None, None)
    found = [
        (_similarity(teacher, student, twin), mask, twin)
        for mask, twin in _candidates(inventory, own, config)
        if _fits(twin, ours, theirs)
    ]
    if not found:
        raise ValueError(_no_student("no mask of the teacher gives its config and shapes"))
    best = max(score for score, _, _ in found)
    near = [(mask, twin) for score, mask, twin in found if score > best - _TOLD_APART]
    mask, twin = next(((m, t) for m, t in near if _preset(m)), near[0])
    return Identified(mask, inventory.plan(mask), twin, _preset(mask))


def _no_student(why: str) -> str:
    return f"the student's U-Net is no pruned form of the teacher's: {why}"


def _preset(mask: Mask) -> str | None:
    return next((name for name, blocks in PRESETS.items() if blocks == mask), None)


def _candidates(
    inventory: Inventory, teacher: Mapping[str, Any], student: Mapping[str, Any]
) -> Iterator[tuple[Mask, Twin]]:
    """Every mask whose stock form has as many levels and layers as the student."""
    n, n_alive = len(inventory.levels), len(student["block_out_channels"])
    layers = student["layers_per_block"]
    layers = [layers] * n_alive if isinstance(layers, int) else list(layers)
    if n_alive > n or len(layers) != n_alive:
        return
    dead: set[str] = set().union(*(level.blocks for level in inventory.levels[n_alive:]))
    choices = [
        list(_level_choices(inventory, level, n, layers[level], student))
        for level in range(n_alive)
    ]
    choices.append([dead] if n_alive < n else list(_mid_choices(inventory, student)))
    for parts in itertools.product(*choices):
        mask = frozenset().union(*parts)
        try:
            yield mask, find_twin(inventory, inventory.plan(mask), teacher, padded=True)
        except NoTwinError:
            continue


def _level_choices(
    inventory: Inventory, level: int, n: int, n_layers: int, student: Mapping[str, Any]
) -> Iterator[set[str]]:
    n_alive = len(student["block_out_channels"])
    down, up = f"down_blocks.{level}", f"up_blocks.{n - 1 - level}"
    depths = student.get("transformer_layers_per_block")
    reverse = student.get("reverse_transformer_layers_per_block")
    sides = []
    for stage, kind, count, depth in (
        (down, student["down_block_types"][level], n_layers, _nested(depths, level)),
        (
            up,
            student["up_block_types"][n_alive - 1 - level],
            n_layers + 1,
            _nested(reverse, n_alive - 1 - level),
        ),
    ):
        blocks = [b for b in inventory if b.stage == stage]
        pairs = sorted({b.index for b in blocks})
        options = []
        for kept in itertools.combinations(pairs, count):
            gone = {b.name for b in blocks if b.index not in kept}
            if not kind.startswith("CrossAttn"):
                gone |= {b.name for b in blocks if b.kind == "attention"}
            for place, index in enumerate(kept):
                if depth and place < len(depth) and depth[place] == 0:
                    gone |= {b.name for b in blocks if b.kind == "attention" and b.index == index}
            options.append(gone)
        sides.append(options)
    for one, other in itertools.product(*sides):
        yield one | other


def _nested(depths: Any, index: int) -> list[int]:
    if isinstance(depths, list | tuple) and isinstance(depths[index], list | tuple):
        return list(depths[index])
    return []


def _mid_choices(inventory: Inventory, student: Mapping[str, Any]) -> Iterator[set[str]]:
    blocks = [b for b in inventory if b.stage == "mid_block"]
    kind = student["mid_block_type"]
    every = {b.name for b in blocks}
    if kind is None:
        yield every
    elif kind == "UNetMidBlock2D":
        yield from (every - {b.name} for b in blocks if b.kind == "residual")
    else:  # its depth is the first of the innermost down stage
        depths = _nested(student.get("transformer_layers_per_block"), -1)
        is_empty = bool(depths) and depths[0] == 0
        yield {b.name for b in blocks if b.kind == "attention"} if is_empty else set()


def _fits(twin: Twin, ours: Mapping[str, torch.Size], theirs: Mapping[str, torch.Size]) -> bool:
    return all(ours.get(twin.teacher_key(key)) == shape for key, shape in theirs.items())


def _similarity(teacher: nn.Module, student: nn.Module, twin: Twin) -> float:
    """Mean cosine of the weights of every renamed block with the teacher's it would come from."""
    ours, theirs = teacher.state_dict(), student.state_dict()
    cosines: dict[str, list[float]] = {}
    for key, tensor in theirs.items():
        source = twin.teacher_key(key)
        block = _owner(key, twin.modules)
        if tensor.ndim >= 2 and block:
            own, other = tensor.flatten().float(), ours[source].flatten().float()
            step = max(1, own.numel() // 4096)
            cosine = torch.cosine_similarity(own[::step], other[::step], dim=0)
            cosines.setdefault(block, []).append(float(cosine))
    means = [sum(values) / len(values) for values in cosines.values()]
    return sum(means) / max(len(means), 1)


def _owner(key: str, names: Collection[str]) -> str:
    """Which of the named modules a tensor belongs to; none gives the empty name."""
    parts = key.split(".")
    return next((name for n in (4, 3) if (name := ".".join(parts[:n])) in names), "")


# --- for people ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Two checkpoints block by block: what is gone, and by how much the rest has moved."""

    identified: Identified
    table: pd.DataFrame
    elsewhere: float

    @property
    def summary(self) -> str:
        """One line."""
        mask, changed = self.identified.mask, self.table["change"]
        name = f" ({self.identified.preset})" if self.identified.preset else ""
        gone = f"{len(mask)} of {len(self.table)} blocks removed{name}" if mask else "no block gone"
        n = int((changed > 0).sum())
        moved = f"{n} of the {len(self.table) - len(mask)} kept ones have other weights"
        return f"{gone}; {moved}; outside of blocks the weights moved by {self.elsewhere:.3g}"

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        rows = self.table.astype(object).where(self.table.notna(), None)
        return {
            "removed": list(rows.loc[rows["student"] == "removed", "block"]),
            "preset": self.identified.preset,
            "blocks": rows.to_dict(orient="records"),
            "change_outside_of_blocks": self.elsewhere,
        }


def compare_models(a: str, b: str) -> Difference:
    """Load a teacher and a student and set them side by side.

    Raises:
        ValueError: one cannot be loaded, or the student is none of this teacher's.
    """
    return compare(load(a).unet, load(b).unet)


def compare(teacher: nn.Module, student: nn.Module) -> Difference:
    """Relative change ||w_student - w_teacher|| / ||w_teacher|| of each block that both have."""
    found = identify(teacher, student)
    inventory = Inventory.of(teacher)
    weights = teacher.state_dict()
    names = {name: [0.0, 0.0] for name in (*inventory.names, "")}
    own_names: dict[str, str] = {}
    for key, tensor in student.state_dict().items():
        source = found.teacher_key(key)
        block = _owner(source, names)
        if block in found.mask:
            continue  # padding
        sums = names[block]
        own_names[block] = ".".join(key.split(".")[: block.count(".") + 1])
        sums[0] += _square(tensor.float() - weights[source].float())
        sums[1] += _square(weights[source].float())
    rows = [
        {
            "block": name,
            "student": "removed" if name in found.mask else own_names.get(name, name),
            "change": None if name in found.mask else (sums[0] / max(sums[1], 1e-300)) ** 0.5,
        }
        for name, sums in names.items()
        if name
    ]
    table = pd.DataFrame(rows).astype({"change": float})
    moved, whole = names[""]
    return Difference(found, table, (moved / max(whole, 1e-300)) ** 0.5)


def _square(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())
