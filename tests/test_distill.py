"""Distillation: the same bits after any interruption, on any number of processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from safetensors.torch import save_file
from typer.testing import CliRunner

from bkprune import Inventory, PrunedUNet, preset
from bkprune.caching import FORMAT, Cache
from bkprune.checkpoints import LOG, SPEED, Checkpoints, read_log
from bkprune.cli import app
from bkprune.distill import Distillation, StoppedError
from bkprune.losses import LossSettings, taps
from bkprune.models import load
from bkprune.recipe import DistillSettings
from tests.conftest import SMALL, build

TINY = {**SMALL, "block_out_channels": (16, 16, 32, 32), "norm_num_groups": 4, "sample_size": 8}


def random_cache(folder: Path, n: int = 24, *, bad: int | None = None) -> Cache:
    """Noise for latents and text, in two shards."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    shards = []
    for i, size in enumerate((n // 2, n - n // 2)):
        mean = torch.randn(size, 4, 8, 8, generator=generator)
        if bad is not None and i == 0:
            mean[bad] = float("nan")
        tensors = {
            "mean": mean,
            "std": 0.1 * torch.ones(size, 4, 8, 8),
            "mean_flipped": mean.flip(-1).contiguous(),
            "std_flipped": 0.1 * torch.ones(size, 4, 8, 8),
            "caption": torch.arange(size),
            "embedding": torch.randn(size, 7, 32, generator=generator),
        }
        save_file(tensors, folder / f"shard-{i:06d}.safetensors")
        shards.append([f"shard-{i:06d}.safetensors", size])
    index = {"format": FORMAT, "n": n, "shards": shards, "complete": True, "examples": []}
    (folder / "cache.json").write_text(json.dumps(index))
    return Cache(folder)


def quick(**more: Any) -> DistillSettings:
    settings: dict[str, Any] = {"steps": 12, "batch_size": 2, "lr": 1e-3, "save_every": 3}
    return DistillSettings(**{**settings, **more})


def distillation(cache: Cache, settings: DistillSettings, **more: Any) -> Distillation:
    teacher = build(TINY)
    inventory = Inventory.of(teacher)
    plan = inventory.plan(preset("bk-sdm-small", inventory))
    return Distillation(
        PrunedUNet.from_teacher(teacher, plan),
        teacher if settings.losses.needs_teacher else None,
        taps(inventory, plan) if settings.losses.feature else [],
        cache,
        more.pop("scheduler", DDPMScheduler()),
        settings,
        **more,
    )


def reached(run: Distillation, step: int) -> bool:
    return run.step >= step


def weights(run: Distillation) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.student.parameters()]


def log_of(folder: Path) -> list[dict[str, Any]]:
    rows = read_log(folder)
    return [{k: v for k, v in row.items() if k not in SPEED} for row in rows]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"ema": 0.9, "schedule": "cosine", "warmup": 2},
        {"accumulate": 2, "losses": LossSettings(normalise_features=True, snr_gamma=5.0)},
        {"losses": LossSettings(output=0.0, feature=0.0)},
    ],
    ids=["plain", "ema", "accumulate", "task"],
)
def test_a_run_stopped_anywhere_ends_the_same(more: Any, tmp_path: Path) -> None:
    cache = random_cache(tmp_path / "cache")
    whole = distillation(cache, quick(**more))
    assert whole.run(tmp_path / "whole", "s")
    for stop in (4, 9):
        folder = tmp_path / f"stopped-{stop}"
        first = distillation(cache, quick(**more))
        assert not first.run(folder, "s", wants_stop=partial(reached, first, stop))
        again = distillation(cache, quick(**more))
        assert again.run(folder, "s")
        assert all(map(torch.equal, weights(again), weights(whole)))
        assert log_of(folder) == log_of(tmp_path / "whole")
        whole_ema, own = whole.ema, again.ema
        if whole_ema is not None and own is not None:
            assert all(map(torch.equal, own.shadow_params, whole_ema.shadow_params))
    rows = log_of(tmp_path / "whole")
    assert [row["step"] for row in rows] == list(range(1, 13))
    kept = sorted(p.name for p in (tmp_path / "whole" / "checkpoints").iterdir())
    assert kept == ["step-00000009", "step-00000012"]


def test_accumulation_is_a_larger_batch(tmp_path: Path) -> None:
    cache = random_cache(tmp_path / "cache")
    runs = [
        distillation(cache, quick(steps=3, batch_size=4)),
        distillation(cache, quick(steps=3, batch_size=2, accumulate=2)),
    ]
    for i, run in enumerate(runs):
        run.run(tmp_path / str(i), "s")
    for a, b in zip(log_of(tmp_path / "0"), log_of(tmp_path / "1"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_training_lowers_every_loss_and_names_every_term(tmp_path: Path) -> None:
    settings = quick(steps=60, batch_size=4, lr=1e-3, losses=LossSettings(task=0.0))
    run = distillation(random_cache(tmp_path / "cache"), settings)
    run.run(tmp_path / "run", "s")
    rows = read_log(tmp_path / "run")
    first, last = rows[:5], rows[-5:]
    for name in ("loss_output", "loss_feature", "tap/up_blocks.3"):
        assert sum(r[name] for r in last) < 0.8 * sum(r[name] for r in first)
    names = [f"tap/{s}_blocks.{i}" for s in ("down", "up") for i in range(4)]
    assert {"loss", "loss_task", "lr", "grad_norm", "images_per_s", *names} <= set(rows[0])
    assert rows[0]["loss"] == pytest.approx(
        sum(rows[0][k] for k in ("loss_output", "loss_feature")), rel=1e-5
    )


def test_the_order_is_a_shuffle_anew_each_epoch(tmp_path: Path) -> None:
    run = distillation(random_cache(tmp_path / "cache"), quick(steps=24))
    seen = []
    for step in range(24):
        seen += [run.lessons.sample(p) for p in run.lessons.positions(step, 0)]
    assert sorted(seen[:24]) == sorted(seen[24:]) == list(range(24))
    assert seen[:24] != seen[24:] != list(range(24))


def test_velocity_is_predicted_where_the_scheduler_says_so(tmp_path: Path) -> None:
    cache = random_cache(tmp_path / "cache")
    targets = []
    for kind in ("epsilon", "v_prediction"):
        run = distillation(cache, quick(), scheduler=DDPMScheduler(prediction_type=kind))
        inputs, target = run.lessons.inputs(0)
        targets.append((inputs["sample"], target, inputs["timestep"], run.scheduler))
    noisy, noise, t, scheduler = targets[0]
    abar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    clean = (noisy - (1 - abar).sqrt() * noise) / abar.sqrt()
    expected = abar.sqrt() * noise - (1 - abar).sqrt() * clean
    assert torch.allclose(targets[1][1], expected, atol=1e-4)


def test_bad_steps_are_skipped_and_too_many_stop(tmp_path: Path) -> None:
    cache = random_cache(tmp_path / "cache", bad=3)
    run = distillation(cache, quick(steps=12, batch_size=2))
    run.run(tmp_path / "run", "s")
    skipped = [row["step"] for row in read_log(tmp_path / "run") if row.get("skipped")]
    assert len(skipped) == 1
    assert all(torch.isfinite(w).all() for w in weights(run))
    run = distillation(random_cache(tmp_path / "good"), quick(steps=40, lr=1e9, save_every=1))
    with pytest.raises(StoppedError, match=r"lower --lr.*last good checkpoint"):
        run.run(tmp_path / "wild", "s")


def test_a_checkpoint_of_another_run_is_refused_and_a_torn_one_skipped(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, "mine")
    kept.save(1, {"x": torch.ones(2)})
    kept.save(2, {"x": torch.zeros(2)})
    newest = tmp_path / "checkpoints" / "step-00000002" / "state.pt"
    newest.write_bytes(newest.read_bytes()[:-40])
    found = kept.latest()
    assert found is not None
    assert found["step"] == 1
    with pytest.raises(ValueError, match=r"other settings.*another --out"):
        Checkpoints(tmp_path, "theirs").latest()


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: Any) -> None:
    kept = Checkpoints(tmp_path, "mine")
    kept.save(1, {"x": torch.ones(2)})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bkprune.checkpoints.torch.save", full)
    with pytest.raises(OSError, match="No space"):
        kept.save(2, {"x": torch.zeros(2)})
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    found = kept.latest()
    assert found is not None
    assert found["step"] == 1


def test_a_torn_log_is_cut_back(tmp_path: Path) -> None:
    (tmp_path / LOG).write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 1}\n{"step": 3, "lo')
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2]


# --- processes -----------------------------------------------------------------------------------

TWO = """
import sys, torch
from pathlib import Path
from accelerate import Accelerator
from tests.test_distill import distillation, quick
from bkprune.caching import Cache
torch.set_num_threads(1)
folder, batch = Path(sys.argv[1]), int(sys.argv[2])
settings, cpu = quick(steps=6, batch_size=batch), Accelerator(cpu=True)
run = distillation(Cache(folder / "cache"), settings, accelerator=cpu)
run.run(folder / f"processes-{run.acc.num_processes}", "s")
"""


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path: Path) -> None:
    cache = random_cache(tmp_path / "cache")
    alone = distillation(cache, quick(steps=6, batch_size=4), accelerator=Accelerator(cpu=True))
    assert alone.run(tmp_path / "processes-1", "s")
    (tmp_path / "two.py").write_text(TWO)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launch, str(tmp_path / "two.py"), str(tmp_path), "2"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = log_of(tmp_path / "processes-1"), log_of(tmp_path / "processes-2")
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "loss_task", "loss_output", "loss_feature"):
            assert a[name] == pytest.approx(b[name], rel=1e-3)


# --- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "base"
    words = ["prune", "emoji", "--mask", "bk-sdm-base", "--out", str(out), "-q"]
    assert CliRunner().invoke(app, words).exit_code == 0
    return out


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "latents"
    words = ["cache", "emoji", "--split", "heldout", "--out", str(out), "--no-flip", "-q"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return out


def words_of(pruned: Path, cached: Path, out: Path, *more: str) -> list[str]:
    words = ["distill", str(pruned), "--teacher", "emoji", "--data", str(cached), "--quiet"]
    words += ["--out", str(out), "--steps", "8", "--batch-size", "2", "--save-every", "2"]
    return [*words, "--preview-every", "0", *more]


def test_a_killed_run_resumes_to_the_same_bits(pruned: Path, cached: Path, tmp_path: Path) -> None:
    whole = CliRunner().invoke(app, words_of(pruned, cached, tmp_path / "whole"))
    assert whole.exit_code == 0, whole.output
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "bkprune.cli", *words_of(pruned, cached, out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(read_log(out)) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "distilled").exists()
    again = CliRunner().invoke(app, words_of(pruned, cached, out))
    assert again.exit_code == 0, again.output
    assert log_of(out) == log_of(tmp_path / "whole")
    name = "distilled/unet/diffusion_pytorch_model.fp16.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_sigterm_saves_first(pruned: Path, cached: Path, tmp_path: Path) -> None:
    words = words_of(pruned, cached, tmp_path / "out", "--steps", "500", "--save-every", "400")
    process = subprocess.Popen(
        [sys.executable, "-m", "bkprune.cli", *words], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(read_log(tmp_path / "out")) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == 130
    assert "a checkpoint was saved" in said
    n = len(read_log(tmp_path / "out"))
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == [f"step-{n:08d}"]


def test_what_a_run_leaves(
    pruned: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bkprune.distill_job.PREVIEW_STEPS", 2)
    out = tmp_path / "out"
    words = words_of(pruned, cached, out, "--preview-every", "4", "--steps", "4")
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    done = load(out / "distilled")
    before = load(pruned).unet.state_dict()
    assert any(not torch.equal(t, before[k]) for k, t in done.unet.state_dict().items())
    assert {p.name for p in (out / "previews").iterdir()} == {
        "step-00000000.png",
        "step-00000004.png",
    }
    assert (out / "figures" / "train.png").exists()
    card = (out / "distilled" / "README.md").read_text()
    assert "Distilled against its teacher for 4 steps of 2 samples" in card
    assert "Pruned only" not in card
    told = json.loads((out / "distilled" / "mask.json").read_text())["distilled"]
    assert told["pairs"] == 328
    assert len(told["taps"]) == 8
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0
    assert "up to date" in again.stderr
    picture = (out / "previews" / "step-00000004.png").read_bytes()
    (out / "distill.json").unlink()
    (out / "checkpoints" / "step-00000004" / "state.pt").unlink()
    assert CliRunner().invoke(app, words).exit_code == 0  # from step 2: the same grid, whole
    assert (out / "previews" / "step-00000004.png").read_bytes() == picture
    other = CliRunner().invoke(app, words_of(pruned, cached, out, "--lr", "1e-3"))
    assert other.exit_code == 2
    assert "other settings" in other.stderr
    dry = CliRunner().invoke(app, words_of(pruned, cached, out, "--dry-run", "--json"))
    shown = json.loads(dry.stdout)
    assert shown["effective_batch"] == 2
    assert shown["steps_per_epoch"] == 164
    assert shown["seconds_per_step"] > 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nowhere", "--teacher", "emoji"], ["nowhere"]),
        (["emoji", "--teacher", "PRUNED"], ["no pruned form"]),
        (["PRUNED", "--teacher", "emoji", "--steps", "0"], ["steps is 0"]),
        (["PRUNED", "--teacher", "emoji", "--schedule", "step"], ["--schedule 'step'", "cosine"]),
        (["PRUNED", "--teacher", "emoji", "--task", "-1"], ["cannot be negative"]),
        (["PRUNED", "--teacher", "emoji", "--ema", "2"], ["between 0 and 1"]),
        (["PRUNED", "--teacher", "emoji", "--data", "no/where"], ["no/where"]),
        (["PRUNED", "--teacher", "emoji", "--optimiser", "adamw8bit"], ["bitsandbytes", "pip"]),
    ],
)
def test_bad_input_is_one_line(
    args: list[str], words: list[str], pruned: Path, cached: Path, tmp_path: Path
) -> None:
    if "--data" not in args:
        args = [*args, "--data", str(cached)]
    given = [str(pruned) if a == "PRUNED" else a for a in args]
    result = CliRunner().invoke(app, ["distill", *given, "--out", str(tmp_path / "out"), "-q"])
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in result.stderr
