"""The mechanism: bypassed = pruned = reloaded = deep-copied, and the teacher comes back."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from bkprune import Inventory, PrunedUNet, Replay, bypassed
from tests.conftest import SMALL, SMALL_XL, build, forward


def masks(inventory: Inventory, n: int, seed: int = 0) -> list[frozenset[str]]:
    rng = random.Random(seed)
    sizes = [rng.randint(1, len(inventory)) for _ in range(n)]
    return [frozenset(rng.sample(inventory.names, size)) for size in sizes]


def ablated(unet: Any, plan: dict[str, Any], size: int = 16) -> Tensor:
    with bypassed(unet, plan):
        return forward(unet, size)


@pytest.mark.parametrize("mask", masks(Inventory.of(build(SMALL)), 20), ids=len)
def test_bypassed_pruned_reloaded_and_copied_agree_bitwise(
    mask: frozenset[str], teacher: Any, inventory: Inventory, tmp_path: Path
) -> None:
    plan = inventory.plan(mask)
    before = forward(teacher)
    expected = ablated(teacher, plan)
    assert torch.equal(forward(teacher), before)
    student = PrunedUNet.from_teacher(teacher, plan)
    assert torch.equal(forward(student), expected)
    assert set(student.state_dict()) <= set(teacher.state_dict())
    assert torch.equal(forward(copy.deepcopy(student)), expected)
    student.save_pretrained(tmp_path)
    reloaded, info = PrunedUNet.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(forward(reloaded.eval()), expected)
    assert dict(reloaded.config["plan"]) == plan


def test_the_teacher_is_back_after_an_exception(teacher: Any, inventory: Inventory) -> None:
    before, modules = forward(teacher), dict(teacher.named_modules())
    with (
        pytest.raises(RuntimeError, match="body"),
        bypassed(teacher, inventory.plan({"mid_block", "up_blocks.2"})),
    ):
        raise RuntimeError("body")
    assert torch.equal(forward(teacher), before)
    assert dict(teacher.named_modules()) == modules


def test_a_plan_that_does_not_fit_changes_nothing(teacher: Any) -> None:
    before = forward(teacher)
    for plan, message in (
        ({"mid_block.resnets.0": "identity", "mid_block.resnets.7": "identity"}, "no such module"),
        ({"mid_block.resnets.0": "melt"}, "cannot be bypassed by melt"),
        ({"mid_block.resnets.0": "shortcut"}, "cannot be bypassed by shortcut"),
        ({"mid_block.attentions.0": "drop_skip"}, "cannot be bypassed by drop_skip"),
        ({"up_blocks.1.resnets.0": "identity"}, "cannot be bypassed by identity"),
    ):
        with pytest.raises(ValueError, match=message), bypassed(teacher, plan):
            pass
        assert torch.equal(forward(teacher), before)


def test_the_student_is_its_own_network(inventory: Inventory) -> None:
    teacher = build(SMALL)
    before = forward(teacher)
    student = PrunedUNet.from_teacher(teacher, inventory.plan({"up_blocks.1"}))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert torch.equal(forward(teacher), before)
    with pytest.raises(ValueError, match="pruned already"):
        PrunedUNet.from_teacher(student, {})
    with (
        pytest.raises(ValueError, match="bypassed already"),
        bypassed(student, {"up_blocks.1.resnets.0": "drop_skip"}),
    ):
        pass


@pytest.mark.parametrize("size", [16, 20])
def test_every_single_removal_runs(size: int, teacher: Any, inventory: Inventory) -> None:
    whole = forward(teacher, size)
    for name in inventory.names:
        out = ablated(teacher, inventory.plan({name}), size)
        assert out.shape == whole.shape
        assert torch.isfinite(out).all()
        assert not torch.equal(out, whole)


def test_two_hundred_random_masks_run_at_any_size(teacher: Any, inventory: Inventory) -> None:
    params = sum(p.numel() for p in teacher.parameters())
    for i, mask in enumerate(masks(inventory, 200, seed=3)):
        size = (16, 20, 8, 13)[i % 4]
        plan = inventory.plan(mask)
        with bypassed(teacher, plan):
            out = forward(teacher, size)
            left = sum(p.numel() for p in teacher.parameters())
        assert out.shape[-1] == size
        assert torch.isfinite(out).all()
        assert left < params


def test_everything_removed_still_runs(teacher: Any, inventory: Inventory) -> None:
    plan = inventory.plan(inventory.names)
    assert sum("samplers" in name for name in plan) == 6
    for size in (16, 20):
        assert ablated(teacher, plan, size).shape[-1] == size


def test_more_removals_never_add_parameters_and_params_are_additive(
    teacher: Any, inventory: Inventory
) -> None:
    def params(mask: Any) -> int:
        with bypassed(teacher, inventory.plan(mask)):
            return sum(p.numel() for p in teacher.parameters())

    order = random.Random(5).sample(inventory.names, len(inventory))
    counts = [params(order[:k]) for k in range(len(order) + 1)]
    assert counts == sorted(counts, reverse=True)
    saved = {name: counts[0] - params({name}) for name in inventory.names}
    alive = [n for n in order if not n.startswith(("mid_block", "up_blocks.0"))]
    assert counts[0] - params(alive) == sum(saved[name] for name in alive)


def test_gradients_flow_with_checkpointing(inventory: Inventory) -> None:
    teacher = build(SMALL)
    plan = inventory.plan({"mid_block", "down_blocks.1.resnets.0", "up_blocks.2.resnets.1"})
    grads = []
    for checkpointing in (False, True):
        student = PrunedUNet.from_teacher(teacher, plan).train()
        if checkpointing:
            student.enable_gradient_checkpointing()
        text = torch.ones(1, 7, 32)
        sample = torch.linspace(-1, 1, 4 * 256).reshape(1, 4, 16, 16)
        student(sample, torch.tensor([500]), text).sample.square().mean().backward()
        grads.append([p.grad for p in student.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        assert plain is not None
        torch.testing.assert_close(plain, checkpointed)


def test_stock_diffusers_refuses_the_folder(
    teacher: Any, inventory: Inventory, tmp_path: Path
) -> None:
    PrunedUNet.from_teacher(teacher, inventory.plan({"mid_block"})).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unknown mid_block_type"):
        UNet2DConditionModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("config", [SMALL, SMALL_XL], ids=["sd", "sdxl"])
@pytest.mark.parametrize("size", [16, 20])
def test_replay_equals_the_full_pass_bitwise(config: dict[str, Any], size: int) -> None:
    unet = build(config)
    inventory = Inventory.of(unet)
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, size, size, generator=generator)
    text = torch.randn(2, 7, 32, generator=generator)
    replay = Replay(unet, sample, torch.tensor([10, 700]), text)
    assert torch.equal(replay.output, forward(unet, size))
    assert torch.equal(replay.ablate({}), replay.output)
    units = {**inventory.units("block"), **inventory.units("pair"), **inventory.units("stage")}
    for mask in [*units.values(), *masks(inventory, 20, seed=9)]:
        plan = inventory.plan(mask)
        assert torch.equal(replay.ablate(plan), ablated(unet, plan, size))
    assert torch.equal(forward(unet, size), replay.output)
    with pytest.raises(ValueError, match="no such module"):
        replay.ablate({"up_blocks.9.resnets.0": "identity"})


def test_replay_computes_the_suffix_alone_and_states_its_memory(teacher: Any) -> None:
    inventory = Inventory.of(teacher)
    sample, text = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 32)
    replay = Replay(teacher, sample, 10, text)
    called: list[str] = []
    hooks = [
        teacher.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: called.append(name)
        )
        for name in inventory.names
    ]
    replay.ablate(inventory.plan({"up_blocks.3.attentions.1"}))
    for hook in hooks:
        hook.remove()
    assert called == ["up_blocks.3.resnets.2", "up_blocks.3.attentions.2"]
    elements = {0: 32 * 256, 1: 64 * 64, 2: 128 * 16, 3: 128 * 4}
    blocks = sum(elements[block.level] for block in inventory)
    samplers = 32 * 64 + 64 * 16 + 128 * 4 + 128 * 16 + 128 * 64 + 64 * 256
    assert replay.recorded_bytes == 4 * (elements[0] + blocks + samplers)
