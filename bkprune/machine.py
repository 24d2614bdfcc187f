"""What machine this is: the record that stands beside every measured figure.

Knows how to read processor, memory, GPU, clocks, power state, load and library versions, and says
nothing where something cannot be read. It does not measure.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

LIBRARIES = ("bkprune", "torch", "diffusers", "transformers", "numpy", "onnxruntime", "openvino")
_GPU_FIELDS = (
    "name",
    "driver_version",
    "memory.total",
    "clocks.sm",
    "clocks.max.sm",
    "power.limit",
    "pstate",
)


def describe(device: str, threads: int) -> dict[str, Any]:
    """Facts about the machine, JSON-ready; `load` and `clocks` are those of this moment."""
    found = {
        "device": device,
        "processor": processor(),
        "cores": {"physical": psutil.cpu_count(logical=False), "logical": psutil.cpu_count()},
        "threads": threads,
        "threads_wait": os.environ.get("OMP_WAIT_POLICY", "library default"),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load": [round(value, 2) for value in psutil.getloadavg()],
        "clock_mhz": _clock(),
        "governor": _line(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "on_battery": _on_battery(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": _versions(),
        "gpu": _gpu() if device.startswith("cuda") else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def identity(device: str, gpu_name: str | None = None) -> dict[str, str]:
    """What must be the same for two timings to be comparable."""
    name = gpu_name or processor()
    return {"device_name": f"{device}: {name}"}


def processor() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        first = info.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        pairs = (line.partition(":") for line in first)
        fields = {name.strip(): value.strip() for name, _, value in pairs}
        name = fields.get("model name") or fields.get("Model") or fields.get("Hardware")
        if name:
            family = "/".join(fields[k] for k in ("cpu family", "model") if k in fields)
            return f"{name} (family/model {family})" if family else name
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def _line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _clock() -> dict[str, float] | None:
    try:
        clock = psutil.cpu_freq()
    except (OSError, NotImplementedError):
        return None
    return {"now": round(clock.current), "max": round(clock.max)} if clock else None


def _on_battery() -> bool | None:
    sensors = getattr(psutil, "sensors_battery", None)
    battery = sensors() if sensors else None
    return None if battery is None else not battery.power_plugged


def _gpu() -> list[dict[str, str]] | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    if done.returncode != 0:
        return None
    rows = [line.split(", ") for line in done.stdout.strip().splitlines()]
    return [dict(zip(_GPU_FIELDS, row, strict=False)) for row in rows]
