"""The cost table: adding up is exact, dead levels included; tables of other models are refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bkprune.blocks import Inventory
from bkprune.bypass import bypassed
from bkprune.cost import COUNTS, CostTable, read
from bkprune.counting import count, unet_call
from bkprune.presets import preset
from bkprune.profiling import Profile, ProfileSettings
from bkprune.skeleton import Skeleton, skeleton
from tests.conftest import SMALL, SMALL_XL, build


@pytest.fixture(scope="module")
def table() -> CostTable:
    return Profile(_bones(SMALL), ProfileSettings()).table


def _bones(config: dict[str, Any]) -> Skeleton:
    return Skeleton("small", build(config).to("meta"))


@pytest.mark.parametrize("config", [SMALL, SMALL_XL], ids=["v1", "xl"])
@pytest.mark.parametrize("keep_shortcuts", [False, True])
def test_costs_of_random_masks_are_those_of_the_networks(
    config: dict[str, Any], keep_shortcuts: bool
) -> None:
    bones = _bones(config)
    table = Profile(bones, ProfileSettings()).table
    inventory = table.inventory
    inner = sorted(inventory.levels[-1].blocks)
    rng = random.Random(3)
    for trial in range(12):
        mask = {name for name in inventory.names if rng.random() < rng.random()}
        mask |= set(inner) if trial % 3 == 0 else set()
        plan = inventory.plan(mask, keep_shortcuts=keep_shortcuts)
        with bypassed(bones.unet, plan):
            whole = count(bones.unet, unet_call(bones.unet.config)).whole
        predicted = table.cost_of(mask, keep_shortcuts=keep_shortcuts)
        for name in COUNTS:
            assert getattr(predicted, name) == getattr(whole, name), (trial, name)


def test_rows_add_up_and_a_removal_never_costs(table: CostTable) -> None:
    whole = table.cost_of()
    for name in COUNTS:
        assert int(table.unet_rows[name].sum()) == getattr(whole, name)
    assert whole.latency_ms is None
    for name in table.inventory.names:
        less = table.cost_of({name})
        assert less.params < whole.params
        assert less.macs < whole.macs
        assert less.memory_mb < whole.memory_mb
    tiny = table.cost_of(preset("bk-sdm-tiny", table.inventory))
    shares = tiny.relative_to(whole)
    assert shares["params"] == tiny.params / whole.params < 0.5
    assert "latency_ms" not in shares


def test_memory_is_weights_and_the_highest_peak_left(table: CostTable) -> None:
    rows = table.unet_rows.set_index("unit")
    peak = rows["activation_mb"].idxmax()
    whole = table.cost_of()
    assert whole.memory_mb == pytest.approx(
        whole.weight_bytes / 1e6 + float(rows["activation_mb"].max())
    )
    without = table.cost_of({str(peak)})
    left = rows.drop(index=[str(peak)])["activation_mb"].max()
    assert without.memory_mb == pytest.approx(without.weight_bytes / 1e6 + float(left))


def test_latency_adds_up_with_shortcuts(table: CostTable) -> None:
    rows = table.rows.copy()
    rows["latency_ms"] = range(1, len(rows) + 1)
    rows.loc[rows["shortcut_params"].notna(), "shortcut_latency_ms"] = 0.25
    timed = CostTable(rows, table.inventory)
    ms = rows.set_index("unit")["latency_ms"]
    whole = timed.cost_of().latency_ms
    assert whole == ms[timed.unet_rows["unit"]].sum()
    dropped, widened = "up_blocks.1.resnets.1", "down_blocks.1.resnets.0"
    assert timed.cost_of({dropped}).latency_ms == whole - ms[dropped]
    assert timed.cost_of({dropped}, keep_shortcuts=True).latency_ms == whole - ms[dropped] + 0.25
    assert timed.cost_of({widened}).latency_ms == whole - ms[widened] + 0.25


def test_a_table_from_elsewhere_is_taken_as_it_is(table: CostTable, tmp_path: Path) -> None:
    units = list(table.unet_rows["unit"])
    path = tmp_path / "phone.csv"
    pd.DataFrame({"unit": units, "latency_ms": 2.0}).to_csv(path, index=False)
    found = read(path, table)
    assert found.cost_of().latency_ms == 2.0 * len(units)
    assert found.cost_of().params == table.cost_of().params
    whole = tmp_path / "whole.csv"
    table.rows.to_csv(whole, index=False)
    assert read(whole, table).cost_of({"mid_block"}) == table.cost_of({"mid_block"})


def test_tables_of_something_else_are_refused(table: CostTable, tmp_path: Path) -> None:
    def refused(rows: pd.DataFrame, words: str) -> None:
        path = tmp_path / "cost.csv"
        rows.to_csv(path, index=False)
        with pytest.raises(ValueError, match=words) as error:
            read(path, table)
        assert "cost.csv" in str(error.value)

    wider = Profile(_bones({**SMALL, "cross_attention_dim": 64}), ProfileSettings())
    refused(wider.table.rows, r"another model: params of .* is [\d,]+ there and [\d,]+ in this")
    larger = Profile(_bones(SMALL), ProfileSettings(height=24, width=24))
    refused(larger.table.rows, "another resolution, batch size or number of tokens: macs_paper of")
    refused(Profile(_bones(SMALL_XL), ProfileSettings()).table.rows, "made for another model")
    refused(pd.DataFrame({"name": ["a"]}), "needs the columns unit and latency_ms")
    units = list(table.unet_rows["unit"])
    refused(pd.DataFrame({"unit": units, "latency_ms": "fast"}), "latency_ms of .* not a number")
    refused(pd.DataFrame({"unit": units, "latency_ms": "inf"}), "latency_ms of .* not a number")
    refused(pd.DataFrame({"unit": [*units, units[0]], "latency_ms": 1.0}), "has two rows")
    refused(pd.DataFrame({"unit": units[1:], "latency_ms": 1.0}), units[0])
    with pytest.raises(ValueError, match="no such cost table"):
        read(tmp_path / "none.csv", table)
    (tmp_path / "cost.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a CSV table"):
        read(tmp_path / "cost.csv", table)


def test_skeletons_of_every_form(unet_folder: Path, tmp_path: Path, inventory: Inventory) -> None:
    for model in (unet_folder, unet_folder / "config.json"):
        assert Inventory.of(skeleton(model).unet) == inventory
    whole = skeleton("emoji")
    assert whole.vae is not None
    assert list(whole.text_encoders) == ["text_encoder"]
    assert next(whole.unet.parameters()).device.type == "meta"
    for model, words in (
        (tmp_path / "none", "no such file or folder.*families known by name: sd_v1"),
        (tmp_path, "no such file"),
    ):
        with pytest.raises(ValueError, match=words):
            skeleton(model)
    for text, words in (
        ('{"_class_name": "AutoencoderKL", "block_out_channels": [4]}', "describes AutoencoderKL"),
        ("{", "not JSON"),
        ('{"block_out_channels": [4], "cross_attention_dim": 4}', "builds no network"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            skeleton(tmp_path / "config.json")
