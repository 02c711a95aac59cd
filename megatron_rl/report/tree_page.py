"""One self-contained HTML file of a recorded step: to open, to send, or to keep beside a result."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from megatron_rl.errors import UserError
from megatron_rl.files import disk_errors

PLACE = "/*RECORD*/null"


def write_page(record: Path, page: Path) -> None:
    """Write the HTML page of a file that ``write_record`` made.

    Raises:
        UserError: the file is no record, or the page cannot be written.
    """
    try:
        found = json.loads(record.read_text())
        assert isinstance(found["step"], int) and isinstance(found["prompts"], list) and found["threshold"]
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(
            "RECORD",
            str(record),
            f"is no record of a step ({type(error).__name__} {error})",
            "name a file of <run>/trees/, which a run with algorithm.save_every_n_steps writes",
        ) from error
    # A response may hold anything, even the tag that ends a script.
    data = json.dumps(found).replace("<", "\\u003c")
    template = files("megatron_rl.report").joinpath("page.html").read_text()
    with disk_errors(page, field="HTML", fix="name a file in a folder that exists"):
        page.write_text(template.replace(PLACE, data))
