"""What people do with a compact U-Net, done with one: stock pipelines, adapters, exports."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from bkprune import Inventory, PrunedUNet, bypassed, ldm, preset
from bkprune.cli import app
from bkprune.counting import Call
from bkprune.export import student
from bkprune.graphs import export_onnx
from bkprune.models import load
from bkprune.sampling import split_sampling
from tests.conftest import build
from tests.test_models import ldm_name

NO_TWIN = ("mid_block.attentions.0", "up_blocks.1.resnets.0", "down_blocks.0.pairs.1")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def mask_of(form: str, inventory: Inventory) -> frozenset[str]:
    return preset("bk-sdm-base", inventory) if form == "plain" else inventory.expand(NO_TWIN)


@pytest.fixture(scope="module")
def emoji() -> Any:
    return load("emoji")


@pytest.fixture(scope="module", params=["plain", "pruned"])
def compact(request: Any, emoji: Any) -> tuple[Any, dict[str, str], str]:
    """A pipeline with a compact U-Net of its own weights, the plan, and the form."""
    inventory = Inventory.of(emoji.unet)
    plan = inventory.plan(mask_of(request.param, inventory))
    unet = student(emoji.unet, inventory, plan, request.param).unet
    unet.load_state_dict({k: v.clone() for k, v in unet.state_dict().items()}, assign=True)
    return type(emoji)(**{**emoji.components, "unet": unet}), dict(plan), request.param


def draw(pipeline: Any, **more: Any) -> np.ndarray[Any, Any]:
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 4, "output_type": "np", **more}
    generator = torch.Generator().manual_seed(5)
    out: np.ndarray[Any, Any] = pipeline("red heart", generator=generator, **settings).images
    return out


SCHEDULERS = [
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_text_to_image_with_every_common_scheduler(
    scheduler: Any, compact: Any, emoji: Any
) -> None:
    small, plan, _ = compact
    made = scheduler.from_config(emoji.scheduler.config)
    ours = draw(type(small)(**{**small.components, "scheduler": made}))
    teacher = type(emoji)(
        **{**emoji.components, "scheduler": scheduler.from_config(emoji.scheduler.config)}
    )
    with bypassed(emoji.unet, plan):
        expected = draw(teacher)
    assert np.isfinite(ours).all()
    assert (ours == expected).all()


def test_image_to_image(compact: Any, emoji: Any) -> None:
    small, plan, _ = compact
    start = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    ours = draw(StableDiffusionImg2ImgPipeline(**small.components), image=start, strength=0.6)
    with bypassed(emoji.unet, plan):
        teacher = StableDiffusionImg2ImgPipeline(**emoji.components)
        expected = draw(teacher, image=start, strength=0.6)
    assert (ours == expected).all()


def test_inpainting_with_nine_channels(emoji: Any) -> None:
    unet = build({**dict(emoji.unet.config), "in_channels": 9})
    inventory = Inventory.of(unet)
    plan = inventory.plan(mask_of("plain", inventory))
    image, hole = torch.rand(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)
    hole[..., 16:48, 16:48] = 1
    pictures = []
    for net in (student(unet, inventory, plan).unet, PrunedUNet.from_teacher(unet, plan), None):
        parts = {**emoji.components, "unet": net or unet}
        pipeline = StableDiffusionInpaintPipeline(**parts)
        with bypassed(unet, {} if net is not None else plan):
            pictures.append(draw(pipeline, image=image, mask_image=hole, height=64, width=64))
    assert (pictures[0] == pictures[2]).all()
    assert (pictures[1] == pictures[2]).all()


def test_a_controlnet_of_the_teacher_fits_the_pruned_form(emoji: Any) -> None:
    """Also without a mid block; a plain twin takes one made of itself, if it has a mid block."""
    torch.manual_seed(0)
    inventory = Inventory.of(emoji.unet)
    plan = inventory.plan(preset("bk-sdm-small", inventory))
    pruned = PrunedUNet.from_teacher(emoji.unet, plan)
    base = inventory.plan(preset("bk-sdm-base", inventory))
    plain = student(emoji.unet, inventory, base).unet
    control = torch.rand(1, 3, 64, 64)
    hints = {"conditioning_embedding_out_channels": (8, 16, 32)}
    for unet in (pruned, plain):
        source = emoji.unet if unet is pruned else plain
        net = ControlNetModel.from_unet(source, **hints)
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if name.startswith("controlnet_"):
                    parameter.copy_(0.02 * torch.randn_like(parameter))
        parts = {**emoji.components, "unet": unet, "controlnet": net}
        pipeline = StableDiffusionControlNetPipeline(**parts)
        free = draw(pipeline, image=control, controlnet_conditioning_scale=0.0)
        held = draw(pipeline, image=control)
        assert (free != held).any()
        if unet is pruned:
            with bypassed(emoji.unet, plan):
                whole = {**emoji.components, "controlnet": net}
                expected = draw(StableDiffusionControlNetPipeline(**whole), image=control)
            assert (held == expected).all()


# --- LoRA ---------------------------------------------------------------------------------------


def lora_file(emoji: Any, folder: Path) -> Path:
    """A LoRA as trained on the teacher: every attention of its U-Net, random weights."""
    peft = pytest.importorskip("peft", reason="the extra `lora` is not installed")
    unet = UNet2DConditionModel.from_config(emoji.unet.config)
    settings = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v"])
    unet.add_adapter(settings)
    generator = torch.Generator().manual_seed(0)
    layers = {
        name.replace(".default", ""): 0.1 * torch.randn(p.shape, generator=generator)
        for name, p in unet.named_parameters()
        if ".lora_" in name
    }
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder / "pytorch_lora_weights.safetensors"


def record_of(emoji: Any, compact: Any) -> dict[str, Any]:
    from bkprune.masks import mask_record

    _, plan, form = compact
    inventory = Inventory.of(emoji.unet)
    mask = mask_of(form, inventory)
    chosen = student(emoji.unet, inventory, inventory.plan(mask), form)
    return {**mask_record(mask, inventory, plan), "modules": chosen.modules}


@pytest.mark.filterwarnings("ignore:.*(Already found a .peft_config|key .*missing).*")
def test_a_lora_of_the_teacher_attaches_without_its_removed_blocks(
    compact: Any, emoji: Any, tmp_path: Path
) -> None:
    from bkprune.lora import load_lora

    path = lora_file(emoji, tmp_path)
    small, plan, form = compact
    small = type(small)(**{**small.components, "unet": copy.deepcopy(small.unet)})
    before = draw(small)
    with pytest.warns(UserWarning, match="tensors skipped") as heard:
        report = load_lora(small, path, record_of(emoji, compact))
    n_gone = 6 if form == "plain" else 2
    assert (report.n_skipped, len(report.blocks)) == (12 * n_gone, n_gone)
    assert f"{12 * n_gone} of 192 tensors skipped, for {n_gone} blocks" in str(heard[0].message)
    attached = draw(small)
    assert (attached != before).any()
    teacher = type(emoji)(**{**emoji.components, "unet": copy.deepcopy(emoji.unet)})
    teacher.load_lora_weights(path)
    with bypassed(teacher.unet, plan):
        expected = draw(teacher)
    assert np.abs(attached - expected).max() < 1e-4
    small.fuse_lora()
    small.unload_lora_weights()
    assert np.abs(draw(small) - expected).max() < 1e-3
    del teacher


def test_lora_files_that_do_not_belong(compact: Any, emoji: Any, tmp_path: Path) -> None:
    from bkprune.lora import load_lora

    path = lora_file(emoji, tmp_path)
    small, _, _ = compact
    record = record_of(emoji, compact)
    state = load_file(path)
    kept = next(k for k in state if "up_blocks.3.attentions.0" in k and "lora_A" in k)
    for change, words in (
        ({kept: torch.ones(2, 999)}, "another architecture"),
        ({"unet.elsewhere.to_q.lora_A.weight": torch.ones(2, 2)}, "elsewhere"),
    ):
        save_file({**state, **change}, tmp_path / "bad.safetensors")
        with pytest.raises(ValueError, match=words):
            load_lora(small, tmp_path / "bad.safetensors", record)
    (tmp_path / "lora.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="pickled LoRA files are refused"):
        load_lora(small, tmp_path / "lora.bin", record)
    (tmp_path / "torn.safetensors").write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="truncated"):
        load_lora(small, tmp_path / "torn.safetensors", record)


def dreambooth(
    pipeline: Any, parameters: list[Any], steps: int, rate: float
) -> tuple[float, float]:
    """The stock recipe in short: instance prompt, noise prediction, AdamW; loss on fixed noise."""
    unet = pipeline.unet
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(4, 3, 64, 64)
    images[:, 0, 16:48, 16:48] = 1
    with torch.no_grad():
        latents = pipeline.vae.encode(images).latent_dist.mean * pipeline.vae.config.scaling_factor
        text = pipeline.encode_prompt("sks square", "cpu", 4, False)[0]

    def loss(at: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        predicted: torch.Tensor = unet(schedule.add_noise(latents, noise, at), at, text).sample
        return (predicted - noise).square().mean()

    fixed = (torch.tensor([100, 300, 500, 700]), torch.randn(latents.shape, generator=generator))
    with torch.no_grad():
        before = float(loss(*fixed))
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    unet.train()
    for _ in range(steps):
        at = torch.randint(0, 1000, (4,), generator=generator)
        optimizer.zero_grad()
        loss(at, torch.randn(latents.shape, generator=generator)).backward()
        optimizer.step()
    unet.eval()
    with torch.no_grad():
        return before, float(loss(*fixed))


def test_personalisation_with_the_stock_recipe(compact: Any) -> None:
    small, _, _ = compact
    unet = copy.deepcopy(small.unet)
    pipeline = type(small)(**{**small.components, "unet": unet})
    before, after = dreambooth(pipeline, list(unet.parameters()), 25, 3e-4)
    assert after < 0.8 * before


def test_lora_training_on_the_compact_net(compact: Any) -> None:
    peft = pytest.importorskip("peft", reason="the extra `lora` is not installed")
    small, _, _ = compact
    unet = copy.deepcopy(small.unet)
    unet.requires_grad_(False)
    unet.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    pipeline = type(small)(**{**small.components, "unet": unet})
    trained = [p for p in unet.parameters() if p.requires_grad]
    before, after = dreambooth(pipeline, trained, 25, 1e-2)
    assert after < before


# --- other forms ----------------------------------------------------------------------------------


def test_torch_compile_traces_every_form_whole(compact: Any) -> None:
    small, _, _ = compact
    compiled: Any = torch.compile(small.unet, backend="aot_eager", fullgraph=True)
    sample, text = torch.randn(1, 4, 16, 16), torch.randn(1, 24, 128)
    with torch.no_grad():
        expected = small.unet(sample, torch.tensor(500), text).sample
        assert torch.allclose(compiled(sample, torch.tensor(500), text).sample, expected, atol=1e-5)


@pytest.mark.parametrize("form", ["plain", "padded", "pruned"])
def test_onnx_export_of_every_form(
    form: Any, teacher: Any, inventory: Inventory, tmp_path: Path
) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
    mask = {"mid_block", "up_blocks.3.attentions.1"} if form != "plain" else {"mid_block"}
    unet = student(teacher, inventory, inventory.plan(mask), form).unet
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 16, 16, generator=generator)
    text = torch.randn(1, 7, 32, generator=generator)
    args = (sample, torch.tensor([300]), text)
    export_onnx(unet, Call(args, {"return_dict": False}), tmp_path / "net.onnx")
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"))
    feed = {f"input_{i}": tensor.numpy() for i, tensor in enumerate(args)}
    got = session.run(None, {given.name: feed[given.name] for given in session.get_inputs()})[0]
    with torch.no_grad():
        expected = unet(*args).sample.numpy()
    assert np.abs(got - expected).max() < 1e-4


def test_original_names_are_those_of_the_original(teacher: Any) -> None:
    assert ldm.unet_names(teacher) == {key: ldm_name(key) for key in teacher.state_dict()}


def test_a_plain_twin_goes_to_one_file_and_back(tmp_path: Path, emoji: Any) -> None:
    out = tmp_path / "out"
    words = ["prune", "emoji", "--mask", "bk-sdm-base", "--out", str(out), "--dtype", "float32"]
    assert CliRunner().invoke(app, [*words, "--single-file", "-q"]).exit_code == 0
    path = out / "original.safetensors"
    folder = UNet2DConditionModel.from_pretrained(out / "unet")
    back = UNet2DConditionModel.from_single_file(
        str(path), config=str(out), subfolder="unet", local_files_only=True
    )
    weights = folder.state_dict()
    assert set(back.state_dict()) == set(weights)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in back.state_dict().items())
    vae = AutoencoderKL.from_single_file(
        str(path), config=str(out), subfolder="vae", local_files_only=True
    )
    own = emoji.vae.state_dict()
    assert all(torch.equal(tensor, own[key]) for key, tensor in vae.state_dict().items())
    text = {k.rsplit("text_model.", 1)[1] for k in load_file(path) if k.startswith("cond_stage")}
    assert text == {k.removeprefix("text_model.") for k in emoji.text_encoder.state_dict()}


def test_what_the_original_layout_cannot_say(teacher: Any, inventory: Inventory) -> None:
    for mask, form, words in (
        ({"up_blocks.1.resnets.0"}, "pruned", "PrunedUNet"),
        ({"down_blocks.0.pairs.1", "up_blocks.3.pairs.1"}, "plain", "same number of layers"),
        ({"up_blocks.3.attentions.0"}, "padded", "padded"),
    ):
        unet = student(teacher, inventory, inventory.plan(mask), form).unet  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=words):
            ldm.unet_names(unet)


# --- split sampling -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler, DPMSolverMultistepScheduler])
def test_split_sampling_runs_from_the_student_to_the_teacher(
    scheduler: Any, compact: Any, emoji: Any
) -> None:
    small, _, _ = compact
    made = scheduler.from_config(emoji.scheduler.config)
    both = type(emoji)(**{**emoji.components, "scheduler": made})
    alone = type(small)(**{**small.components, "scheduler": made})
    pictures = []
    for k in (0, 2, 99):
        with split_sampling(both, small.unet, k):
            pictures.append(draw(both))
    assert (pictures[0] == draw(alone)).all()
    assert (pictures[2] == draw(both)).all()
    assert both.unet is emoji.unet
    assert (pictures[1] != pictures[0]).any()
    assert (pictures[1] != pictures[2]).any()


def test_split_sampling_counts_steps(emoji: Any) -> None:
    calls: dict[str, int] = {"teacher": 0, "student": 0}
    other = copy.deepcopy(emoji.unet)
    hooks = [
        net.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
        for name, net in (("teacher", emoji.unet), ("student", other))
    ]
    with split_sampling(emoji, other, 3):
        draw(emoji, num_inference_steps=10)
    for hook in hooks:
        hook.remove()
    assert calls == {"teacher": 3, "student": 7}
    with pytest.raises(ValueError, match="negative"), split_sampling(emoji, other, -1):
        pass
