"""The house keeps its plan: top level, import floors, light imports, short rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bkprune"

# Imports go down only; rooms of one floor never import one another.
FLOORS = [
    set(floor.split())
    for floor in (
        "blocks",
        "bypass study presets single_file counting cost machine series storage twin losses"
        " studyfile gathering",
        "data models sampling metrics inception lpips graphs operators drawing masks grids"
        " checkpoints stages halving",
        "calibration backends clip pictures skeleton space card comparing check ldm lora sources"
        " plots plots_cost plots_search plots_distill plots_eval protocols evidence needs",
        "ablation latency measured memory program judging caching recipe export generation"
        " features comparison estimates",
        "importance profiling proposals lessons judges speed sections",
        "distill measuring terminal search evaluate report",
        "profile_view search_view distill_view racing",
        "cli_analyze cli_profile cli_prune cli_run",
        "distill_job evaluate_job",
        "race_job",
        "search_job",
        "cli_search cli_distill cli_evaluate",
        "cli",
    )
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
COMMANDS = {
    "cli",
    "cli_analyze",
    "cli_profile",
    "cli_prune",
    "cli_distill",
    "cli_evaluate",
    "cli_run",
    "cli_search",
    "terminal",
}
OWNERS = {
    "matplotlib": {"drawing", "plots", "plots_cost", "plots_search", "plots_distill"}
    | {"plots_eval", "evidence", "report"},
    "jinja2": {"report"},
    "typer": COMMANDS,
    "rich": {"terminal"},
    "fvcore": {"operators"},
    "optuna": {"search", "storage", "halving"},
    "onnxruntime": {"graphs", "backends"},
    "openvino": {"graphs"},
    "peft": {"lora"},
    "accelerate": {"lessons", "distill", "distill_job", "evaluate_job", "racing"},
    "torchmetrics": {"evaluate", "lpips"},
    "webdataset": {"sources"},
    "datasets": {"sources"},
}
WITHOUT_TORCH = {"blocks", "presets", "study", "data", "cost", "series", "machine", *COMMANDS}
WITHOUT_TORCH |= {"drawing", "plots", "plots_cost", "plots_search", "profile_view", "search_view"}
WITHOUT_TORCH |= {
    "judging",
    "search_job",
    "twin",
    "masks",
    "card",
    "space",
    "program",
    "proposals",
    "search",
    "storage",
    "studyfile",
    "stages",
    "needs",
    "sections",
    "evidence",
    "comparison",
    "report",
    "plots_distill",
    "plots_eval",
}
TORCH_INSIDE = {"data"}  # needs tensors, but no model


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "bkprune":
                found |= {f"bkprune.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


def rooms() -> list[str]:
    return sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def test_every_room_has_a_floor() -> None:
    assert set(rooms()) == set(FLOOR)


@pytest.mark.parametrize("room", rooms())
def test_imports_go_down_only(room: str) -> None:
    ours = {
        name.split(".")[1]
        for name in imports(PACKAGE / f"{room}.py")
        if name.startswith("bkprune.") and name.split(".")[1] in FLOOR
    }
    upward = {other for other in ours if FLOOR[other] >= FLOOR[room]}
    assert not upward, f"{room} imports {upward}"


@pytest.mark.parametrize("room", rooms())
def test_one_owner_a_library(room: str) -> None:
    libraries = {name.split(".")[0] for name in imports(PACKAGE / f"{room}.py")}
    for library, owners in OWNERS.items():
        assert library not in libraries or room in owners
    if room in WITHOUT_TORCH - TORCH_INSIDE:
        top = {n.split(".")[0] for n in imports(PACKAGE / f"{room}.py", top_level_only=True)}
        assert not top & {"torch", "diffusers", "transformers"}


def test_blocks_is_standard_library_only() -> None:
    libraries = {name.split(".")[0] for name in imports(PACKAGE / "blocks.py")}
    assert libraries <= set(sys.stdlib_module_names)


def test_bypass_needs_nothing_of_ours() -> None:
    assert not any(name.startswith("bkprune") for name in imports(PACKAGE / "bypass.py"))


@pytest.mark.parametrize(
    "code",
    [
        "import bkprune",
        "import bkprune.cli",
        "import bkprune.plots",
        "import bkprune.plots_cost",
        "import bkprune.plots_search",
        "import bkprune.search",
        "import bkprune.report",
        "import bkprune.stages",
        "import bkprune.cost",
        "import bkprune.study",
    ],
)
def test_light_imports_bring_no_torch(code: str) -> None:
    check = f"{code}; import sys; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("analyze", "--criterion"),
        ("profile", "--dtype"),
        ("search", "--budget"),
        ("prune", "--form"),
        ("distill", "--teacher"),
        ("evaluate", "--protocol"),
        ("run", "--dry-run"),
        ("report", "--json"),
    ],
)
def test_help_brings_no_torch(command: str, option: str) -> None:
    code = (
        f"import sys; sys.argv = ['bkprune', '{command}', '--help']\n"
        "from bkprune.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: sys.exit(bool(stop.code) or 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert option in done.stdout


def test_top_level_is_as_agreed() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    top = {name.split("/")[0] for name in tracked}
    assert top == {
        ".ci",
        ".gitignore",
        ".pre-commit-config.yaml",
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
        "README.md",
        "benchmarks",
        "bkprune",
        "cli.py",
        "constraints.txt",
        "docs",
        "pyproject.toml",
        "reports",
        "studies",
        "tests",
    }


@pytest.mark.parametrize("room", rooms())
def test_rooms_are_small_and_say_what_they_know(room: str) -> None:
    text = (PACKAGE / f"{room}.py").read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))
    assert text.count("\n") <= 380


def test_assets_stay_small() -> None:
    size = sum(path.stat().st_size for path in (PACKAGE / "assets").rglob("*") if path.is_file())
    assert size <= 35e6
    assert (PACKAGE / "assets" / "emoji" / "NOTICE").exists()
