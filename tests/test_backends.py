"""Backends run the same network to the same output, and refuse what they cannot do in one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from bkprune import graphs, memory
from bkprune.backends import Target, prepare
from bkprune.counting import Call, unet_call
from bkprune.graphs import export_onnx, parse_ms
from bkprune.memory import OutOfMemoryError, check_memory, explained
from bkprune.operators import operators
from tests.conftest import SMALL, build

TINY: dict[str, Any] = {
    **SMALL,
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "attention_head_dim": 2,
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return build(TINY)


@pytest.fixture(scope="module")
def call(unet: UNet2DConditionModel) -> Call:
    return unet_call(unet.config, device="cpu", n_tokens=5)


@pytest.fixture(scope="module")
def graph(unet: UNet2DConditionModel, call: Call, tmp_path_factory: Any) -> Path:
    pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
    path: Path = tmp_path_factory.mktemp("graph") / "model.onnx"
    export_onnx(unet, call, path)
    return path


def _expected(unet: UNet2DConditionModel, call: Call) -> Any:
    with torch.no_grad():
        return unet(*call.args, **call.kwargs)[0].numpy()


def test_onnxruntime_agrees_with_torch(unet: UNet2DConditionModel, call: Call, graph: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    feed = graphs._inputs([given.name for given in session.get_inputs()], call)
    np.testing.assert_allclose(session.run(None, feed)[0], _expected(unet, call), atol=2e-4)
    assert graphs.onnxruntime_pass(graph, call, "cpu", 1)() is None


def test_openvino_agrees_with_torch(unet: UNet2DConditionModel, call: Call, graph: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
    compiled = openvino.Core().compile_model(str(graph), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    feed = graphs._inputs([given.get_any_name() for given in compiled.inputs], call)
    (found,) = compiled(feed).values()
    np.testing.assert_allclose(found, _expected(unet, call), atol=2e-4)
    assert graphs.openvino_pass(graph, call, "float32", 1)() is None


def test_the_users_command_gets_the_graph(graph: Path, tmp_path: Path) -> None:
    script = tmp_path / "bench me.py"
    script.write_text(
        "import sys, onnx\n"
        "model = onnx.load(sys.argv[1])\n"
        "print('nodes', len(model.graph.node), 'latency 7.25 ms')\n"
    )
    command = f"'{sys.executable}' '{script}' {{onnx}}"
    run = graphs.command_pass(graph, command, None)
    assert run() == 7.25
    other = graphs.command_pass(graph, f"'{sys.executable}' -c 'exit(3)'", None)
    with pytest.raises(ValueError, match="exited with 3"):
        other()
    missing = graphs.command_pass(graph, "no-such-program {onnx}", None)
    with pytest.raises(ValueError, match=r"--latency-cmd no-such-program: No such file"):
        missing()


@pytest.mark.parametrize(
    ("text", "pattern", "ms"),
    [
        ("12.5", None, 12.5),
        ("run 1\nmedian: 3e1 ms", None, 30.0),
        ("GPU latency: median = 4.5 ms, p99 = 9 ms", r"median = ([0-9.]+) ms", 4.5),
    ],
)
def test_milliseconds_are_found(text: str, pattern: str | None, ms: float) -> None:
    assert parse_ms(text, pattern) == ms


@pytest.mark.parametrize(
    ("text", "pattern", "words"),
    [
        ("no luck", None, "no number of milliseconds: 'no luck'"),
        ("", None, "no number of milliseconds: 'nothing'"),
        ("4.5", "median ([0-9.]+)", "nothing that matches"),
        ("-1", None, "above zero"),
    ],
)
def test_no_milliseconds(text: str, pattern: str | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_ms(text, pattern)


class _Odd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.linalg.eigvals(x).real
        return out


def test_an_operator_that_cannot_be_exported_or_counted_is_named(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
    call = Call((torch.eye(3),), {})
    with pytest.raises(ValueError, match=r"_Odd cannot be exported to ONNX: .*eig"):
        export_onnx(_Odd(), call, tmp_path / "x.onnx")
    with pytest.raises(ValueError, match=r"no rule covers: aten::linalg_eigvals \(1 calls\)"):
        operators(_Plain(), call)


class _Plain(nn.Module):
    def forward(self, x: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        return (torch.linalg.eigvals(x).real,)


@pytest.mark.parametrize(
    "config",
    [SMALL, {**SMALL, "use_linear_projection": True, "upcast_attention": True}],
    ids=["v1", "v2"],
)
def test_operators_agree_with_the_other_counter(config: dict[str, Any]) -> None:
    unet = build(config)
    table = operators(unet, unet_call(unet.config, device="cpu", batch_size=2))
    assert set(table.loc[table["in_macs"], "operator"]) == {
        "conv",
        "linear",
        "scaled_dot_product_attention",
    }
    assert table.loc[table["in_macs"], "share"].sum() == pytest.approx(1)
    assert all(p.device.type == "cpu" for p in unet.parameters())


def test_operators_see_naive_attention_too() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    unet = build(TINY)
    call = unet_call(unet.config, device="cpu")
    fused = operators(unet, call)
    unet.set_attn_processor(AttnProcessor())
    naive = operators(unet, call)
    assert {"baddbmm", "bmm"} <= set(naive["operator"])
    assert naive.loc[naive["in_macs"], "macs"].sum() == fused.loc[fused["in_macs"], "macs"].sum()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"device": "cuda:9"}, r"device 'cuda:9' is not present on this machine; present: .*cpu"),
        ({"device": "tpu"}, "device 'tpu' is no device bkprune knows"),
        ({"backend": "openvino", "device": "mps"}, "mps"),
    ],
)
def test_targets_that_are_not_here(settings: dict[str, Any], words: str) -> None:
    if settings["device"] == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has an mps device")
    with pytest.raises(ValueError, match=words):
        Target(**settings).check()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"backend": "tvm"}, "unknown backend 'tvm'.*eager"),
        ({"dtype": "int4"}, "unknown dtype 'int4'.*float32"),
        ({"backend": "command", "command": "trtexec"}, "{onnx}"),
    ],
)
def test_targets_that_make_no_sense(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Target(**settings)


def test_a_missing_package_names_its_extra(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ValueError, match=r"needs the package openvino: pip install 'bkprune\[open"):
        Target(backend="openvino").check()
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match="needs a C"):
        Target(backend="compile").check()


def test_memory_that_is_not_there(monkeypatch: Any) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10_000)
    check_memory(Target(), 4_000, 6_000, 8)
    with pytest.raises(OutOfMemoryError, match=r"batch size 16 needs .* --batch-size 7 would fit"):
        check_memory(Target(), 4_000, 12_000, 16)
    with pytest.raises(OutOfMemoryError, match="not even batch size 1 would fit"):
        check_memory(Target(), 12_000, 6_000, 1)
    with pytest.raises(OutOfMemoryError, match="try --batch-size 4"), explained(Target(), 1, 1, 8):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    with pytest.raises(OutOfMemoryError, match="try --batch-size 4"), explained(Target(), 1, 1, 8):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with (
        pytest.raises(ValueError, match="cpu cannot run this network in float16"),
        explained(Target(dtype="float16"), 1, 1, 1),
    ):
        raise RuntimeError("\"slow_conv2d_cpu\" not implemented for 'Half'")
    with pytest.raises(RuntimeError, match="else"), explained(Target(), 1, 1, 1):
        raise RuntimeError("something else")


def test_half_precision_runs_in_half_and_stays_near(unet: UNet2DConditionModel, call: Call) -> None:
    half = build(TINY).to(torch.bfloat16)
    own = unet_call(half.config, device="cpu", n_tokens=5, dtype=torch.bfloat16)
    seen: list[torch.Tensor] = []
    hook = half.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    prepare(half, own, Target(dtype="bfloat16"))()
    hook.remove()
    assert seen[0].dtype == torch.bfloat16
    expected = torch.from_numpy(_expected(unet, call))
    error = (seen[0].float() - expected).square().mean() / expected.square().mean()
    assert error < 1e-3
