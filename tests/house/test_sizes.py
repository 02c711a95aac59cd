"""Parts stay small and few, and a name means one thing.

``PENDING`` lists what does not hold yet. A new offender fails its test, and so does an entry that holds by now: take it off.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_rl"
MODULES = {str(path.relative_to(ROOT)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}

MAX_MODULE_LINES = 450
MAX_FUNCTION_LINES = 76
MAX_METHOD_LINES = 150
MAX_TOP_ENTRIES, MAX_TOP_FILES = 28, 8

PENDING: dict[str, set[str]] = {
    "modules": set(),
    "functions": set(),
    "methods": set(),
    "class names": set(),
}


def compare(what: str, found: Iterable[str]) -> None:
    found = set(found)
    assert not found - PENDING[what], f"new: {sorted(found - PENDING[what])}"
    assert not PENDING[what] - found, f"holds by now, take it off PENDING: {sorted(PENDING[what] - found)}"


def num_lines(source: str) -> int:
    return len(source.splitlines())


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Name and lines of each function, without decorators."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def top_classes(source: str) -> list[str]:
    """Classes of a module, without the underscore that marks private ones."""
    return [node.name.lstrip("_") for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]


def test_modules_fit_one_head() -> None:
    compare("modules", (name for name, source in MODULES.items() if num_lines(source) > MAX_MODULE_LINES))


def test_functions_fit_one_screen() -> None:
    compare(
        "functions",
        (
            f"{name}:{function}"
            for name, source in MODULES.items()
            for function, lines in functions(source)
            if lines > MAX_FUNCTION_LINES
        ),
    )


def test_a_method_is_one_short_file() -> None:
    shared = {"__init__.py", "base.py"}
    names = [name for name in MODULES if name.count("/") == 2 and name.startswith("megatron_rl/algorithms/")]
    names = [name for name in names if Path(name).name not in shared]
    assert len(names) >= 6
    compare("methods", (name for name in names if num_lines(MODULES[name]) > MAX_METHOD_LINES))


def test_the_package_opens_with_few_entries() -> None:
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    files = [path.name for path in entries if path.is_file()]
    assert {"train.py", "run.py", "types.py"} <= set(files)
    assert len(files) <= MAX_TOP_FILES, sorted(files)
    assert len(entries) <= MAX_TOP_ENTRIES, sorted(path.name for path in entries)


def test_a_class_name_means_one_thing() -> None:
    counts = Counter(name for source in MODULES.values() for name in top_classes(source))
    assert len(counts) > 100
    compare("class names", (name for name, count in counts.items() if count > 1))


def test_what_is_counted() -> None:
    source = "@a\n@b\ndef f():\n    def g():\n        pass\n\n\nclass _A: ...\n\n\nclass B:\n    class C: ...\n"
    assert dict(functions(source)) == {"f": 3, "g": 2}
    assert top_classes(source) == ["A", "B"]
