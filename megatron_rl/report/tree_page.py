"""One HTML file of a recorded step, with everything in it: to be opened, sent, or kept beside a result."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from megatron_rl.errors import UserError
from megatron_rl.files import disk_errors

PLACE = "/*RECORD*/null"


def write_page(record: Path, page: Path) -> None:
    """Make the page of a file that ``write_record`` has written.

    Raises:
        UserError: it is none, or the page cannot be written.
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
    # What a model writes may hold anything, also the end of a script.
    data = json.dumps(found).replace("<", "\\u003c")
    template = files("megatron_rl.report").joinpath("page.html").read_text()
    with disk_errors(page, field="HTML", fix="name a file in a folder that exists"):
        page.write_text(template.replace(PLACE, data))
