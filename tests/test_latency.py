"""The timing protocol: statistics by formula, turns, resume, marks. No time is ever asserted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import UNet2DConditionModel
from scipy import stats

from bkprune.backends import Clock, Target, prepare
from bkprune.blocks import Inventory
from bkprune.bypass import variant
from bkprune.counting import unet_call
from bkprune.latency import Isolated, TimingSettings, in_place, interleave, whole
from bkprune.series import PROBE, Rounds, Series, accuracy, median_interval
from bkprune.study import Stamp, Study, Unfinished
from tests.conftest import forward


@pytest.fixture
def unfinished(tmp_path: Path) -> Unfinished:
    return Unfinished(Study(tmp_path), "cost.csv", Stamp.of({}, {}))


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        low, high = median_interval(random.gamma(2.0, 1.0, size=60))
        covered += low <= 1.678347 <= high  # median of that distribution
    assert covered / 400 >= 0.94


def test_the_interval_sees_drift() -> None:
    steady = np.random.default_rng(1).normal(10, 0.1, size=100)
    low, high = median_interval(steady)
    drifting_low, drifting_high = median_interval(steady + np.linspace(-1, 1, 100))
    assert drifting_high - drifting_low > 3 * (high - low)


def test_series_of_few_and_of_many() -> None:
    one = Series.of(np.array([4.0]))
    assert (one.median, one.low, one.high, one.n) == (4.0, 4.0, 4.0, 1)
    many = Series.of(np.arange(1.0, 102.0))
    assert (many.median, many.p10, many.p90) == (51.0, 11.0, 91.0)
    assert many.is_noisy
    assert not Series.of(np.full(30, 5.0)).is_noisy


def test_disturbed_rounds_are_set_aside() -> None:
    probe = np.full(40, 1.0)
    times = np.full(40, 10.0)
    probe[10:20], times[10:20] = 1.5, 25.0
    rounds = Rounds([PROBE, "a"], np.column_stack([probe, times]))
    assert rounds["a"].n == 30
    assert rounds["a"].p90 == 10.0
    assert Rounds(["a"], times[:, None])["a"].n == 40
    elsewhere = Rounds([PROBE, "a"], np.column_stack([probe, times]), quiet_ms=0.5)
    assert elsewhere["a"].n == 30  # no round as quiet as that: its own quietest ones count
    assert rounds.ratio("a", "a").median == 1.0


def _clockwork(values: dict[str, list[float]]) -> dict[str, Callable[[], dict[str, float]]]:
    turns = {name: iter(series) for name, series in values.items()}
    return {name: (lambda n=name: {n: next(turns[n])}) for name in values}  # type: ignore[misc]


def test_everyone_has_one_turn_a_round_until_it_is_known_well_enough(
    unfinished: Unfinished,
) -> None:
    order: list[str] = []

    def contestant(name: str) -> Callable[[], dict[str, float]]:
        def turn() -> dict[str, float]:
            order.append(name)
            return {name: 300.0}  # slow enough that warming up is short

        return turn

    settings = TimingSettings(precision=0.02, min_rounds=8, max_s=60)
    contestants = {name: contestant(name) for name in "abc"}
    rounds = interleave(contestants, settings, unfinished, "x", probing=False)
    assert rounds.ms.shape == (8, 3)
    measured = order[-24:]
    by_round = [measured[i : i + 3] for i in range(0, 24, 3)]
    assert all(sorted(turns) == ["a", "b", "c"] for turns in by_round)
    assert len({tuple(turns) for turns in by_round}) > 1
    n_before = len(order)
    again = interleave(contestants, settings, unfinished, "x", probing=False)
    assert np.array_equal(again.ms, rounds.ms)
    assert len(order) == n_before  # it was all kept


def test_an_interrupted_measurement_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("bkprune.latency._SAVE_EVERY_S", 0.0)
    stamp = Stamp.of({"seed": 1}, {})
    calls = [0]

    def turn() -> dict[str, float]:
        calls[0] += 1
        if calls[0] == 20:
            raise KeyboardInterrupt
        return {"a": 300.0 + calls[0] % 2}

    settings = TimingSettings(min_rounds=30, max_s=60)
    kept = Unfinished(Study(tmp_path), "cost.csv", stamp)
    with pytest.raises(KeyboardInterrupt):
        interleave({"a": turn}, settings, kept, "x", probing=False)
    kept = Unfinished(Study(tmp_path), "cost.csv", stamp)
    n_kept = len(kept.arrays["x/ms"])
    assert 0 < n_kept < 20
    rounds = interleave({"a": turn}, settings, kept, "x", probing=False)
    assert len(rounds.ms) == 30
    assert np.array_equal(rounds.ms[:n_kept], kept.arrays["x/ms"][:n_kept])
    assert Unfinished(Study(tmp_path), "cost.csv", Stamp.of({"seed": 2}, {})).arrays == {}


@pytest.mark.parametrize(
    "settings", [{"precision": 0.0}, {"precision": 2.0}, {"min_rounds": 0}, {"max_s": 0.0}]
)
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"precision|round"):
        TimingSettings(**settings)


def test_marks_split_a_pass_and_leave_no_hook(
    teacher: UNet2DConditionModel, inventory: Inventory
) -> None:
    call = unet_call(teacher.config, device="cpu")
    turn = in_place(teacher, call, inventory.names, Clock("cpu"), "all")
    times = turn()
    assert set(times) == {*inventory.names, "all"}
    assert all(ms > 0 for ms in times.values())
    assert sum(times[name] for name in inventory.names) < times["all"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())


def test_isolated_modules_have_the_inputs_of_the_pass_and_share_times_by_shape(
    teacher: UNet2DConditionModel, inventory: Inventory
) -> None:
    call = unet_call(teacher.config, device="cpu")
    isolated = Isolated.record(teacher, call, inventory.names)
    assert set(isolated.owner) == set(inventory.names)
    assert isolated.owner["mid_block.resnets.1"] == "down_blocks.3.resnets.0"
    assert isolated.owner["up_blocks.3.attentions.2"] == "down_blocks.0.attentions.0"
    assert len(isolated.calls) == len(set(isolated.owner.values())) < 25
    for name, own in isolated.calls.items():
        with torch.no_grad():
            teacher.get_submodule(name)(*own.args, **own.kwargs)
    first = isolated.calls["down_blocks.0.resnets.0"].args[0]
    with torch.no_grad():
        assert torch.equal(first, teacher.conv_in(call.args[0]))
    turn = whole("x", prepare(teacher, call, Target()), Clock("cpu"))
    assert turn()["x"] > 0


def test_variants_share_weights_and_nothing_else(
    teacher: UNet2DConditionModel, inventory: Inventory
) -> None:
    before = forward(teacher)
    plan = inventory.plan({"mid_block", "up_blocks.1.resnets.2"})
    other = variant(teacher, plan)
    assert {p.data_ptr() for p in other.parameters()} < {p.data_ptr() for p in teacher.parameters()}
    assert not torch.equal(forward(other), before)
    assert torch.equal(forward(teacher), before)
    from bkprune.bypass import bypassed

    with bypassed(teacher, plan):
        assert torch.equal(forward(other), forward(teacher))


def test_a_command_that_times_itself_is_believed() -> None:
    assert whole("x", lambda: 12.5, Clock("cpu"))() == {"x": 12.5}


@pytest.mark.parametrize("seed", range(5))
def test_ranks_of_predictions_are_those_of_scipy_ties_included(seed: int) -> None:
    draw = np.random.default_rng(seed)
    measured = draw.integers(10, 20, 12).astype(float)
    predicted = np.round(measured + draw.normal(0, 3, 12).clip(-5, 5))
    found = accuracy(pd.DataFrame({"predicted_ms": predicted, "measured_ms": measured}))
    assert found["spearman"] == pytest.approx(stats.spearmanr(predicted, measured).statistic)
    assert found["kendall"] == pytest.approx(stats.kendalltau(predicted, measured).statistic)
    assert found["mape_percent"] == pytest.approx(
        100 * np.mean(abs(predicted - measured) / measured)
    )


def test_a_single_measured_mask_has_no_rank() -> None:
    found = accuracy(pd.DataFrame({"predicted_ms": [1.0], "measured_ms": [2.0]}))
    assert found["mape_percent"] == 50
    assert np.isnan(found["spearman"])
    assert np.isnan(found["kendall"])
