"""Kinds of values that the fields of upstream's classes take, read from the annotations in their source text.

An annotation that is not understood here takes anything: upstream itself knows better.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class ValueKind:
    """A set of values, in words and as a test."""

    words: str
    fits: Callable[[object], bool]

    def __or__(self, other: ValueKind) -> ValueKind:
        """Unite two kinds."""
        return ValueKind(f"{self.words}, or {other.words}", lambda value: self.fits(value) or other.fits(value))


@dataclass(frozen=True)
class UpstreamField:
    """One annotated field."""

    kind: ValueKind
    aliases: tuple[str, ...] = field(default=())
    """Further names of its command-line option, as field names are written."""


ANYTHING = ValueKind("anything", lambda _: True)
NULL = ValueKind("null", lambda value: value is None)
NO_OBJECT = ValueKind("left out (it takes an object of Python)", lambda _: False)
SCALARS = {
    "bool": ValueKind("true or false", lambda value: isinstance(value, bool)),
    "int": ValueKind("a whole number", lambda value: type(value) is int),
    "float": ValueKind("a number", lambda value: type(value) in (int, float) and math.isfinite(value)),  # type: ignore[arg-type]
    "str": ValueKind("a text", lambda value: isinstance(value, str)),
    **dict.fromkeys(("Callable", "ContextManager", "AttnBackend", "RecipeConfig"), NO_OBJECT),
}
LISTS = ("list", "List", "Sequence", "tuple", "Tuple")
MAPPINGS = ("dict", "Dict", "Mapping")


def read_fields(
    source: str, *, class_name: str | None = None, constants: Mapping[str, ast.expr] | None = None
) -> dict[str, UpstreamField]:
    """Read the annotated fields of a module's classes.

    Args:
        source: text of the module.
        class_name: the one class to read; None reads all that stand at the top.
        constants: values of names that the module imports.
    """
    tree = ast.parse(source)
    reader = _Reader({**(constants or {}), **read_constants(tree)})
    return {
        item.target.id: reader.read_field(item.annotation, item.value)
        for node in tree.body
        if isinstance(node, ast.ClassDef) and class_name in (None, node.name)
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not item.target.id.startswith("_")
    }


def read_constants(module: ast.Module | Path) -> dict[str, ast.expr]:
    """Return what a module assigns to names at its top level, unevaluated; nothing for a file that is not there."""
    if isinstance(module, Path):
        module = ast.parse(module.read_text() if module.is_file() else "")
    return {
        node.targets[0].id: node.value
        for node in module.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }


class _Reader:
    def __init__(self, constants: Mapping[str, ast.expr]) -> None:
        self._constants = constants

    def read_field(self, annotation: ast.expr, default: ast.expr | None) -> UpstreamField:
        """Read ``int``, or SGLang's ``A[int, "help"]`` and ``A[int, Arg(help=..., choices=...)]``."""
        annotation = _unquoted(annotation)
        if not (isinstance(annotation, ast.Subscript) and _name(annotation.value) in ("A", "Annotated")):
            kind = self._kind(annotation)
            return UpstreamField(kind if kind.fits(None) or not _is_null(default) else kind | NULL)
        annotation, *notes = _parts(annotation.slice)
        arguments = {
            keyword.arg: keyword.value
            for note in notes
            if isinstance(note, ast.Call)
            for keyword in note.keywords
            if keyword.arg is not None
        }
        choices = self._literals(arguments.get("choices"))
        aliases = self._literals(arguments.get("aliases")) or ()
        kind = self._kind(annotation) if choices is None else _with_choices(self._kind(annotation), choices)
        if "type_parser" in arguments or "action" in arguments:  # code of SGLang reads the value
            kind = ANYTHING
        return UpstreamField(kind, tuple(str(alias).lstrip("-").replace("-", "_") for alias in aliases))

    def _kind(self, node: ast.expr) -> ValueKind:
        match _unquoted(node):
            case ast.Constant(value=None):
                return NULL
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return self._union([left, right])
            case ast.Name(id=name) if name in SCALARS:
                return SCALARS[name]
            case ast.Name(id=name) | ast.Subscript(value=ast.Name(id=name)) if name in MAPPINGS:
                return ValueKind("a mapping", lambda value: isinstance(value, dict))
            case ast.Name(id=name) if name in LISTS:
                return _list_of(ANYTHING)
            case ast.Subscript(value=ast.Name(id=name), slice=inner):
                return self._generic(name, _parts(inner))
            case _:
                return ANYTHING

    def _generic(self, name: str, parts: list[ast.expr]) -> ValueKind:
        if name == "Optional":
            return self._kind(parts[0]) | NULL
        if name == "Union":
            return self._union(parts)
        if name == "Literal":
            return _one_of(self._literals(ast.Tuple(parts)) or [])
        if name in LISTS and name not in ("tuple", "Tuple"):
            return _list_of(self._kind(parts[0]))
        if name in LISTS and len(parts) > 1 and not isinstance(parts[1], ast.Constant):  # not tuple[int, ...]
            return _list_of(self._kind(parts[0]), length=len(parts))
        return SCALARS.get(name, ANYTHING)

    def _union(self, parts: list[ast.expr]) -> ValueKind:
        kinds = [kind for kind in map(self._kind, parts) if kind is not NO_OBJECT]
        united = kinds[0] if kinds else NO_OBJECT
        for kind in kinds[1:]:
            united |= kind
        return united

    def _literals(self, node: ast.expr | None) -> list[object] | None:
        """Return the values of a list, or of a constant's name; None where that takes running the code."""
        if isinstance(node, ast.Name):
            node = self._constants.get(node.id)
        try:
            return None if node is None else list(ast.literal_eval(node))
        except (ValueError, TypeError):
            return None


def _one_of(choices: list[object]) -> ValueKind:
    return ValueKind(f"one of {', '.join(map(str, choices))}", lambda value: value in choices)


def _list_of(kind: ValueKind, length: int | None = None) -> ValueKind:
    size = "a list" if length is None else f"a list of {length}"

    def fits(value: object) -> bool:
        return isinstance(value, list) and length in (None, len(value)) and all(map(kind.fits, value))

    return ValueKind(size if kind is ANYTHING else f"{size}, each {kind.words}", fits)


def _with_choices(kind: ValueKind, choices: list[object]) -> ValueKind:
    """Narrow a kind to choices: of the value, or of the items of a list."""
    chosen = _one_of(choices)
    if kind.fits(choices[:1]):
        chosen |= _list_of(chosen)
    return chosen | NULL if kind.fits(None) else chosen


def _is_null(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _parts(node: ast.expr) -> list[ast.expr]:
    return node.elts if isinstance(node, ast.Tuple) else [node]


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _unquoted(node: ast.expr) -> ast.expr:
    """Return the annotation that stands in quotes, or ``node``."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        with suppress(SyntaxError):
            return ast.parse(node.value, mode="eval").body
    return node
