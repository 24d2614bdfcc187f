"""Sources in every form, encoded once; what cannot be read is counted and named."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from bkprune.caching import Cache, CacheSettings, fill
from bkprune.calibration import encode_images, encode_prompts, sample_generator
from bkprune.cli import app
from bkprune.data import read_pairs
from bkprune.models import BUILT_IN, load
from bkprune.sources import Source


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (i * 37 % 255, i * 91 % 255, 40)).save(buffer, format="png")
    return buffer.getvalue()


def shard(path: Path, n: int, first: int = 0, *, spoil: int | None = None) -> None:
    with tarfile.open(path, "w") as archive:
        for i in range(first, first + n):
            data = b"not a picture" if i == spoil else png(i)
            for name, content in ((f"{i:05d}.png", data), (f"{i:05d}.txt", f"tile {i}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def emoji() -> Any:
    return load("emoji", dtype=torch.float32)


def small(**more: Any) -> CacheSettings:
    return CacheSettings(**{"size": 16, "shard_size": 4, "batch_size": 4, **more})


def filled(folder: Path, emoji: Any, text: str, **more: Any) -> Cache:
    source = Source(text)
    settings = small(**more)
    fill(folder, emoji, source.examples(16), source.key, settings)
    return Cache(folder)


def captions(cache: Cache) -> int:
    return len(cache)


# --- forms ------------------------------------------------------------------------------------


def test_every_form_gives_the_same_latents(emoji: Any, tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="the extra `train` is not installed")
    datasets = pytest.importorskip("datasets", reason="the extra `train` is not installed")
    n = 6
    listed, beside = tmp_path / "listed", tmp_path / "beside"
    for folder in (listed, beside):
        folder.mkdir()
        for i in range(n):
            (folder / f"{i}.png").write_bytes(png(i))
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"tile {i}"}) for i in range(n)]
    (listed / "metadata.jsonl").write_text("\n".join(lines))
    for i in range(n):
        (beside / f"{i}.txt").write_text(f"tile {i}\n")
    shard(tmp_path / "s-000.tar", 3)
    shard(tmp_path / "s-001.tar", 3, first=3)
    rows = {
        "image": [{"bytes": png(i), "path": None} for i in range(n)],
        "text": [f"tile {i}" for i in range(n)],
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "hf"))
    texts = {
        "listed": str(listed),
        "beside": str(beside),
        "shards": str(tmp_path / "s-{000..001}.tar"),
        "hf": str(tmp_path / "hf"),
    }
    batches = {}
    for name, text in texts.items():
        cache = filled(tmp_path / f"cache-{name}", emoji, text)
        generators = [sample_generator(0, i) for i in range(n)]
        batches[name] = cache.batch(range(n), generators)
        assert len(cache) == n
        assert cache.index["examples"] == [f"tile {i}" for i in range(n)]
    for batch in batches.values():
        assert torch.equal(batch.latents, batches["listed"].latents)
        assert torch.equal(batch.embeddings, batches["listed"].embeddings)


def test_what_is_cached_is_what_the_networks_give(emoji: Any, tmp_path: Path) -> None:
    pairs = read_pairs(BUILT_IN["emoji"] / "pairs.zip").split("heldout").subset(range(5))
    folder = tmp_path / "cache"
    examples = ((pairs.image(i, 64), c) for i, c in enumerate(pairs.captions))
    fill(folder, emoji, examples, "x", CacheSettings(64, shard_size=3, batch_size=2))
    tensors = load_file(folder / "shard-000000.safetensors")
    expected = encode_images(emoji.vae, pairs.images(64), 5)[:3]
    assert torch.allclose(tensors["mean"].float(), expected, atol=2e-3)
    turned = encode_images(emoji.vae, pairs.images(64).flip(-1), 5)[:3]
    assert torch.allclose(tensors["mean_flipped"].float(), turned, atol=2e-3)
    text = encode_prompts(emoji, pairs.captions[:3])[0]
    found = tensors["embedding"][tensors["caption"]].float()
    assert torch.allclose(found, text, atol=5e-3)
    batch = Cache(folder).batch([4, 0], [sample_generator(1, i) for i in range(2)])
    assert batch.latents.shape == (2, 4, 16, 16)
    assert batch.embeddings.shape == (2, 24, 128)


def test_prompts_alone_let_the_teacher_draw(emoji: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("red heart\ncat face\nred heart\n")
    cache = filled(tmp_path / "cache", emoji, str(tmp_path / "prompts.txt"), size=64, steps=2)
    tensors = load_file(tmp_path / "cache" / "shard-000000.safetensors")
    assert tensors["mean"].shape == (3, 4, 16, 16)
    assert not torch.equal(tensors["mean"][0], tensors["mean"][2])  # a seed of its own each
    assert len(tensors["embedding"]) == 2
    assert captions(cache) == 3


# --- interruptions and order ------------------------------------------------------------------


def test_an_interrupted_cache_goes_on(emoji: Any, tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="the extra `train` is not installed")
    shard(tmp_path / "s.tar", 11)
    source = Source(str(tmp_path / "s.tar"))
    whole = filled(tmp_path / "whole", emoji, source.text)

    def cut_off() -> Any:
        for i, example in enumerate(source.examples(16)):
            if i == 6:
                raise KeyboardInterrupt
            yield example

    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        fill(folder, emoji, cut_off(), source.key, small())
    with pytest.raises(ValueError, match=r"not complete \(4 pairs so far\)"):
        Cache(folder)
    again = filled(folder, emoji, source.text)
    assert len(again) == len(whole) == 11
    for path in sorted(folder.glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()


def test_many_shards_are_shuffled_by_groups(emoji: Any, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("webdataset", reason="the extra `train` is not installed")
    shard(tmp_path / "s.tar", 23)
    cache = filled(tmp_path / "cache", emoji, str(tmp_path / "s.tar"))
    monkeypatch.setattr("bkprune.caching._N_OPEN", 2)
    order = cache.order(0, 7)
    assert sorted(order) == list(range(23))
    assert order != cache.order(1, 7)
    reads: list[int] = []
    read = cache._read

    def counted(i: int) -> Any:
        reads.append(i)
        return read(i)

    monkeypatch.setattr(cache, "_read", counted)
    for index in order:
        cache.batch([index], [sample_generator(0, index)])
    assert sorted(reads) == list(range(6))  # each shard once


def test_caches_side_by_side_are_one(emoji: Any, tmp_path: Path) -> None:
    for i, prompts in enumerate(("red heart\ncat face\n", "house\n")):
        (tmp_path / f"{i}.txt").write_text(prompts)
        filled(tmp_path / "both" / str(i), emoji, str(tmp_path / f"{i}.txt"), steps=1)
    both = Cache(tmp_path / "both")
    assert len(both) == 3
    assert sorted(both.order(0, 1)) == [0, 1, 2]
    alone = Cache(tmp_path / "both" / "1").batch([0], [sample_generator(0, 0)])
    assert torch.equal(both.batch([2], [sample_generator(0, 0)]).latents, alone.latents)
    filled(tmp_path / "both" / "2", emoji, str(tmp_path / "1.txt"), steps=1, size=32)
    with pytest.raises(ValueError, match="made with another size"):
        Cache(tmp_path / "both")


# --- bad input ------------------------------------------------------------------------------------


def test_unreadable_pairs_are_counted_and_named(emoji: Any, tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="the extra `train` is not installed")
    shard(tmp_path / "s.tar", 12, spoil=5)
    source = Source(str(tmp_path / "s.tar"))
    folder = tmp_path / "cache"
    done = fill(folder, emoji, source.examples(16), source.key, small(max_bad=0.2))
    assert (done.n, done.n_bad) == (11, 1)
    assert "00005" in done.bad[0]
    with pytest.raises(ValueError, match=r"1 of 8 pairs cannot be read .*limit is 2\.0%.*00005"):
        fill(tmp_path / "strict", emoji, source.examples(16), source.key, small())


def test_a_shard_that_ends_early(emoji: Any, tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="the extra `train` is not installed")
    shard(tmp_path / "s-0.tar", 8)
    shard(tmp_path / "s-1.tar", 8, first=8)
    torn = tmp_path / "s-0.tar"
    torn.write_bytes(torn.read_bytes()[: 9 * 1024 + 700])
    source = Source(str(tmp_path / "s-{0..1}.tar"))
    done = fill(tmp_path / "c", emoji, source.examples(16), source.key, small(max_bad=0.9))
    assert done.n >= 8
    assert done.n_bad >= 1


def test_sources_that_are_none(emoji: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pictures in it"):
        Source(str(tmp_path / "empty")).examples(16)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "a.png").write_bytes(png(1))
    complaints = list(Source(str(tmp_path / "bare")).examples(16))
    assert "no caption" in str(complaints[0])
    with pytest.raises(ValueError, match=r"not one readable pair|cannot be read"):
        filled(tmp_path / "c", emoji, str(tmp_path / "bare"))
    with pytest.raises(ValueError, match="cannot be read"):
        list(Source(str(tmp_path / "none.tar")).examples(16))
    with pytest.raises(ValueError, match="no row with split 'odd'"):
        Source(str(BUILT_IN["emoji"] / "pairs.zip"), "odd").examples(16)


def test_a_cache_of_other_networks_or_settings_is_refused(emoji: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("red heart\n")
    text = str(tmp_path / "prompts.txt")
    cache = filled(tmp_path / "cache", emoji, text, steps=1)
    cache.check(emoji)
    with pytest.raises(ValueError, match=r"filled with another size \(16, now 32\)"):
        filled(tmp_path / "cache", emoji, text, size=32)
    other = load("emoji", dtype=torch.float32)
    with torch.no_grad():
        for parameter in other.vae.parameters():
            parameter.mul_(1.1)
    with pytest.raises(ValueError, match="made by another vae"):
        cache.check(other)
    path = tmp_path / "cache" / "shard-000000.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="missing or damaged"):
        Cache(tmp_path / "cache").batch([0], [sample_generator(0, 0)])
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="exists and is no cache"):
        filled(tmp_path / "theirs", emoji, text)
    with pytest.raises(ValueError, match="no cache; make one"):
        Cache(tmp_path / "theirs")


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("red heart\ncat face\n")
    words = ["cache", "emoji", "--data", str(tmp_path / "prompts.txt"), "--steps", "1"]
    for _ in range(2):
        result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "c"), "--json"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout) == {"pairs": 2, "unreadable": 0}
    missing = CliRunner().invoke(app, ["cache", "emoji", "--data", "nope", "--out", "x"])
    assert missing.exit_code == 2
    assert "nope" in missing.stderr
