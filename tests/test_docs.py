"""Every command in the README and the docs is one that the commands take; `make docs` runs them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from bkprune.cli import app
from tests.run_docs import ELSEWHERE, PAGES, TABLE, commands, documented, whole, words_of


def parsed(line: str) -> Any:
    """The context that typer makes of a command line; raises what a user would see."""
    words = shlex.split(line, comments=True)
    words = words[words.index("bkprune.cli") + 1 if words[0] == "accelerate" else 1 :]
    root: Any = typer.main.get_command(app)
    if words[0].startswith("--"):
        return root.make_context("bkprune", words)
    return root.commands[words[0]].make_context(words[0], words[1:])


def test_there_are_many() -> None:
    assert len(commands()) > 30


@pytest.mark.parametrize(("page", "line"), [c for c in commands() if whole(c[1])])
def test_every_command_parses(page: str, line: str) -> None:
    assert parsed(line).info_name in line.split(), page


def test_every_command_is_run_by_make_docs() -> None:
    run = {words_of(line) for line in (*TABLE, *ELSEWHERE)}
    assert {words_of(line) for line in documented()} == run


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_a_wrong_option_would_be_seen() -> None:
    with pytest.raises(Exception, match="No such option: --buget"):
        parsed("bkprune search MODEL --buget 'macs<=0.5x'")
