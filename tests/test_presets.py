"""BK-SDM's students are three masks of the one mechanism: counts, names and bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from bkprune import Inventory, PrunedUNet, bypassed, preset
from tests.conftest import SMALL, SMALL_V2, SMALL_XL, build, forward

STUDENTS = ["bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"]
TENSORS = {"bk-sdm-base": 442, "bk-sdm-small": 396, "bk-sdm-tiny": 358}
PARAMS = {
    ("sd_v1", None): 859_520_964,
    ("sd_v1", "bk-sdm-base"): 579_384_964,
    ("sd_v1", "bk-sdm-small"): 482_346_884,
    ("sd_v1", "bk-sdm-tiny"): 323_384_964,
    ("sd_v2_base", None): 865_910_724,
    ("sd_v2_base", "bk-sdm-base"): 583_480_964,
    ("sd_v2_base", "bk-sdm-small"): 485_787_524,
    ("sd_v2_base", "bk-sdm-tiny"): 326_825_604,
    ("sd_v2_768", None): 865_910_724,
    ("sd_v2_768", "bk-sdm-tiny"): 326_825_604,
    ("sdxl", None): 2_567_463_684,
}
BLOCKS_LEFT = {"bk-sdm-base": (14, 10), "bk-sdm-small": (12, 9), "bk-sdm-tiny": (9, 9)}


def plain_config(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The published students' configs: fewer layers, no mid block, three levels."""
    plain = {**config, "layers_per_block": 1}
    if name != "bk-sdm-base":
        plain["mid_block_type"] = None
    if name == "bk-sdm-tiny":
        plain["block_out_channels"] = config["block_out_channels"][:3]
        plain["attention_head_dim"] = config["attention_head_dim"][:3]
        plain["down_block_types"] = ("CrossAttnDownBlock2D",) * 3
        plain["up_block_types"] = ("CrossAttnUpBlock2D",) * 3
    return plain


def teacher_name(key: str, name: str) -> str:
    """The published copy map, from a student's tensor name to the teacher's."""
    parts = key.split(".")
    if parts[0] == "up_blocks":
        if parts[2] in ("resnets", "attentions") and parts[3] == "1":
            parts[3] = "2"
        if name == "bk-sdm-tiny":
            parts[1] = str(int(parts[1]) + 1)
    return ".".join(parts)


def plain_student(
    teacher: UNet2DConditionModel, config: dict[str, Any], name: str
) -> UNet2DConditionModel:
    student = UNet2DConditionModel(**plain_config(config, name))
    weights = teacher.state_dict()
    filled = {key: weights[teacher_name(key, name)] for key in student.state_dict()}
    student.load_state_dict(filled)
    return student.to(next(teacher.parameters()).dtype).eval()


@pytest.mark.parametrize(("family", "name"), list(PARAMS))
def test_params_at_full_size(family: str, name: str | None, meta: Callable[[str], Any]) -> None:
    unet = meta(family)
    inventory = Inventory.of(unet)
    plan = inventory.plan(preset(name, inventory)) if name else {}
    with bypassed(unet, plan):
        assert sum(p.numel() for p in unet.parameters()) == PARAMS[family, name]


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("config", [SMALL, SMALL_V2], ids=["v1", "v2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bitwise_equal_to_the_plain_student(
    config: dict[str, Any], name: str, dtype: torch.dtype
) -> None:
    teacher = build(config).to(dtype)
    inventory = Inventory.of(teacher)
    student = plain_student(teacher, config, name)
    plan = inventory.plan(preset(name, inventory))
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, 16, 16, generator=generator).to(dtype)
    text = torch.randn(2, 7, 32, generator=generator).to(dtype)
    inputs = (sample, torch.tensor([10, 700]), text)
    with torch.no_grad():
        expected = student(*inputs).sample
        with bypassed(teacher, plan):
            assert torch.equal(teacher(*inputs).sample, expected)
        assert torch.equal(PrunedUNet.from_teacher(teacher, plan)(*inputs).sample, expected)


@pytest.mark.parametrize("name", STUDENTS)
def test_tensors_and_blocks_left(name: str, teacher: Any, inventory: Inventory) -> None:
    removed = preset(name, inventory)
    plan = inventory.plan(removed)
    student = PrunedUNet.from_teacher(teacher, plan)
    plain = UNet2DConditionModel(**plain_config(SMALL, name))
    names = {teacher_name(key, name) for key in plain.state_dict()}
    assert len(plain.state_dict()) == len(names) == TENSORS[name]
    assert names == set(student.state_dict())
    left = [block.kind for block in inventory if block.name not in removed]
    assert (left.count("residual"), left.count("attention")) == BLOCKS_LEFT[name]


def test_a_preset_needs_its_topology(inventory: Inventory) -> None:
    with pytest.raises(ValueError, match=r"unknown preset 'bk-sdm-huge'.*bk-sdm-tiny"):
        preset("bk-sdm-huge", inventory)
    with pytest.raises(ValueError, match="topology"):
        preset("bk-sdm-base", Inventory.of(build(SMALL_XL)))
    assert forward(build(SMALL_XL)).shape == (2, 4, 16, 16)
