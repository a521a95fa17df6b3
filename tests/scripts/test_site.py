"""The documentation site: its pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.common import ScriptError
from scripts.site import ROOT, assemble, configuration
from scripts.site_hook import on_page_content

LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")


def test_pages_are_whole(tmp_path: Path) -> None:
    """Every link among them leads to a file of the site."""
    assemble(ROOT, tmp_path)
    pages = sorted(tmp_path.rglob("*.md"))
    assert len(pages) > 40
    for page in pages:
        if "code" in page.relative_to(tmp_path).parts:
            continue
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for link in LINK.findall(text):
            assert link.startswith("https://") or (page.parent / link).is_file(), (page, link)
    code = (tmp_path / "code" / "acktr" / "train.py.md").read_text()
    assert "class Trainer:" in code and "](../code/acktr/train.py.md)" in (
        (tmp_path / "acktr" / "README.md").read_text()
    )
    text = configuration(ROOT, tmp_path)
    for name in re.findall(r'"([\w/]+\.md)"', text):
        assert (tmp_path / name).is_file(), name
    assert not list(tmp_path.rglob("*.zip"))


def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "README.md").write_text("```\n[code](no.md)\n```\nsee [this](gone.md)\n")
    for name in ("CHANGELOG", "CONTRIBUTING"):
        (root / f"{name}.md").write_text("nothing\n")
    with pytest.raises(ScriptError, match=r"README.md: the link to gone.md leads nowhere"):
        assemble(root.resolve(), tmp_path / "out")


def test_roles_of_sphinx_are_not_shown() -> None:
    page = "see :class:<code>KFAC</code> and :data:`x`, :meth:<a>"
    assert on_page_content(page, page=None) == "see <code>KFAC</code> and :data:`x`, <a>"


def test_formulas_are_mathematics() -> None:
    """Every one of the pages; that the site is built without a warning is seen in CI."""
    pytest.importorskip("latex2mathml")
    set_ = on_page_content("a $<code>F &gt; J^\\top</code>$ and <code>$HOME</code>")
    assert set_.startswith("a <math") and "<msup><mi>J</mi>" in set_ and "$HOME" in set_
    for wrong in ("\\nonsense", "x^"):
        with pytest.raises(ValueError, match="the formula"):
            on_page_content(f"$<code>{wrong}</code>$")
