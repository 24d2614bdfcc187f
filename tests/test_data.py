"""Caption files and images: what is read, and what is refused by name."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from bkprune.data import Pairs, read_pairs, read_prompts, read_source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = []
    for i, size in enumerate([(64, 64), (100, 50), (20, 40)]):
        Image.new("RGB", size, (255, 0, 50 * i)).save(tmp_path / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": f"red {i}", "split": "ab"[i % 2]})
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def test_pairs_are_cropped_to_one_size(folder: Path) -> None:
    pairs = read_pairs(folder)
    images = pairs.images(32)
    assert images.shape == (3, 3, 32, 32)
    assert torch.equal(images[0, :, 5, 5], torch.tensor([1.0, -1.0, -1.0]))
    assert pairs.captions == ["red 0", "red 1", "red 2"]
    assert pairs.split("a").captions == ["red 0", "red 2"]
    assert pairs.subset([2, 2]).captions == ["red 2", "red 2"]


def test_a_zip_and_a_csv_read_like_the_folder(folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "pairs.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in folder.glob("[0-9m]*"):
            file.write(path, path.name)
    assert torch.equal(read_pairs(archive).images(16), read_pairs(folder).images(16))
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,text\n1.png,one\n")
    assert read_pairs(folder).captions == ["one"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no pairs in it"),
        ('{"file_name": "0.png"}\n', r"line 1: no column text \(found file_name\)"),
        ('{"image": "0.png", "caption": "x"}\n', "no column file_name or text"),
        ("{oops\n", "line 1: not JSON"),
        ("[1]\n", "not a JSON object"),
    ],
)
def test_caption_files_that_are_refused(folder: Path, text: str, message: str) -> None:
    (folder / "metadata.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pairs(folder)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../secret.png", "..\\x"])
def test_names_may_not_leave_the_folder(folder: Path, name: str) -> None:
    pairs = Pairs(folder, ({"file_name": name, "text": "x"},))
    with pytest.raises(ValueError, match="leaves the folder"):
        pairs.images(8)


def test_missing_and_unreadable_images_are_named(folder: Path) -> None:
    (folder / "1.png").write_bytes(b"not a picture")
    (folder / "2.png").unlink()
    pairs = read_pairs(folder)
    with pytest.raises(ValueError, match=r"1\.png: not a readable image"):
        pairs.image(1, 8)
    with pytest.raises(ValueError, match=r"2\.png is in the caption file but not there"):
        pairs.image(2, 8)


def test_sources(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n\n a dog \n")
    assert read_source(str(tmp_path / "p.txt")) == ["a cat", "a dog"]
    assert isinstance(read_source(str(folder)), Pairs)
    (tmp_path / "p.txt").write_text("\n")
    with pytest.raises(ValueError, match="no prompts"):
        read_prompts(tmp_path / "p.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no metadata\.jsonl"):
        read_pairs(tmp_path / "empty")
    with pytest.raises(ValueError, match="no such folder"):
        read_pairs(tmp_path / "nowhere")
