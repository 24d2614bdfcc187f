"""The commands as a user meets them: files, exit codes, one-line errors, resume."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner, Result

import bkprune
from bkprune.bypass import Replay
from bkprune.cli import app

RUNNER = CliRunner()
SMALL = ["--grain", "stage", "--samples", "8", "--bins", "2", "--batch-size", "4"]
FIGURES = ["ranked_output.png", "timesteps_output_per_error.png", "u_output.png"]


def run(*args: Any) -> Result:
    return RUNNER.invoke(app, [str(arg) for arg in args])


def refused(result: Result, *words: str) -> None:
    """Exit code 2, one line on stderr that has the words, and no traceback."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("bkprune: ")
    for word in words:
        assert word in lines[0]


def test_version_and_help() -> None:
    assert run("--version").stdout == f"bkprune {bkprune.__version__}\n"
    for command in ([], ["analyze"], ["blocks"]):
        result = run(*command, "--help")
        assert result.exit_code == 0
        assert "Example" in result.stdout
        assert run(*command, "-h").stdout == result.stdout


def test_blocks_prints_the_inventory() -> None:
    rows = json.loads(run("blocks", "emoji", "--json").stdout)
    assert len(rows) == 38
    assert rows[0]["name"] == "down_blocks.0.resnets.0"
    assert sum(row["params"] for row in rows) > 5e6
    assert len(json.loads(run("blocks", "emoji", "--grain", "pair", "--json").stdout)) == 21
    assert "mid_block.attentions.0" in run("blocks", "emoji").stdout


def test_analyze_writes_records_and_figures_once(tmp_path: Path) -> None:
    result = run("analyze", "emoji", *SMALL, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "importance.csv") in result.stdout
    table = pd.read_csv(tmp_path / "importance.csv")
    assert list(table.columns) == [
        "unit",
        "criterion",
        "timestep_bin",
        "score",
        "stderr",
        "n",
        "seed",
    ]
    assert set(table["criterion"]) == {"output", "output_per_power", "output_per_error"}
    assert set(table["timestep_bin"]) == {"all", "0", "1"}
    assert len(table) == 9 * 3 * 3
    assert len(pd.read_csv(tmp_path / "blocks.csv")) == 38
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == FIGURES
    for name in FIGURES:
        assert (tmp_path / "figures" / name).read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    again = run("analyze", "emoji", *SMALL, "--out", tmp_path)
    assert "up to date" in again.stderr
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    other = [*SMALL, "--seed", "7", "--out", tmp_path]
    refused(run("analyze", "emoji", *other), "stale: seed was 1234, now 7")
    forced = run("analyze", "emoji", *other, "--force", "--json")
    assert {row["seed"] for row in json.loads(forced.stdout)} == {7}


def test_an_interrupt_loses_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    whole = run("analyze", "emoji", *SMALL, "--out", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    calls, ablate = [], Replay.ablate

    def interrupted(self: Replay, plan: Any) -> Any:
        calls.append(plan)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return ablate(self, plan)

    monkeypatch.setattr(Replay, "ablate", interrupted)
    args = ["analyze", "emoji", *SMALL, "--out", tmp_path / "cut"]
    result = run(*args)
    assert result.exit_code == 130
    assert "the same command resumes" in result.stderr
    assert not (tmp_path / "cut" / "importance.csv").exists()
    assert run(*args).exit_code == 0
    assert len(calls) == 12 + 9
    for name in ("importance.csv", "blocks.csv", "stamps.json"):
        cut, full = (tmp_path / side / name for side in ("cut", "whole"))
        assert cut.read_text() == full.read_text()


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(run("analyze", "emoji", *SMALL, "--out", tmp_path), "No space left on device")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["analyze", "nowhere"], ["nowhere", "no such file or folder", "emoji"]),
        (["analyze", "emoji", "--grain", "row"], ["--grain 'row'", "stage, pair, block"]),
        (["analyze", "emoji", "--criterion", "x"], ["--criterion 'x'", "taylor"]),
        (["analyze", "emoji", "--weighting", "x"], ["--weighting 'x'", "snr"]),
        (["analyze", "emoji", "--samples", "3"], ["3 samples over 8 timestep bins"]),
        (["analyze", "emoji", "--data", "none"], ["none", "no such folder of images"]),
        (["analyze", "emoji", "--criterion", "clip", "--clip", "none"], ["none", "no CLIP model"]),
        (["analyze", "emoji", "--criterion", "latent", "--data", "noise"], ["need prompts"]),
        (["blocks", "emoji", "--grain", "row"], ["--grain 'row'"]),
    ],
)
def test_bad_input_is_one_line(args: list[str], words: list[str], tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")] if args[0] == "analyze" else []
    refused(run(*args, *out), *words)
    assert not (tmp_path / "out").exists()


def test_a_bare_unet_can_be_timed_and_asks_for_data(unet_folder: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out", *SMALL]
    refused(run("analyze", unet_folder, *out), "brings no calibration data", "--data")
    (tmp_path / "p.txt").write_text("a cat\n")
    prompts = run("analyze", unet_folder, *out, "--data", tmp_path / "p.txt")
    refused(prompts, "text_encoder", "--text-encoder DIR")
    timed = run("analyze", unet_folder, *out, "--data", "noise")
    assert timed.exit_code == 0, timed.output


def test_debug_shows_the_traceback() -> None:
    result = run("--debug", "analyze", "nowhere")
    assert isinstance(result.exception, ValueError)
    run("--version")
