"""Networks as ONNX graphs, and the runtimes that take them: ONNX Runtime, OpenVINO, any command.

Knows how a call of a PyTorch network becomes a graph of static shapes, how each runtime is told
about threads and precision, and how milliseconds are read out of what a command prints. The
packages are extras, imported where they are used.
"""

from __future__ import annotations

import logging
import re
import shlex
import subprocess
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bkprune.counting import Call
from bkprune.single_file import first_line

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_OPENVINO_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}

Pass = Callable[[], "float | None"]  # runs once; a command returns its own milliseconds


def export_onnx(network: nn.Module, call: Call, path: Path) -> None:
    """Write an ONNX graph of one pass with static shapes (`torch.onnx`, dynamo exporter).

    Raises:
        ValueError: the exporter does not support an operator of the network; it is named.
    """
    arrays, rebuilt = _flattened(call)
    wrapper = _Flat(network, rebuilt).eval()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision aloud
    try:
        with torch.no_grad(), warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                wrapper,
                tuple(arrays),
                str(path),
                dynamo=True,
                verbose=False,
                input_names=[f"input_{i}" for i in range(len(arrays))],
                external_data=True,
            )
    except Exception as error:
        if isinstance(error, KeyboardInterrupt | MemoryError):
            raise
        cause = error.__cause__ or error
        raise ValueError(
            f"{type(network).__name__} cannot be exported to ONNX: {first_line(cause)}"
        ) from error


class _Flat(nn.Module):
    """The network as a function of tensors alone; everything else in its call is fixed."""

    def __init__(self, network: nn.Module, rebuilt: Callable[[list[Tensor]], Call]) -> None:
        super().__init__()
        self.network = network
        self._rebuilt = rebuilt

    def forward(self, *tensors: Tensor) -> Tensor:
        call = self._rebuilt(list(tensors))
        out = self.network(*call.args, **call.kwargs)
        while not isinstance(out, Tensor):
            out = out[0]
        return out


def _flattened(call: Call) -> tuple[list[Tensor], Callable[[list[Tensor]], Call]]:
    """The tensors of a call, and how to put others in their places."""
    leaves, spec = torch.utils._pytree.tree_flatten((list(call.args), dict(call.kwargs)))
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def rebuilt(tensors: list[Tensor]) -> Call:
        filled = list(leaves)
        for i, tensor in zip(where, tensors, strict=True):
            filled[i] = tensor
        args, kwargs = torch.utils._pytree.tree_unflatten(filled, spec)
        return Call(tuple(args), kwargs)

    return [leaves[i] for i in where], rebuilt


def _inputs(names: list[str], call: Call) -> dict[str, Any]:
    """Inputs by name; the exporter drops those that the graph does not need."""
    arrays = [t.cpu().numpy() for t in _flattened(call)[0]]
    return {name: arrays[int(name.rsplit("_", 1)[1])] for name in names}


def onnxruntime_pass(path: Path, call: Call, device: str, threads: int) -> Pass:
    """A pass of a graph through ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")  # others run in between
    providers = [PROVIDERS[device]]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        feed = _inputs([given.name for given in session.get_inputs()], call)
        session.run(None, feed)
    except Exception as error:  # its exceptions share no base class
        if isinstance(error, KeyboardInterrupt | MemoryError):
            raise
        raise ValueError(f"backend onnxruntime refused the graph: {first_line(error)}") from error

    def run() -> None:
        session.run(None, feed)

    return run


def openvino_pass(path: Path, call: Call, dtype: str, threads: int) -> Pass:
    """A pass of a graph through OpenVINO on the CPU, in the precision that was asked for."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": str(threads),
        "INFERENCE_PRECISION_HINT": _OPENVINO_DTYPES[dtype],
        "PERFORMANCE_HINT": "LATENCY",
    }
    try:
        compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        request = compiled.create_infer_request()
        feed = _inputs([given.get_any_name() for given in compiled.inputs], call)
        request.infer(feed)
    except Exception as error:
        if isinstance(error, KeyboardInterrupt | MemoryError):
            raise
        raise ValueError(f"backend openvino refused the graph: {first_line(error)}") from error

    def run() -> None:
        request.infer(feed)

    return run


_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


def command_pass(path: Path, command: str, pattern: str | None) -> Pass:
    """A pass through the user's own command, which finds the graph where it lies."""
    words = [word.replace("{onnx}", str(path)) for word in shlex.split(command)]

    def run() -> float:
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        except OSError as error:
            raise ValueError(f"--latency-cmd {words[0]}: {error.strerror or error}") from error
        if done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
            raise ValueError(f"--latency-cmd {words[0]} exited with {done.returncode}: {said}")
        return parse_ms(done.stdout, pattern)

    return run


def parse_ms(text: str, pattern: str | None = None) -> float:
    """Milliseconds in what a command printed: the pattern's first group, or the last number.

    Raises:
        ValueError: there is none, or it is not above zero.
    """
    found = re.findall(pattern or f"({_NUMBER})", text)
    try:
        ms = float(found[-1] if isinstance(found[-1], str) else found[-1][0])
    except (IndexError, ValueError):
        said = text.strip().splitlines()[-1][:120] if text.strip() else "nothing"
        what = f"nothing that matches {pattern!r}" if pattern else "no number"
        raise ValueError(f"--latency-cmd printed {what} of milliseconds: {said!r}") from None
    if not ms > 0:
        raise ValueError(f"--latency-cmd printed {ms} ms: a time above zero is expected")
    return ms
