"""The front of the path, before anything is imported: this module may import only what Python itself has loaded by then."""

import os
import sys


def leave_current_folder() -> None:
    """Take the current folder off the front of the path, where ``python -m`` puts it without ``-P``.

    A file ``secrets.py`` in it would be everybody's ``secrets``. ``lifetime.see_current_folder`` puts the folder last.
    """
    try:
        here = os.getcwd()
    except FileNotFoundError:  # it has been removed, and is not on the path
        return
    if not sys.flags.safe_path and sys.path[:1] == [here]:
        del sys.path[0]
