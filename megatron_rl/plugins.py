"""Names in a config: one of ours, or ``package.module:NAME`` from anywhere on the Python path.

``find`` is the only resolver. Tasks, rewards, methods, engines, transports and sinks all go through it, so that outside code is
found, checked and refused in one way. ``check`` says without importing whether a path can be right: a module that imports torch
is refused for a spelling mistake in the first second, like everything else.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from megatron_rl.errors import UserError

T = TypeVar("T")
BINDERS = frozenset({"exec", "globals", "setattr", "vars"})
"""Functions by which a module can bind names that its syntax does not show."""


def is_path(name: str) -> bool:
    """Tell ``package.module:NAME`` from a known name."""
    return ":" in name


def find(name: str, known: Mapping[str, T], *, field: str, what: str) -> T | Any:
    """Return what a config names.

    Args:
        name: a key of ``known``, or ``package.module:NAME``.
        known: ours, by name.
        field: config key, for errors.
        what: the kind of thing, with its article: ``a task``.

    Raises:
        UserError: the name is unknown; the module cannot be imported; it has no such name.
    """
    if is_path(name):
        return load(name, field=field, what=what)
    if name not in known:
        raise unknown(name, known, field=field, what=what)
    return known[name]


def check_name(name: str, known: Iterable[str], *, field: str, what: str) -> None:
    """Check that a config names one of ours, or a path that exists; arguments as ``find``. Nothing is imported.

    Raises:
        UserError: it names nothing.
    """
    if is_path(name):
        check(name, field=field, what=what)
    elif name not in known:
        raise unknown(name, known, field=field, what=what)


def unknown(name: object, known: Iterable[str], *, field: str, what: str) -> UserError:
    """Say that ``name`` is neither known nor a path."""
    noun = what.split(" ", 1)[1]
    near = difflib.get_close_matches(str(name), known, n=1)
    ours = f"did you mean {near[0]}? Else" if near else "use one of them, or"
    return UserError(
        field,
        name,
        f"is no {noun}; there are {', '.join(sorted(known))}",
        f"{ours} give {what} of your own as package.module:NAME",
    )


def load(path: str, *, field: str, what: str) -> Any:
    """Import ``package.module:NAME`` and return the object.

    Raises:
        UserError: the module cannot be imported, whatever its code raises, or has no such name.
    """
    check(path, field=field, what=what)
    name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(name)
    except Exception as error:  # the module is the user's: anything may come out of it
        where = f"{type(error).__name__}: {error}"
        raise UserError(field, path, f"cannot be imported ({where})", f"mend the module of {what}") from error
    if not hasattr(module, attribute):
        raise _missing(path, vars(module), field)
    return getattr(module, attribute)


def check(path: str, *, field: str, what: str) -> None:
    """Check that ``package.module:NAME`` exists, without running the module.

    Raises:
        UserError: it is misspelt, the module is not found, or its source has no such name at its top level.
    """
    module, _, attribute = path.partition(":")
    if not attribute.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise UserError(field, path, "does not read package.module:NAME", f"name the module of {what}, then the object")
    source = _source(module, field, path)
    if source is not None and attribute not in (names := _top_level_names(source)):
        raise _missing(path, names, field)


def _missing(path: str, names: Iterable[str], field: str) -> UserError:
    module, _, attribute = path.partition(":")
    public = sorted(name for name in names if not name.startswith("_"))
    near = difflib.get_close_matches(attribute, public, n=1)
    fix = (
        f"did you mean {near[0]}?" if near else f"check the spelling; {module} has {', '.join(public[:8]) or 'nothing'}"
    )
    return UserError(field, path, f"is not there: {module} has no {attribute}", fix)


def _source(module: str, field: str, path: str) -> str | None:
    """The module's text; None where it has none (built in, compiled) or was imported already and may have changed itself."""
    if module in sys.modules:
        return None
    try:
        spec = importlib.util.find_spec(module)
    except Exception as error:  # a package on the way, which is imported to look inside it
        spec, reason = None, f"{type(error).__name__}: {error}"
    else:
        reason = f"there is no module {module}"
    if spec is None:
        raise UserError(
            field,
            path,
            f"cannot be imported ({reason})",
            "start from the folder that holds it, or put that folder on PYTHONPATH, and check the spelling",
        )
    if spec.loader is None or spec.origin is None:  # a folder without __init__.py
        return ""
    try:
        return spec.loader.get_source(module)  # type: ignore[attr-defined]
    except Exception:  # no source, or in a form that importing understands better
        return None


def _top_level_names(source: str) -> set[str]:
    """Names that a module binds at its top level, in whatever way; all where it imports ``*``."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return _Everything()  # importing says it better
    names: set[str] = set()
    todo: list[ast.AST] = [*tree.body]
    while todo:
        match node := todo.pop():
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)  # and not what is inside
                continue
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
                names.add(name)
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                names |= {(alias.asname or alias.name).split(".")[0] for alias in aliases}
        todo += ast.iter_child_nodes(node)
    is_open = "*" in names or "__getattr__" in names or any(map(_may_bind, ast.walk(tree)))
    return _Everything() if is_open else names


def _may_bind(node: ast.AST) -> bool:
    return isinstance(node, ast.Global) or (isinstance(node, ast.Name) and node.id in BINDERS)


class _Everything(set[str]):
    def __contains__(self, name: object) -> bool:
        return True
