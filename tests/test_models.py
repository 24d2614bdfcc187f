"""The one door: every form of model that comes in, and everything that must not."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel

from bkprune import Inventory, PrunedUNet, single_file
from bkprune.models import BUILT_IN, Parts, fingerprint, load, need, stored_dtype
from tests.conftest import SMALL, build, forward

WEIGHTS = "diffusion_pytorch_model.safetensors"
EMOJI = BUILT_IN["emoji"]


@pytest.fixture
def pipeline_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pipeline"
    shutil.copytree(EMOJI, folder, ignore=shutil.ignore_patterns("clip", "pairs.zip"))
    return folder


def test_the_built_in_model_is_a_whole_stable_diffusion_pipeline() -> None:
    pipeline = load("emoji")
    kinds = [type(getattr(pipeline, name)).__name__ for name in pipeline.components]
    assert kinds[:5] == [
        "AutoencoderKL",
        "CLIPTextModel",
        "CLIPTokenizer",
        "UNet2DConditionModel",
        "DDIMScheduler",
    ]
    inventory = Inventory.of(pipeline.unet)
    counts = [b.kind for b in inventory]
    assert (counts.count("residual"), counts.count("attention")) == (22, 16)
    n_params = sum(p.numel() for p in pipeline.unet.parameters())
    assert 5e6 <= n_params <= 9e6
    assert pipeline.unet.dtype == torch.float32
    assert not pipeline.unet.training


def test_folders(pipeline_folder: Path, unet_folder: Path, teacher: Any) -> None:
    assert fingerprint(load(pipeline_folder).unet) == fingerprint(load("emoji").unet)
    alone = load(unet_folder)
    assert torch.equal(forward(alone.unet), forward(teacher))
    assert alone.text_encoder is None
    with pytest.raises(ValueError, match=r"needs a text_encoder.*--text-encoder DIR"):
        need(alone, "text_encoder", "encoding captions")
    parts = Parts(EMOJI / "tokenizer", EMOJI / "text_encoder", EMOJI / "vae", "v_prediction")
    whole = load(unet_folder, parts)
    assert type(whole.text_encoder).__name__ == "CLIPTextModel"
    assert whole.tokenizer.model_max_length == 24
    assert whole.scheduler.config.prediction_type == "v_prediction"


def test_a_folder_may_hold_half_precision_alone(teacher: Any, tmp_path: Path) -> None:
    PrunedUNet.from_teacher(teacher, {}).half().save_pretrained(tmp_path, variant="fp16")
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    unet = load(tmp_path).unet
    assert unet.dtype == torch.float32
    assert load(tmp_path, dtype=torch.float16).unet.dtype == torch.float16


def test_a_text_encoder_need_not_be_clip(unet_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=37,
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    pipeline = load(unet_folder, Parts(text_encoder=tmp_path / "bert"))
    assert type(pipeline.text_encoder).__name__ == "BertModel"


def test_a_pruned_folder_loads_but_is_no_teacher(
    teacher: Any, inventory: Inventory, tmp_path: Path
) -> None:
    student = PrunedUNet.from_teacher(teacher, inventory.plan({"mid_block"}))
    student.save_pretrained(tmp_path)
    pipeline = load(tmp_path)
    assert torch.equal(forward(pipeline.unet), forward(student))
    with pytest.raises(ValueError, match="pruned already"):
        Inventory.of(pipeline.unet)


def test_a_pruned_pipeline_loads_and_its_module_path_is_part_of_the_file_format(
    tmp_path: Path,
) -> None:
    pipeline = load("emoji")
    plan = Inventory.of(pipeline.unet).plan({"mid_block", "up_blocks.1.resnets.0"})
    student = PrunedUNet.from_teacher(pipeline.unet, plan)
    pipeline.register_modules(unet=student)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["bkprune.bypass", "PrunedUNet"]
    expected = forward(student)
    assert torch.equal(forward(DiffusionPipeline.from_pretrained(tmp_path).unet.eval()), expected)
    assert torch.equal(forward(load(tmp_path).unet), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("conv_in.bias"), r"missing keys: conv_in\.bias"),
        (lambda w: w.update({"extra.weight": torch.ones(1)}), r"unexpected keys: extra\.weight"),
        (lambda w: w.update({"conv_in.bias": torch.ones(3)}), r"conv_in\.bias"),
        (lambda w: w["conv_in.bias"].fill_(torch.nan), r"NaN or infinite weights in conv_in\.bias"),
    ],
)
def test_loading_is_strict(
    unet_folder: Path, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    weights = load_file(unet_folder / WEIGHTS)
    change(weights)
    save_file(weights, unet_folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load(unet_folder)


@pytest.mark.parametrize("keep", [0, 7, 5000, -100])
def test_a_damaged_weight_file_is_named(unet_folder: Path, keep: int) -> None:
    path = unet_folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="truncated or corrupt"):
        load(unet_folder)


def test_a_header_that_lies_about_its_size_is_refused(unet_folder: Path) -> None:
    path = unet_folder / WEIGHTS
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(ValueError, match="truncated or corrupt"):
        load(unet_folder)


def test_what_is_no_model(tmp_path: Path, unet_folder: Path, edit_json: Any) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"neither model_index\.json"):
        load(empty)
    with pytest.raises(ValueError, match="no such file or folder"):
        load(tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(ValueError, match="AutoencoderKL, where a UNet2DConditionModel"):
        load(EMOJI / "vae")
    edit_json(unet_folder / "config.json", _class_name="FluxTransformer2DModel")
    with pytest.raises(ValueError, match="FluxTransformer2DModel, where"):
        load(unet_folder)
    (unet_folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        load(unet_folder)


def test_transformer_pipelines_are_refused(pipeline_folder: Path) -> None:
    index = json.loads((pipeline_folder / "model_index.json").read_text())
    del index["unet"]
    index |= {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (pipeline_folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="FluxPipeline has no U-Net"):
        load(pipeline_folder)


@pytest.mark.parametrize("part", ["scheduler", "text_encoder"])
def test_no_code_of_a_model_is_run(
    part: str, pipeline_folder: Path, edit_json: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    edit_json(pipeline_folder / "model_index.json", **{part: ["evil", "Thing"]})
    with pytest.raises(ValueError, match=r"asks to import evil\.Thing"):
        load(pipeline_folder)


# --- the original layout ---------------------------------------------------------------------

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def ldm_name(key: str) -> str:
    """A diffusers tensor name of a two-layer SD U-Net in the original layout."""
    head, *rest = key.split(".")
    outer = {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    if head in outer:
        return ".".join(["model.diffusion_model", outer[head], *rest])
    if head == "time_embedding":
        layer = {"linear_1": "0", "linear_2": "2"}[rest[0]]
        return ".".join(["model.diffusion_model.time_embed", layer, *rest[1:]])
    if head == "mid_block":
        kind, j, *leaf = rest
        block = {"resnets": 2 * int(j), "attentions": 1}[kind]
        return _block(f"middle_block.{block}", kind, leaf)
    i, kind, j, *leaf = rest
    if head == "down_blocks":
        if kind == "downsamplers":
            return f"model.diffusion_model.input_blocks.{3 * int(i) + 3}.0.op.{leaf[-1]}"
        slot = 1 if kind == "attentions" else 0
        return _block(f"input_blocks.{3 * int(i) + int(j) + 1}.{slot}", kind, leaf)
    if kind == "upsamplers":
        slot = 1 if i == "0" else 2
        return f"model.diffusion_model.output_blocks.{3 * int(i) + 2}.{slot}.conv.{leaf[-1]}"
    slot = 1 if kind == "attentions" else 0
    return _block(f"output_blocks.{3 * int(i) + int(j)}.{slot}", kind, leaf)


def _block(prefix: str, kind: str, leaf: list[str]) -> str:
    if kind == "resnets":
        leaf = [_RESNET[leaf[0]], *leaf[1:]]
    return ".".join(["model.diffusion_model", prefix, *leaf])


@pytest.fixture(scope="module")
def wide() -> Any:
    """SD v1 as the families say it, but narrower: 32 groups and 8 heads need 32-channel steps."""
    config = {**SMALL, "norm_num_groups": 32, "attention_head_dim": 8, "sample_size": 64}
    return build(config)


@pytest.fixture(scope="module")
def ldm(wide: Any) -> dict[str, Tensor]:
    return {ldm_name(key): t.clone() for key, t in wide.state_dict().items()}


def test_single_files_load_offline(wide: Any, ldm: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(ldm, tmp_path / "net.safetensors")
    torch.save({"state_dict": ldm, "global_step": 7}, tmp_path / "net.ckpt")
    expected = forward(wide)
    for name in ("net.safetensors", "net.ckpt"):
        pipeline = load(tmp_path / name)
        assert torch.equal(forward(pipeline.unet), expected)
        assert pipeline.scheduler.config.prediction_type == "epsilon"
        assert pipeline.text_encoder is None


_VAE = [
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.0\.resnets\.(\d)", r"up.1.block.\1"),
    (r"up_blocks\.1\.resnets\.(\d)", r"up.0.block.\1"),
    (r"up_blocks\.0\.upsamplers\.0", "up.1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_", "mid.attn_1."),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
]


def test_a_single_file_brings_its_vae_and_text_encoder(
    wide: Any, ldm: dict[str, Tensor], tmp_path: Path, monkeypatch: Any
) -> None:
    families = single_file.families()
    vae_config = {
        **families["sd_v1"]["vae"],
        "block_out_channels": [32, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 1,
    }
    text_config = {**families["sd_v1"]["text_encoder"], "hidden_size": 32, "num_hidden_layers": 1}
    text_config |= {"intermediate_size": 64, "num_attention_heads": 2}
    families["sd_v1"] |= {"vae": vae_config, "text_encoder": text_config}
    monkeypatch.setattr(single_file, "families", lambda: families)
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(vae_config).eval()
    text = CLIPTextModel(CLIPTextConfig(**text_config)).eval()
    weights = dict(ldm)
    for key, tensor in vae.state_dict().items():
        name = key
        for pattern, new in _VAE:
            name = re.sub(pattern, new, name)
        is_linear = ".attn_1." in name and tensor.ndim == 2
        weights[f"first_stage_model.{name}"] = tensor[..., None, None] if is_linear else tensor
    for key, tensor in text.state_dict().items():
        weights[f"cond_stage_model.transformer.text_model.{key}"] = tensor
    torch.save({"state_dict": weights}, tmp_path / "net.ckpt")
    pipeline = load(tmp_path / "net.ckpt")
    pixels, ids = torch.rand(1, 3, 16, 16), torch.arange(77)[None]
    with torch.no_grad():
        assert torch.equal(
            pipeline.vae.encode(pixels).latent_dist.mean, vae.encode(pixels).latent_dist.mean
        )
        latents = torch.rand(1, 4, 8, 8)
        assert torch.equal(pipeline.vae.decode(latents).sample, vae.decode(latents).sample)
        got = pipeline.text_encoder(ids).last_hidden_state
        assert torch.equal(got, text(ids).last_hidden_state)
    assert pipeline.tokenizer is None
    weights.pop("cond_stage_model.transformer.text_model.final_layer_norm.bias")
    torch.save({"state_dict": weights}, tmp_path / "net.ckpt")
    with pytest.raises(ValueError, match=r"CLIPTextModel: missing keys: final_layer_norm\.bias"):
        load(tmp_path / "net.ckpt")


def test_single_files_are_strict(ldm: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    for change, message in (
        ({"model.diffusion_model.extra.weight": torch.ones(1)}, "an unknown variant"),
        ({"model.diffusion_model.out.2.bias": torch.ones(9)}, r"mismatched keys: conv_out\.bias"),
    ):
        save_file({**ldm, **change}, path)
        with pytest.raises(ValueError, match=message):
            load(path)
    less = {k: v for k, v in ldm.items() if k != "model.diffusion_model.out.2.bias"}
    save_file(less, path)
    with pytest.raises(ValueError, match=r"missing keys: conv_out\.bias"):
        load(path)


def test_pickles_with_code_are_refused_and_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    path = tmp_path / "net.ckpt"
    torch.save({"state_dict": Evil()}, path)
    with pytest.raises(ValueError, match="more than tensors"):
        load(path)
    path.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ValueError, match="more than tensors"):
        load(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["double_blocks.0.img_attn.qkv.weight"], "Flux or SD3 transformer"),
        (["encoder.down.0.block.0.conv1.weight"], "a VAE, where a U-Net is expected"),
        (["down_blocks.0.resnets.0.conv1.weight"], "diffusers weights without their config"),
        (["layer.weight"], "no U-Net in the original layout"),
    ],
)
def test_other_networks_are_told_apart(names: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_file({name: torch.ones(1) for name in names}, path)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(ValueError, match=r"\.safetensors or \.ckpt file is expected"):
        load(tmp_path / "notes.md")
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04junk")
    with pytest.raises(ValueError, match="truncated or corrupt"):
        load(tmp_path / "cut.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="holds a list"):
        load(tmp_path / "list.ckpt")


def test_the_stored_dtype_is_that_of_the_weights_that_are_loaded(
    teacher: Any, tmp_path: Path
) -> None:
    teacher.save_pretrained(tmp_path / "both")
    half = build(SMALL).half()
    half.save_pretrained(tmp_path / "both", variant="fp16")
    half.save_pretrained(tmp_path / "half", variant="fp16")
    assert stored_dtype(tmp_path / "both") == torch.float32
    assert stored_dtype(tmp_path / "half") == torch.float16
    assert stored_dtype("emoji") == torch.float16
