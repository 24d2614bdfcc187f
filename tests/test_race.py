"""Races: successive halving, students side by side, and a search that ends in one."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
import torch
from diffusers import DDPMScheduler

from bkprune import Inventory, preset
from bkprune.bypass import PrunedUNet
from bkprune.caching import CacheSettings, fill
from bkprune.calibration import draw, noise_latents
from bkprune.checkpoints import Checkpoints, read_log
from bkprune.cli_search import judged_by
from bkprune.clip import ClipScore
from bkprune.data import read_pairs
from bkprune.distill import Distillation
from bkprune.halving import Rung, entrant_steps, race, rungs
from bkprune.judging import entrants
from bkprune.losses import LossSettings, taps
from bkprune.measured import OutputDistance, PictureDistance
from bkprune.models import BUILT_IN, load
from bkprune.racing import Field
from bkprune.recipe import DistillSettings, from_words
from bkprune.sampling import SamplingSettings, decode, sample_latents
from tests.conftest import build
from tests.test_cli import refused, run
from tests.test_distill import TINY, quick, random_cache


def test_rungs_halve_entrants_and_double_steps() -> None:
    assert rungs(8, 200) == [Rung(50, 4), Rung(100, 2), Rung(200, 1)]
    assert rungs(2, 30) == [Rung(30, 1)]
    assert rungs(5, 80) == [Rung(20, 3), Rung(40, 2), Rung(80, 1)]
    assert entrant_steps(8, rungs(8, 200)) == 8 * 50 + 4 * 50 + 2 * 100


class Track:
    """Losses known beforehand: entrant `i` loses `losses[i][step]`."""

    def __init__(self, losses: dict[str, dict[int, float]], dies_at: int | None = None) -> None:
        self.losses, self.dies_at = losses, dies_at
        self.asked: list[tuple[int, list[str]]] = []

    def __call__(self, names: Sequence[str], step: int) -> dict[str, float]:
        if step == self.dies_at:
            raise KeyboardInterrupt
        self.asked.append((step, list(names)))
        return {name: self.losses[name][step] for name in names}


def losses(values: Sequence[Sequence[float]]) -> dict[str, dict[int, float]]:
    return {f"{i:02d}": dict(zip((1, 2, 4), row, strict=True)) for i, row in enumerate(values)}


TRACK = losses(
    [
        (9, 9, 9),
        (3, 3, 3),
        (1, 4, 9),
        (2, 2, 4),
        (4, 1, 1),
        (8, 8, 8),
        (7, 7, 7),
        (float("nan"),) * 3,
    ]
)


def test_the_better_half_goes_on_and_is_asked_once() -> None:
    storage = optuna.storages.InMemoryStorage()
    track = Track(TRACK)
    table = race(list(TRACK), rungs(8, 4), track, storage, "race")
    assert track.asked == [(1, list(TRACK)), (2, ["01", "02", "03", "04"]), (4, ["03", "04"])]
    assert list(table["entrant"][:4]) == ["04", "03", "01", "02"]
    assert list(table["kd_steps"][:4]) == [4, 4, 2, 2]
    assert table["distilled"].iloc[0] == 1
    again = Track(TRACK)
    pd.testing.assert_frame_equal(race(list(TRACK), rungs(8, 4), again, storage, "race"), table)
    assert again.asked == []


@pytest.mark.parametrize("dies_at", [1, 2, 4])
def test_a_race_that_was_killed_ends_the_same(dies_at: int) -> None:
    whole = race(list(TRACK), rungs(8, 4), Track(TRACK), optuna.storages.InMemoryStorage(), "a")
    storage = optuna.storages.InMemoryStorage()
    with pytest.raises(KeyboardInterrupt):
        race(list(TRACK), rungs(8, 4), Track(TRACK, dies_at), storage, "a")
    track = Track(TRACK)
    found = race(list(TRACK), rungs(8, 4), track, storage, "a")
    pd.testing.assert_frame_equal(found, whole)
    assert track.asked[0][0] == dies_at


# --- students side by side -----------------------------------------------------------------------


TINY_MASKS = {
    "00": frozenset({"mid_block.attentions.0"}),
    "01": frozenset({"down_blocks.0.resnets.1", "up_blocks.3.attentions.1"}),
    "02": frozenset({"down_blocks.3.resnets.1", "mid_block.resnets.0"}),
}


def field(folder: Path, **more: Any) -> Field:
    pipeline = SimpleNamespace(unet=build(TINY), scheduler=DDPMScheduler())
    config = pipeline.unet.config
    latents = noise_latents(config, 6, 3)
    embeddings = torch.randn(6, 7, 32, generator=torch.Generator().manual_seed(4))
    judged = draw(latents, (embeddings, {}), config, n_train_timesteps=1000, n_bins=2, seed=5)
    cache = random_cache(folder / "cache")
    settings = more.pop("settings", quick(steps=8, save_every=100))
    judge = OutputDistance(pipeline, judged, settings.batch_size)
    return Field(pipeline, TINY_MASKS, cache, judge, settings, folder / "race", **more)


def trained(made: Field, name: str) -> dict[str, torch.Tensor]:
    state = Checkpoints(made.folder / name, made.stamp(name)).latest()
    assert state is not None
    weights: dict[str, torch.Tensor] = state["student"]
    return weights


@pytest.mark.parametrize(
    "losses", [LossSettings(), LossSettings(feature=0.0)], ids=["features", "output"]
)
def test_side_by_side_is_what_each_alone_would_learn(losses: LossSettings, tmp_path: Path) -> None:
    settings = quick(steps=4, save_every=100, losses=losses, accumulate=2)
    made = field(tmp_path, settings=settings)
    found = made.advance(list(TINY_MASKS), 4)
    for name, mask in TINY_MASKS.items():
        inventory = Inventory.of(made.pipeline.unet)
        plan = inventory.plan(mask)
        alone = Distillation(
            PrunedUNet.from_teacher(made.pipeline.unet, plan),
            made.pipeline.unet,
            taps(inventory, plan) if losses.feature else [],
            made.cache,
            DDPMScheduler(),
            settings,
        )
        alone.run(tmp_path / "alone" / name, "s")
        beside = trained(made, name)
        assert all(torch.equal(w, beside[k]) for k, w in alone.student.state_dict().items())
        assert np.array_equal(made.judge(alone.student.eval()), found[name])


def test_a_student_goes_on_rather_than_start_again(tmp_path: Path) -> None:
    whole = field(tmp_path / "whole")
    whole.advance(list(TINY_MASKS), 8)
    made = field(tmp_path / "parts", together=2)
    early = made.advance(list(TINY_MASKS), 3)
    assert [len(errors) for errors in early.values()] == [6, 6, 6]
    again = field(tmp_path / "parts")  # a new process would begin like this
    late = again.advance(["00", "02"], 8)
    for name in ("00", "02"):
        assert np.array_equal(late[name], whole.loss(name, 8))
        other = trained(again, name)
        assert all(torch.equal(weight, other[key]) for key, weight in trained(whole, name).items())
    assert not again.is_done("01", 8)


def test_a_student_that_runs_away_is_lost_alone(tmp_path: Path) -> None:
    made = field(tmp_path, settings=quick(steps=20, save_every=100))
    poor = made.student("00").state_dict()
    whole = Field.student

    def student(self: Field, name: str) -> PrunedUNet:
        found = whole(self, name)
        if name == "01":
            found.conv_out.weight.data.fill_(float("nan"))
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Field, "student", student)
        found = made.advance(["00", "01"], 14)
    assert np.isinf(found["01"]).all()
    assert np.isfinite(found["00"]).all()
    assert any(not torch.equal(weight, poor[key]) for key, weight in trained(made, "00").items())


def test_the_teacher_is_asked_once_for_all(tmp_path: Path) -> None:
    made = field(tmp_path)
    asked = []
    made.pipeline.unet.register_forward_hook(lambda *_: asked.append(1))
    made.advance(list(TINY_MASKS), 3)
    n_judged = -(-6 // made.settings.batch_size)
    assert len(asked) == 3 + n_judged


# --- what they are judged by ---------------------------------------------------------------------


def test_pictures_are_compared_with_the_teachers_of_the_same_seeds() -> None:
    pipeline, clip = load("emoji"), ClipScore.load(None)
    prompts, drawing = ["a red apple", "a cat", "a clock"], SamplingSettings(3, 3.0, 9, 2)
    judge = PictureDistance(pipeline, prompts, drawing, clip)
    teacher = pipeline.unet
    assert len(judge) == 3
    assert np.abs(judge(teacher)).max() < 1e-6
    inventory = Inventory.of(teacher)
    student = PrunedUNet.from_teacher(teacher, inventory.plan(preset("bk-sdm-base", inventory)))
    found = judge(student)
    assert pipeline.unet is teacher
    pictures = []
    for unet in (teacher, student):
        pipeline.unet = unet
        latents = sample_latents(pipeline, prompts, drawing)
        pictures.append(clip.image_features(decode(pipeline.vae, latents)))
    cosines = torch.nn.functional.cosine_similarity(pictures[0], pictures[1])
    np.testing.assert_allclose(found, 1 - cosines.numpy(), atol=1e-6)
    assert found.min() > 0.01


def test_a_judge_that_fails_gives_the_teacher_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load("emoji")
    teacher = pipeline.unet
    judge = PictureDistance(pipeline, ["a cat"], SamplingSettings(2), ClipScore.load(None))
    student = PrunedUNet.from_teacher(teacher, Inventory.of(teacher).plan(frozenset()))

    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(student, "forward", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        judge(student)
    assert pipeline.unet is teacher


def test_pictures_judge_where_a_clip_model_is_known(tmp_path: Path) -> None:
    assert judged_by("emoji", None, None, None) == ("pictures", 3.0)
    assert judged_by("emoji", "output", 5.0, None) == ("output", 5.0)
    assert judged_by("their/model", None, None, None) == ("output", 7.5)
    assert judged_by("their/model", None, None, tmp_path) == ("pictures", 7.5)
    with pytest.raises(ValueError, match="--clip DIR"):
        judged_by("their/model", "pictures", None, None)
    with pytest.raises(ValueError, match="pictures, output"):
        judged_by("emoji", "fid", None, None)


# --- recipes and entrants ------------------------------------------------------------------------


def test_a_recipe_is_read_from_words() -> None:
    words = ["lr=1e-3", "batch-size=32", "feature=0", "schedule=cosine", "normalise-features=true"]
    made = from_words([*words, "snr-gamma=5"], steps=7)
    assert (made.lr, made.batch_size, made.schedule, made.steps) == (1e-3, 32, "cosine", 7)
    assert made.losses == LossSettings(1.0, 1.0, 0.0, True, 5.0)
    assert from_words([], steps=9) == DistillSettings(steps=9)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("lr", "expected NAME=VALUE with one of"),
        ("rate=1", "expected NAME=VALUE with one of"),
        ("steps=3", "expected NAME=VALUE with one of"),
        ("batch-size=many", "'many' is not a int"),
        ("normalise-features=1", "'1' is not a bool"),
        ("lr=-1", "--kd: lr and clip_norm must be above 0"),
        ("output=-1", "--kd: loss weights cannot be negative"),
    ],
)
def test_a_wrong_word_is_named(word: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        from_words([word], steps=7)


def test_entrants_are_the_best_the_baselines_and_no_near_copies() -> None:
    rows = [
        ("a b c d", True, "local move"),
        ("a b c e", True, "local move"),  # differs in two blocks: a near copy
        ("a f g h", True, "integer program"),
        ("i j k l", True, "knapsack"),
        ("m n o p", False, "greedy"),
        ("q r s t", True, "random 0"),
        ("u v w x", True, "greedy + bk-sdm-tiny"),
    ]
    table = pd.DataFrame(rows, columns=["removed", "feasible", "source"])
    first = ["a b c d", "a f g h", "i j k l", "u v w x"]
    assert list(entrants(table, 4)["removed"]) == first
    assert list(entrants(table, 5)["removed"]) == [*first[:3], "q r s t", first[3]]
    assert len(entrants(table, 6)) == 6
    assert len(entrants(table, 9)) == 6
    assert list(entrants(table, 1)["removed"]) == ["a b c d"]


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with importance, and a small cache beside it."""
    folder: Path = tmp_path_factory.mktemp("study")
    small = ["--grain", "stage", "--samples", "8", "--bins", "2", "--batch-size", "4"]
    assert run("analyze", "emoji", *small, "--out", folder, "--quiet").exit_code == 0
    pipeline = load("emoji")
    pairs = read_pairs(BUILT_IN["emoji"] / "pairs.zip").split("train").subset(range(12))
    examples = ((pairs.image(i, 64), caption) for i, caption in enumerate(pairs.captions))
    fill(folder / "twelve", pipeline, examples, "twelve", CacheSettings(64, flip=False))
    return folder


def race_of(folder: Path, *more: Any) -> Any:
    words = ["search", "emoji", "--out", folder, "--grain", "stage", "--budget", "macs<=0.75x"]
    words += ["--samples", "16", "--judged", "16", "--trials", "8", "--objective", "distilled"]
    words += ["--finalists", "4", "--kd-steps", "4", "--kd", "batch-size=2", "--kd", "lr=1e-3"]
    if "--kd-judge" not in more:
        words += ["--kd-judge", "output"]
    return run(*words, "--kd-data", folder / "twelve", *more)


def test_a_search_that_ends_in_a_race(searched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = Field.advance

    def dies(self: Field, names: Sequence[str], step: int, progress: Any) -> Any:
        if step == 4:
            raise KeyboardInterrupt
        return advance(self, names, step, progress)

    with monkeypatch.context() as patched:
        patched.setattr(Field, "advance", dies)
        assert race_of(searched, "--quiet").exit_code == 130
    assert not (searched / "winner.json").exists()
    result = race_of(searched)
    assert result.exit_code == 0, result.output
    assert "halved at steps 2, 4: 12 steps in all" in result.stderr
    winner = json.loads((searched / "winner.json").read_text())
    table = pd.read_csv(searched / "finalists.csv")
    assert list(table["kd_steps"]) == [4, 4, 2, 2]
    assert table["removed"].iloc[0].split() == winner["removed"]
    assert table["distilled"].iloc[0] == table["distilled"].iloc[:2].min()
    assert table["behind"].iloc[0] == 0
    assert (table["behind_stderr"].iloc[1:] > 0).all()
    assert winner["why"].startswith("least output error after 4 steps of distillation")
    folders = list((searched / "race").glob("*/*/checkpoints"))
    assert len(folders) == 2  # those that are out have left theirs
    for folder in folders:  # and started once: step 1 is logged once
        steps = [row["step"] for row in read_log(folder.parent)]
        assert steps == [1, 2, 3, 4]
    again = race_of(searched, "--json")
    assert json.loads(again.stdout) == winner
    other = race_of(searched, "--kd", "output=30", "--json")  # another recipe is another race
    assert other.exit_code == 0, other.output
    assert len(list((searched / "race").iterdir())) == 2
    assert json.loads(other.stdout)["figures"]["distilled"] != winner["figures"]["distilled"]


def test_a_race_by_pictures(searched: Path) -> None:
    drawn = ("--kd-judge", "pictures", "--kd-pictures", "4", "--kd-sampling-steps", "2")
    result = race_of(searched, *drawn)
    assert result.exit_code == 0, result.output
    assert "12 steps in all, 6 times judged" in result.stderr
    assert "pictures' distance after so many steps" in " ".join(result.stdout.split())
    winner = json.loads((searched / "winner.json").read_text())
    assert winner["why"].startswith("pictures nearest to the teacher's")
    table = pd.read_csv(searched / "finalists.csv")
    assert set(table["kd_judge"]) == {"pictures"}
    assert list(table["kd_steps"]) == [4, 4, 2, 2]
    assert table["distilled"].iloc[0] == table["distilled"].iloc[:2].min() > 0
    assert (table["distilled_held_out"] > 0).all()
    again = race_of(searched, *drawn, "--json")
    assert json.loads(again.stdout) == winner
    other = race_of(searched, *drawn[:-1], "3", "--json")  # another drawing is another race
    assert json.loads(other.stdout)["figures"]["distilled"] != winner["figures"]["distilled"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--finalists", "1"], ["--finalists is 1", "at least 2"]),
        (["--kd-steps", "0"], ["--kd-steps is 0"]),
        (["--kd-together", "0"], ["--kd-together is 0"]),
        (["--kd-pictures", "1"], ["--kd-pictures is 1"]),
        (["--kd-judge", "fid"], ["--kd-judge", "pictures, output"]),
        (["--kd", "rate=1"], ["--kd 'rate=1'", "NAME=VALUE", "batch-size"]),
        (["--kd-data", "nowhere"], ["nowhere"]),
        (["--front", "macs"], ["--front", "measured or additive"]),
    ],
)
def test_a_race_that_cannot_be_run_says_so(
    more: list[str], words: list[str], searched: Path
) -> None:
    refused(race_of(searched, *more), *words)
