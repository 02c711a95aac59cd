"""Models by their name on the hub: found in the cache, fetched in order of size, refused by name without a network."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from megatron_rl.convert.architecture.hub import HubName, hub_name, local_folder
from megatron_rl.errors import UserError
from tests.tiny_models import make_tiny_model

TINY = Path(__file__).parents[2] / "tiny.yaml"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FIELD = "policy.model_path"


def as_cached(model: Path, cache: Path, name: str) -> Path:
    """Lay a folder out as the hub's cache has it."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(COMMIT)
    return Path(shutil.copytree(model, folder / "snapshots" / COMMIT))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_model(tmp_path_factory.mktemp("hub") / "model", "qwen3", tied=True, seed=0, tokenizer=True)
    (folder / "pytorch_model.bin").write_bytes(b"the same weights once more")
    return folder


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Org/Name-1.5B", HubName("Org/Name-1.5B", "main")),
        ("Org/Name@v1.0", HubName("Org/Name", "v1.0")),
        ("Org/Name@refs/pr/1", HubName("Org/Name", "refs/pr/1")),
        *((path, None) for path in ("model", "./model", "../model", "/a/b", "a/b/c", "a/b@", "~/m", "a b/c")),
    ],
)
def test_a_name_of_the_hub_is_told_from_a_path(text: str, name: HubName | None) -> None:
    assert hub_name(text) == name


def test_a_folder_that_exists_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "org/name").mkdir(parents=True)
    as_cached(tmp_path / "org/name", tmp_path / "cache", "org/name")
    assert local_folder("org/name", field=FIELD) == Path("org/name")


def test_a_name_is_the_snapshot_of_its_revision(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = as_cached(model, tmp_path, "org/name")
    assert [local_folder(text, field=FIELD) for text in ("org/name", f"org/name@{COMMIT}")] == [snapshot] * 2
    with pytest.raises(UserError, match=r"hf download org/name --revision v2 --local-dir FOLDER") as caught:
        local_folder("org/name@v2", field=FIELD)
    assert (caught.value.field, caught.value.value) == (FIELD, "org/name@v2")


class Hub(ThreadingHTTPServer):
    """What the client of the hub asks for, with the files of one folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.folder = folder
        self.served: list[str] = []
        """Files, in the order in which they were read."""


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        files = sorted(path for path in self.server.folder.iterdir())
        if parts[0] == "api" and parts[3] == "gated":
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif parts[0] == "api" and parts[3] != "name":
            self.answer(401 if parts[3] == "hidden" else 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif parts[0] == "api" and "v9" in parts:
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif parts[0] == "api" and "tree" in parts:
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": oid(f)} for f in files]
            self.answer(200, json.dumps(tree).encode())
        elif parts[0] == "api":
            siblings = [{"rfilename": file.name} for file in files]
            self.answer(200, json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode())
        else:
            file = self.server.folder / parts[-1]
            if self.command == "GET":
                self.server.served.append(file.name)
            self.answer(200, file.read_bytes(), {"ETag": f'"{oid(file)}"', "X-Repo-Commit": COMMIT})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(model: Path) -> Iterator[Hub]:
    with Hub(model) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


CHECKS = """
import sys
from megatron_rl.config import check_files, load_config
from megatron_rl.errors import UserError
for overrides in {overrides}:
    config = load_config({tiny!r}, overrides)
    try:
        check_files(config, fetches=True, starts={starts})
        print(config.policy.model_dir)
    except UserError as error:
        print(error)
assert not {{'torch', 'transformers'}} & set(sys.modules)
"""


def lines_of(
    tmp_path: Path, *overrides: list[str], endpoint: str = "", starts: bool = True, **environment: str
) -> list[str]:
    """Check configs in a process that has the real client of the hub; a line for each."""
    (tmp_path / "train.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n')
    given = [
        [f"exp_manager.exp_dir={tmp_path}/runs", f"data.train={tmp_path}/train.jsonl", *more] for more in overrides
    ]
    code = CHECKS.format(overrides=given, tiny=str(TINY), starts=starts)
    own = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", **environment}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**kept, **own}, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_small_files_come_first_and_weights_only_where_all_else_is_right(hub: Hub, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    two = ["trainer.devices=3", "policy.megatron_cfg.tensor_model_parallel_size=3"]
    wrong, right, again = lines_of(
        tmp_path, ["policy.model_path=org/name", *two], *([["policy.model_path=org/name"]] * 2), endpoint=endpoint
    )
    assert "tensor_model_parallel_size = 3" in wrong and "num_attention_heads = 8" in wrong
    assert right == again and Path(right) == tmp_path / "home/hub/models--org--name/snapshots" / COMMIT
    assert hub.served[-1] == "model.safetensors" and hub.served.count("model.safetensors") == 1
    small = sorted(path.name for path in hub.folder.iterdir() if path.suffix == ".json")
    assert sorted(hub.served[:-1]) == small and "pytorch_model.bin" not in hub.served
    assert (Path(right) / "model.safetensors").read_bytes() == (hub.folder / "model.safetensors").read_bytes()


def test_check_leaves_the_weights_where_they_are(hub: Hub, tmp_path: Path) -> None:
    line = lines_of(
        tmp_path, ["policy.model_path=org/name"], endpoint=f"http://127.0.0.1:{hub.server_port}", starts=False
    )
    assert line[0].endswith(COMMIT) and "model.safetensors" not in hub.served and "config.json" in hub.served


def test_what_the_hub_refuses_is_named(hub: Hub, tmp_path: Path) -> None:
    names = ["org/gated", "org/hidden", "org/nowhere", "org/name@v9"]
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    gated, hidden, nowhere, revision = lines_of(
        tmp_path, *([f"policy.model_path={name}"] for name in names), endpoint=endpoint
    )
    assert gated.startswith("policy.model_path = 'org/gated': is a gated model") and "huggingface.co/org/gated" in gated
    for line in (hidden, nowhere):
        assert "the hub shows this user no such model" in line and "HF_TOKEN" in line
    assert "has no revision v9" in revision


def test_without_a_network_the_cache_is_enough_or_one_line_says_what_to_do(model: Path, tmp_path: Path) -> None:
    as_cached(model, tmp_path / "home/hub", "org/kept")
    half = as_cached(model, tmp_path / "home/hub", "org/half")
    (half / "model.safetensors").unlink()
    (half / "pytorch_model.bin").unlink()
    cases = ["model_path=org/kept", "model_path=org/absent", "model_path=org/half"]
    given = [[f"policy.{text}"] for text in cases]
    given.append([f"policy.model_path={model}", "policy.tokenizer_path=org/absent"])
    for way in ({"HF_HUB_OFFLINE": "1"}, {"endpoint": "http://127.0.0.1:9"}):
        kept, absent, half_line, tokenizer = lines_of(tmp_path, *given, **way)
        assert kept.endswith(COMMIT)
        assert absent.startswith("policy.model_path = 'org/absent': is no folder here") and "was not reached" in absent
        assert (
            "hf download org/absent --local-dir FOLDER, and policy.model_path=FOLDER" in absent and "HF_HOME" in absent
        )
        assert half_line.startswith("policy.model_path = 'org/half'") and "is not whole in the cache" in half_line
        assert tokenizer.startswith("policy.tokenizer_path = 'org/absent': is no folder")
