"""A plain twin is found for every mask that has one, and claimed for none that has not."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from bkprune import Inventory, bypassed, preset
from bkprune.export import student
from bkprune.twin import NoTwinError, find_twin
from tests.conftest import SMALL, SMALL_XL, build, forward

Removed = tuple[tuple[int | None, int | None], ...]  # of each level: down pair, up pair
N_LEVELS = 4


def one_level() -> Iterator[Removed]:
    """At most one pair removed on each side of one level, nothing elsewhere."""
    for level in range(N_LEVELS):
        for pairs in itertools.product((None, 0, 1), (None, 0, 1, 2)):
            if pairs != (None, None) or level == 0:
                yield tuple(pairs if i == level else (None, None) for i in range(N_LEVELS))


def mask_of(removed: Removed, inventory: Inventory, mid: bool) -> frozenset[str]:
    units = []
    for level, (down, up) in enumerate(removed):
        if down is not None:
            units.append(f"down_blocks.{level}.pairs.{down}")
        if up is not None:
            units.append(f"up_blocks.{N_LEVELS - 1 - level}.pairs.{up}")
    return (
        inventory.expand({*units, "mid_block"} if mid else units) if units or mid else frozenset()
    )


def by_brute_force(teacher: Any, removed: Removed, mid: bool) -> UNet2DConditionModel | None:
    """The stock net with the same pairs in the same order, if one can be built and filled."""
    layers, names = [], {}
    for level, (down, up) in enumerate(removed):
        kept_down = [i for i in range(2) if i != down]
        kept_up = [i for i in range(3) if i != up]
        if len(kept_up) != len(kept_down) + 1:
            return None
        layers.append(len(kept_down))
        for stage, kept in (
            (f"down_blocks.{level}", kept_down),
            (f"up_blocks.{N_LEVELS - 1 - level}", kept_up),
        ):
            for new, old in enumerate(kept):
                for kind in ("resnets", "attentions"):
                    names[f"{stage}.{kind}.{new}"] = f"{stage}.{kind}.{old}"
    settings = {**SMALL, "layers_per_block": layers}
    if mid:
        settings["mid_block_type"] = None
    unet = UNet2DConditionModel(**settings)
    weights, filled = teacher.state_dict(), {}
    for key, tensor in unet.state_dict().items():
        parts = key.split(".")
        module = ".".join(parts[:4])
        source = ".".join([names[module], *parts[4:]]) if module in names else key
        if source not in weights or weights[source].shape != tensor.shape:
            return None
        filled[key] = weights[source]
    unet.load_state_dict(filled)
    return unet.eval()


def agree(teacher: Any, inventory: Inventory, removed: Removed, mid: bool) -> bool:
    """Whether the claim and brute force say the same; returns whether there is a twin."""
    mask = mask_of(removed, inventory, mid)
    plan = inventory.plan(mask)
    with bypassed(teacher, plan):
        expected = forward(teacher)
    brute = by_brute_force(teacher, removed, mid)
    exists = brute is not None and torch.equal(forward(brute), expected)
    try:
        find_twin(inventory, plan, teacher.config)
    except NoTwinError:
        assert not exists, f"a twin of {sorted(mask)} was missed"
        return False
    ours = student(teacher, inventory, plan, "plain")
    assert torch.equal(forward(ours.unet), expected), f"no twin of {sorted(mask)}"
    assert exists
    return True


def test_every_level_against_brute_force(teacher: Any, inventory: Inventory) -> None:
    with_twin = [r for r in one_level() if agree(teacher, inventory, r, mid=False)]
    assert len(with_twin) > 8


def test_many_levels_against_brute_force(teacher: Any, inventory: Inventory) -> None:
    dice = random.Random(0)
    good = [(None, None), (1, 1), (1, 0), (None, 1)]
    n = 0
    for _ in range(40):
        removed = tuple(dice.choice(good) for _ in range(N_LEVELS))
        n += agree(teacher, inventory, removed, mid=dice.random() < 0.5)
    assert 0 < n < 40


@pytest.mark.parametrize("name", ["bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"])
def test_published_configs_and_names(name: str, teacher: Any, inventory: Inventory) -> None:
    found = student(teacher, inventory, inventory.plan(preset(name, inventory)))
    config = found.unet.config
    assert found.form == "plain"
    assert config["layers_per_block"] == 1
    assert (config["mid_block_type"] is None) == (name != "bk-sdm-base")
    assert len(config["block_out_channels"]) == (3 if name == "bk-sdm-tiny" else 4)
    last = "up_blocks.0.resnets.1" if name == "bk-sdm-tiny" else "up_blocks.1.resnets.1"
    assert found.modules[last] == "up_blocks.1.resnets.2"


@pytest.mark.parametrize(
    ("mask", "is_twin"),
    [
        ({"mid_block.attentions.0", "mid_block.resnets.1"}, True),
        ({"mid_block.attentions.0", "mid_block.resnets.0"}, True),
        ({"mid_block.attentions.0"}, False),
        ({"mid_block.resnets.0"}, False),
        ({"up_blocks.3.attentions.*"}, True),
        ({"up_blocks.3.attentions.0"}, False),
        ({"up_blocks.3.resnets.1"}, False),
        ({"down_blocks.1.resnets.0"}, False),
        ({"down_blocks.0", "up_blocks.3.pairs.0", "up_blocks.3.pairs.1"}, False),
        ({"down_blocks.0", "up_blocks.3.pairs.1", "up_blocks.3.pairs.2"}, True),
    ],
)
def test_other_stock_configs(
    mask: set[str], is_twin: bool, teacher: Any, inventory: Inventory
) -> None:
    plan = inventory.plan(mask)
    with bypassed(teacher, plan):
        expected = forward(teacher)
    if is_twin:
        found = student(teacher, inventory, plan, "plain")
        assert type(found.unet) is UNet2DConditionModel
        assert torch.equal(forward(found.unet), expected)
    else:
        with pytest.raises(ValueError, match=r"--form plain: .*--form pruned holds any mask"):
            student(teacher, inventory, plan, "plain")
    auto = student(teacher, inventory, plan)
    assert auto.form == ("plain" if is_twin else "pruned")
    assert torch.equal(forward(auto.unet), expected)


@pytest.mark.parametrize("base", [None, "bk-sdm-base"])
def test_attention_only_masks_have_a_padded_twin(
    base: str | None, teacher: Any, inventory: Inventory
) -> None:
    dice = random.Random(1)
    for _ in range(8):
        mask = set(preset(base, inventory)) if base else set()
        mask |= {b.name for b in inventory if b.kind == "attention" and dice.random() < 0.5}
        plan = inventory.plan(mask)
        found = student(teacher, inventory, plan, "padded")
        with bypassed(teacher, plan):
            assert torch.equal(forward(found.unet), forward(teacher))
        least = student(teacher, inventory, plan, "pruned").n_params
        assert (found.n_params > least) == bool(found.twin and found.twin.padded)


def test_sdxl_shares_one_depth_between_mid_and_down() -> None:
    unet = build(SMALL_XL)
    inventory = Inventory.of(unet)
    with pytest.raises(NoTwinError, match="share one depth"):
        find_twin(inventory, inventory.plan({"mid_block.attentions.0"}), unet.config, padded=True)
    both = {"mid_block.attentions.0", "down_blocks.2.attentions.0"}
    plan = inventory.plan(both)
    found = student(unet, inventory, plan, "padded")
    with bypassed(unet, plan):
        assert torch.equal(forward(found.unet), forward(unet))
