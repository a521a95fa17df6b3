"""Documents agree with each other and with the code: links, logged tags, line lengths."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest

import acktr

ROOT = Path(__file__).parents[1]
FOLDERS = ("acktr", "envs", "scripts", "results")
PAGES = sorted([*ROOT.glob("*.md"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.md"))])
PAGES = [page for page in PAGES if "acktr/envs" not in page.as_posix()]  # the link to envs/
WRITTEN = [page for page in PAGES if page.stem.isupper() and page.stem != "FORMULAS"]
LINK = re.compile(r"\]\(([^)\s]+)\)")
HOME = re.compile(r"(?<![\w.])/(home|root|opt|tmp|work|mnt|usr|Users|private)/|[A-Z]:\\\\")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        kept = (c for c in text if c in " -_" or unicodedata.category(c)[0] in "LN")
        found.add("".join(kept).strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT.resolve()), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_folder_of_one_machine_is_named(page: Path) -> None:
    assert not HOME.search(page.read_text())


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_prose_has_lines_of_at_most_100_columns(page: Path) -> None:
    """Tables and commands may be longer."""
    for line in page.read_text().splitlines():
        assert len(line) <= 100 or line.startswith(("|", "    ", "!")), line


def test_every_folder_is_explained() -> None:
    pages = {name(page) for page in WRITTEN}
    campaigns = [path for path in (ROOT / "results").iterdir() if path.is_dir()]
    for campaign in campaigns:
        assert {f"results/{campaign.name}/{page}.md" for page in ("README", "NOTES")} <= pages
    table = (ROOT / "results" / "README.md").read_text()
    assert all(f"({campaign.name}/README.md)" in table for campaign in campaigns)
    assert {"README.md", *(f"{folder}/README.md" for folder in FOLDERS)} <= pages


def test_every_logged_tag_is_explained() -> None:
    tag = r"(?:train|kfac|time|rollout|eval)/(?:critic_)?[a-z_]+"
    logged: set[str] = set()
    for path in (ROOT / "acktr").rglob("*.py"):
        logged |= set(re.findall(f'"({tag})"', path.read_text()))
    logged |= {f"kfac/{which}{end}_eig" for which in ("", "critic_") for end in ("min", "max")}
    page = (ROOT / "acktr" / "runs" / "README.md").read_text()
    assert set(re.findall(f"^\\| `({tag})`", page, re.MULTILINE)) == logged


def test_the_citation_is_of_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {acktr.__version__}\n" in text and "1708.05144" in text
