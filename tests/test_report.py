"""The report: from tables alone, escaped, self-contained, and alive in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bkprune.evidence import Run
from bkprune.report import build
from bkprune.sections import sections
from tests.test_cli import refused, run

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "reports" / "emoji"
NASTY = '<script>alert("x")</script> & </script> |`'


def copy_of(sample: Path, folder: Path) -> Path:
    """The sample's tables and pictures, without the pages made of them."""
    left_out = shutil.ignore_patterns("report.*", "*.svg", "figures")
    shutil.copytree(sample, folder, ignore=left_out)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_of(SAMPLE, tmp_path_factory.mktemp("report") / "run")
    build(folder)
    return folder


def test_the_sample_answers_every_question(built: Path) -> None:
    found = {section.key: section for section in sections(Run(built))}
    assert list(found) == [
        "asked", "winner", "models", "pictures", "front", "blocks", "timesteps", "prediction",
        "training", "how",
    ]  # fmt: skip
    assert not [key for key, section in found.items() if section.missing]
    models = found["models"].tables[0]
    assert [row[0] for row in models.rows[:3]] == ["teacher", "winner", "bk-sdm-base"]
    winner = dict(zip(models.columns, models.rows[1], strict=True))
    assert "±" in winner["output error"]
    assert "x)" in winner["predicted ms"]
    quality = found["models"].tables[1]
    after = dict(zip(quality.columns, quality.rows[1], strict=True))
    assert after["model"] == "winner"
    assert "→" in after["clip score"]
    assert len(found["front"].front["points"]) > 20


def test_the_page_needs_nothing_else(built: Path) -> None:
    page = (built / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)""", page)
    assert "@import" not in page
    assert "url(" not in page
    markdown = (built / "report.md").read_text()
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", markdown)
    assert len(pictures) > 8
    assert all((built / picture).is_file() for picture in pictures)
    assert {p.stem for p in (built / "figures").glob("*.svg")} == {
        p.stem for p in (built / "figures").glob("*.png")
    }


def test_the_same_tables_make_the_same_page(built: Path, tmp_path: Path) -> None:
    again = copy_of(built, tmp_path / "run")
    build(again)
    assert (again / "report.html").read_bytes() == (built / "report.html").read_bytes()


def test_building_it_imports_no_torch(built: Path) -> None:
    code = (
        f"import sys; sys.argv = ['bkprune', 'report', {str(built)!r}]\n"
        "from bkprune.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: sys.exit(bool(stop.code) or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_what_was_not_run_is_named(built: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("blocks.csv", "importance.csv"):
        shutil.copy(built / name, folder / name)
    build(folder)
    missing = {s.key: s.missing for s in sections(Run(folder)) if s.missing}
    assert set(missing) == {
        "asked", "winner", "models", "pictures", "front", "prediction", "training"
    }  # fmt: skip
    page = (folder / "report.html").read_text()
    assert "No search was run." in page
    assert "Nothing was distilled." in page
    assert "Costs were not measured." in page


def test_what_comes_from_outside_is_escaped(built: Path, tmp_path: Path) -> None:
    folder = copy_of(built, tmp_path / "run")
    table = pd.read_csv(folder / "candidates.csv")
    table.loc[0, "source"] = NASTY
    table.to_csv(folder / "candidates.csv", index=False)
    told = json.loads((folder / "machine.json").read_text())
    (folder / "machine.json").write_text(json.dumps({**told, "processor": NASTY}))
    quality = pd.read_csv(folder / "evaluation" / "eval.csv")
    quality["model"] = quality["model"].replace("bk-sdm-base pruned", NASTY)
    quality.to_csv(folder / "evaluation" / "eval.csv", index=False)
    (folder / "study.toml").write_text(f"# {NASTY}\n")
    build(folder)
    page = (folder / "report.html").read_text()
    assert "alert(" in page
    assert '<script>alert("x")' not in page
    assert page.count("<script") == 2  # the figure's data and code
    assert page.count("</script>") == 2
    markdown = (folder / "report.md").read_text()
    lines = [x for x in markdown.splitlines() if "alert(" in x and not x.startswith("    ")]
    assert lines
    assert not any("<script" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("importance.csv", lambda t: t.drop(columns="score"), ("no column score",)),
        ("cost.csv", lambda t: t.assign(params=None), ("line 2", "params is 'nan'")),
        ("candidates.csv", lambda t: t.assign(macs="many"), ("line 2", "macs is 'many'")),
        ("finalists.csv", lambda t: t[:0], ("no rows in it",)),
        ("evaluation/eval.csv", lambda t: t.assign(model=None), ("line 2: model is empty",)),
        ("validation.csv", lambda t: t[["mask"]], ("no column predicted_ms, measured_ms",)),
    ],
)
def test_tables_edited_by_hand_are_refused(
    built: Path, tmp_path: Path, name: str, change: Any, words: tuple[str, ...]
) -> None:
    folder = copy_of(built, tmp_path / "run")
    change(pd.read_csv(folder / name)).to_csv(folder / name, index=False)
    refused(run("report", folder), Path(name).name, *words)


def test_other_files_that_are_broken_are_refused(built: Path, tmp_path: Path) -> None:
    refused(run("report", tmp_path / "none"), "no such run folder")
    (tmp_path / "empty").mkdir()
    refused(run("report", tmp_path / "empty"), "no tables in it")
    folder = copy_of(built, tmp_path / "run")
    (folder / "winner.json").write_text("{")
    refused(run("report", folder), "winner.json", "not JSON")
    folder = copy_of(built, tmp_path / "log")
    (folder / "distillation" / "train.jsonl").write_text("x\n")
    refused(run("report", folder), "train.jsonl", "not a log of training")


def test_pictures_that_are_gone_leave_the_rest(built: Path, tmp_path: Path) -> None:
    folder = copy_of(built, tmp_path / "run")
    for path in (*folder.rglob("grid-*.png"), *folder.rglob("step-*.png")):
        path.unlink()
    build(folder)
    assert "No pictures were drawn." in (folder / "report.html").read_text()


# --- in a browser ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, where it is installed: Debian's chromium and chromium-driver."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed")
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = chromium
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = webdriver.Chrome(options=options, service=Service(driver))
    yield made
    made.quit()


@pytest.mark.parametrize(("width", "height"), [(1200, 900), (390, 844)])
def test_the_page_lives_without_errors_or_a_network(
    built: Path, browser: Any, width: int, height: int
) -> None:
    browser.set_window_size(width, height)
    browser.get((built / "report.html").as_uri())
    circles = browser.find_elements("css selector", "#front-points circle")
    assert len(circles) > 20
    words = browser.find_element("id", "front-words")
    before = words.text
    assert before.startswith("Winner:")
    gone = len(browser.find_elements("css selector", "#front-mask .gone"))
    assert gone == len(json.loads((built / "winner.json").read_text())["removed"])
    other = next(c for c in circles if c.get_attribute("class") == "base")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", other)
    browser.execute_script(
        "arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true}))", other
    )
    assert words.text == other.get_attribute("aria-label") != before
    assert "on" in other.get_attribute("class").split()
    browser.switch_to.active_element.send_keys("\ue014")  # the right arrow key
    assert words.text != other.get_attribute("aria-label")
    wide = "return document.documentElement.scrollWidth <= window.innerWidth"
    assert browser.execute_script(wide)
    assert browser.get_log("browser") == []
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [
        m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in urls if not url.startswith(("file:", "data:"))] == []
    assert sum(url.startswith("file:") for url in urls) == 1
