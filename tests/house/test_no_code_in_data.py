"""Nothing that comes from a file or over the network is unpickled, because a pickle runs code of whoever wrote it."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOADS = {"pickle.loads", "pickle.load", "pickle.Unpickler", "dill.loads", "joblib.load", "marshal.loads", "shelve.open"}
READER = "megatron_rl/convert/offline/distcp.py"
"""Reader of the one format that is a pickle: it knows the classes of that format and runs nothing."""
SENDER = {
    "megatron_rl/rollout/sglang/client.py",
    "megatron_rl/convert/offline/archive.py",
    "megatron_rl/model/plain_load.py",
}
"""Modules that write a pickle, because its reader is SGLang or torch."""


def calls() -> list[tuple[str, str, ast.Call | ast.Attribute]]:
    """Module, dotted name and node of every attribute that is used."""
    found = []
    for path in sorted([*(ROOT / "megatron_rl").rglob("*.py"), *(ROOT / "patches").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                found.append((str(path.relative_to(ROOT)), ast.unparse(node), node))
            elif isinstance(node, ast.Call):
                found.append((str(path.relative_to(ROOT)), f"call {ast.unparse(node.func)}", node))
    return found


def test_nothing_is_unpickled() -> None:
    assert {module for module, name, _ in calls() if name in LOADS} == {READER}


def test_pickles_are_written_for_readers_of_others_only() -> None:
    assert {module for module, name, _ in calls() if name.startswith("pickle.")} <= {READER, *SENDER}


def test_torch_loads_data_only() -> None:
    loads = [
        (module, node) for module, name, node in calls() if name == "call torch.load" and isinstance(node, ast.Call)
    ]
    assert loads
    for module, node in loads:
        only = [word.value for word in node.keywords if word.arg == "weights_only"]
        assert only and isinstance(only[0], ast.Constant) and only[0].value is True, f"{module}:{node.lineno}"


def test_objects_are_not_sent_between_ranks() -> None:
    sent = {"broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "send_object_list"}
    assert not [(module, name) for module, name, _ in calls() if name.split(".")[-1] in sent]
