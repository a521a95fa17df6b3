"""A run and its card on the Hub: python -m scripts.examples.hub_folder RUN --repo ME/NAME.

Without --repo it writes the card and says what would be sent. The token is that of hf auth login.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Sequence
from pathlib import Path

from acktr.report.listing import card

LEFT_OUT = ("events.out.*", "fault.log", "checkpoints/last-[12]/*", "*.lock")
"""Not sent: TensorBoard's events, tracebacks with paths of this machine, older checkpoints."""


def prepare(run: Path) -> list[Path]:
    """Write README.md, the card, where there is none, and list the files to send.

    Args:
        run: Folder of a run.

    Raises:
        RunError, ValueError: It is none, or damaged.
    """
    page = run / "README.md"
    if not page.exists():
        page.write_text(card(run))
    files = sorted(path.relative_to(run) for path in run.rglob("*") if path.is_file())
    return [
        file for file in files if not any(fnmatch.fnmatch(str(file), each) for each in LEFT_OUT)
    ]


def send(run: Path, repo: str, private: bool) -> str:
    """Send the files of a run; returns the address."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    found = api.upload_folder(repo_id=repo, folder_path=run, ignore_patterns=list(LEFT_OUT))
    return str(found)


def main(argv: Sequence[str]) -> int:
    """Prepare the folder, and send it where a repository is named."""
    parser = argparse.ArgumentParser(prog="scripts.examples.hub_folder", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--repo", help="OWNER/NAME; without it nothing is sent")
    parser.add_argument("--private", action="store_true")
    given = parser.parse_args(argv)
    files = prepare(given.run)
    size = sum((given.run / file).stat().st_size for file in files)
    print(f"{len(files)} files, {size / 1e6:.1f} MB: {', '.join(map(str, files))}")
    if given.repo:
        print(f"sent to {send(given.run, given.repo, given.private)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
