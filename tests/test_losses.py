"""The three losses are BK-SDM's: against a straightforward version of them, term by term."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bkprune import Inventory, PrunedUNet, preset
from bkprune.export import student as student_of
from bkprune.losses import (
    LossSettings,
    distillation_losses,
    sample_weights,
    taps,
    watched,
)
from tests.conftest import SMALL, SMALL_V2, build
from tests.test_presets import plain_student

PUBLISHED = {
    "bk-sdm-base": [(f"{s}_blocks.{i}",) * 2 for s in ("down", "up") for i in range(4)],
    "bk-sdm-small": [(f"{s}_blocks.{i}",) * 2 for s in ("down", "up") for i in range(4)],
    "bk-sdm-tiny": [
        ("down_blocks.0", "down_blocks.0"),
        ("down_blocks.1", "down_blocks.1"),
        ("down_blocks.2.attentions.1.proj_out", "down_blocks.2.attentions.0.proj_out"),
        ("up_blocks.1", "up_blocks.0"),
        ("up_blocks.2", "up_blocks.1"),
        ("up_blocks.3", "up_blocks.2"),
    ],
}


def inputs(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(3, 4, 16, 16, generator=generator),
        "timestep": torch.tensor([10, 400, 900]),
        "encoder_hidden_states": torch.randn(3, 7, 32, generator=generator),
    }


def ours(teacher: Any, student: Any, found: list[Any], target: Any, **settings: Any) -> Any:
    with (
        watched(student, [t.student for t in found]) as own,
        watched(teacher, [t.name for t in found]) as theirs,
        torch.no_grad(),
    ):
        reference = theirs(**inputs())
        names = [t.name for t in found]
        return distillation_losses(
            own(**inputs()), reference, target, names, LossSettings(**settings)
        )


def by_hand(teacher: Any, student: Any, pairs: list[Any], target: Any) -> dict[str, Any]:
    """As BK-SDM's script: hooks fill two dictionaries, stages give tuples, means are summed."""
    seen: dict[str, dict[str, Any]] = {"teacher": {}, "student": {}}
    handles = []
    for net, which, column in ((teacher, "teacher", 0), (student, "student", 1)):
        for pair in pairs:

            def hook(m: Any, a: Any, out: Any, which: str = which, n: str = pair[column]) -> None:
                seen[which][n] = out

            handles.append(net.get_submodule(pair[column]).register_forward_hook(hook))
    with torch.no_grad():
        eps_t = teacher(**inputs()).sample
        eps_s = student(**inputs()).sample
    for handle in handles:
        handle.remove()
    features = []
    for a, b in pairs:
        f_t, f_s = seen["teacher"][a], seen["student"][b]
        f_t = f_t[0] if isinstance(f_t, tuple) else f_t
        f_s = f_s[0] if isinstance(f_s, tuple) else f_s
        features.append(F.mse_loss(f_s.float(), f_t.float(), reduction="mean"))
    return {
        "loss_task": F.mse_loss(eps_s, target),
        "loss_output": F.mse_loss(eps_s, eps_t),
        "loss_feature": sum(features),
        "features": features,
    }


@pytest.mark.parametrize("name", list(PUBLISHED))
@pytest.mark.parametrize("config", [SMALL, SMALL_V2], ids=["v1", "v2"])
@pytest.mark.parametrize("form", ["plain", "pruned"])
def test_losses_are_those_of_the_published_script(name: str, config: Any, form: Any) -> None:
    teacher = build(config)
    inventory = Inventory.of(teacher)
    plan = inventory.plan(preset(name, inventory))
    made = student_of(teacher, inventory, plan, form)
    found = taps(inventory, plan, made.twin.modules if made.twin else None)
    if form == "plain":
        assert [(t.name, t.student) for t in found] == PUBLISHED[name]
    assert [t.name for t in found] == [pair[0] for pair in PUBLISHED[name]]
    target = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    total, terms = ours(teacher, made.unet, found, target)
    expected = by_hand(teacher, plain_student(teacher, config, name), PUBLISHED[name], target)
    for key in ("loss_task", "loss_output", "loss_feature"):
        assert float(terms[key]) == pytest.approx(float(expected[key]), rel=1e-6)
    assert float(total) == pytest.approx(
        sum(float(expected[k]) for k in ("loss_task", "loss_output", "loss_feature")), rel=1e-6
    )
    for tap, feature in zip(found, expected["features"], strict=True):
        assert float(terms[f"tap/{tap.name}"]) == pytest.approx(float(feature), rel=1e-6)


def test_a_student_that_is_its_teacher_loses_nothing(teacher: Any, inventory: Inventory) -> None:
    target = torch.zeros(3, 4, 16, 16)
    _, terms = ours(teacher, PrunedUNet.from_teacher(teacher, {}), taps(inventory, {}), target)
    assert terms.pop("loss_task") > 0
    assert len(terms) == 10
    assert all(float(value) == 0 for value in terms.values())


def test_weights_and_options(teacher: Any, inventory: Inventory) -> None:
    plan = inventory.plan({"mid_block"})
    unet = PrunedUNet.from_teacher(teacher, plan)
    found = taps(inventory, plan)
    target = torch.zeros(3, 4, 16, 16)
    _, plain = ours(teacher, unet, found, target)
    total, terms = ours(teacher, unet, found, target, task=0.5, output=2.0, feature=0.1)
    expected = 0.5 * plain["loss_task"] + 2 * plain["loss_output"] + 0.1 * plain["loss_feature"]
    assert float(total) == pytest.approx(float(expected))
    assert float(terms["loss_task"]) == float(plain["loss_task"])
    _, relative = ours(teacher, unet, found, target, normalise_features=True)
    with watched(teacher, [found[0].name]) as theirs, torch.no_grad():
        power = theirs(**inputs())[1][0].square().mean()
    name = f"tap/{found[-1].name}"
    assert float(relative[name]) != pytest.approx(float(plain[name]))
    first = f"tap/{found[0].name}"
    assert float(relative[first]) == pytest.approx(float(plain[first] / power), rel=1e-5)
    wrong: list[dict[str, Any]] = [
        {"task": -1.0},
        {"task": 0.0, "output": 0.0, "feature": 0.0},
        {"snr_gamma": 0.0},
    ]
    for bad in wrong:
        with pytest.raises(ValueError, match=r"weights|snr_gamma"):
            LossSettings(**bad)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights(kind: str) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(prediction_type=kind)
    timesteps = torch.tensor([0, 200, 999])
    found = sample_weights(scheduler, timesteps, 5.0)
    assert found is not None
    for t, weight in zip(timesteps.tolist(), found.tolist(), strict=True):
        abar = float(scheduler.alphas_cumprod[t])
        snr = abar / (1 - abar)
        expected = min(snr, 5.0) / (snr + 1 if kind == "v_prediction" else snr)
        assert weight == pytest.approx(expected, rel=1e-4)
    assert sample_weights(scheduler, timesteps, None) is None


@pytest.mark.parametrize("how", ["checkpointing", "compile"])
def test_taps_work_under_checkpointing_and_compile(how: str) -> None:
    teacher = build(SMALL)
    inventory = Inventory.of(teacher)
    plan = inventory.plan(preset("bk-sdm-tiny", inventory))
    found = taps(inventory, plan)
    target = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    results = []
    for special in (False, True):
        unet = PrunedUNet.from_teacher(teacher, plan).train()
        if special and how == "checkpointing":
            unet.enable_gradient_checkpointing()
        with (
            watched(unet, [t.student for t in found]) as own,
            watched(teacher, [t.name for t in found]) as theirs,
        ):
            run: Any = own
            if special and how == "compile":
                run = torch.compile(own, backend="aot_eager")
            with torch.no_grad():
                reference = theirs(**inputs())
            names = [t.name for t in found]
            total, terms = distillation_losses(
                run(**inputs()), reference, target, names, LossSettings()
            )
            total.backward()
        grads = [p.grad for p in unet.parameters()]
        assert all(g is not None for g in grads)
        results.append((terms, grads))
    for name, value in results[0][0].items():
        assert float(results[1][0][name].detach()) == pytest.approx(float(value.detach()), rel=1e-5)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


def test_taps_leave_nothing_behind(teacher: Any) -> None:
    words = r"up_blocks\.9: this U-Net has no such module"
    with pytest.raises(ValueError, match=words), watched(teacher, ["down_blocks.0", "up_blocks.9"]):
        pass
    assert not any(m._forward_hooks for m in teacher.modules())
