"""The documentation site: the pages of the folders and the docstrings, as HTML with a search.

Usage: python -m scripts.site [--out site] [--pages-only]

Needs the extra `docs` (mkdocs-material, mkdocstrings, latex2mathml). The pages are those of the
repository, put together in a temporary folder: links among them stay, files of code that they link
to become pages of their own, and what a browser cannot show is named without a link. A link that
leads nowhere and any other warning of mkdocs is an error. Formulas become MathML, which browsers
set themselves. Nothing is loaded from elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from acktr.config import ALGOS, known_presets, preset, to_dict
from acktr.files import flat
from scripts.common import ScriptError, on_files

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("acktr", "envs", "scripts", "results")
SHOWN = {".png", ".svg", ".csv"}
"""Kinds of files that are copied beside the pages."""
CODE = {".py": "python", ".json": "json", ".toml": "toml", ".txt": "text", ".cff": "yaml"}
"""Kinds of files that become pages of code, and their languages."""

_LINK = re.compile(r"(!?)\[([^]\[]*(?:\[[^]]*\][^]\[]*)*)\]\(([^)\s]+)\)")
_REFERENCE = {
    "agents": ("acktr.agent", "acktr.predictor", "acktr.callbacks", "acktr.listeners"),
    "settings": ("acktr.config.settings", "acktr.config.network", "acktr.config.shorthand"),
    "environments": ("acktr.envs.factory", "acktr.envs.source", "acktr.envs.settings"),
    "networks": ("acktr.policies.contract",),
    "updates": ("acktr.train", "acktr.algorithms.update"),
    "kfac": ("acktr.kfac.optimizer", "acktr.kfac.config", "acktr.kfac.losses.likelihoods"),
}
"""Pages of the reference, and the modules on each."""

_HOOK = ROOT / "scripts" / "site_hook.py"
"""What mkdocs does to every page."""

_ANY = "any other environment"
_EXAMPLES = {
    _ANY: "FrozenLake-v1",
    "Atari": "ALE/Pong-v5",
    "MuJoCo": "HalfCheetah-v5",
    "Pixels": "Pixels/HalfCheetah-v5",
}
"""An environment of each family that presets are for."""

_STYLE = "style.css"
_CSS = """\
.md-grid { max-width: 80rem }
math {
  font-family: "STIX Two Math", "Latin Modern Math", "Cambria Math", "DejaVu Math TeX Gyre",
    "XITS Math", "Noto Sans Math", math;
}
@media screen and (max-width: 44.9rem) {
  p:has(> math) { overflow-x: auto; padding-block: 0.3rem }
}
"""
"""Style besides the theme's: pages have wide tables, and formulas a font made for them, if any.

Without one browsers raise and lower scripts wrongly. On a phone a formula that is wider than the
screen, which no browser breaks, can be moved.
"""

_NAV: list[dict[str, object]] = [
    {"Start": "README.md"},
    {"Install and first run": "acktr/INSTALL.md"},
    {
        "Guides": [
            {"Python": "acktr/README.md"},
            {"Coming from Stable-Baselines3": "acktr/FROM_SB3.md"},
            {"Your own environment": "envs/OWN.md"},
            {"Environments": "envs/README.md"},
            {"Commands": "acktr/cli/README.md"},
            {"A run folder and its tags": "acktr/runs/README.md"},
            {"Tuning": "acktr/algorithms/TUNING.md"},
            {"Recipes": "scripts/examples/README.md"},
        ]
    },
    {
        "Algorithms": [
            {"ACKTR on two pages": "acktr/algorithms/ACKTR.md"},
            {"ACKTR, A2C, TRPO": "acktr/algorithms/README.md"},
        ]
    },
    {
        "K-FAC": [
            {"K-FAC alone": "acktr/kfac/README.md"},
            {"Noisy K-FAC": "acktr/kfac/noisy/README.md"},
            {"Formulas": "acktr/kfac/FORMULAS.md"},
        ]
    },
    {"Results": "results/README.md"},
    {"Scripts and studies": "scripts/README.md"},
    {
        "Reference": [
            *({name.capitalize(): f"reference/{name}.md"} for name in _REFERENCE),
            {"Presets": "reference/presets.md"},
        ]
    },
    {"Contributing": "CONTRIBUTING.md"},
    {"Changes": "CHANGELOG.md"},
]


def assemble(root: Path, target: Path) -> None:
    """Put the pages together in a new folder.

    Args:
        root: The repository.
        target: The folder.

    Raises:
        ScriptError: A page links to something that is not there.
    """
    target.mkdir(exist_ok=True)
    (target / _STYLE).write_text(_CSS)
    found = [root / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING")]
    for folder in FOLDERS:
        found += [p for p in (root / folder).rglob("*.md") if "acktr/envs" not in p.as_posix()]
    for page in sorted(found):
        place = target / page.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(_linked(page, root, target))
    for name, modules in _REFERENCE.items():
        place = target / "reference" / f"{name}.md"
        place.parent.mkdir(exist_ok=True)
        parts = "".join(f"::: {module}\n\n" for module in modules)
        place.write_text(f"# {name.capitalize()}\n\n{parts}")
    (target / "reference" / "presets.md").write_text(presets_page())


def presets_page() -> str:
    """The presets: all settings of the general ones, and what the others change in these."""
    lines = [
        "# Presets",
        "",
        "`acktr presets ENV --algo ALGO --preset NAME` writes one as a file for `--config`. Below,"
        " the general preset of an algorithm has all its settings, the others those that differ.",
    ]
    for algo, name, place, what in sorted(known_presets(), key=lambda each: each[2] != _ANY):
        general = _settings(algo, _EXAMPLES[_ANY], "default")
        settings = general
        if place != _ANY:
            own = _settings(algo, _EXAMPLES.get(place, place), name)
            settings = {key: own[key] for key in own if own[key] != general.get(key)}
        lines += [
            "",
            f"## {algo}, {name}: {place}",
            "",
            what,
            "",
            "| setting | value |",
            "|---|---|",
        ]
        lines += [f"| `{key}` | `{json.dumps(value)}` |" for key, value in settings.items()]
    return "\n".join(lines) + "\n"


def _settings(algo: str, env: str, name: str) -> dict[str, object]:
    """The settings of a preset that its algorithm uses, by their dotted names."""
    left_out = {"env", "algo", "preset", "seed", "device", *(set(ALGOS) - {algo})}
    settings = flat(to_dict(preset(env, algo, name)[0]))
    return {key: value for key, value in settings.items() if key.split(".")[0] not in left_out}


def _linked(page: Path, root: Path, target: Path) -> str:
    """The text of a page with links that work in the site."""
    parts = re.split(r"(^```.*?^```)", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for index in range(0, len(parts), 2):  # the others are code
        parts[index] = _LINK.sub(lambda link: _link(link, page, root, target), parts[index])
    return "".join(parts)


def _link(link: re.Match[str], page: Path, root: Path, target: Path) -> str:
    """A link as it is in the site, or its text alone."""
    image, text, goal = link.groups()
    path, mark, anchor = goal.partition("#")
    if goal.startswith(("https://", "http://")) or not path:
        return link[0]
    file = (page.parent / path).resolve()
    if not file.is_relative_to(root) or not file.exists():
        raise ScriptError(f"{page.relative_to(root)}: the link to {goal} leads nowhere")
    inside = file.relative_to(root)
    place = target / inside
    if file.suffix in SHOWN:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    elif file.suffix in CODE:
        mark = anchor = ""
        place = target / "code" / f"{inside}.md"
        _show(file, inside, place)
    elif file.suffix != ".md":
        return text
    here = (target / page.relative_to(root)).parent
    return f"{image}[{text}]({os.path.relpath(place, here)}{mark}{anchor})"


def _show(file: Path, name: Path, place: Path) -> None:
    """Make a page of a file of code."""
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        fence = "`" * 6
        code = file.read_text()
        place.write_text(f"# {name}\n\n{fence}{CODE[file.suffix]}\n{code}\n{fence}\n")


def configuration(root: Path, pages: Path) -> str:
    """mkdocs.yml, written as JSON, which is YAML too.

    Args:
        root: The repository, in which the docstrings are looked for.
        pages: What :func:`assemble` has made.
    """
    handler = {
        "paths": [str(root)],
        "options": {
            "show_source": False,
            "show_root_heading": True,
            "heading_level": 2,
            "docstring_style": "google",
            "members_order": "source",
            "show_signature_annotations": True,
            "separate_signature": True,
        },
    }
    return json.dumps(
        {
            "site_name": "acktr",
            "site_description": "ACKTR and K-FAC in PyTorch",
            "docs_dir": str(pages),
            "strict": True,
            "use_directory_urls": False,
            "hooks": [str(_HOOK)],
            "extra_css": [_STYLE],
            "theme": {
                "name": "material",
                "font": False,
                "features": ["navigation.top", "content.code.copy"],
                "palette": {"scheme": "default", "primary": "indigo"},
            },
            "nav": _NAV,
            "not_in_nav": "code/**\nresults/**\nscripts/**\n",
            "validation": {"links": {"anchors": "warn", "unrecognized_links": "warn"}},
            "markdown_extensions": [
                "tables",
                "admonition",
                "pymdownx.superfences",
                "pymdownx.highlight",
                {"toc": {"permalink": True, "toc_depth": 3}},
            ],
            "plugins": ["search", {"mkdocstrings": {"handlers": {"python": handler}}}],
        }
    )


def build(out: Path, pages_only: bool) -> None:
    """Build the site.

    Raises:
        ScriptError: mkdocs is not installed, or warns of something.
    """
    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder) / "pages"
        assemble(ROOT, pages)
        if pages_only:
            shutil.copytree(pages, out)
            return
        file = Path(folder) / "mkdocs.yml"
        file.write_text(configuration(ROOT, pages))
        command = [sys.executable, "-m", "mkdocs", "build", "-q", "-f", str(file)]
        quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
        done = subprocess.run([*command, "-d", str(out.resolve())], check=False, env=quiet)
    if done.returncode:
        raise ScriptError(
            "mkdocs did not build the site; it needs: pip install -c constraints.txt '.[docs]'"
        )


def main() -> int:
    """Build the site of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("site"), help="folder to write (site)")
    parser.add_argument(
        "--pages-only", action="store_true", help="write the Markdown pages, without mkdocs"
    )
    options = parser.parse_args()
    return on_files("site", lambda: build(options.out, options.pages_only))


if __name__ == "__main__":
    sys.exit(main())
