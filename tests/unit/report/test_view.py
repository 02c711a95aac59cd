"""The page of a run: all that was recorded is in it, nothing in it can break out, it stays small; and a browser can use it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.errors import UserError
from megatron_rl.report.rollout_texts import encode
from megatron_rl.report.view import write_page

HOSTILE = (
    "</script><script>document.title='broken'</script><!-- <![CDATA[ ]]> "
    "\u2028\u2029 \ud800 \x00 \u202e ربع /*DATA*/ /*JS*/"
)
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def line(step: int, number: int = 0, **fields: Any) -> dict[str, Any]:
    return {
        "step": step, "origin": "rollout", "group": number // 2, "problem_id": f"p{number}", "answer": "7",
        "prompt": f"prompt {number // 2} of step {step}", "response": f"response {number}", "found": "7",
        "reward": float(number % 2), "parts": {"correct": 1.0}, "verdict": "right" if number % 2 else "wrong", "reason": "",
        "finish": "stop", "prompt_tokens": 3, "response_tokens": 2, "weight_version": step, "advantage": 0.5,
    } | fields  # fmt: skip


def write_run(folder: Path, lines: dict[str, list[dict[str, Any]]], metrics: str = "") -> Path:
    for name, of_file in lines.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"".join(map(encode, of_file)))
    (folder / "metrics.jsonl").write_text(metrics)
    return folder


def data_of(page: Path) -> dict[str, Any]:
    text = page.read_text()
    assert text.count("</script>") == 2 and text.count("<script") == 2, "no text of a rollout ends a script"
    assert not re.search(r"""(src|href)=|@import|url\(|fetch\(|XMLHttp""", text), "nothing is loaded from elsewhere"
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_page_holds_steps_evaluations_trees_and_curves(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        {
            "rollouts/step_00000001.jsonl": [line(1, n) for n in range(4)],
            "rollouts/step_00000002.jsonl": [line(2)],
            "eval/step_00000000.jsonl": [line(0, origin="greedy")],
        },
        '{"step": 0, "eval/greedy": 0.5}\n{"step": 1, "reward/mean": "NaN"}\n'
        '{"step": 2, "reward/mean": 0.25, "eval/hard/greedy": 1}\n',
    )
    (run / "rollouts" / "rollouts_00.safetensors").write_bytes(b"\x00")
    (run / "trees").mkdir()
    (run / "trees" / "step_00000002.json").write_text('{"step": 2, "threshold": 0.9, "prompts": []}')
    note = write_page(run, tmp_path / "page.html")
    data = data_of(tmp_path / "page.html")
    assert [(page["kind"], page["step"]) for page in data["pages"]] == [
        ("eval", 0),
        ("step", 1),
        ("step", 2),
        ("trees", 2),
    ]
    first = data["pages"][1]
    assert first["prompts"] == ["prompt 0 of step 1", "prompt 1 of step 1"], "a prompt is there once"
    assert [rollout["prompt"] for rollout in first["rollouts"]] == [0, 0, 1, 1]
    assert data["series"] == {
        "reward/mean": [[1, "NaN"], [2, 0.25]], "eval/greedy": [[0, 0.5]], "eval/hard/greedy": [[2, 1.0]],
    }  # fmt: skip
    assert data["name"] == "run" and note == data["note"] == "4 records"
    write_page(run, tmp_path / "page.html", step=2)
    assert [page["kind"] for page in data_of(tmp_path / "page.html")["pages"]] == ["step", "trees"]


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    lines = [line(1, prompt=HOSTILE, response=HOSTILE, reason=HOSTILE, reward=float("nan"), problem_id=HOSTILE)]
    run = write_run(tmp_path / "<b>run", {"rollouts/step_00000001.jsonl": lines})
    write_page(run, tmp_path / "page.html")
    (page,) = data_of(tmp_path / "page.html")["pages"]
    shown = HOSTILE.replace("\ud800", "\ufffd")
    assert page["prompts"] == [shown] and page["rollouts"][0]["response"] == shown
    assert page["rollouts"][0]["reward"] == "NaN"


def test_a_long_run_is_thinned_to_the_limit_and_says_so(tmp_path: Path) -> None:
    steps = {f"rollouts/step_{n:08d}.jsonl": [line(n, i, response="x<" * 200) for i in range(8)] for n in range(1, 101)}
    evaluations = {f"eval/step_{n:08d}.jsonl": [line(n, response="x" * 400)] for n in (0, 50, 100)}
    run = write_run(tmp_path / "run", steps | evaluations)
    note = write_page(run, tmp_path / "page.html", max_bytes=400_000)
    data = data_of(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 400_000
    shown = [page["step"] for page in data["pages"] if page["kind"] == "step"]
    assert 5 < len(shown) < 60 and shown[-1] == 100 and len({b - a for a, b in pairwise(shown)}) == 1
    assert re.search(r"one step in \d+, of 100", note) and data["note"] == note
    assert sum(page["kind"] == "eval" for page in data["pages"]) == 3, "evaluations have room of their own"


def test_one_step_that_is_too_large_is_cut_and_says_so(tmp_path: Path) -> None:
    tokens = {"text": ["x"] * 1000, "log_prob": [-0.5] * 1000}
    lines = [line(1, n, response="y" * 3000, tokens=tokens) for n in range(100)]
    run = write_run(tmp_path / "run", {"rollouts/step_00000001.jsonl": lines})
    note = write_page(run, tmp_path / "page.html", max_bytes=200_000)
    (page,) = data_of(tmp_path / "page.html")["pages"]
    assert 10 < len(page["rollouts"]) < 100 and "cut" in note
    assert (tmp_path / "page.html").stat().st_size < 200_000


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run", {"rollouts/step_00000001.jsonl": [line(1), line(1, 1)]}, '{"step": 1, "loss": 1.0}\n{"st'
    )
    path = run / "rollouts" / "step_00000001.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    note = write_page(run, tmp_path / "page.html")
    data = data_of(tmp_path / "page.html")
    assert len(data["pages"][0]["rollouts"]) == 1 and "1 torn" in note and data["series"] == {"loss": [[1, 1.0]]}


@pytest.mark.parametrize("name", ["missing", "empty", "foreign.jsonl"])
def test_where_there_is_nothing_to_show_is_one_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign.jsonl").write_text('{"a": 1}\n{"b": 2}\n')
    with pytest.raises(UserError, match=r"^RUN"):
        write_page(tmp_path / name, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


# ---- in a browser


def opened(page: Path, address: str = "") -> dict[str, str]:
    """Open a page in a headless browser; return the data of its root, its title, and the text of some elements."""
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={page.parent / 'profile'}", "--dump-dom",
        f"file://{page}#{address}",
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, timeout=60, check=True).stdout.decode()
    ends = {"count": "p", "pane": "main"}
    texts = {name: re.search(rf'id="{name}"[^>]*>(.*?)</{end}>', dom, re.DOTALL) for name, end in ends.items()}
    return {
        **dict(re.findall(r'data-([a-z-]+)="(\d+)"', dom[: dom.index("<head>")])),
        "title": re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1],  # type: ignore[index]
        **{name: found[1] if found else "" for name, found in texts.items()},
    }


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium: what a browser makes of the page is not checked")
def test_a_browser_shows_searches_and_filters_and_no_text_runs(tmp_path: Path) -> None:
    tokens = {
        "text": ["<b>re", "sponse\n"], "log_prob": [-0.1, -2.0], "engine_log_prob": [-0.1, -1.5],
        "advantage": [1.0, -1.0], "mask": "10", "entropy": [0.1, "NaN"],
    }  # fmt: skip
    lines = [line(1, 0, prompt=HOSTILE, response=HOSTILE), line(1, 1, tokens=tokens, response="a needle here"),
             line(1, 2, response="z" * 100_000), line(1, 3, finish="length", verdict="failed", reward=None)]  # fmt: skip
    tree = {
        "tokens": [["in a tree", 0.5]],
        "value": 0.5,
        "advantage": 0.25,
        "pieces": [],
        "end": "stop",
        "reward": 1.0,
        "reason": "r",
    }
    record = {
        "step": 1,
        "threshold": 0.9,
        "prompts": [{"problem_id": "p", "prompt": "q", "answer": "7", "tree": [tree]}],
    }
    run = write_run(tmp_path / "run", {"rollouts/step_00000001.jsonl": lines}, '{"step": 1, "reward/mean": 0.5}\n')
    (run / "trees").mkdir()
    (run / "trees" / "step_00000001.json").write_text(json.dumps(record))
    page = tmp_path / "page.html"
    write_page(run, page)
    whole = opened(page)
    assert whole["title"] == "run" and whole["matches"] == "4" and int(whole["ready"]) < 2000
    assert "&lt;/script&gt;" in whole["pane"], "hostile text is shown as it is"
    found = opened(page, "q=NEEDLE&c=mask")
    assert found["matches"] == "1" and "1 of 4" in found["count"]
    assert 'class="out"' in found["pane"] and "advantage -1" in found["pane"] and "&lt;b&gt;re" in found["pane"]
    trees = opened(page, "page=trees-1&f=cut")
    assert "in a tree" in trees["pane"] and trees["matches"] == "0"
