"""A tiny model with a tokenizer, a few real-looking problems, and two ways to run the training program on them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.forked import run_ranks
from tests.policy_case import CONFIG, tiny_yaml
from tests.tiny_models import make_tiny_model


@dataclass(frozen=True)
class Case:
    """A place to train in."""

    model: Path
    train: Path
    root: Path
    config: Path = CONFIG

    @property
    def held_out(self) -> Path:
        """The training problems under another name: as validation, their own file would be refused."""
        return Path(shutil.copy(self.train, self.root / "held_out.jsonl"))

    def with_algorithm(self, section: str) -> Case:
        """The same place, with another ``algorithm`` section."""
        config = self.root / "own.yaml"
        config.write_text(tiny_yaml(section))
        return replace(self, config=config)

    def arguments(self, *overrides: str) -> list[str]:
        return [
            str(self.config),
            f"policy.model_path={self.model}",
            f"data.train={self.train}",
            f"exp_manager.exp_dir={self.root}",
            "exp_manager.export_hf=false",
            *overrides,
        ]

    def run(self, *overrides: str, ranks: int = 1) -> list[int]:
        """Exit statuses of forked ranks: quick, everything is imported already."""
        overrides = (f"trainer.devices={ranks}", *overrides)
        return run_ranks(run_main, ranks, self.arguments(*overrides), timeout_s=120)

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        """The documented command, as a user types it."""
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_rl.commands.cli", "train", *self.arguments(*overrides)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )

    def rows(self, name: str = "tiny") -> list[dict[str, float]]:
        """Of ``metrics.jsonl``, times, memory and transfers left out."""
        text = (self.root / name / "metrics.jsonl").read_text()
        unsteady = ("time/", "checkpoint/", "memory/", "weight_sync/", "tokens_per_s", "update/", "eval/seconds")
        return [
            {key: value for key, value in json.loads(line).items() if not key.startswith(unsteady)}
            for line in text.splitlines()
        ]


def run_main(arguments: list[str]) -> int:
    from megatron_rl.train import main

    return main(["--config", *arguments])


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(
        tmp_path_factory.mktemp("model"), "qwen3", tied=True, seed=3, tokenizer=True, max_position_embeddings=512
    )


@pytest.fixture
def case(tiny_model: Path, tmp_path: Path) -> Case:
    train = tmp_path / "train.jsonl"
    rows = [
        {"question": f"What is {n} plus {n % 7}?", "answer": f"{n} + {n % 7} = {n + n % 7}\n#### {n + n % 7}"}
        for n in range(24)
    ]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Case(tiny_model, train, tmp_path)
