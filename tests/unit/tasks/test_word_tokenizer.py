import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from megatron_rl.convert.architecture.shape import read_shape
from megatron_rl.errors import UserError
from megatron_rl.tasks import get_task
from megatron_rl.tasks.problems import load_problems
from megatron_rl.tasks.word_problems import generate
from megatron_rl.tasks.word_tokenizer import END, PAD, UNKNOWN, VOCABULARY, ModelSize, build_tokenizer, save_model
from megatron_rl.types import Problem

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "model"
    save_model(path, ModelSize())
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return AutoTokenizer.from_pretrained(directory)


def test_thousand_problems_round_trip_without_unknown_tokens(tokenizer):
    score = get_task("word_problems").score
    for row in generate(1000, seed=1, num_operations=(1, 2, 3, 10), slip_share=0.2):
        for text in (row["question"], row["solution"]):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
        decoded = tokenizer.batch_decode([ids], skip_special_tokens=True)[0]
        assert score(Problem("id", "text", row["solution"].split()[-1]), decoded).reward == 1


def test_digits_are_single_tokens(tokenizer):
    assert tokenizer.tokenize("Ben 17 + 5 = 22 .") == ["Ben", "1", "7", "+", "5", "=", "2", "2", "."]
    assert tokenizer.tokenize("#### 36") == ["####", "3", "6"]


def test_three_step_problem_fits_40_prompt_and_40_solution_tokens(tokenizer):
    for row in generate(500, seed=2, num_operations=(3,), slip_share=0.2):
        assert len(tokenizer(row["question"])["input_ids"]) <= 40
        assert len(tokenizer(row["solution"])["input_ids"]) < 40


def test_special_tokens_and_size(tokenizer):
    assert len(tokenizer) == len(VOCABULARY) == len(set(VOCABULARY)) == 48
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token) == (PAD, END, UNKNOWN)
    assert tokenizer.bos_token is None and tokenizer("Ana")["input_ids"] == [VOCABULARY.index("Ana")]
    assert tokenizer("Zebra")["input_ids"] == [tokenizer.unk_token_id]


def test_no_tokens_decode_to_nothing(tokenizer):
    assert tokenizer.batch_decode([[], [tokenizer.eos_token_id]], skip_special_tokens=True) == ["", ""]


def test_config_is_what_transformers_and_our_reader_expect(directory):
    config, shape = AutoConfig.from_pretrained(directory), read_shape(directory)
    assert (shape.num_layers, shape.hidden_size, shape.head_dim, shape.vocab_size) == (4, 128, 32, 48)
    assert config.rope_parameters["rope_theta"] == shape.rope_theta == 10_000
    assert config.tie_word_embeddings and shape.tied
    assert shape.eos_token_ids == (VOCABULARY.index(END),) and shape.pad_token_id == VOCABULARY.index(PAD)


@pytest.mark.parametrize(
    ("size", "field"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"num_heads": 3}, "hidden_size"),
        ({"hidden_size": 4, "num_heads": 4}, "hidden_size"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
    ],
)
def test_impossible_size_is_an_error(size, field):
    with pytest.raises(UserError) as caught:
        ModelSize(**size)
    assert caught.value.field == field


def run_tool(*arguments):
    command = [sys.executable, "tools/make_word_problems.py", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


def test_tool_writes_everything(tmp_path):
    done = run_tool(
        tmp_path / "out", "--num-warm-start", 30, "--num-train", 20, "--num-held-out", 10, "--slip-share", 0.9,
        "--num-operations", 2, "--no-tied", "--hidden-size", 64,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = {name: load_problems("word_problems", tmp_path / "out" / f"{name}.jsonl")
             for name in ("warm_start", "train", "held_out")}  # fmt: skip
    assert {name: len(problems) for name, problems in files.items()} == {"warm_start": 30, "train": 20, "held_out": 10}
    score = get_task("word_problems").score
    assert all(score(p, p.solution).reward == 1 for p in files["train"] + files["held_out"])
    assert sum(score(p, p.solution).reward for p in files["warm_start"]) < 15
    shape = read_shape(tmp_path / "out" / "model")
    assert (shape.hidden_size, shape.tied) == (64, False)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out" / "model")) == 48


def test_tool_reports_a_wrong_option_without_a_traceback(tmp_path):
    done = run_tool(tmp_path, "--slip-share", 2)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: slip_share = 2.0: must be at least 0 and below 1. Fix: give a share such as 0.2."
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("vocabulary", "rule"),
    [(VOCABULARY[1:], "must hold"), (VOCABULARY[:10], "must hold"), ((*VOCABULARY, "has"), "more than once")],
)
def test_vocabulary_that_would_lose_tokens_is_an_error(vocabulary, rule):
    with pytest.raises(UserError, match=rule):
        build_tokenizer(vocabulary)
