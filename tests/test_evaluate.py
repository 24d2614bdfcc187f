"""Pictures that depend on nothing but their number, and tables that can be trusted."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

from bkprune.clip import ClipScore
from bkprune.features import ClipRows, load_reference, rows_of, save_reference
from bkprune.generation import Generation, fill, groups_of
from bkprune.models import BUILT_IN, load
from bkprune.pictures import PictureFolder
from bkprune.protocols import PROTOCOLS, read
from bkprune.sampling import SCHEDULERS, SamplingSettings, draw, use_scheduler
from tests.test_cli import refused, run

PROMPTS = ("rocket, noto emoji", "red heart, fluent emoji", "grinning cat, noto emoji")
EXACT = SamplingSettings(3, 3.0, 7, 1, scheduler="ddim", is_exact=True)
QUICK = ["--steps", 2, "--n", 6, "--quiet"]
CHEAP = "clip_score,frechet_clip,psnr,ssim,output_error"


def generation(**changes: Any) -> Generation:
    return replace(Generation("emoji", "emoji", PROMPTS, EXACT), **changes)


def table_of(path: Path) -> Any:
    return pd.read_csv(path)


def drawn(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*.png"))}


def made(folder: Path, generation: Generation, n: int, n_workers: int = 1) -> dict[str, bytes]:
    pictures = generation.folder(folder, generation.manifest())
    fill([(generation, pictures)], n, n_workers)
    return drawn(pictures.folder)


# --- pictures --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return made(tmp_path_factory.mktemp("one"), generation(), 7)


@pytest.mark.parametrize(("batch_size", "n_workers"), [(3, 1), (8, 1), (2, 2)])
def test_batch_size_and_processes_change_no_bit(
    seven: dict[str, bytes], batch_size: int, n_workers: int, tmp_path: Path
) -> None:
    settings = replace(EXACT, batch_size=batch_size)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # as the processes have
        assert made(tmp_path / "a", generation(settings=settings), 7, n_workers) == made(
            tmp_path / "b", generation(), 7
        )
    finally:
        torch.set_num_threads(threads)
    assert len(seven) == 7


def test_a_picture_is_what_the_pipeline_alone_draws(
    seven: dict[str, bytes], tmp_path: Path
) -> None:
    pipeline = load("emoji")
    pictures = generation().folder(tmp_path, generation().manifest())
    fill([(generation(), pictures)], 4)
    alone = pipeline(
        PROMPTS[0],
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(7 + 3),
    ).images[0]
    np.testing.assert_array_equal(pictures.load(3), np.asarray(alone))
    assert drawn(pictures.folder).items() <= seven.items()


def test_what_is_missing_is_drawn_and_nothing_else(seven: dict[str, bytes], tmp_path: Path) -> None:
    pictures = generation().folder(tmp_path, generation().manifest())
    fill([(generation(), pictures)], 5)
    pictures.path(2).unlink()
    kept = pictures.path(1).stat().st_mtime_ns
    fill([(generation(), pictures)], 7)
    assert drawn(pictures.folder) == seven
    assert pictures.path(1).stat().st_mtime_ns == kept


def test_together_the_batch_stays_whole_whatever_is_missing(tmp_path: Path) -> None:
    """Rounding may depend on who is drawn together, so the same ones always are."""
    assert groups_of([0, 5, 6], 3) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    together = generation(settings=replace(EXACT, is_exact=False, batch_size=4))
    whole = made(tmp_path / "a", together, 6)
    pictures = together.folder(tmp_path / "b", together.manifest())
    fill([(together, pictures)], 6)
    pictures.path(4).unlink()
    fill([(together, pictures)], 6)
    assert drawn(pictures.folder) == whole


def test_sharing_by_rank_leaves_nothing_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seven: dict[str, bytes]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    pictures = generation().folder(tmp_path, generation().manifest())
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        fill([(generation(), pictures)], 7)
        assert len(drawn(pictures.folder)) == [3, 5, 7][rank]
    assert drawn(pictures.folder) == seven


def test_a_kill_leaves_whole_pictures_and_the_same_command_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bkprune.cli", "evaluate", "emoji", "--metrics", "clip_score"]
    command += ["--n", "20", "--steps", "4", "--workers", "1", "--quiet", "--out"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, str(killed)], env=env, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(drawn(killed)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 2 <= len(drawn(killed)) < 20
    for out in (killed, whole):
        subprocess.run([*command, str(out)], env=env, check=True, capture_output=True)
    assert drawn(killed) == drawn(whole)
    assert (killed / "eval.csv").read_bytes() == (whole / "eval.csv").read_bytes()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_draws(name: str) -> None:
    pipeline = load("emoji")
    use_scheduler(pipeline, name)
    settings = replace(EXACT, steps=4)
    a, b = draw(pipeline, PROMPTS, [1, 2, 3], settings), draw(pipeline, PROMPTS[:1], [1], settings)
    np.testing.assert_array_equal(a.pictures[0], b.pictures[0])
    assert a.troubles == ["", "", ""]
    assert type(pipeline.scheduler).__name__ == SCHEDULERS[name][0]


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="scheduler 'magic': choose one of pndm, ddim"):
        SamplingSettings(scheduler="magic")
    with pytest.raises(ValueError, match="strength 2"):
        SamplingSettings(strength=2)
    with pytest.raises(ValueError, match="at least one step"):
        SamplingSettings(steps=0)


def test_nan_and_flagged_pictures_are_kept_as_black_and_named(tmp_path: Path) -> None:
    class Broken:
        def __call__(self, **how: Any) -> Any:
            pictures = torch.full((len(how["prompt"]), 3, 8, 8), 0.5)
            pictures[1] = float("nan")
            pictures[2] = 0
            return SimpleNamespace(images=pictures, nsfw_content_detected=[False, False, True])

    found = draw(Broken(), PROMPTS, [0, 1, 2], replace(EXACT, is_exact=False, batch_size=3))
    assert found.troubles == ["", "not_finite", "flagged"]
    assert found.pictures[0].max() == 128
    assert found.pictures[1:].max() == 0
    folder = PictureFolder(tmp_path, {})
    for i, (picture, trouble) in enumerate(zip(found.pictures, found.troubles, strict=True)):
        folder.save(i, picture, trouble)
    folder.save(3, np.zeros((8, 8, 3), np.uint8))
    assert [folder.trouble(i) for i in range(4)] == ["", "not_finite", "flagged", "black"]


def test_a_safety_checker_is_kept_and_what_it_flags_is_counted(tmp_path: Path) -> None:
    model = tmp_path / "checked"
    shutil.copytree(BUILT_IN["emoji"], model)
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = CLIPConfig(
        text_config={**tower, "num_attention_heads": 2},
        vision_config={**tower, "num_attention_heads": 2, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(config)
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(-2)  # below any cosine: everything is flagged
    checker.save_pretrained(model / "safety_checker")
    size = {"shortest_edge": 32}
    CLIPImageProcessor(size=size, crop_size=32).save_pretrained(model / "feature_extractor")
    index = json.loads((model / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (model / "model_index.json").write_text(json.dumps(index))

    assert load(model).safety_checker is None
    options = [*QUICK, "--metrics", "clip_score", "--protocol", "emoji", "--workers", 1, "--out"]
    result = run("evaluate", model, *options, tmp_path / "kept")
    assert result.exit_code == 0, result.output
    table = table_of(tmp_path / "kept" / "eval.csv").set_index("metric")
    assert table.loc["flagged", "value"] == 6
    assert table.loc["black", "value"] == 0
    run("evaluate", model, *options, tmp_path / "off", "--no-safety-checker")
    assert table_of(tmp_path / "off" / "eval.csv").set_index("metric").loc["flagged", "value"] == 0


def test_pictures_of_other_settings_never_share_a_folder(tmp_path: Path) -> None:
    a, b = generation(), generation(settings=replace(EXACT, steps=4))
    assert a.folder(tmp_path, a.manifest()).folder != b.folder(tmp_path, b.manifest()).folder
    assert a.manifest() == generation(settings=replace(EXACT, batch_size=5)).manifest()
    PictureFolder(tmp_path / "x", {"seed": 1})
    with pytest.raises(ValueError, match="drawn otherwise; use another folder"):
        PictureFolder(tmp_path / "x", {"seed": 2})


def test_a_label_cannot_leave_the_folder(tmp_path: Path) -> None:
    made = generation(label="../../etc/x").folder(tmp_path, {})
    assert made.folder.parent == tmp_path


# --- features and references -----------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> ClipRows:
    return ClipRows(ClipScore.load(None))


def noise(index: int) -> Any:
    return np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def test_features_go_on_where_they_stopped(network: ClipRows, tmp_path: Path) -> None:
    whole = rows_of(tmp_path / "whole.npy", noise, 90, network)
    path, asked = tmp_path / "rows.npy", []
    rows_of(path, noise, 40, network)

    def counted(index: int) -> Any:
        asked.append(index)
        return noise(index)

    grown = rows_of(path, counted, 90, network)
    assert min(asked) == 40
    np.testing.assert_allclose(grown, whole, atol=1e-5)
    np.testing.assert_array_equal(rows_of(path, counted, 90, network), grown)
    assert len(asked) == 50
    note = path.with_suffix(".json")
    note.write_text(note.read_text().replace(network.key, "clip:other"))
    rows_of(path, counted, 90, network)
    assert len(asked) == 140  # rows of another network are worth nothing


def test_references_name_their_network(network: ClipRows, tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(300, 128))
    save_reference(tmp_path / "ours.npz", features, network, 64, keep_features=True)
    found = load_reference(tmp_path / "ours.npz", network)
    assert found.moments.n == 300
    np.testing.assert_allclose(found.moments.mean, features.mean(0))
    assert found.features is not None
    other = SimpleNamespace(name="clip", key="clip:other", width=128)
    with pytest.raises(ValueError, match=r"made by network clip:[0-9a-f]+, not by clip:other"):
        load_reference(tmp_path / "ours.npz", other)
    inception = SimpleNamespace(name="inception", key="inception:x", width=2048)
    with pytest.raises(ValueError, match="statistics of 128 features, where inception has 2048"):
        load_reference(tmp_path / "ours.npz", inception)


def test_pytorch_fids_statistics_are_read(network: ClipRows, tmp_path: Path) -> None:
    path = tmp_path / "theirs.npz"
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048))
    inception = SimpleNamespace(name="inception", key="inception:x", width=2048)
    found = load_reference(path, inception)
    assert found.moments.cov[5, 5] == 1
    assert found.features is None
    np.savez(path, mu=np.zeros(128), sigma=np.eye(128))
    with pytest.raises(ValueError, match="does not name its network"):
        load_reference(path, network)
    np.savez(path, mu=np.array([object()]), sigma=np.eye(1), allow_pickle=True)
    with pytest.raises(ValueError, match="no mu and sigma to be read"):
        load_reference(path, network)
    path.write_bytes(b"PK\3\4 torn")
    with pytest.raises(ValueError, match="no mu and sigma to be read"):
        load_reference(path, network)


# --- the command -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("students")
    for name in ("base", "tiny"):
        assert (
            run("prune", "emoji", "--mask", f"bk-sdm-{name}", "--out", folder / name).exit_code == 0
        )
    return folder


@pytest.fixture(scope="module")
def evaluation(students: Path) -> Path:
    out = students / "evaluation"
    result = run(
        *("evaluate", students / "base", students / "tiny", "--teacher", "emoji", "--out", out),
        *("--steps", 8, "--n", 10, "--workers", 1, "--metrics", CHEAP),
    )
    assert result.exit_code == 0, result.output
    assert "text-to-image, 10 pictures a model" in result.stdout
    assert "10 samples in 128 dimensions is biased upwards" in result.stderr
    return out


def test_tables_say_who_is_better_and_by_how_much(evaluation: Path) -> None:
    table = table_of(evaluation / "eval.csv")
    values = table.pivot(index="metric", columns="model", values="value")
    assert set(values.columns) == {"emoji", "base", "tiny"}
    assert values.loc["clip_score", "emoji"] > values.loc["clip_score", "base"]
    assert values.loc["psnr", ["base", "tiny"]].between(5, 30).all()
    assert values.loc["output_error", "tiny"] > 0.05
    assert np.isnan(values.loc["psnr", "emoji"])
    clip = table[table["metric"] == "frechet_clip"]["how"].iloc[0]
    assert "PIL bicubic" in clip
    assert "against 3230 pictures of emoji" in clip
    apart = table_of(evaluation / "differences.csv").set_index(["metric", "a", "b"])
    row = apart.loc[("clip_score", "base", "emoji")]
    assert row["a_minus_b"] == pytest.approx(
        values.loc["clip_score", "base"] - values.loc["clip_score", "emoji"], abs=1e-3
    )
    assert row["a_is"] == "worse"
    assert row["high"] < 0
    told = json.loads((evaluation / "evaluation.json").read_text())
    assert told["n"] == 10
    assert told["machine"]["versions"]["torch"]
    assert (evaluation / "grid-text-to-image.png").exists()
    assert (evaluation / "figures" / "quality-text-to-image.png").exists()


def test_the_clip_score_is_that_of_the_pictures_on_the_disk(evaluation: Path) -> None:
    told = json.loads((evaluation / "evaluation.json").read_text())
    folder = evaluation / "pictures" / told["pictures"]["base"]
    pictures = PictureFolder(folder, json.loads((folder / "manifest.json").read_text()))
    prompts = read(None, PROTOCOLS["emoji"], 10).texts
    tensors = torch.from_numpy(np.stack([pictures.load(i) for i in range(10)])).permute(0, 3, 1, 2)
    expected = ClipScore.load(None)(tensors / 255, prompts).mean()
    table = table_of(evaluation / "eval.csv").set_index(["model", "metric"])
    assert table.loc[("base", "clip_score"), "value"] == pytest.approx(float(expected), rel=1e-5)


def test_tables_grow_and_the_same_measurement_is_replaced(evaluation: Path, students: Path) -> None:
    before = table_of(evaluation / "eval.csv")
    options = ("--steps", 8, "--n", 10, "--workers", 1, "--quiet", "--out", evaluation)
    again = run("evaluate", students / "base", "--teacher", "emoji", *options, "--metrics", "ssim")
    assert again.exit_code == 0, again.output
    after = table_of(evaluation / "eval.csv")
    assert len(after) == len(before)
    other = run(
        *("evaluate", students / "base", "--teacher", "emoji", *options),
        *("--metrics", "psnr", "--strength", 0.5),
    )
    assert other.exit_code == 0, other.output
    grown = table_of(evaluation / "eval.csv")
    assert set(grown["task"]) == {"text-to-image", "image-to-image 0.5"}
    assert (evaluation / "grid-image-to-image-0-5.png").exists()
    (evaluation / "eval.csv").write_text("hello\n")
    broken = run("evaluate", students / "base", "--teacher", "emoji", *options, "--metrics", "ssim")
    refused(broken, "eval.csv", "move it away")
    after.to_csv(evaluation / "eval.csv", index=False)


def test_split_sampling_ends_at_both_models(students: Path, tmp_path: Path) -> None:
    result = run(
        *("evaluate", students / "tiny", "--teacher", "emoji", "--out", tmp_path, "--quiet"),
        *("--steps", 4, "--n", 3, "--workers", 1, "--metrics", "psnr", "--teacher-steps", "0,2,4"),
    )
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "evaluation.json").read_text())["pictures"]
    assert list(told) == [
        "emoji", "tiny, teacher 0/4", "tiny, teacher 2/4", "tiny, teacher 4/4"
    ]  # fmt: skip
    pictures = [drawn(tmp_path / "pictures" / name) for name in told.values()]
    assert pictures[3] == pictures[0]
    psnr = table_of(tmp_path / "eval.csv").query("metric == 'psnr'")["value"].tolist()
    assert psnr[0] < psnr[1] < psnr[2]


def test_speed_is_split_over_the_parts(students: Path, tmp_path: Path) -> None:
    result = run(
        *("evaluate", students / "tiny", "--teacher", "emoji", "--out", tmp_path, "--quiet"),
        *("--steps", 2, "--n", 1, "--metrics", "speed", "--max-seconds", 1),
    )
    assert result.exit_code == 0, result.output
    values = table_of(tmp_path / "eval.csv").pivot(index="metric", columns="model", values="value")
    parts = values.loc[["s_text_encoder", "s_unet", "s_vae_decoder"]].sum()
    assert (parts < values.loc["s_per_image"]).all()
    assert (parts > 0.5 * values.loc["s_per_image"]).all()
    how = table_of(tmp_path / "eval.csv").query("metric == 's_per_image'")["how"].iloc[0]
    assert how.startswith("tiny 0.")


def test_statistics_once_and_again(tmp_path: Path) -> None:
    clip = BUILT_IN["emoji"] / "clip"
    folder = tmp_path / "real"
    for i in range(12):
        PictureFolder(folder, {}).save(i, noise(i))
    result = run(
        *("stats", folder, "--clip", clip, "--features"), *("--out", tmp_path / "s.npz", "-q")
    )
    assert result.exit_code == 0, result.output
    assert "12 pictures for 128 features" in result.stderr
    options = ("--protocol", "own", "--prompts", tmp_path / "p.txt", "--clip", clip, *QUICK)
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    outs = []
    for name, reference in (("a", folder), ("b", tmp_path / "s.npz")):
        made = run(
            *("evaluate", "emoji", *options, "--reference", reference, "--workers", 1),
            *("--metrics", "frechet_clip,kernel_clip", "--out", tmp_path / name),
        )
        assert made.exit_code == 0, made.output
        outs.append(table_of(tmp_path / name / "eval.csv").set_index("metric")["value"])
    pd.testing.assert_series_equal(outs[0], outs[1], rtol=1e-4)
    refused(run("stats", folder, "--out", tmp_path / "s.npz"), "--inception FILE", "--clip DIR")
    refused(run("stats", tmp_path / "x", "--clip", clip, "--out", tmp_path / "s.npz"), "no such")
    refused(run("stats", folder, "--clip", clip, "--out", tmp_path / "s.txt"), ".npz file")


def test_what_cannot_be_judged_is_refused_with_the_file_that_is_missing(tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    refused(run("evaluate", "emoji", "--metrics", "fid", *out), "weights-inception-2015-12-05")
    refused(run("evaluate", "emoji", "--metrics", "psnr", *out), "psnr needs --teacher")
    refused(run("evaluate", "emoji", "--metrics", "magic", *out), "'magic'", "clip_score")
    refused(run("evaluate", "emoji", "--protocol", "coco30k", *out), "--prompts FILE")
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat\n")
    own = ("evaluate", "emoji", "--protocol", "own", "--prompts", prompts, *out)
    refused(run(*own, "--metrics", "clip_score"), "--clip DIR")
    clip = ("--clip", BUILT_IN["emoji"] / "clip")
    refused(run(*own, *clip, "--metrics", "frechet_clip"), "--reference")
    coco = ("evaluate", "emoji", "--protocol", "coco30k", "--prompts", prompts, *out)
    refused(run(*coco, *clip), "fid needs --inception")
    refused(run("evaluate", "emoji", "--metrics", "lpips", "--teacher", "emoji", *out), "alexnet")
    refused(run("evaluate", "emoji", "--n", 0, *out), "--n 0")
    refused(run("evaluate", "emoji", "--teacher-steps", "3", *out), "--teacher-steps needs")
    refused(
        run("evaluate", "x", "--teacher", "emoji", "--teacher-steps", "99", *out), "from 0 to 25"
    )
    refused(run("evaluate", "a=emoji", "a=emoji", *out), "two models are called 'a'")
    refused(
        run("evaluate", "nothing", "--protocol", "emoji", "--metrics", "clip_score", *out),
        "no such file or folder",
    )
    assert not (tmp_path / "out" / "eval.csv").exists()


def test_few_built_in_captions_are_spread_over_all() -> None:
    every = read(None, PROTOCOLS["emoji"]).texts
    few = read(None, PROTOCOLS["emoji"], 10).texts
    assert few == [every[i * len(every) // 10] for i in range(10)]
    assert read(None, PROTOCOLS["emoji"], 1000).texts == every


def test_prompt_files(tmp_path: Path) -> None:
    own, path = PROTOCOLS["own"], tmp_path / "prompts.csv"
    path.write_text("file_name,text\na.png,a cat\nb.png,a dog\nc.png,a cat\n")
    found = read(str(path), own)
    assert found.texts == ["a cat", "a dog", "a cat"]
    assert found.n_duplicates == 1
    assert found[4] == "a dog"
    path.write_text("file_name,title\na.png,a cat\n")
    with pytest.raises(ValueError, match=r"line 2: no column text, caption, prompt \(found"):
        read(str(path), own)
    path.write_text('text\na cat\n""\n')
    with pytest.raises(ValueError, match="line 3: the prompt is empty"):
        read(str(path), own)
    lines = tmp_path / "prompts.jsonl"
    with lines.open("w") as file:
        csv.writer(file).writerow(["x"])
    with pytest.raises(ValueError, match="prompts cannot be read"):
        read(str(lines), own)
    lines.write_text('{"prompt": "a cat"}\n')
    assert read(str(lines), own).texts == ["a cat"]
