"""The commands of docs/first_hour.md, run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "first_hour.md"
INSTALL = ("make packages", "pip install")
"""Beginnings of commands that have been done where a test runs."""


def commands() -> list[str]:
    """Return the commands of the page; a file that is written by ``cat`` belongs to its command."""
    text = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE.read_text(), flags=re.S))
    return re.findall(r"^(?:cat > .*?^EOF$|for .*?^done$|[^\n]+$)", text, flags=re.S | re.M)


def run_page(folder: Path, *, skipped: tuple[str, ...] = ()) -> str:
    """Run the page in a folder that looks like a checkout; return what it printed."""
    for name in ("configs", "tools", "tests"):
        (folder / name).symlink_to(ROOT / name)
    script = "\n".join(command for command in commands() if not command.startswith((*INSTALL, *skipped)))
    bin_folder = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout
