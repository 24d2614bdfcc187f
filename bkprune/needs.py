"""What a study asks for, or has to, and is not there: better said before the first stage.

Knows which options name files, and what a model that is not built in does not bring. Whether a file
is a good one is its command's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bkprune.stages import Stage, options_of
from bkprune.studyfile import StudyFile

# what a model that is not built in does not bring along
_NEEDS = {"analyze": "data", "search": "data", "cache": "data", "distill": "data"}
_FILES = ("data", "kd-data", "prompts", "reference", "inception", "lpips", "clip")


def lacking(asked: StudyFile, stages: Sequence[Stage], run: Path, *, brings: bool) -> list[str]:
    """What is wrong, a line each, with the sections that it is wrong in.

    Args:
        asked: the study.
        stages: those that are to be done.
        run: their folder; what they make for one another is not lacking.
        brings: whether the model is a built-in one, which has data and prompts of its own.
    """
    found: dict[str, list[str]] = {}  # what is wrong, and in which sections

    def note(stage: Stage, wrong: str) -> None:
        section = "[distill]" if stage.command == "cache" else f"[{stage.command}]"
        sections = found.setdefault(wrong, [])
        if section not in sections:
            sections.append(section)

    for stage in stages:
        given = {k.removeprefix("--"): v for k, v in options_of(stage.words).items()}
        needed = _NEEDS.get(stage.command)
        if stage.command == "evaluate" and given.get("protocol") != ["emoji"]:
            needed = "prompts"
        if needed and needed not in given and not brings:
            note(stage, f"needs {needed} = ...: {asked.model} brings none")
        for name in _FILES:
            for value in given.get(name, ()):
                if not (value.startswith(str(run)) or _is_there(value)):
                    note(stage, f"{name} = {value!r}: no such file or folder")
    return [f"{' '.join(sections)} {wrong}" for wrong, sections in found.items()]


def _is_there(value: str) -> bool:
    """Whether a path is there; of a pattern its folder is asked, of a URL nothing."""
    if value == "noise" or "://" in value:
        return True
    before, is_pattern, _ = value.partition("{")
    return Path(before).parent.is_dir() if is_pattern else Path(value).exists()
