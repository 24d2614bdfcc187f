"""Where and how networks run: device, dtype, threads, backend, and the device's clock.

Knows what each device and backend refuses, before anything is built where that is possible, and
makes of any network a function without arguments that runs one pass. What is run, how often, and
what the times mean is for `latency.py`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from bkprune import graphs
from bkprune.counting import Call
from bkprune.graphs import Pass
from bkprune.single_file import first_line

Backend = Literal["eager", "compile", "onnxruntime", "openvino", "command"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_EXTRAS = {"onnxruntime": "onnx", "openvino": "openvino", "command": "onnx"}


@dataclass(frozen=True)
class Target:
    """Where and how networks run. `threads` 0 leaves the library's default."""

    device: str = "cpu"
    dtype: str = "float32"
    backend: Backend = "eager"
    threads: int = 0
    command: str | None = None
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(
                f"unknown backend {self.backend!r}: choose one of {', '.join(BACKENDS)}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}: choose one of {', '.join(DTYPES)}")
        if self.backend == "command" and (not self.command or "{onnx}" not in self.command):
            raise ValueError(
                "--latency-cmd needs a command with {onnx} where the exported graph's path goes"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights and inputs."""
        return DTYPES[self.dtype]

    def check(self) -> None:
        """Refuse what this machine has not, before anything is built.

        Raises:
            ValueError: the device, the dtype on it, or the backend's package is not there.
        """
        _check_device(self.device)
        _check_backend(self)
        if self.threads:
            torch.set_num_threads(self.threads)

    @property
    def n_threads(self) -> int:
        """CPU threads within one operator."""
        return self.threads or torch.get_num_threads()


def _check_device(device: str) -> None:
    kind = device.split(":")[0]
    present = ["cpu"]
    if torch.cuda.is_available():
        present += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        present.append("mps")
    if device not in present:
        why = (
            "not present on this machine" if kind in ("cuda", "mps") else "no device bkprune knows"
        )
        raise ValueError(f"device {device!r} is {why}; present: {', '.join(present)}")


def _check_backend(target: Target) -> None:
    backend, kind = target.backend, target.device.split(":")[0]
    wanted = {
        "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
        "command": ("onnx", "onnxscript"),
    }
    wanted["openvino"] = ("onnx", "onnxscript", "openvino")
    for package in wanted.get(backend, ()):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                __import__(package)
        except ImportError:
            extra = _EXTRAS[backend]
            raise ValueError(
                f"backend {backend} needs the package {package}: pip install 'bkprune[{extra}]'"
            ) from None
    if (
        backend == "compile"
        and kind == "cpu"
        and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")))
    ):
        raise ValueError("backend compile needs a C++ compiler (g++ or clang++), none is installed")
    if backend == "openvino" and kind != "cpu":
        raise ValueError(f"backend openvino runs on device cpu here, not on {target.device}")
    if backend == "onnxruntime":
        import onnxruntime

        provider = graphs.PROVIDERS.get(kind)
        if provider not in onnxruntime.get_available_providers():
            raise ValueError(
                f"backend onnxruntime cannot use {target.device}: the installed onnxruntime brings "
                f"{', '.join(onnxruntime.get_available_providers())}"
            )


# --- clocks ----------------------------------------------------------------------------------


class Clock:
    """Marks moments on the device's own time line; only `elapsed_ms` waits for the device."""

    def __init__(self, device: str) -> None:
        self._kind = device.split(":")[0]

    def mark(self) -> Any:
        """This moment."""
        if self._kind == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        self.wait()
        return time.perf_counter()

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self._kind == "cuda":
            torch.cuda.synchronize()
        elif self._kind == "mps":
            torch.mps.synchronize()

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks."""
        if self._kind == "cuda":
            end.synchronize()
            return float(start.elapsed_time(end))
        return float(end - start) * 1e3


# --- preparing -------------------------------------------------------------------------------


def prepare(network: nn.Module, call: Call, target: Target) -> Pass:
    """Make a network ready to be run again and again on the same inputs.

    Args:
        network: on the target's device in its dtype, in evaluation mode.
        call: its inputs, on the same device.
        target: where and how.

    Raises:
        ValueError: the backend cannot take this network; the operator or the reason is named.
    """
    if target.backend == "eager":
        return _eager(network, call)
    if target.backend == "compile":
        return _compiled(network, call)
    kind = target.device.split(":")[0]
    folder = Path(tempfile.mkdtemp(prefix="bkprune-"))
    path = folder / "model.onnx"
    try:
        graphs.export_onnx(network, call, path)
        if target.backend == "command":
            assert target.command is not None
            run = graphs.command_pass(path, target.command, target.pattern)
            weakref.finalize(run, shutil.rmtree, folder, ignore_errors=True)
            return run
        if target.backend == "onnxruntime":
            return graphs.onnxruntime_pass(path, call, kind, target.n_threads)
        return graphs.openvino_pass(path, call, target.dtype, target.n_threads)
    finally:
        if target.backend != "command":
            shutil.rmtree(folder, ignore_errors=True)


def _eager(network: nn.Module, call: Call) -> Pass:
    def run() -> None:
        with torch.inference_mode():
            network(*call.args, **call.kwargs)

    return run


def _compiled(network: nn.Module, call: Call) -> Pass:
    compiled = torch.compile(network, dynamic=False)

    def run() -> None:
        with torch.inference_mode():
            compiled(*call.args, **call.kwargs)

    try:
        run()
    except (RuntimeError, OSError, ImportError) as error:
        raise ValueError(f"backend compile failed: {first_line(error)}") from error
    return run
