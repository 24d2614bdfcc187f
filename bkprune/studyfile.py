"""study.toml: which model, on what hardware, and the options of each command, read and checked.

A section is a command and its keys are that command's options, so that there is one list of them.
Knows how to say what is wrong with a file: line and column, the key, the nearest right name. It
does not know what commands do.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "study.toml"
COMMANDS = ("analyze", "profile", "search", "prune", "distill", "evaluate")
_STUDY_KEYS = ("model", "compare", "tokenizer", "text-encoder", "vae", "prediction-type")
_HARDWARE_KEYS = ("device", "dtype", "threads")
PARTS = ("tokenizer", "text-encoder", "vae", "prediction-type")
# what `run` itself gives, and what makes no sense in a file
_OURS = frozenset(
    ("out", "mask", "teacher", "force", "quiet", "json", "join", "dry-run", "check", "help")
)

Parse = Callable[[str, list[str]], str | None]  # a command's words -> what it says against them


@dataclass(frozen=True)
class Option:
    """One option of a command."""

    name: str
    is_flag: bool
    is_switch: bool  # has an opposite, --no-...
    is_multiple: bool


@dataclass(frozen=True)
class StudyFile:
    """What a study asks for.

    Attributes:
        path: of the file.
        model: as `analyze` takes it; a relative path is one beside the file.
        compare: published masks that are pruned, distilled and judged beside the winner.
        parts: options for what the model lacks.
        options: words of each command that has a section; the others are not run.
    """

    path: Path
    model: str
    compare: tuple[str, ...]
    parts: tuple[str, ...]
    options: Mapping[str, tuple[str, ...]]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().parent.name


def read(
    path: Path,
    options: Mapping[str, Sequence[Option]],
    presets: Collection[str],
    parse: Parse,
    built_in: Collection[str],
) -> StudyFile:
    """Read a study.

    Args:
        path: the file, or the folder that it lies in.
        options: of each command.
        presets: masks that `compare` may name.
        parse: tries a command's words.
        built_in: models that are no paths.

    Raises:
        ValueError: no such file, not TOML, an unknown section, key or value.
    """
    path = path / NAME if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such study; `bkprune init` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from error
    _known(path, "section", data, ("study", "hardware", *COMMANDS))
    for section, keys in data.items():
        if not isinstance(keys, dict):
            raise ValueError(f"{path}: {section} stands outside of a section")
    study = _named(path, "study", data.get("study", {}), _STUDY_KEYS)
    hardware = _named(path, "hardware", data.get("hardware", {}), _HARDWARE_KEYS)
    model = study.get("model")
    if not isinstance(model, str) or not model:
        raise ValueError(f'{path}: [study] needs model = "..."')
    compare = study.get("compare", [])
    if not isinstance(compare, list):
        raise ValueError(f"{path}: compare is a list of published masks")
    for name in compare:
        if name not in presets:
            raise ValueError(f"{path}: compare: {_unknown(str(name), presets)}")
    words = {
        command: _words(path, command, data[command], hardware, options[command])
        for command in COMMANDS
        if command in data
    }
    for command, given in words.items():
        complaint = parse(command, list(given))
        if complaint is not None:
            raise ValueError(f"{path}: [{command}] {complaint}")
    if "distill" in words and "prune" not in words:
        raise ValueError(f"{path}: [distill] needs [prune]")
    if "prune" in words and "search" not in words and not compare:
        raise ValueError(f"{path}: [prune] needs [search], or masks to compare")
    if compare and "prune" not in words:
        raise ValueError(f"{path}: compare needs [prune]")
    parts = tuple(
        word for key in PARTS if key in study for word in (f"--{key}", _beside(path, study[key]))
    )
    found = model if model in built_in else _beside(path, model)
    return StudyFile(path, found, tuple(compare), parts, words)


def _beside(path: Path, value: Any) -> str:
    """Paths in a study are relative to it; whatever is no path there stays as it is."""
    near = path.parent / str(value)
    return str(near) if near.exists() else str(value)


def _named(
    path: Path, section: str, given: Mapping[str, Any], keys: Collection[str]
) -> dict[str, Any]:
    found = {key.replace("_", "-"): value for key, value in given.items()}
    _known(path, f"key in [{section}]", found, keys)
    return found


def _known(path: Path, what: str, given: Collection[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{path}: unknown {what}: {_unknown(name, known)}")


def _unknown(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
    return f"{name!r}; {hint}"


def _words(
    path: Path,
    command: str,
    given: Mapping[str, Any],
    hardware: Mapping[str, Any],
    options: Sequence[Option],
) -> tuple[str, ...]:
    named = {option.name: option for option in options if option.name not in _OURS}
    settings = _named(path, command, given, named)
    settings = {**{k: v for k, v in hardware.items() if k in named}, **settings}
    words: list[str] = []
    for key, value in settings.items():
        option = named[key]
        if option.is_flag != isinstance(value, bool):
            wanted = "true or false" if option.is_flag else "a value"
            raise ValueError(f"{path}: [{command}] {key} = {value!r}: {wanted} is expected")
        if option.is_flag:
            words += [f"--{key}"] if value else [f"--no-{key}"] if option.is_switch else []
        elif isinstance(value, list) and not option.is_multiple:
            raise ValueError(f"{path}: [{command}] {key} takes one value, not a list")
        else:
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, list | dict):
                    raise ValueError(f"{path}: [{command}] {key} = {one!r}: text or a number")
                words += [f"--{key}", _beside(path, one) if isinstance(one, str) else str(one)]
    return tuple(words)


def begun(path: Path, model: str, data: Path | None, *, brings: bool) -> str:
    """The text of a study to start from.

    Args:
        path: where it will lie; what is given as a path is written relative to it.
        model: as `analyze` takes it.
        data: captioned pictures, if they are known.
        brings: whether the model has data and prompts of its own, so that it may go without.
    """

    def line(key: str, value: str) -> str:
        return f"{'# ' if brings and data is None else ''}{key} = {_quoted(value)}"

    near = _seen_from(path, str(data)) if data is not None else "pairs"
    told = {
        "{model}": _quoted(model if brings else _seen_from(path, model)),
        "{data}": line("data", near),
        "{prompts}": line("prompts", near),
    }
    text = _TEMPLATE
    for name, value in told.items():
        text = text.replace(name, value)
    return text


def _seen_from(path: Path, value: str) -> str:
    """A path that is there, relative to the study's folder; anything else as it is."""
    there = Path(value)
    if not there.exists() or there.is_absolute():
        return value
    return Path(os.path.relpath(there, path.parent)).as_posix()


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


_TEMPLATE = """\
# A study: `bkprune run` does everything in it, skips what is up to date, and resumes.
# A section is a command, its keys are that command's options: see `bkprune COMMAND --help`.
# A section that is taken out is a stage that is not run. Paths are relative to this file.

[study]
model = {model}  # emoji (built in), a diffusers folder, a .safetensors file, or a hub id
compare = ["bk-sdm-base"]  # published masks, treated like the winner and shown beside it

[hardware]
# device = "cuda"        # default: cpu
# dtype = "float16"

[analyze]                # what every block is worth
samples = 256
{data}  # captioned pictures, or a .txt of prompts; emoji brings its own

[profile]                # what every block costs here
validate = 10            # random masks that are measured whole, to test the prediction
max-seconds = 20

[search]                 # the mask that loses least within the budgets
budget = ["latency<=0.6x"]  # also params, macs, memory, weights; absolute (40ms, 500M) or 0.6x
trials = 100
{data}
# objective = "distilled"   # rank the finalists by a short distillation; see docs/studies.md

[prune]

[distill]
steps = 1000
batch-size = 32
lr = 1e-4
{data}

[evaluate]
{prompts}  # a .txt, .csv or .jsonl, or captioned pictures
# protocol = "coco30k"   # or emoji, or own
# n = 1000
"""
