"""`bkprune prune`: folders that load everywhere, say what they are, and are never half there."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bkprune
from bkprune import Inventory, PrunedUNet, bypassed, preset
from bkprune.check import check
from bkprune.export import FolderSettings, new_folder, student, write_folder
from bkprune.masks import mask_record, read_mask
from bkprune.models import load
from bkprune.presets import PRESETS
from tests.conftest import SMALL, build, forward
from tests.test_cli import refused
from tests.test_cli import run as bkprune_run

WHOLE = ["--dtype", "float32"]


def run(*words: Any) -> Any:
    return bkprune_run("prune", *words)


# --- what comes out ---------------------------------------------------------------------------


def _many_masks(inventory: Inventory) -> list[frozenset[str]]:
    dice = random.Random(0)
    masks = [preset(name, inventory) for name in PRESETS]
    while len(masks) < 33:
        share = dice.uniform(0.05, 0.7)
        masks.append(frozenset(n for n in inventory.names if dice.random() < share))
    return masks


FRESH = """
import sys, torch
from pathlib import Path
from diffusers import AutoModel, UNet2DConditionModel
inputs = torch.load(Path(sys.argv[1]) / "inputs.pt")
for folder in sorted(Path(sys.argv[1]).glob("mask-*")):
    trusted = any(folder.glob("*.py"))
    door = AutoModel if trusted else UNet2DConditionModel
    extra = {"trust_remote_code": True} if trusted else {}
    unet = door.from_pretrained(str(folder), **extra).eval()
    with torch.no_grad():
        torch.save(unet(*inputs).sample, folder / "out.pt")
assert "bkprune" not in sys.modules
"""


def test_33_masks_come_back_bitwise_in_a_fresh_process(
    teacher: Any, inventory: Inventory, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 7, 32, generator=generator)
    torch.save((sample, torch.tensor([10, 700]), text), tmp_path / "inputs.pt")
    expected, forms = {}, []
    for i, mask in enumerate(_many_masks(inventory)):
        plan = inventory.plan(mask)
        with bypassed(teacher, plan):
            expected[i] = forward(teacher)
        folder = tmp_path / f"mask-{i:02d}"
        folder.mkdir()
        chosen = student(teacher, inventory, plan)
        forms.append(chosen.form)
        pipeline = type("UNetAlone", (), {"vae": None})()
        write_folder(folder, pipeline, chosen, None, FolderSettings())
        twin, names = chosen.twin, chosen.unet.state_dict()
        assert {twin.teacher_key(k) if twin else k for k in names} <= set(teacher.state_dict())
        path = folder / "diffusion_pytorch_model.safetensors"
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size == header + 4 * chosen.n_params
    assert forms[:3] == ["plain"] * 3
    assert forms.count("pruned") > 20
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # bits depend on it
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path)],
        cwd=tmp_path,
        env={
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "not expected" not in done.stderr
    for i, output in expected.items():
        assert torch.equal(torch.load(tmp_path / f"mask-{i:02d}" / "out.pt"), output)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emoji model without two blocks, in the form that needs our class."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    mask = "mid_block.attentions.0,up_blocks.1.resnets.0"
    assert run("emoji", "--mask", mask, "--out", out, *WHOLE, "-q").exit_code == 0
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "out"
    assert run("emoji", "--mask", "bk-sdm-base", "--out", out, "-q").exit_code == 0
    return out


def picture(pipeline: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    return pipeline("red heart", num_inference_steps=2, generator=generator, output_type="np")


def test_a_folder_of_each_form_draws_what_the_bypassed_teacher_draws(
    pruned: Path, base: Path
) -> None:
    for folder in (pruned, base):
        assert check(folder).is_same
        teacher = load("emoji")
        inventory = Inventory.of(teacher.unet)
        with bypassed(teacher.unet, inventory.plan(read_mask(str(folder), inventory))):
            expected = picture(teacher).images
        assert (picture(bkprune.load(folder)).images == expected).all()


def test_the_plain_folder_is_ordinary_diffusers(base: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(base, variant="fp16")
    assert type(pipeline.unet) is UNet2DConditionModel
    assert not list(base.rglob("*.py"))
    assert (base / "NOTICE").exists()
    with safe_open(base / "unet/diffusion_pytorch_model.fp16.safetensors", framework="pt") as file:
        assert len(list(file.keys())) == 442


def test_stock_code_refuses_the_pruned_folder_and_ours_is_strict(
    pruned: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="bkprune:"):
        UNet2DConditionModel.from_pretrained(pruned / "unet")
    name = "diffusion_pytorch_model.safetensors"
    weights = load_file(pruned / "unet" / name)
    config = (pruned / "unet" / "config.json").read_text()
    first = next(key for key in weights if key.endswith("conv1.weight"))
    for i, (change, words) in enumerate(
        (
            ({k: v for k, v in weights.items() if k != first}, "missing keys"),
            ({**weights, "mid_block.attentions.0.norm.weight": torch.ones(4)}, "unexpected keys"),
            ({**weights, first: torch.ones(3, 3)}, first),
        )
    ):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "config.json").write_text(config)
        save_file(change, folder / name, metadata={"format": "pt"})
        with pytest.raises((ValueError, RuntimeError), match=words):
            PrunedUNet.from_pretrained(folder)
        with pytest.raises(ValueError, match=words):
            load(folder)


def test_a_header_that_lies_about_its_size(pruned: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((pruned / "unet" / "config.json").read_text())
    data = (pruned / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    for i, bad in enumerate((data[:-100], (2**40).to_bytes(8, "little") + data[8:])):
        (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(bad)
        with pytest.raises(ValueError, match="truncated or corrupt"):
            load(tmp_path)
        assert i < 2


def test_the_card_says_what_it_is(pruned: Path, base: Path) -> None:
    card = (base / "README.md").read_text()
    assert card.startswith("---\n")
    assert "14 of 38 U-Net blocks removed" in card
    assert "8,765,028 | 5,903,940 | 0.674x" in card
    assert "no attention matmuls" in card
    assert 'variant="fp16"' in card
    assert "trust_remote_code" not in card
    assert "trust_remote_code=True" in (pruned / "README.md").read_text()
    assert (pruned / "unet.png").read_bytes().startswith(b"\x89PNG")
    for path in pruned.rglob("*.json"):
        assert "/" not in json.loads(path.read_text()).get("_name_or_path", "")


def test_licence_and_safety_settings_are_carried(
    tmp_path: Path, edit_json: Callable[..., None]
) -> None:
    teacher = tmp_path / "teacher"
    assert run("emoji", "--mask", "mid_block", "--out", teacher, "-q").exit_code == 0
    checker = teacher / "safety_checker"
    checker.mkdir()
    (checker / "config.json").write_text('{"kept": true}')
    (checker / "evil.py").write_text("raise SystemExit")
    entry = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    edit_json(teacher / "model_index.json", safety_checker=entry, requires_safety_checker=True)
    (teacher / "README.md").write_text("---\nlicense: openrail\nbase: x\n---\nwords")
    (teacher / "LICENSE.txt").write_text("the licence")
    out = tmp_path / "out"
    assert (
        run(teacher, "--mask", "bk-sdm-base", "--out", out, "-q").exit_code == 2
    )  # pruned: no mid
    assert run(teacher, "--mask", "up_blocks.0.resnets.1", "--out", out, "-q").exit_code == 0
    index = json.loads((out / "model_index.json").read_text())
    assert index["safety_checker"] == entry
    assert index["requires_safety_checker"] is True
    assert (out / "safety_checker" / "config.json").exists()
    assert not list(out.rglob("evil.py"))
    assert "license: openrail" in (out / "README.md").read_text()
    assert (out / "LICENSE.txt").read_text() == "the licence"


def test_a_large_net_is_sharded(tmp_path: Path) -> None:
    args = ["--mask", "bk-sdm-base", "--out", tmp_path / "o", "--max-shard-size", "10MB", "-q"]
    assert run("emoji", *WHOLE, *args).exit_code == 0
    assert len(list((tmp_path / "o" / "unet").glob("*-of-*.safetensors"))) > 1
    assert check(tmp_path / "o").is_same


def test_a_unet_alone_gives_a_unet_folder(unet_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(unet_folder, "--mask", "mid_block.attentions.0", "--out", out, "--form", "padded")
    assert result.exit_code == 0, result.output
    assert (out / "config.json").exists()
    result = run("--check", out)
    assert result.exit_code == 0
    assert "bitwise the same" in result.stdout


# --- again, in the way, and broken ---------------------------------------------------------------


def test_again_does_nothing_and_others_are_left_alone(base: Path, tmp_path: Path) -> None:
    before = (base / "README.md").stat().st_mtime_ns
    result = run("emoji", "--mask", "bk-sdm-base", "--out", base)
    assert "up to date" in result.stderr
    assert (base / "README.md").stat().st_mtime_ns == before
    refused(
        run("emoji", "--mask", "mid_block", "--out", base), str(base), "another mask", "--force"
    )
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years")
    refused(run("emoji", "--mask", "mid_block", "--out", theirs), "not a folder that bkprune")
    assert (theirs / "thesis.tex").read_text() == "years"
    forced = run("emoji", "--mask", "mid_block", "--out", theirs, "--force", "-q")
    assert forced.exit_code == 0
    assert not (theirs / "thesis.tex").exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bkprune.export._sync", full)
    refused(run("emoji", "--mask", "mid_block", "--out", tmp_path / "o", "-q"), "No space left")
    assert list(tmp_path.iterdir()) == []
    old = tmp_path / "old"
    old.mkdir()
    (old / "kept").write_text("yes")
    with pytest.raises(OSError, match="No space"), new_folder(old, force=True) as folder:
        (folder / "new").write_text("no")
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert (old / "kept").exists()


def test_mask_files(teacher: Any, inventory: Inventory, tmp_path: Path) -> None:
    mask = preset("bk-sdm-base", inventory)
    record = {**mask_record(mask, inventory), "why": "because"}
    path = tmp_path / "winner.json"
    path.write_text(json.dumps(record))
    assert read_mask(str(path), inventory) == mask
    assert read_mask("bk-sdm-base", inventory) == mask
    (tmp_path / "names.txt").write_text("# mine\nmid_block\n\nup_blocks.3.attentions.*\n")
    assert len(read_mask(str(tmp_path / "names.txt"), inventory)) == 6
    (tmp_path / "list.json").write_text('["mid_block"]')
    assert len(read_mask(str(tmp_path / "list.json"), inventory)) == 3
    removed = record["removed"]
    for change, words in (
        ({"removed": removed[:-1]}, "its stamp .* does not fit"),
        ({"removed": "all"}, "a list of block names"),
        ({"removed": [*removed, "mid_blok"], "stamp": None}, "does not fit"),
    ):
        path.write_text(json.dumps({**record, **change}))
        with pytest.raises(ValueError, match=words):
            read_mask(str(path), inventory)
    narrow = build({**SMALL, "block_out_channels": (16, 32, 64, 64)})
    other = mask_record(mask, Inventory.of(narrow))
    path.write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"winner\.json: made for another U-Net"):
        read_mask(str(path), inventory)
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        read_mask(str(path), inventory)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["emoji"], ["--mask"]),
        ([], ["MODEL"]),
        (["emoji", "--mask", "mid_blok"], ["mid_blok", "mid_block"]),
        (["emoji", "--mask", "nowhere.json"], ["nowhere.json", "cannot be read"]),
        (["emoji", "--mask", "mid_block", "--form", "round"], ["--form 'round'", "padded"]),
        (
            ["emoji", "--mask", "up_blocks.3.resnets.1", "--form", "padded"],
            ["up_blocks.3.attentions.1 stays", "--form pruned"],
        ),
        (["emoji", "--mask", "mid_block", "--dtype", "int3"], ["--dtype 'int3'", "bfloat16"]),
        (["nowhere", "--mask", "mid_block"], ["nowhere", "no such file"]),
        (["emoji", "--mask", "mid_block", "--check", "x"], ["--check"]),
        (["--check", "nowhere"], ["nowhere"]),
    ],
)
def test_bad_input_is_one_line(args: list[str], words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(run(*args, *(["--out", out] if "--check" not in args else [])), *words)
    assert not out.exists()
