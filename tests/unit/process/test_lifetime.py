"""How a program ends."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap


def ended(body: str, *, stdout: int = subprocess.PIPE) -> tuple[int, str]:
    """Status and output of a program that ends by ``leave(3)``."""
    code = "import atexit, sys, threading, time\nfrom megatron_rl.process.lifetime import leave\n" + textwrap.dedent(
        body
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", code + "\nleave(3)\n"]
    done = subprocess.run(command, stdout=stdout, text=True, env=environment, timeout=30, check=False)
    return done.returncode, done.stdout


def test_all_that_was_said_and_registered_is_done() -> None:
    assert ended("atexit.register(print, 'last', end=''); print('first', end=' ')") == (3, "first last")


def test_a_thread_that_never_ends_does_not_keep_it() -> None:
    assert ended("threading.Thread(target=time.sleep, args=(300,)).start()") == (3, "")


def test_nothing_is_taken_apart() -> None:
    """What aborts in an orderly end is a destructor of C++; one of Python stands for it."""
    body = """
        import os
        class Aborts:
            def __del__(self, abort=os.abort):
                abort()
        kept = Aborts()
    """
    assert ended(body) == (3, "")


def test_output_that_nobody_reads_does_not_change_the_status() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        assert ended("print('x')", stdout=write)[0] == 3
    finally:
        os.close(write)
