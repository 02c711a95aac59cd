"""One verb of the command line, from its arguments to its exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from megatron_rl.errors import UserError
from megatron_rl.process import lifetime


def run_verb(app: typer.Typer) -> int:
    """Do what the command line asks ``app`` for; a ``UserError`` is one line and status 2."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as end:  # typer ends this way in any case, having said why
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def run_script(verb: Callable[..., Any]) -> NoReturn:
    """Be a program with this one verb."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(verb)
    lifetime.run(lambda: run_verb(app))
