"""What a newcomer does in the first hour: docs/first_hour.md, with a tiny model in the place of SmolLM2."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer

from tests.e2e.first_hour import commands, run_page
from tests.tiny_models import make_tiny_model

TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_the_page_holds_from_the_first_command_to_the_last(tmp_path: Path) -> None:
    model = make_tiny_model(
        tmp_path / "build" / "smollm2", "llama", tied=True, seed=1, tokenizer=True, max_position_embeddings=2048
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    output = run_page(tmp_path, skipped=("python tools/gguf_to_hf.py",))
    assert len(commands()) <= 25
    for layout in ("verl", "slime", "NeMo-RL", "TRL"):
        assert layout in output, f"the layout of {layout} is not named"
    rows = [json.loads(line) for line in (tmp_path / "runs/first_hour/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert all(row["num_rollouts"] == 16 and "reward/shown" in row for row in rows)
    assert "resuming after step 5" in output
    figures = json.loads((tmp_path / "runs/first_hour/evaluations/hf/results.json").read_text())["sets"]["test"]
    assert figures["num_problems"] == 8 and {"greedy", "pass@4"} <= figures["figures"].keys()
    assert (tmp_path / "runs/first_hour/hf/model.safetensors").is_file()
    assert (tmp_path / "runs/first_hour/view.html").stat().st_size > 10_000
