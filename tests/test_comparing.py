"""Somebody else's student is recognised as a mask of its teacher."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bkprune import Inventory, preset
from bkprune.cli import app
from bkprune.comparing import compare, identify
from bkprune.export import student
from bkprune.presets import PRESETS
from tests.conftest import SMALL, build
from tests.test_presets import plain_student


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("retrained", [False, True])
def test_published_students(name: str, retrained: bool, teacher: Any) -> None:
    theirs = plain_student(teacher, SMALL, name)
    if retrained:
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    found = compare(teacher, theirs)
    assert found.identified.preset == name
    gone = set(found.table.loc[found.table["student"] == "removed", "block"])
    assert gone == preset(name, Inventory.of(teacher))
    assert bool((found.table["change"].dropna() > 0).all()) == retrained
    assert (found.elsewhere > 0) == retrained


@pytest.mark.parametrize("form", ["plain", "padded", "pruned"])
def test_every_form_is_recognised(form: Any, teacher: Any, inventory: Inventory) -> None:
    dice = random.Random(2)
    n = 0
    for _ in range(6):
        mask = set(preset("bk-sdm-base", inventory)) if dice.random() < 0.5 else set()
        mask |= {f"up_blocks.3.attentions.{i}" for i in range(3)}
        if form != "plain":
            mask |= {b.name for b in inventory if b.kind == "attention" and dice.random() < 0.3}
        made = student(teacher, inventory, inventory.plan(mask), form)
        found = identify(teacher, made.unet)
        assert found.mask == inventory.expand(mask)
        n += 1
    assert n == 6


def test_the_same_net_and_no_net_of_it(teacher: Any) -> None:
    assert identify(teacher, teacher).mask == frozenset()
    narrow = build({**SMALL, "block_out_channels": (32, 64, 128, 64), "layers_per_block": 1})
    with pytest.raises(ValueError, match="no pruned form"):
        identify(teacher, narrow)


def test_at_the_command_line(unet_folder: Path, teacher: Any, tmp_path: Path) -> None:
    plain_student(teacher, SMALL, "bk-sdm-small").save_pretrained(tmp_path / "theirs")
    words = ["diff", str(unet_folder), str(tmp_path / "theirs")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "17 of 38 blocks removed (bk-sdm-small)" in result.stderr
    shown = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert shown["preset"] == "bk-sdm-small"
    assert len(shown["removed"]) == 17
    backwards = CliRunner().invoke(app, ["diff", words[2], words[1]])
    assert backwards.exit_code == 2
    assert "no pruned form" in backwards.stderr
