"""Docstrings open with a sentence or a noun; pages and docstrings refer to nothing that a reader cannot find."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "megatron_rl").rglob("*.py"), *(ROOT / "patches").rglob("*.py")])
TEXTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
PAGES = [path for path in TEXTS if path.name != "CHANGELOG.md"]  # which names what was

OPENING_FRAGMENT = re.compile(
    "(After|Against|Although|As|At|Because|Before|Between|By|Else|For|From|Hence|Here|How|If|In|Into|It|Its|Like|Of|On|Once|"
    "Over|See|Since|So|Such|That|Their|There|They|Those|Thus|To|Under|Unless|Until|What|Whatever|When|Where|Whether|Which|"
    r"Whichever|While|Who|Whoever|Whom|Whose|Why|With|Without)(?![\w-])"
)
"""Words that begin a clause without its subject. A docstring's first line begins with a verb, or names the thing."""
ALLOWED: frozenset[str] = frozenset()
"""``path:name`` of docstrings that begin with such a word for a good reason."""

MAX_DOCSTRINGS = 0.02
MAX_FIELDS = 0.02
"""Shares of fragments; a field's docstring is the string under it."""
MAX_SEE_ONLY = 0

STRANGE_PAGES = re.compile(r"\b(DESIGN|ALGORITHMS|HOUSE|STYLE|PLAN|BRIEF)(\.md)?\s+(section )?\d")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
PATH = re.compile(r"(?<![\w/.-])((?:[\w.-]+/)+[\w.-]+\.(?:py|yaml|md|sh|sbatch|txt|json|html|png))\b")
NAME = re.compile(r"\bmegatron_rl((?:\.[a-z_]+)+)(?:[.:]([A-Za-z_]+))?")
MADE_BY_OTHERS = re.compile(r"(runs|logs|first_hour|my_\w+)/|.*NAME")
"""Paths of a page that runs write, or its reader."""


def docstrings(source: str) -> Iterator[tuple[str, str]]:
    """Name and docstring of a module, its classes and its functions."""
    for node in ast.walk(ast.parse(source)):
        is_documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if is_documented and (text := ast.get_docstring(node)):
            yield getattr(node, "name", "module"), text


def field_docstrings(source: str) -> Iterator[tuple[str, str]]:
    """Name and docstring of fields, constants and attributes: a string right under an assignment."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for field, below in zip(node.body, node.body[1:]):
            is_field = isinstance(field, ast.Assign | ast.AnnAssign)
            if is_field and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                target = field.targets[0] if isinstance(field, ast.Assign) else field.target
                if isinstance(below.value.value, str):
                    yield ast.unparse(target), below.value.value


def is_fragment(text: str) -> bool:
    """``On-policy`` is an adjective, and fine."""
    return OPENING_FRAGMENT.match(text.strip()) is not None


def is_see_only(text: str) -> bool:
    return text.startswith("See ") and len(text.splitlines()) == 1


ALL = [(f"{path.relative_to(ROOT)}:{name}", text) for path in SOURCES for name, text in docstrings(path.read_text())]
FIELDS = [
    (f"{path.relative_to(ROOT)}:{name}", text) for path in SOURCES for name, text in field_docstrings(path.read_text())
]


@pytest.mark.parametrize(("texts", "limit"), [(ALL, MAX_DOCSTRINGS), (FIELDS, MAX_FIELDS)], ids=["code", "fields"])
def test_docstrings_do_not_open_with_a_fragment(texts: list[tuple[str, str]], limit: float) -> None:
    assert len(texts) > 300
    found = [(name, text.splitlines()[0]) for name, text in texts if is_fragment(text) and name not in ALLOWED]
    share = len(found) / len(texts)
    assert share <= limit, f"{len(found)} of {len(texts)}, {share:.2%}:\n" + "\n".join(map(str, found))


def test_no_docstring_says_only_where_to_look() -> None:
    found = [name for name, text in ALL if is_see_only(text)]
    assert len(found) <= MAX_SEE_ONLY, found


def test_allowed_fragments_are_fragments() -> None:
    texts = dict([*ALL, *FIELDS])
    assert all(is_fragment(texts[name]) for name in ALLOWED)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What a task is.", True),
        ("Of the run.", True),
        ("See ``Fleet``.", True),
        ("Return the sum.", False),
        ("On-policy rows.", False),
        ("``what`` is a name.", False),
        ("[T] float32.", False),
    ],
)
def test_what_counts_as_a_fragment(text: str, expected: bool) -> None:
    assert is_fragment(text) is expected


def test_where_docstrings_are_found() -> None:
    source = "'M.'\nA = 1\n'F.'\nclass C:\n    'K.'\n    b: int\n    'G.'\n    def f(self):\n        'H.'\n"
    assert list(docstrings(source)) == [("module", "M."), ("C", "K."), ("f", "H.")]
    assert list(field_docstrings(source)) == [("A", "F."), ("b", "G.")]


@pytest.mark.parametrize("path", [*SOURCES, *TEXTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_texts_refer_to_pages_of_this_repository(path: Path) -> None:
    found = STRANGE_PAGES.search(path.read_text())
    assert found is None, found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths_of_a_page_exist(page: Path) -> None:
    text = page.read_text()
    links = [link for link in LINK.findall(text) if not link.startswith("http")]
    targets = [(page.parent / link).resolve() for link in links]
    lost = [str(path) for path in targets if not path.exists()]
    bases = (ROOT, page.parent, ROOT / "megatron_rl", ROOT / "tests")
    for path in PATH.findall(re.sub(r"https?://\S+", "", text)):
        if not MADE_BY_OTHERS.match(path) and not any((base / path).exists() for base in bases):
            lost.append(path)
    assert not lost, lost


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_names_of_a_page_exist(page: Path) -> None:
    lost = [match.group() for match in NAME.finditer(page.read_text()) if not exists(match.group(1), match.group(2))]
    assert not lost, lost


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"([\w/]+\.py)::(\w+)", page.read_text())
    lost = [f"{file}::{name}" for file, name in named if not defines((ROOT / "tests" / file).read_text(), name)]
    assert not lost, lost


def exists(dotted: str, name: str | None) -> bool:
    """Look for a module under megatron_rl, and in it for the rest of the name."""
    parts = dotted.strip(".").split(".")
    rest = [name] if name else []
    place = ROOT / "megatron_rl"
    while parts and (place / parts[0]).is_dir():
        place = place / parts.pop(0)
    module = place / "__init__.py"
    if parts and (place / f"{parts[0]}.py").is_file():
        module = place / f"{parts.pop(0)}.py"
    names = [*parts, *rest]
    return not names or defines(module.read_text(), names[0])


def defines(source: str, name: str) -> bool:
    return (
        re.search(rf"^(?:(?:async )?def|class) {name}\b|^{name}\b.*=|^from .* import .*\b{name}\b", source, re.M)
        is not None
    )


def test_a_name_that_is_gone_is_noticed() -> None:
    assert exists(".tasks.base", "Task")
    assert exists(".process.activity.beat", None)
    assert not exists(".process.watchdog.beat", None)
    assert not exists(".tasks.nowhere", "Task")
