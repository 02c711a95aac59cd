"""Names in a config: one of ours, ``package.module:NAME`` from anywhere on the Python path, or ``folder/file.py:NAME``.

``find`` is the only resolver. Tasks, rewards, methods, engines, transports and sinks all go through it, so that outside code is
found, checked and refused in one way. ``check`` says without importing whether a path can be right: a module that imports torch
is refused for a spelling mistake in the first second, like everything else. ``check_call`` looks at what was found, before it
is called.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from megatron_rl.errors import UserError, described
from megatron_rl.files import content_digest

T = TypeVar("T")
BINDERS = frozenset({"exec", "globals", "setattr", "vars"})
"""Functions by which a module can bind names that its syntax does not show."""
FROM_OUTSIDE = (Exception, SystemExit)
"""Exceptions of the user's code that count as errors of the config; Ctrl-C is not one."""
CONSTANTS = (bool, bytes, complex, dict, float, int, list, set, str, tuple, type(None), type(...))
"""Types of which nothing is code that a config could name."""
LITERALS = {
    ast.Dict: "dict", ast.DictComp: "dict", ast.JoinedStr: "str", ast.List: "list", ast.ListComp: "list", ast.Set: "set",
    ast.SetComp: "set", ast.Tuple: "tuple",
}  # fmt: skip
"""Expressions, beside constants, whose type shows without running them."""


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
    noun = _noun(what)
    near = difflib.get_close_matches(str(name), known, n=1)
    ours = f"did you mean {near[0]}? Else" if near else "use one of them, or"
    return UserError(
        field,
        name,
        f"is not a known {noun}; there are {', '.join(sorted(known))}",
        f"{ours} give {what} of your own as package.module:NAME",
    )


def load(path: str, *, field: str, what: str) -> Any:
    """Import ``package.module:NAME`` or ``folder/file.py:NAME`` and return the object.

    Raises:
        UserError: the module cannot be imported, whatever its code raises, or has no such name.
    """
    _look(path, field, what)
    name, _, attribute = path.partition(":")
    try:
        module = _module_of_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
        if hasattr(module, attribute):
            return getattr(module, attribute)
    except FROM_OUTSIDE as error:
        raise _broken(path, described(error), field, what) from error
    raise _missing(path, vars(module), field)


def file_digest(path: str | None) -> str | None:
    """Return a digest of the file of ``folder/file.py:NAME``; None of a name from the Python path, and of None."""
    file = Path((path or "").rpartition(":")[0])
    return content_digest(file) if file.is_file() else None


def _module_of_file(path: Path) -> ModuleType:
    """Run a file as a module, once; it finds its neighbours as a script does."""
    name = f"_file_{hashlib.blake2b(os.fsencode(path.resolve()), digest_size=8).hexdigest()}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def check(path: str, *, field: str, what: str) -> None:
    """Check that ``package.module:NAME`` exists and may be code, without running the module.

    Raises:
        UserError: it is misspelt, the module is not found or cannot be compiled, or its source has no such name at its top
            level, or binds it to a constant.
    """
    kinds = _look(path, field, what)
    if all(kinds):
        rule = f"is a constant ({' or '.join(sorted(kinds))}), not {what}"
        raise UserError(field, path, rule, f"name the function or the class that is your {_noun(what)}")


def check_call(found: Any, path: str, arguments: Sequence[str], keywords: Sequence[str] = (), *, field: str) -> None:
    """Check that what a path names can be called, before it is.

    Args:
        found: what ``load`` returned.
        path: that named it.
        arguments: names of the arguments by position.
        keywords: names of the arguments by keyword.
        field: config key, for errors.

    Raises:
        UserError: it is no function or class, is an async function, is abstract, or does not take these arguments.
    """
    call = f"f({', '.join([*arguments, *(f'{name}=...' for name in keywords)])})"
    if not callable(found):
        rule, fix = f"is {kind_of(found)}, not a function or a class", f"name what can be called as {call}"
    elif inspect.iscoroutinefunction(found):
        rule, fix = "is an async function", "write a plain one"
    elif inspect.isabstract(found):
        rule, fix = f"is a class that lacks {', '.join(sorted(found.__abstractmethods__))}", "give it these members"
    elif misfit := _misfit(found, arguments, keywords):
        rule, fix = f"cannot be called as {call} ({misfit})", "take these arguments; give any others a default"
    else:
        return
    raise UserError(field, path, rule, fix)


def _misfit(found: Any, arguments: Sequence[str], keywords: Sequence[str]) -> str:
    """Say what is wrong with a call; nothing where that cannot be known."""
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # compiled code may have none
        return ""
    try:
        signature.bind(*arguments, **dict.fromkeys(keywords))
    except TypeError as error:
        return str(error)
    return ""


def kind_of(value: object) -> str:
    """Return the name of a value's type, with its article."""
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"


@contextmanager
def named_by(name: str, path: str, *, field: str) -> Iterator[None]:
    """Let an error of a path that stands in the user's code, not in the config, name the config key that leads there.

    Args:
        name: value of the key.
        path: that the code of ``name`` gives.
        field: config key.
    """
    try:
        yield
    except UserError as error:
        raise UserError(field, name, f"is implemented by {path}, which {error.rule}", error.fix) from error.__cause__


def _look(path: str, field: str, what: str) -> set[str]:
    """Check the spelling of a path and that its name is there; return the types of what it is bound to, as ``_bindings``."""
    module, _, attribute = path.partition(":")
    is_file = module.endswith(".py")
    if not attribute.isidentifier() or not (is_file or all(part.isidentifier() for part in module.split("."))):
        form = (
            f"{module}:NAME, with the name of {what} in that file"
            if is_file
            else "folder/file.py:NAME or package.module:NAME"
        )
        raise UserError(field, path, f"does not read {'file.py' if is_file else 'package.module'}:NAME", f"give {form}")
    if (imported := sys.modules.get(module)) is not None:  # it may bind other names than its source shows
        there = vars(imported)
        if attribute not in there and "__getattr__" not in there:
            raise _missing(path, there, field)
        value = there.get(attribute, imported)
        return {type(value).__name__ if isinstance(value, CONSTANTS) else ""}
    try:
        source = _text_of(Path(module), field, path) if is_file else _source(module, field, path)
        tree = None if source is None else _parse(source)
    except UserError:
        raise
    except (SyntaxError, ValueError) as error:  # of the source, or of its encoding
        where = f"in line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) and error.lineno else error
        raise _broken(path, f"{type(error).__name__} {where}", field, what) from error
    if tree is None:
        return {""}
    bound = _bindings(tree)
    if _is_open(tree, bound):
        return {""}
    if attribute not in bound:
        raise _missing(path, bound, field)
    return bound[attribute]


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings(action="ignore"):  # importing gives them
        tree = ast.parse(source)
        compile(source, "<module>", "exec", dont_inherit=True)  # finds errors that parsing does not
    return tree


def _noun(what: str) -> str:
    return what.split(" ", 1)[1]


def _broken(path: str, reason: str, field: str, what: str) -> UserError:
    return UserError(field, path, f"cannot be imported ({reason})", f"fix the module that holds your {_noun(what)}")


def _missing(path: str, names: Iterable[str], field: str) -> UserError:
    module, _, attribute = path.partition(":")
    public = sorted(name for name in names if not name.startswith("_"))
    near = difflib.get_close_matches(attribute, public, n=1)
    fix = (
        f"did you mean {near[0]}?" if near else f"check the spelling; {module} has {', '.join(public[:8]) or 'nothing'}"
    )
    return UserError(field, path, f"is not there: {module} has no {attribute}", fix)


def _text_of(file: Path, field: str, path: str) -> str:
    try:
        with tokenize.open(file) as opened:
            return opened.read()
    except OSError as error:
        fix = "give the path of the file, from the folder in which you start or from the root"
        raise UserError(field, path, f"cannot be read ({error.strerror})", fix) from error


def _source(module: str, field: str, path: str) -> str | None:
    """The module's text; None where it has none (built in, compiled)."""
    try:
        spec = importlib.util.find_spec(module)
    except FROM_OUTSIDE as error:  # a package on the way, which is imported to look inside it
        spec, reason = None, described(error)
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
    except (SyntaxError, UnicodeError):
        raise
    except Exception:  # no source, or none that a loader of another kind would show
        return None


def _bindings(tree: ast.Module) -> dict[str, set[str]]:
    """Names that a module binds at its top level, in whatever way, with the types of the constants that each is bound to.

    The type is ``""`` for everything that only running can tell.
    """
    bound: dict[str, set[str]] = {}
    todo: list[ast.AST] = [*tree.body]
    while todo:
        names: list[str] = []
        kind = ""
        match node := todo.pop():
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names, node = [name], ast.Pass()  # and not what is inside
            case ast.Assign(targets=targets, value=value):
                names, kind = [target.id for target in targets if isinstance(target, ast.Name)], _kind(value)
                todo += [target for target in targets if not isinstance(target, ast.Name)]
                node = value
            case ast.AnnAssign(target=ast.Name(id=name), value=given):  # without a value it binds nothing
                names, kind, node = [name] if given else [], _kind(given), given or ast.Pass()
            case ast.Name(id=name, ctx=ast.Store()):
                names = [name]
            case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
                names = [name]
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                names = [(alias.asname or alias.name).split(".")[0] for alias in aliases]
        for name in names:
            bound.setdefault(name, set()).add(kind)
        todo += ast.iter_child_nodes(node)
    return bound


def _kind(value: ast.expr | None) -> str:
    """The type of a literal."""
    match value:
        case ast.Constant(value=constant) | ast.UnaryOp(operand=ast.Constant(value=constant)):
            return type(constant).__name__
        case _:
            return LITERALS.get(type(value), "")


def _is_open(tree: ast.Module, bound: Iterable[str]) -> bool:
    """Tell that a module may bind names that its syntax does not show."""
    return "*" in bound or "__getattr__" in bound or any(map(_may_bind, ast.walk(tree)))


def _may_bind(node: ast.AST) -> bool:
    return isinstance(node, ast.Global) or (isinstance(node, ast.Name) and node.id in BINDERS)
