"""The documentation site: its pages, and the whole where mkdocs is installed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.common import ScriptError
from scripts.site import ROOT, assemble, configuration
from tests.tools.command_line import environment

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
    text = configuration(ROOT, tmp_path, tmp_path / "hook.py")
    for name in re.findall(r'"([\w/]+\.md)"', text):
        assert (tmp_path / name).is_file(), name
    assert not list(tmp_path.rglob("*.zip"))


def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "README.md").write_text("```\n[code](no.md)\n```\nsee [this](gone.md)\n")
    (root / "CHANGELOG.md").write_text("nothing\n")
    with pytest.raises(ScriptError, match=r"README.md: the link to gone.md leads nowhere"):
        assemble(root.resolve(), tmp_path / "out")


@pytest.mark.slow
def test_the_site_is_built(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "scripts.site", "--out", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "site" / "reference" / "agents.html").read_text()
    assert 'id="acktr.agent.Agent.learn"' in page and ":class:" not in page
