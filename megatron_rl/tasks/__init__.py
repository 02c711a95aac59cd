"""Tasks: where problems come from, how they are put to the model, and how an answer is scored. All of them, by name."""

from __future__ import annotations

from megatron_rl import plugins
from megatron_rl.errors import UserError
from megatron_rl.tasks.base import Task
from megatron_rl.tasks.gsm8k import Gsm8k
from megatron_rl.tasks.math import Math
from megatron_rl.tasks.word_problems import WordProblems

TASKS: dict[str, Task] = {
    "math": Math(),
    "gsm8k": Gsm8k(),
    "word_problems": WordProblems(),
}


def get_task(name: str) -> Task:
    """Return the task called ``name``; ``package.module:NAME`` names a task outside this package.

    Raises:
        UserError: there is no such task, or what the import path names is not one.
    """
    task = plugins.find(name, TASKS, field="data.task", what="a task")
    if isinstance(task, type) or not isinstance(task, Task):
        raise UserError(
            "data.task",
            name,
            "is not an object with name, preload, problem and score",
            "name an instance that has the members of megatron_rl.tasks.base.Task",
        )
    return task
