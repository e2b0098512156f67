"""The documentation says what is there."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TREES = "protos|sluice|engine|edge|gateway|central|tests|benchmarks|deploy|docs"


def test_configuration_reference_matches_the_code() -> None:
    page = ROOT / "docs" / "configuration.md"
    rendered = runpy.run_path(str(ROOT / "docs" / "build_configuration.py"))["render"]()
    assert page.read_text(encoding="utf-8") == rendered, "run: make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_paths_and_links_of_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(rf"`((?:{TREES})/[\w./-]*)`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"
