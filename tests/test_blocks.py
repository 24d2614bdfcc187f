"""The inventory against the published topology, and masks against plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from bkprune import Inventory, PrunedUNet
from tests.conftest import SMALL, build

FAMILIES = ["sd_v1", "sd_v2_base", "sd_v2_768", "sd_v1_inpaint", "sd_v1_instruct_pix2pix"]

# Exact params of every block of SD v1, in order within each module list.
SD_V1_PARAMS = {
    "down_blocks.0.resnets": [2_255_040, 2_255_040],
    "down_blocks.0.attentions": [2_546_240] * 2,
    "down_blocks.1.resnets": [6_558_080, 8_196_480],
    "down_blocks.1.attentions": [9_188_480] * 2,
    "down_blocks.2.resnets": [24_584_960, 31_138_560],
    "down_blocks.2.attentions": [34_760_960] * 2,
    "down_blocks.3.resnets": [31_138_560] * 2,
    "mid_block.resnets": [31_138_560] * 2,
    "mid_block.attentions": [34_760_960],
    "up_blocks.0.resnets": [49_164_800] * 3,
    "up_blocks.1.resnets": [49_164_800, 49_164_800, 40_971_520],
    "up_blocks.1.attentions": [34_760_960] * 3,
    "up_blocks.2.resnets": [16_801_280, 12_704_000, 10_655_360],
    "up_blocks.2.attentions": [9_188_480] * 3,
    "up_blocks.3.resnets": [4_407_040, 3_382_400, 3_382_400],
    "up_blocks.3.attentions": [2_546_240] * 3,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_sd_has_22_residual_and_16_attention_blocks(
    family: str, meta: Callable[[str], Any]
) -> None:
    inventory = Inventory.of(meta(family))
    kinds = [block.kind for block in inventory]
    assert (kinds.count("residual"), kinds.count("attention")) == (22, 16)
    assert inventory.kinds() == {
        "attention_identity": 16,
        "identity": 8,
        "drop_skip": 10,
        "shortcut": 4,
    }


def test_sdxl_has_17_residual_and_11_attention_blocks(meta: Callable[[str], Any]) -> None:
    inventory = Inventory.of(meta("sdxl"))
    assert inventory.kinds() == {
        "attention_identity": 11,
        "identity": 6,
        "drop_skip": 7,
        "shortcut": 4,
    }
    assert sum(block.depth for block in inventory) == 70


def test_block_params_of_sd_v1(meta: Callable[[str], Any]) -> None:
    unet = meta("sd_v1")
    found: dict[str, list[int]] = {}
    for name in sorted(Inventory.of(unet).names):
        n = sum(p.numel() for p in unet.get_submodule(name).parameters())
        found.setdefault(name.rsplit(".", 1)[0], []).append(n)
    assert found == SD_V1_PARAMS


def test_channels_follow_the_skip_stack(meta: Callable[[str], Any]) -> None:
    inventory = Inventory.of(meta("sd_v1"))
    read = {b.name: (b.hidden, b.skip, b.out, b.resolution_factor) for b in inventory}
    assert read["down_blocks.1.resnets.0"] == (320, 0, 640, 2)
    assert read["mid_block.attentions.0"] == (1280, 0, 1280, 8)
    assert read["up_blocks.1.resnets.2"] == (1280, 640, 1280, 4)
    assert read["up_blocks.2.resnets.0"] == (1280, 640, 640, 2)
    assert read["up_blocks.3.resnets.0"] == (640, 320, 320, 1)
    assert {b.name for b in inventory if b.bypass == "shortcut"} == {
        "down_blocks.1.resnets.0",
        "down_blocks.2.resnets.0",
        "up_blocks.2.resnets.0",
        "up_blocks.3.resnets.0",
    }


def test_heads_are_heads(meta: Callable[[str], Any]) -> None:
    v1, v2 = Inventory.of(meta("sd_v1")), Inventory.of(meta("sd_v2_base"))
    assert {b.heads for b in v1 if b.kind == "attention"} == {8}
    assert v2["down_blocks.0.attentions.0"].heads == 5
    assert v2["mid_block.attentions.0"].heads == 20


def test_units_of_each_grain_partition_the_blocks(inventory: Inventory) -> None:
    for grain, n_units in (("stage", 9), ("pair", 21), ("block", 38)):
        units = inventory.units(grain)  # type: ignore[arg-type]
        assert len(units) == n_units
        listed = [name for blocks in units.values() for name in blocks]
        assert sorted(listed) == sorted(inventory.names)
    assert inventory.units("pair")["up_blocks.1.pairs.2"] == {
        "up_blocks.1.resnets.2",
        "up_blocks.1.attentions.2",
    }


def test_a_mask_may_name_units_and_globs(inventory: Inventory) -> None:
    assert inventory.expand({"mid_block"}) == {n for n in inventory.names if "mid_block" in n}
    assert len(inventory.expand({"*.attentions.*"})) == 16
    with pytest.raises(ValueError, match=r"down_blocks\.0\.resnets\.9.*nearest.*down_blocks\.0"):
        inventory.plan({"down_blocks.0.resnets.9"})
    with pytest.raises(ValueError, match="not one string"):
        inventory.plan("mid_block")
    with pytest.raises(ValueError, match="unknown grain 'row'"):
        inventory.units("row")  # type: ignore[arg-type]


def test_plan_keys_are_the_removed_blocks(inventory: Inventory) -> None:
    for name in inventory.names:
        assert set(inventory.plan({name})) == {name}
    assert inventory.plan(()) == {}


def test_a_level_dies_with_its_last_block_and_takes_both_samplers(inventory: Inventory) -> None:
    innermost = inventory.levels[-1].blocks
    samplers = {"down_blocks.2.downsamplers.0", "up_blocks.0.upsamplers.0"}
    for spared in innermost:
        assert not set(inventory.plan(innermost - {spared})) & samplers
    plan = inventory.plan(innermost)
    assert set(plan) == innermost | samplers
    assert {plan[name] for name in samplers} == {"identity"}
    two = inventory.plan(innermost | inventory.levels[-2].blocks)
    assert {"down_blocks.1.downsamplers.0", "up_blocks.1.upsamplers.0"} < set(two)
    outer_alone = inventory.plan(inventory.levels[-2].blocks)
    assert not any("samplers" in name for name in outer_alone)


def test_shortcuts_on_request_only(inventory: Inventory) -> None:
    mask = {"up_blocks.1.resnets.0", "mid_block.resnets.0"}
    assert inventory.plan(mask)["up_blocks.1.resnets.0"] == "drop_skip"
    kept = inventory.plan(mask, keep_shortcuts=True)
    assert kept == {"mid_block.resnets.0": "identity", "up_blocks.1.resnets.0": "shortcut"}


def test_refuses_what_is_no_teacher(inventory: Inventory) -> None:
    teacher = build(SMALL)
    pruned = PrunedUNet.from_teacher(teacher, inventory.plan({"mid_block"}))
    with pytest.raises(ValueError, match="pruned already"):
        Inventory.of(pruned)
    with pytest.raises(ValueError, match="AutoencoderKL has no"):
        Inventory.of(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4))
    teacher.down_blocks[0].resnets[0] = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"down_blocks\.0\.resnets\.0 is a Identity"):
        Inventory.of(teacher)
