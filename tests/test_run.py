"""A whole study in one command: what is done, what is skipped and why, and what a kill leaves."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bkprune.data import read_pairs
from bkprune.models import BUILT_IN
from bkprune.pictures import PictureFolder
from bkprune.stages import Record, stages_of
from bkprune.studyfile import Option, read
from tests.test_cli import refused, run

ROOT = Path(__file__).parents[1]
STUDY = """
[study]
model = "emoji"
compare = ["bk-sdm-tiny"]

[analyze]
grain = "stage"
samples = 8
bins = 2

[profile]
latency = false

[search]
budget = ["macs<=0.7x"]
grain = "stage"
trials = 6
samples = 16
judged = 16

[prune]

[distill]
data = "pairs"
steps = 4
batch-size = 4
save-every = 1
preview-every = 0
lr = 1e-3

[evaluate]
n = 3
steps = 2
workers = 1
metrics = "clip_score,psnr"
"""
TABLES = (
    "importance.csv", "cost.csv", "candidates.csv", "finalists.csv", "winner.json",
    "distillation/train.jsonl", "compared/bk-sdm-tiny/distillation/train.jsonl",
    "evaluation/eval.csv", "evaluation/differences.csv",
)  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study small enough for a test, with a dozen pictures of its own."""
    folder = tmp_path_factory.mktemp("study")
    pairs = read_pairs(BUILT_IN["emoji"] / "pairs.zip").split("train").subset(range(12))
    pictures = PictureFolder(folder / "pairs", {})
    lines = []
    for i, caption in enumerate(pairs.captions):
        pictures.save(i, pairs.picture(i))
        name = str(pictures.path(i).relative_to(folder / "pairs"))
        lines.append(json.dumps({"file_name": name, "text": caption}))
    (folder / "pairs" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "study.toml").write_text(STUDY)
    return folder


@pytest.fixture(scope="module")
def finished(study: Path) -> Path:
    result = run("run", study, "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip().endswith("run/report.html")
    return study


def tables(folder: Path) -> dict[str, Any]:
    """What a run ends with, without how fast it was."""
    found: dict[str, Any] = {}
    for name in TABLES:
        text = (folder / name).read_text()
        if name.endswith(".jsonl"):
            rows = [json.loads(line) for line in text.splitlines()]
            found[name] = [{k: v for k, v in r.items() if k != "images_per_s"} for r in rows]
        else:
            found[name] = text.replace(str(folder), "RUN")
    return found


def test_everything_is_there_and_a_second_run_does_nothing(finished: Path) -> None:
    for name in (*TABLES, "report.html", "report.md", "pruned/mask.json", "run.json"):
        assert (finished / "run" / name).exists(), name
    before = {p: p.stat().st_mtime_ns for p in (finished / "run").rglob("*.csv")}
    again = run("run", finished, "--quiet")
    assert again.exit_code == 0
    assert again.stderr.count("up to date") == 10
    assert {p: p.stat().st_mtime_ns for p in (finished / "run").rglob("*.csv")} == before
    assert "everything is up to date" in run("run", finished, "--dry-run").stdout


def test_one_setting_redoes_what_depends_on_it_and_says_why(finished: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    shutil.copytree(finished, study)
    text = (study / "study.toml").read_text()
    (study / "study.toml").write_text(text.replace("lr = 1e-3", "lr = 2e-3"))
    rows = json.loads(run("run", study, "--dry-run", "--json").stdout)
    assert {row["stage"]: row[""] for row in rows} == {
        "analyze": "up to date",
        "profile": "up to date",
        "search": "up to date",
        "cache": "up to date",
        "prune winner": "up to date",
        "distill winner": "--lr was 0.001, now 0.002",
        "prune bk-sdm-tiny": "up to date",
        "distill bk-sdm-tiny": "--lr was 0.001, now 0.002",
        "evaluate": "may change: reads mask.json",
        "report": "may change: reads mask.json",
    }
    assert all("as the last time" in row["takes"] for row in rows if row["takes"])
    done = run("run", study, "--quiet")
    assert done.exit_code == 0, done.output
    assert "distill winner: --lr was 0.001, now 0.002" in done.stderr
    assert "evaluate: {run}/distillation/distilled/mask.json has changed" in done.stderr
    assert (study / "run" / "distillation.old").is_dir()
    old, new = (tables(folder / "run") for folder in (finished, study))
    assert new["importance.csv"] == old["importance.csv"]
    assert new["distillation/train.jsonl"] != old["distillation/train.jsonl"]
    rows = pd.read_csv(study / "run" / "evaluation" / "eval.csv")
    assert not rows.duplicated(["model", "metric"]).any()


def test_five_kills_end_in_the_same_tables(finished: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments, wherever they fall; each time the same command goes on."""
    study = tmp_path / "study"
    shutil.copytree(finished, study, ignore=shutil.ignore_patterns("run"))
    command = [sys.executable, "-m", "bkprune.cli", "run", str(study), "--quiet"]
    env = {**os.environ, "OMP_NUM_THREADS": str(os.environ.get("OMP_NUM_THREADS", 2))}
    chance = random.Random(7)
    for _ in range(5):
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + chance.uniform(5, 11)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, cwd=ROOT, env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert tables(study / "run") == tables(finished / "run")


def test_a_failed_stage_stops_the_run_and_is_named(finished: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    shutil.copytree(finished, study)
    text = (study / "study.toml").read_text()
    (study / "study.toml").write_text(text.replace('"macs<=0.7x"', '"macs<=0.001x"'))
    result = run("run", study, "--quiet")
    assert result.exit_code in (2, 3)
    assert "[3/10] search failed; once mended, `bkprune run` goes on from there" in result.stderr


def test_a_run_of_a_newer_version_is_left_alone(finished: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    shutil.copytree(finished, study)
    path = study / "run" / "run.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "format": 99, "bkprune": "9.9"}))
    refused(run("run", study), "run.json", "newer bkprune (9.9)")
    path.write_text("[]")
    refused(run("run", study), "run.json", "not the record of a run")


# --- study.toml ------------------------------------------------------------------------------


def test_init_writes_a_study_that_can_be_planned(tmp_path: Path) -> None:
    assert run("init", tmp_path / "new").exit_code == 0
    result = run("run", tmp_path / "new", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "10 of 10 stages to do, about" in result.stdout
    refused(run("init", tmp_path / "new"), "study.toml", "is there already")
    assert run("init", tmp_path / "other", "--model", 'a"b\\c').exit_code == 0
    assert 'model = "a\\"b\\\\c"' in (tmp_path / "other" / "study.toml").read_text()


def test_init_names_what_it_is_given_as_seen_from_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sd15").mkdir()
    (tmp_path / "pictures").mkdir()
    assert run("init", "mine", "--model", "./sd15", "--data", "pictures").exit_code == 0
    text = (tmp_path / "mine" / "study.toml").read_text()
    assert 'model = "../sd15"' in text
    assert text.count('\ndata = "../pictures"') == 3
    assert '\nprompts = "../pictures"' in text
    monkeypatch.chdir("/")
    planned = run("run", tmp_path / "mine", "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert "before it can run" not in planned.stderr


def test_what_is_not_there_is_said_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("init", "mine", "--model", "somebody/sd15").exit_code == 0
    everywhere = "[analyze] [search] [distill] data = 'pairs': no such file or folder"
    refused(run("run", "mine"), "study.toml", everywhere, "[evaluate] prompts = 'pairs'")
    assert not (tmp_path / "mine" / "run").exists()
    planned = run("run", "mine", "--dry-run")
    assert planned.exit_code == 0
    assert f"before it can run: {everywhere}" in planned.stderr
    path = tmp_path / "mine" / "study.toml"
    path.write_text(re.sub("^(data|prompts) = .*$", "", path.read_text(), flags=re.M))
    refused(
        run("run", "mine"),
        "[analyze] [search] [distill] needs data = ...: somebody/sd15 brings none",
        "[evaluate] needs prompts",
    )


def test_patterns_and_urls_are_not_looked_for(tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "study.toml").write_text(
        STUDY.replace('data = "pairs"', f'data = "{tmp_path}/pairs/{{000..009}}.tar"').replace(
            "n = 3", f'n = 3\nreference = "{tmp_path}/none.npz"\nprompts = "a.txt"'
        )
    )
    planned = run("run", tmp_path, "--dry-run")
    said = [line for line in planned.stderr.splitlines() if "before it can run" in line]
    assert len(said) == 1
    assert "[evaluate] reference" in said[0]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('model = "emoji"', "model = emoji", ("line 3, column",)),
        ("trials = 6", "trails = 6", ("unknown key in [search]: 'trails'", "did you mean trials?")),
        ("[prune]", "[prun]", ("unknown section: 'prun'", "did you mean prune?")),
        ("[study]", "[study]\ncolour = 1", ("unknown key in [study]: 'colour'",)),
        ("trials = 6", 'trials = "many"', ("[search]", "integer")),
        ("trials = 6", "trials = [1, 2]", ("trials takes one value",)),
        ("latency = false", 'latency = "no"', ("latency = 'no': true or false",)),
        ("samples = 8\nbins", "samples = true\nbins", ("samples = True: a value",)),
        ('"bk-sdm-tiny"', '"bk-sdm-tinny"', ("compare: 'bk-sdm-tinny'; did you mean bk-sdm-tiny",)),
        ('model = "emoji"', "", ("[study] needs model",)),
        ("[prune]", "", ("[distill] needs [prune]",)),
        ("trials = 6", 'out = "x"', ("unknown key in [search]: 'out'",)),
    ],
)
def test_a_broken_study_says_where(
    study: Path, tmp_path: Path, old: str, new: str, words: tuple[str, ...]
) -> None:
    assert old in STUDY
    (tmp_path / "study.toml").write_text(STUDY.replace(old, new, 1))
    refused(run("run", tmp_path, "--dry-run"), "study.toml", *words)


def test_no_study_is_a_hint(tmp_path: Path) -> None:
    refused(run("run", tmp_path), "no such study", "bkprune init")


OPTIONS = {
    name: [Option("device", False, False, False), Option("dtype", False, False, False)]
    for name in ("analyze", "profile", "search", "prune", "distill", "evaluate")
}


def test_hardware_goes_to_every_command_that_has_the_option(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text('[study]\nmodel="m"\n[hardware]\ndevice="cuda"\n[analyze]\n[profile]\n')
    options = {**OPTIONS, "analyze": []}
    found = read(path, options, (), lambda command, words: None, ())
    assert found.options == {"analyze": (), "profile": ("--device", "cuda")}


def test_stages_follow_from_the_sections(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text('[study]\nmodel="m"\ncompare=["bk-sdm-base"]\n[prune]\n[evaluate]\n')
    found = read(path, OPTIONS, ("bk-sdm-base",), lambda command, words: None, ())
    stages = stages_of(found, tmp_path / "run")
    assert [s.name for s in stages] == ["prune bk-sdm-base", "evaluate", "report"]
    record = Record(tmp_path / "run", found)
    assert record.why(stages[0]) == "not done yet"
    record.begin(stages[0])
    assert record.why(stages[0]) == "was interrupted: goes on"
    record.finish(stages[0], 1.0)
    assert record.why(stages[0]).endswith("mask.json is missing")


def test_a_race_learns_by_the_recipe_of_the_study(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    one = ("objective", "kd-steps", "data", "steps", "lr", "feature")
    every = [Option(name, False, False, False) for name in one]
    every += [Option(name, False, False, True) for name in ("budget", "kd")]
    every.append(Option("normalise-features", True, False, False))
    options = dict.fromkeys(("search", "prune", "distill"), every)
    search = '[search]\nbudget=["macs<=0.7x"]\nobjective="distilled"\nkd-steps=50\n'
    distill = '[distill]\ndata="d"\nsteps=900\nlr=1e-3\nfeature=0.0\nnormalise-features=true\n'
    path.write_text(f'[study]\nmodel="m"\n{search}[prune]\n{distill}')
    found = read(path, options, (), lambda command, words: None, ())
    run = tmp_path / "run"
    stages = {stage.name: stage for stage in stages_of(found, run)}
    assert list(stages)[:2] == ["cache", "search"]
    assert stages["search"].reads[-1] == run / "cache" / "cache.json"
    words = stages["search"].words
    given = [words[i + 1] for i, word in enumerate(words) if word == "--kd"]
    assert given == ["lr=0.001", "feature=0.0", "normalise-features=true"]
    assert words[words.index("--kd-data") + 1] == str(run / "cache")
    path.write_text(f'[study]\nmodel="m"\n{search}kd=["lr=1"]\n[prune]\n{distill}')
    own = {s.name: s for s in stages_of(read(path, options, (), lambda c, w: None, ()), run)}
    assert [w for w in own["search"].words if w.startswith("lr=")] == ["lr=1"]
    record = Record(run, found)
    record.begin(stages["search"])
    record.finish(stages["search"], 1.0)
    path.write_text(
        path.read_text().replace("kd-steps=50", "kd-steps=80").replace('kd=["lr=1"]', "")
    )
    later = {s.name: s for s in stages_of(read(path, options, (), lambda c, w: None, ()), run)}
    assert record.why(later["search"]) == "--kd-steps was 50, now 80"
    assert "--force" not in record.words(later["search"])  # its trials are as good as they were


def test_a_study_may_be_moved(finished: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(finished, moved, copy_function=shutil.copy2)
    rows = json.loads(run("run", moved, "--dry-run", "--json").stdout)
    assert {row[""] for row in rows} == {"up to date"}


@pytest.mark.parametrize("name", ["emoji", "bk-sdm-v1", "bk-sdm-v2", "sd15-latency", "sdxl-base"])
def test_shipped_studies_can_be_planned(name: str, tmp_path: Path) -> None:
    result = run("run", ROOT / "studies" / name, "--out", tmp_path / "run", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert rows[-1]["stage"] == "report"
    takes = {row["takes"] for row in rows[:-1]}
    assert (takes == {"unknown: the model is not here"}) == (name != "emoji")
