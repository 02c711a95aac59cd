"""The function of ``data.reward``, which replaces the ``score`` of a problem's task: found and checked before it judges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_rl import plugins
from megatron_rl.errors import UserError
from megatron_rl.types import Problem

Verifier = Callable[[Problem, str], Any]
"""(problem, decoded response) -> Score, unless code from outside returns something else: ``scoring.reward`` finds out."""
FIELD = "data.reward"


def get_reward(path: str) -> Verifier:
    """Import the function of ``data.reward``.

    Raises:
        UserError: there is none, or it does not take (problem, response).
    """
    function = plugins.load(path, field=FIELD, what="a reward")
    if not callable(function) or isinstance(function, type):
        rule = f"is {plugins.kind_of(function)}, not a function"
        raise UserError(FIELD, path, rule, "name a function f(problem, response) that returns a float or a Score")
    plugins.check_call(function, path, ("problem", "response"), field=FIELD)
    return function
