"""FSDP: a student held in slices learns what it learns whole, and its checkpoints fit both."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from bkprune import gathering, load
from bkprune.caching import Cache
from bkprune.checkpoints import Checkpoints, read_log
from bkprune.cli import app
from bkprune.data import read_pairs
from bkprune.models import BUILT_IN
from tests.sharded import EMA, STEPS, STOP, Sharded
from tests.test_distill import distillation, log_of, quick, random_cache, reached

ROOT = Path(__file__).parents[1]


def two_processes(*words: str) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, "-m", "tests.sharded", *words],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def whole(cache: Cache) -> Any:
    settings = quick(steps=STEPS, batch_size=4, ema=EMA)
    return distillation(cache, settings, accelerator=Accelerator(cpu=True))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes at work on what one began, on what one will end, and on a whole command."""
    folder = tmp_path_factory.mktemp("sharded")
    cache = random_cache(folder / "cache")
    for name, stop in (("whole", STEPS), ("ended", STOP)):
        run = whole(cache)
        run.run(folder / name, "s", wants_stop=partial(reached, run, stop))
    words = ["prune", "emoji", "--mask", "bk-sdm-base", "--out", str(folder / "small"), "-q"]
    assert CliRunner().invoke(app, words).exit_code == 0
    pairs = read_pairs(BUILT_IN["emoji"] / "pairs.zip")
    (folder / "pairs").mkdir()
    for i in range(4):
        Image.fromarray(pairs.picture(i)).save(folder / "pairs" / f"{i}.png")
        (folder / "pairs" / f"{i}.txt").write_text(pairs.captions[i])
    words = ["distill", str(folder / "small"), "--teacher", "emoji", "--device", "cpu", "--quiet"]
    words += ["--data", str(folder / "pairs"), "--out", str(folder / "run"), "--steps", "2"]
    two_processes(str(folder), *words, "--batch-size", "2", "--ema", "0.5")
    return folder


def test_slices_learn_what_the_whole_learns(sharded: Path) -> None:
    begun = Checkpoints(sharded / "begun", "s").latest()
    assert begun is not None
    assert begun["step"] == STOP
    assert whole(Cache(sharded / "cache")).run(sharded / "begun", "s")

    expected = Checkpoints(sharded / "whole", "s").latest()
    assert expected is not None
    for folder in ("begun", "ended"):
        found = Checkpoints(sharded / folder, "s").latest()
        assert found is not None
        assert found["step"] == STEPS
        for a, b in zip(log_of(sharded / folder), log_of(sharded / "whole"), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert found["student"].keys() == expected["student"].keys()
        for name, value in expected["student"].items():
            torch.testing.assert_close(found["student"][name], value, atol=2e-4, rtol=1e-3)
        for a, b in zip(found["ema"], expected["ema"], strict=True):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
        assert found["optimiser"]["state"].keys() == expected["optimiser"]["state"].keys()


def test_the_command_in_slices(sharded: Path) -> None:
    out = sharded / "run"
    assert [row["step"] for row in read_log(out)] == [1, 2]
    assert (out / "previews" / "step-00000002.png").exists()
    unet = load(str(out / "distilled")).unet
    kept = torch.load(
        out / "checkpoints" / "step-00000002" / "state.pt", map_location="cpu", weights_only=True
    )
    for parameter, average in zip(unet.parameters(), kept["ema"], strict=True):
        assert torch.equal(parameter.detach(), average.half().float())  # stored in float16


@pytest.mark.parametrize(
    ("version", "optimiser", "words"),
    [(1, "adamw", "fsdp_version: 2"), (2, "adamw8bit", "adamw8bit cannot be shared out")],
)
def test_what_cannot_be_sliced_is_refused(
    version: int, optimiser: str, words: str, tmp_path: Path
) -> None:
    cache = random_cache(tmp_path / "cache")
    try:
        with pytest.raises(ValueError, match=words):
            distillation(
                cache, quick(optimiser=optimiser), accelerator=Sharded(cpu=True, version=version)
            )
    finally:
        AcceleratorState._reset_state()


def test_what_was_gathered_is_put_back(tmp_path: Path) -> None:
    run = whole(random_cache(tmp_path / "cache"))
    run.run(tmp_path / "run", "s")
    optimiser: Any = run.optimiser
    before = [p.detach().clone() for p in run.student.parameters()]
    given = gathering.weights(run.student), gathering.moments(run.student, optimiser)
    given = copy.deepcopy(given)  # where nothing is sliced they are the student's own tensors
    with torch.no_grad():
        for p in run.student.parameters():
            p.zero_()
    state = optimiser.state[next(iter(run.student.parameters()))]
    moment = state["exp_avg"].clone()
    state["exp_avg"].zero_()
    gathering.set_weights(run.student, given[0])
    gathering.set_moments(run.student, optimiser, given[1])
    assert all(torch.equal(a, b) for a, b in zip(run.student.parameters(), before, strict=True))
    assert torch.equal(optimiser.state[next(iter(run.student.parameters()))]["exp_avg"], moment)


def test_every_process_knows_the_losses_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts as a spike must not depend on who keeps the log."""
    cache = random_cache(tmp_path / "cache")
    first = whole(cache)
    first.run(tmp_path / "run", "s", wants_stop=partial(reached, first, STOP))
    losses = [row["loss"] for row in read_log(tmp_path / "run")]
    again = whole(cache)
    monkeypatch.setattr(Accelerator, "is_main_process", False)  # another keeps the log
    with again.opened(tmp_path / "run", "s"):
        assert again._going.log is None
        assert again._going.history == losses


def test_a_gradient_scaler_goes_on(tmp_path: Path) -> None:
    cache = random_cache(tmp_path / "cache")

    def run() -> Any:
        made = whole(cache)
        made.acc.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        return made

    first = run()
    first.run(tmp_path / "whole", "s")
    scale = first.acc.scaler.get_scale()
    assert scale == 8.0 * 2**3
    begun = run()
    begun.run(tmp_path / "begun", "s", wants_stop=partial(reached, begun, STOP))
    again = run()
    assert again.run(tmp_path / "begun", "s")
    assert again.acc.scaler.get_scale() == scale
    assert log_of(tmp_path / "begun") == log_of(tmp_path / "whole")


def test_eight_bit_moments_go_on(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra 8bit is not installed")
    cache = random_cache(tmp_path / "cache")

    def run() -> Any:
        settings = quick(steps=STEPS, batch_size=4, optimiser="adamw8bit")
        return distillation(cache, settings, accelerator=Accelerator(cpu=True))

    run().run(tmp_path / "whole", "s")
    begun = run()
    begun.run(tmp_path / "begun", "s", wants_stop=partial(reached, begun, STOP))
    assert run().run(tmp_path / "begun", "s")
    kept = Checkpoints(tmp_path / "begun", "s").latest()
    assert kept is not None
    leaves = tree_leaves(kept["optimiser"]["state"])  # weights of 4,096 elements and more
    assert any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.uint8 for leaf in leaves)
    assert log_of(tmp_path / "begun") == log_of(tmp_path / "whole")
