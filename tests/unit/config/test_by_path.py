"""``megatron-rl check`` says in one line, with status 2, what is wrong with a config or with code that it names by path."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rl.commands.cli import app
from megatron_rl.commands.verbs import run_verb
from megatron_rl.config import load_config
from megatron_rl.config.files import stored_pools
from megatron_rl.errors import UserError

TINY = Path(__file__).parents[2] / "tiny.yaml"
MODULES = {
    "good": """
        class Engine: ...
        def reward(problem, response, scale=1.0): return 1.0
        """,
    "heavy": """
        raise SystemExit("a check must not run this")
        class Method: ...
        NUMBER = 3
        NUMBERS: list = [1, 2]
        SWITCHED = None
        if NUMBER:
            SWITCHED = Method
        declared: int
        """,
    "unread": "X = 1\ndef broken(:\n",
    "returns": "def Engine(): ...\nreturn 3\n",
    "latin": b"# \xe9\ndef Engine(): ...\n",
    "leaves": "import sys\nsys.exit(3)\ndef reward(problem, response): ...\n",
    "leaves_package.inside": "def reward(problem, response): ...\n",
    "raises": 'raise RuntimeError("one line,\\nanother " + 1000 * "x")\ndef reward(problem, response): ...\n',
    "hides": """
        def __getattr__(name):
            raise RuntimeError("no " + name)
        """,
    "rewards": """
        import functools
        NUMBER = 3
        class Reward: ...
        def one(answer): ...
        def three(problem, response, tokenizer): ...
        whole = functools.partial(three, tokenizer=None)
        """,
    "methods": """
        from decimal import Decimal
        from typing import ClassVar
        from pydantic import Field, field_validator
        from megatron_rl.config import GroupConfig, MethodConfig, section
        from megatron_rl.errors import UserError

        @section
        class Good(GroupConfig):
            implementation: ClassVar[str] = "by_path_heavy:Method"
            strength: float = 0.5
        @section
        class Number(GroupConfig):
            implementation: ClassVar = 3
        @section
        class Itself(GroupConfig):
            implementation: ClassVar = Good
        @section
        class Open(GroupConfig):
            implementation: str = "by_path_heavy:Method"
        @section
        class Staged(Good):
            stage: ClassVar[str] = "dpo"
        @section
        class StageField(Good):
            stage: str = "rl"
        @section
        class Lost(Good):
            implementation: ClassVar[str] = "by_path_heavy:Methud"
        @section
        class Constant(Good):
            implementation: ClassVar[str] = "by_path_heavy:NUMBER"
        @section
        class Unread(Good):
            implementation: ClassVar[str] = "by_path_unread:Method"
        @section
        class Unresolved(Good):
            other: "Nowhere" = None
        @section
        class Words(Good):
            words: set[str] = Field(default_factory=lambda: {"a"})
        @section
        class Exact(Good):
            part: Decimal = Decimal("0.1")
        @section
        class RaisesAtOnce(Good):
            def __post_init__(self):
                raise ValueError("strength is weak")
        @section
        class Asserts(Good):
            def __post_init__(self):
                assert self.strength > 1, "too weak"
        @section
        class Mistyped(Good):
            def __post_init__(self):
                self.strenght
        @section
        class Validated(Good):
            @field_validator("strength")
            @classmethod
            def positive(cls, value):
                raise ValueError("is weak")
        @section
        class Checks(Good):
            def check(self, others):
                raise ValueError("a\\nb")
        @section
        class ChecksMistyped(Good):
            def check(self, others):
                others.polisy
        @section
        class Leaves(Good):
            def check(self, others):
                raise SystemExit(3)
        @section
        class Says(Good):
            def check(self, others):
                raise UserError("algorithm.strength", self.strength, "is weak", "raise it")
        @section
        class Negative(Good):
            num_rows = property(lambda self: -8)
        @section
        class Half(Good):
            num_rows = property(lambda self: 2.5)
        @section
        class Absent(Good):
            num_rows = property(lambda self: None)
        @section
        class Divides(Good):
            num_rows = property(lambda self: 1 // 0)
        @section
        class Stores(Good):
            num_stored_rows_per_update = property(lambda self: "2")
        @section
        class Pools(Good):
            def stored_pools(self):
                return [self.polls]
        """,
}
METHOD = "fix the settings class; it should raise megatron_rl.errors.UserError for settings that are wrong."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Modules from outside; what is imported of them stays so for all cases."""
    folder = tmp_path_factory.mktemp("outside")
    for name, source in MODULES.items():
        package, _, inside = name.partition(".")
        if inside:
            (folder / f"by_path_{package}").mkdir()
            (folder / f"by_path_{package}" / "__init__.py").write_text("raise SystemExit(4)\n")
        path = folder / f"by_path_{name.replace('.', '/')}.py"
        if isinstance(source, bytes):
            path.write_bytes(source)
        else:
            path.write_text(source.replace("\n        ", "\n"))
    yield folder
    for name in [name for name in sys.modules if name.startswith("by_path_")]:
        del sys.modules[name]


@pytest.fixture
def check(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The command, in this process: its status, and what it writes to stdout and stderr."""
    monkeypatch.syspath_prepend(folder)

    def run(*overrides: str, config: Path = TINY) -> tuple[int, str, str]:
        monkeypatch.setattr(
            sys, "argv", ["megatron-rl", "check", "--no-files", str(config), "policy.model_path=m", *overrides]
        )
        return run_verb(app), *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    "override",
    [
        "algorithm.name=by_path_methods:Good",
        "data.reward=by_path_good:reward",
        "data.reward=by_path_rewards:whole",
        "rollout.engine=by_path_heavy:Method",
        "rollout.engine=by_path_heavy:SWITCHED",
        "exp_manager.sinks=[by_path_heavy:Method]",
    ],
)
def test_what_is_right_passes(check, override: str) -> None:
    code, out, err = check(override)
    assert (code, err) == (0, "") and "trainer:" in out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # values that are no YAML
        ("algorithm.name=:", "algorithm.name = ':': is not a valid YAML value (line 1, column 1: did not find"),
        ("data.train=[", "data.train = '[': is not a valid YAML value ("),
        ("a=${", "a = '${': is not a valid YAML value (no viable alternative"),
        (
            "data.train={a: 1, a: 2}",
            "data.train = '{a: 1, a: 2}': is not a valid YAML value (line 1, column 8: found dup",
        ),
        # sections and keys
        ("rollout.servers.use_router=false", "rollout.servers.use_router = False: is gone: the engine itself chooses"),
        ("weight_sync.transport=by_path_good:Engine", "weight_sync.transport = 'by_path_good:Engine': is for servers;"),
        ("weight_sync.quantization=fp8_block", "weight_sync.quantization = 'fp8_block': is for servers;"),
        # rewards are imported
        ("data.reward=by_path_rewards:NUMBER", "data.reward = 'by_path_rewards:NUMBER': is an int, not a function."),
        ("data.reward=by_path_rewards:Reward", "data.reward = 'by_path_rewards:Reward': is a type, not a function."),
        (
            "data.reward=by_path_rewards:one",
            "data.reward = 'by_path_rewards:one': takes answer, none of which is a resp",
        ),
        (
            "data.reward=by_path_raises:reward",
            "data.reward = 'by_path_raises:reward': cannot be imported (RuntimeError: one line, another xxx",
        ),
        (
            "data.reward=by_path_leaves:reward",
            "data.reward = 'by_path_leaves:reward': cannot be imported (SystemExit: 3). Fix: fix the module that holds "
            "your reward.",
        ),
        ("data.reward=by_path_leaves_package.inside:reward", "cannot be imported (SystemExit: 4)."),
        ("data.reward=by_path_hides:reward", "cannot be imported (RuntimeError: no reward)."),
        ("data.task=by_path_leaves:reward", "data.task = 'by_path_leaves:reward': cannot be imported (SystemExit: 3)."),
        # engines, transports and sinks are read, not imported
        (
            "rollout.engine=by_path_unread:Engine",
            "rollout.engine = 'by_path_unread:Engine': cannot be imported (SyntaxError in line 2: invalid syntax). Fix: "
            "fix the module that holds your engine.",
        ),
        (
            "rollout.engine=by_path_returns:Engine",
            "cannot be imported (SyntaxError in line 2: 'return' outside function",
        ),
        ("rollout.engine=by_path_latin:Engine", "rollout.engine = 'by_path_latin:Engine': cannot be imported (Syntax"),
        (
            "rollout.engine=by_path_heavy:NUMBER",
            "rollout.engine = 'by_path_heavy:NUMBER': is a constant (int), not an engine. Fix: name the function or the "
            "class that is your engine.",
        ),
        ("rollout.engine=by_path_heavy:declared", "is not there: by_path_heavy has no declared."),
        (
            "exp_manager.sinks=[by_path_heavy:NUMBERS]",
            "exp_manager.sinks = 'by_path_heavy:NUMBERS': is a constant (list)",
        ),
        ("weight_sync.transport=by_path_heavy:NUMBER", "weight_sync.transport = 'by_path_heavy:NUMBER': is a constant"),
        # methods
        (
            "algorithm.name=by_path_leaves:Method",
            "algorithm.name = 'by_path_leaves:Method': is not there: by_path_leaves has no Method.",
        ),
        ("algorithm.name=by_path_raises:reward", "Fix: fix the module that holds your method."),
        ("algorithm.name=by_path_methods:Number", "has an implementation that is an int; it must be a text, package."),
        ("algorithm.name=by_path_methods:Itself", "has an implementation that is a type; it must be a text, package."),
        ("algorithm.name=by_path_methods:Open", "makes implementation a field, which a config could change."),
        ("algorithm.name=by_path_methods:StageField", "makes stage a field, which a config could change."),
        ("algorithm.name=by_path_methods:Staged", "has a stage that is 'dpo'; it must be rl or sft."),
        (
            "algorithm.name=by_path_methods:Lost",
            "algorithm.name = 'by_path_methods:Lost': is implemented by by_path_heavy:Methud, which is not there: "
            "by_path_heavy has no Methud. Fix: did you mean Method?",
        ),
        (
            "algorithm.name=by_path_methods:Constant",
            "which is a constant (int), not a method. Fix: name the function or",
        ),
        (
            "algorithm.name=by_path_methods:Unread",
            "by by_path_unread:Method, which cannot be imported (SyntaxError in l",
        ),
        ("algorithm.name=by_path_methods:Unresolved", "'by_path_methods:Unresolved': cannot be checked (Pydantic"),
        ("algorithm.name=by_path_methods:Words", "algorithm.words = {'a'}: is a set that a YAML file cannot hold ("),
        (
            "algorithm.name=by_path_methods:Exact",
            "algorithm.part = Decimal('0.1'): is a Decimal that a YAML file cannot",
        ),
        (
            "algorithm.name=by_path_methods:RaisesAtOnce",
            "algorithm.name = 'by_path_methods:RaisesAtOnce': cannot be checked (ValueError: strength is weak). Fix: "
            + METHOD,
        ),
        ("algorithm.name=by_path_methods:Asserts", "cannot be checked (AssertionError: too weak). Fix: " + METHOD),
        ("algorithm.name=by_path_methods:Mistyped", "Mistyped': cannot be checked (AttributeError: "),
        ("algorithm.name=by_path_methods:Validated", "algorithm.strength = 0.5: value error, is weak."),
        (
            "algorithm.name=by_path_methods:Checks",
            "algorithm.name = 'by_path_methods:Checks': cannot be checked (ValueError: a b). Fix: " + METHOD,
        ),
        ("algorithm.name=by_path_methods:ChecksMistyped", "ChecksMistyped': cannot be checked (AttributeError: "),
        ("algorithm.name=by_path_methods:Leaves", "Leaves': cannot be checked (SystemExit: 3)."),
        ("algorithm.name=by_path_methods:Says", "algorithm.strength = 0.5: is weak. Fix: raise it."),
        ("algorithm.name=by_path_methods:Negative", "has a num_rows that is -8; it must be a whole number, 1 or more."),
        ("algorithm.name=by_path_methods:Half", "has a num_rows that is 2.5; it must be a whole number, 1 or more."),
        ("algorithm.name=by_path_methods:Absent", "has a num_rows that is None; it must be a whole number, 1 or more."),
        ("algorithm.name=by_path_methods:Divides", "Divides': cannot be checked (ZeroDivisionError: "),
        ("algorithm.name=by_path_methods:Stores", "has a num_stored_rows_per_update that is '2'; it must be a whole"),
    ],
)
def test_what_is_wrong_is_one_line(check, override: str, message: str) -> None:
    code, out, err = check(override)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and len(err) < 1000
    assert message in err


def test_pools_that_cannot_be_listed_are_one_error(check) -> None:
    config = load_config(TINY, ["policy.model_path=m", "algorithm.name=by_path_methods:Pools"])
    with pytest.raises(
        UserError, match=r"algorithm.name = 'by_path_methods:Pools': cannot be checked \(AttributeError"
    ):
        stored_pools(config)


def test_an_imported_module_is_judged_by_what_it_holds(check, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of a method and an engine may lie in one module, which is imported for the first."""
    check("data.reward=by_path_good:reward")
    monkeypatch.setattr(sys.modules["by_path_good"], "Engine", 3)
    assert "is a constant (int), not an engine" in check("rollout.engine=by_path_good:Engine")[2]
    assert "by_path_good has no Engines. Fix: did you mean Engine?" in check("rollout.engine=by_path_good:Engines")[2]


def test_an_error_stays_on_one_line_and_keeps_its_parts() -> None:
    error = UserError("a\nb", "x" * 1000, "is\n  wrong", "mend\r\n\r\nit")
    assert error.value == "x" * 1000 and error.rule == "is\n  wrong"
    shown = str(error)
    assert shown.startswith("a b = 'xxx") and shown.endswith("xxx': is wrong. Fix: mend it.") and len(shown) < 400
    assert str(UserError("a", "b  c", "", "")).startswith("a = 'b  c'"), (
        "spaces of a value may be what is wrong with it"
    )
