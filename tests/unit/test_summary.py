import io
import json
import math

from rich.console import Console

from megatron_rl.summary import print_before_after, write_summary


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
    cells = [
        [cell.strip() for cell in line.strip("│ ").split("│")]
        for line in console.file.getvalue().splitlines()
        if line.startswith("│")
    ]
    assert cells == [
        ["greedy accuracy", "18.1%", "74.0%", "+55.9"],
        ["pass@1", "50.0%", "25.0%", "-25.0"],
        ["pass@8", "75.0%", "-", "-"],
    ]
