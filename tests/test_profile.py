"""`bkprune profile` as a user meets it: files, resume, validation, imported tables, refusals."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bkprune.cost import COLUMNS
from tests.conftest import SMALL, build
from tests.test_backends import TINY
from tests.test_cli import refused, run

QUICK = ["--max-seconds", "0.3", "--precision", "0.5", "--steps", "2"]


@pytest.fixture(autouse=True)
def _short_warm_up(monkeypatch: Any) -> None:
    monkeypatch.setattr("bkprune.latency.MIN_WARM_UP_S", 0.0)


def _cost(folder: Path) -> Any:
    return pd.read_csv(folder / "cost.csv").set_index("unit")


def test_counts_without_a_clock(tmp_path: Path) -> None:
    result = run("profile", "sd_v1", "--no-latency", "--out", tmp_path, "--mask", "bk-sdm-tiny")
    assert result.exit_code == 0, result.output
    assert "859,520,964" in result.stdout
    assert "323,384,964 (0.376x)" in result.stdout
    assert "no attention matmuls" in result.stderr
    table = _cost(tmp_path)
    assert list(table.reset_index().columns) == COLUMNS
    assert table["latency_ms"].isna().all()
    assert set(table.index) >= {"rest", "text_encoder", "vae_decoder", "up_blocks.1.attentions.2"}
    assert (tmp_path / "figures" / "u_cost.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "machine.json").read_text())["versions"]["torch"]
    again = run("profile", "sd_v1", "--no-latency", "--out", tmp_path, "--json")
    shown = json.loads(again.stdout)
    assert shown["masks"][0]["macs_paper"] == 338_749_194_240
    assert "up to date" in again.stderr
    other = ["profile", "sd_v2_base", "--no-latency", "--out", tmp_path]
    refused(run(*other), "cost.csv is stale: ")
    assert run(*other, "--force").exit_code == 0


def test_a_config_and_nothing_else_is_timed(tmp_path: Path) -> None:
    build(SMALL).save_config(tmp_path / "unet")
    out = tmp_path / "out"
    args = ["profile", tmp_path / "unet" / "config.json", "--out", out, *QUICK]
    counted = run(*args, "--no-latency", "--quiet")
    assert counted.exit_code == 0, counted.output
    result = run(*args)  # a clock adds to counts, nothing has to be forced
    assert result.exit_code == 0, result.output
    table = _cost(out)
    of_unet = table[table["part"].isin(("block", "sampler", "rest"))]
    assert (of_unet.drop(index="rest")["latency_ms"] > 0).all()
    assert of_unet["peak_memory_mb"].notna().all()
    latency: Any = pd.read_csv(out / "latency.csv").set_index("part")
    assert of_unet["latency_ms"].sum() == pytest.approx(latency.loc["unet", "median"], rel=1e-3)
    assert list(latency.index) == ["unet"]
    assert not list(out.glob(".*"))
    assert "up to date" in run(*args).stderr
    assert "up to date" in run(*args, "--no-latency").stderr


def test_a_whole_model_and_how_well_its_table_predicts(tmp_path: Path) -> None:
    args = ["profile", "emoji", "--out", tmp_path, *QUICK, "--max-seconds", "4", "--validate", "3"]
    (tmp_path / "importance.csv").write_text(
        "unit,criterion,timestep_bin,score,stderr,n,seed\n"
        + "".join(f"{u},output,all,{i + 1},0.1,8,1\n" for i, u in enumerate(_stages()))
    )
    result = run(*args, "--mask", "bk-sdm-base", "--mask", "mid_block,up_blocks.3.attentions.*")
    assert result.exit_code == 0, result.output
    assert "MAPE" in result.stderr
    latency: Any = pd.read_csv(tmp_path / "latency.csv").set_index("part")
    assert list(latency.index) == ["unet", "text_encoder", "vae_decoder", "image"]
    assert (latency["low"] <= latency["median"]).all()
    assert (latency["median"] <= latency["high"]).all()
    compared: Any = pd.read_csv(tmp_path / "validation.csv")
    assert len(compared) == 2 + 3 + 2  # named, random, the presets not named
    assert (compared["measured_ms"] > 0).all()
    assert compared.loc[compared["mask"] == "bk-sdm-base", "n_removed"].item() == 14
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert names == ["importance_cost.png", "predicted_measured.png", "u_cost.png"]
    before = (tmp_path / "validation.csv").stat().st_mtime_ns
    shown = json.loads(
        run(
            *args, "--mask", "bk-sdm-base", "--mask", "mid_block,up_blocks.3.attentions.*", "--json"
        ).stdout
    )
    assert set(shown["accuracy"]) == {"mape_percent", "spearman", "kendall"}
    assert (tmp_path / "validation.csv").stat().st_mtime_ns == before


def _stages() -> list[str]:
    sides = [f"{side}_blocks.{i}" for side in ("down", "up") for i in range(4)]
    return [*sides[:4], "mid_block", *sides[4:]]


def test_an_interrupt_loses_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    from bkprune import measuring

    build(TINY).save_config(tmp_path / "unet")
    args = ["profile", tmp_path / "unet", "--out", tmp_path / "out", *QUICK]
    timed_rows = measuring._timed_rows

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "_timed_rows", interrupted)
    result = run(*args)
    assert result.exit_code == 130
    assert "resumes where it stopped" in result.stderr
    assert not (tmp_path / "out" / "cost.csv").exists()
    monkeypatch.setattr(measuring, "_timed_rows", timed_rows)
    monkeypatch.setattr("bkprune.latency._warm_up", interrupted)  # there is nothing left to time
    assert run(*args).exit_code == 0
    assert (tmp_path / "out" / "cost.csv").exists()


def test_graphs_of_blocks_and_whole_are_timed_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
    tiny = {**TINY, "block_out_channels": (16,), "norm_num_groups": 4}
    tiny |= {"down_block_types": ("CrossAttnDownBlock2D",)}
    tiny |= {"up_block_types": ("CrossAttnUpBlock2D",), "mid_block_type": None}
    build(tiny).save_config(tmp_path / "unet")
    script = tmp_path / "bench.py"
    script.write_text("import os, sys; print(os.path.getsize(sys.argv[1]) / 1e3)")
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(script))} {{onnx}}"
    args = ["profile", tmp_path / "unet", "--out", tmp_path / "out", *QUICK]
    result = run(*args, "--latency-cmd", command)
    assert result.exit_code == 0, result.output
    table = _cost(tmp_path / "out")
    assert table.loc["down_blocks.0.attentions.0", "latency_ms"] > 1
    twins = table.loc[["up_blocks.0.attentions.0", "up_blocks.0.attentions.1"], "latency_ms"]
    assert twins.nunique() == 1  # graphs of one shape are timed once
    assert table.loc["rest", "latency_ms"] >= 0  # timed: the U-Net without any block

    script.write_text("print(12.5)")
    args = ["profile", tmp_path / "unet", "--out", tmp_path / "constant", *QUICK]
    refused(run(*args, "--latency-cmd", command), "do not depend on the network", "{onnx}")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nowhere"], ["nowhere", "no such file or folder", "sd_v1"]),
        (["emoji", "--backend", "tvm"], ["--backend 'tvm'", "onnxruntime"]),
        (["emoji", "--dtype", "int4"], ["--dtype 'int4'", "bfloat16"]),
        (["emoji", "--device", "cuda:7"], ["cuda:7", "not present", "cpu"]),
        (["emoji", "--resolution", "big"], ["--resolution 'big'", "512x768"]),
        (["emoji", "--resolution", "63"], ["multiples of 4"]),
        (["emoji", "--batch-size", "0"], ["batch_size is 0"]),
        (["emoji", "--batch-size", "90000000"], ["--batch-size", "would fit"]),
        (["emoji", "--mask", "mid_blok"], ["mid_blok", "mid_block"]),
        (["sdxl", "--mask", "bk-sdm-base", "--no-latency"], ["published for the topology"]),
        (["emoji", "--validate", "-1"], ["--validate -1"]),
        (["emoji", "--latency-cmd", "trtexec"], ["{onnx}"]),
        (["emoji", "--precision", "0"], ["precision 0"]),
    ],
)
def test_bad_input_is_one_line(args: list[str], words: list[str], tmp_path: Path) -> None:
    refused(run("profile", *args, "--out", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_operators_are_shown(tmp_path: Path) -> None:
    args = ["profile", "emoji", "--operators", "--no-latency", "--out", tmp_path]
    shown = json.loads(run(*args, "--json").stdout)
    assert next(row["operator"] for row in shown["operators"] if row["in_macs"]) == "conv"
    assert "add up to what torch.utils.flop_counter counts" in run(*args).stderr
