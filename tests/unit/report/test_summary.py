import io
import json
import math

from rich.console import Console

from megatron_rl.report.summary import print_before_after, sum_up, write_summary


def cells(console):
    return [
        [cell.strip() for cell in line.strip("│ ").split("│")]
        for line in console.file.getvalue().splitlines()
        if line.startswith("│")
    ]


def test_summary_is_valid_json_without_nan(tmp_path):
    path = tmp_path / "run" / "summary.json"
    write_summary(path, {"steps": 3, "greedy_after": math.nan, "seconds": {"a": [1.5, math.inf]}})
    assert json.loads(path.read_text()) == {"steps": 3, "greedy_after": "NaN", "seconds": {"a": [1.5, "Infinity"]}}
    assert [p.name for p in path.parent.iterdir()] == ["summary.json"]


def test_table_shows_percent_and_the_change_in_points():
    console = Console(file=io.StringIO(), width=100)
    before = {"step": 0, "eval/greedy": 0.181, "eval/pass@1": 0.5, "eval/pass@8": 0.75}
    after = {"step": 9, "eval/greedy": 0.74, "eval/pass@1": 0.25}
    print_before_after(before, after, [1, 8], console=console)
    assert cells(console) == [
        ["greedy accuracy", "18.1%", "74.0%", "+55.9"],
        ["pass@1", "50.0%", "25.0%", "-25.0"],
        ["pass@8", "75.0%", "-", "-"],
    ]


def test_diversity_follows_where_it_was_measured():
    console = Console(file=io.StringIO(), width=100)
    before = {"step": 0, "eval/greedy": 0.2, "eval/distinct_answers": 3.456, "eval/styles_ge_3": 0.9}
    after = {"step": 9, "eval/greedy": 0.2, "eval/distinct_answers": 2.0, "eval/styles_ge_3": 0.4}
    after |= {"eval/keep_rate_greedy": 0.85, "eval/explore_rate_any": 0.125}
    print_before_after(before, after, [], console=console)
    assert cells(console) == [
        ["greedy accuracy", "20.0%", "20.0%", "+0.0"],
        ["solved before, still (greedy)", "-", "85.0%", "-"],
        ["failed before, solved (any sample)", "-", "12.5%", "-"],
        ["problems with 3 styles or more", "90.0%", "40.0%", "-50.0"],
        ["distinct answers a problem", "3.46", "2.00", "-"],
    ]


def test_sets_stand_below_each_other_by_name(tmp_path):
    console = Console(file=io.StringIO(), width=100)
    before = {"step": 0, "eval/gsm8k/greedy": 0.2, "eval/aime/greedy": 0.1, "eval/seconds": 3.0}
    after = {"step": 9, "eval/gsm8k/greedy": 0.3, "eval/aime/greedy": 0.1, "eval/aime/dropped/greedy": 1.0}
    print_before_after(before, after, [], console=console)
    assert cells(console) == [
        ["gsm8k greedy accuracy", "20.0%", "30.0%", "+10.0"],
        ["aime greedy accuracy", "10.0%", "10.0%", "+0.0"],
    ]
    arguments = {"engine": "e", "k_values": [8], "seconds": 1.0, "origin": None, "is_exported": False, "settings": {}}
    sum_up(tmp_path, [before, after], **arguments)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["gsm8k/greedy_before"], summary["aime/greedy_after"]) == (0.2, 0.1)
