import json
import math

import matplotlib.image
import numpy as np
import pytest

from megatron_rl.report import curves
from megatron_rl.report.curves import plot_curves, smooth


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Plots rows, or raw text, and returns the four panels; the picture must be there and readable."""

    def draw(rows):
        figures = []

        class Kept(curves.Figure):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                figures.append(self)

        monkeypatch.setattr(curves, "Figure", Kept)
        jsonl = tmp_path / "run" / "metrics.jsonl"
        jsonl.parent.mkdir(exist_ok=True)
        if rows is not None:
            jsonl.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
        plot_curves(jsonl, tmp_path / "plots" / "curves.png")
        picture = matplotlib.image.imread(tmp_path / "plots" / "curves.png")
        assert picture.shape[0] > 600 and picture.shape[1] > 1000 and picture.std() > 0
        return {panel.get_title(): panel for panel in figures[0].axes}

    return draw


def points(line):
    return list(zip(line.get_xdata(), line.get_ydata()))


def notes(panel):
    return [text.get_text() for text in panel.texts]


FULL = [
    {
        "step": step,
        "reward/mean": step / 10,
        "pass@1": step / 20,
        "entropy/mean": 1 / step,
        "response_length/mean": 10.0 * step,
    }
    for step in range(1, 11)
]


def test_raw_line_is_faint_and_exact_and_the_smoothed_one_strong(draw):
    panels = draw(FULL)
    assert list(panels) == ["Reward", "Accuracy", "Entropy", "Response length"]
    for panel, key in zip(panels.values(), ("reward/mean", "pass@1", "entropy/mean", "response_length/mean")):
        raw, strong = panel.lines
        assert points(raw) == [(row["step"], row[key]) for row in FULL]
        assert raw.get_alpha() < 0.5 and strong.get_alpha() is None
        assert strong.get_linewidth() > raw.get_linewidth()
        assert panel.get_xlabel() == "training step" and panel.get_ylabel()
        assert notes(panel) == []


def test_a_supervised_run_has_loss_gradient_norm_and_learning_rate(draw):
    rows = [{"step": n, "loss": 2 / n, "grad_norm": 1 / n, "lr": 1e-3, "entropy/mean": 0.5} for n in range(1, 10)]
    panels = draw(rows)
    assert list(panels) == ["Loss", "Entropy", "Gradient norm", "Learning rate"]
    assert points(panels["Loss"].lines[0]) == [(n, 2 / n) for n in range(1, 10)]
    assert not any(map(notes, panels.values())), "no panel is empty"
    evaluated = draw([{"step": 0, "eval/greedy": 0.1}, *rows])
    assert list(evaluated) == ["Loss", "Accuracy", "Gradient norm", "Learning rate"] and evaluated["Accuracy"].lines


def test_evaluations_are_points_at_their_steps(draw):
    rows = [{"step": 0, "eval/greedy": 0.1, "eval/pass@16": 0.6, "eval/pass@1": 0.05, "eval/pass@8": 0.5}, *FULL]
    rows[-1] = rows[-1] | {"eval/greedy": 0.7}
    accuracy = draw(rows)["Accuracy"]
    lines = {line.get_label(): line for line in accuracy.lines}
    assert points(lines["eval greedy"]) == [(0, 0.1), (10, 0.7)]
    assert points(lines["eval pass@8"]) == [(0, 0.5)]
    labels = [text.get_text() for text in accuracy.get_legend().get_texts()]
    assert labels == ["train pass@1", "eval greedy", "eval pass@1", "eval pass@8", "eval pass@16"]


def test_sets_have_points_of_their_own(draw):
    panels = draw([*FULL[:-1], FULL[-1] | {"eval/a/greedy": 0.7, "eval/b/greedy": 0.2, "eval/b/pass@4": 0.4}])
    labels = [line.get_label() for line in panels["Accuracy"].lines]
    assert [label for label in labels if "eval" in label] == ["eval a/greedy", "eval b/greedy", "eval b/pass@4"]


def test_missing_metrics_leave_an_empty_panel_with_a_note(draw):
    panels = draw([{"step": 1, "reward/mean": 0.5}, {"step": 2, "reward/mean": 0.6}])
    assert points(panels["Reward"].lines[0]) == [(1, 0.5), (2, 0.6)] and notes(panels["Reward"]) == []
    for title in ("Accuracy", "Entropy", "Response length"):
        assert not panels[title].lines and notes(panels[title]) == ["not in the metrics"]


@pytest.mark.parametrize("text", [None, "", "\n", '{"step": 1, "rew', "nonsense\n[]\n3\n"], ids=repr)
def test_file_without_a_row_gives_four_notes(draw, text):
    assert all(notes(panel) == ["not in the metrics"] for panel in draw(text).values())


def test_torn_and_not_finite_values_are_left_out(draw):
    text = '{"step": 1, "reward/mean": 0.5}\n{"step": 2, "reward/mean": "NaN"}\nbroken\n'
    text += '{"step": 3, "reward/mean": null}\n{"step": 4, "reward/mean": 0.7}\n{"step": 5, "rew'
    assert points(draw(text)["Reward"].lines[0]) == [(1, 0.5), (4, 0.7)]


def test_smooth_keeps_constants_and_inner_lines():
    assert np.allclose(smooth([2.0] * 7, 1.5), 2.0)
    assert smooth([5.0], 1.0).tolist() == [5.0]
    straight = np.arange(50.0)
    assert np.allclose(smooth(straight, 2.0)[6:-6], straight[6:-6])


def test_smooth_exact_value():
    # At width 1 the points at distance 0, 1, 2 weigh 1, exp(-1/2), exp(-2).
    near, far = math.exp(-0.5), math.exp(-2)
    expected = [far / (1 + near + far), near / (1 + 2 * near), 1 / (1 + near + far)]
    assert smooth([0.0, 0.0, 1.0], 1.0).tolist() == pytest.approx(expected)


DIVERSE = [
    {"step": 0, "eval/pass@1": 0.1, "eval/pass@8": 0.5, "eval/avg@8": 0.1, "eval/styles_ge_3": 1.0},
    {"step": 5, "eval/pass@1": 0.2, "eval/avg@3": 0.2, "eval/keep_rate_greedy": 0.9, "eval/styles_ge_3": 0.1},
    {"step": 7, "eval/pass@1": 0.25, "eval/pass@8": 0.6, "eval/avg@8": 0.25, "eval/styles_ge_3": 0.7},
    {
        "step": 9, "eval/pass@8": 0.55, "eval/pass@1": 0.3, "eval/avg@8": 0.3, "eval/styles_ge_3": 0.5,
        "eval/keep_rate_greedy": 0.8, "eval/explore_rate_any": 0.25,
    },
]  # fmt: skip


def test_diversity_adds_a_third_row(draw):
    panels = draw(DIVERSE)
    assert list(panels) == ["Reward", "Accuracy", "Entropy", "Response length", "pass@k", "Diversity"]
    assert all(notes(panels[title]) == [] for title in ("pass@k", "Diversity"))


def test_pass_at_k_has_a_line_for_each_evaluation(draw):
    panel = draw(DIVERSE)["pass@k"]
    assert panel.get_xscale() == "log" and panel.xaxis.get_transform().base == 2
    first, between, last = panel.lines  # step 5 has one k only
    assert points(first) == [(1, 0.1), (8, 0.5)] and points(last) == [(1, 0.3), (8, 0.55)]
    assert points(between) == [(1, 0.25), (8, 0.6)] and between.get_alpha() < 1
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["step 0", "step 9"]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["1", "8"]


def test_diversity_is_of_evaluations_with_equally_many_samples(draw):
    panel = draw(DIVERSE)["Diversity"]
    lines = {line.get_label(): points(line) for line in panel.lines}
    assert lines == {
        "still solved (greedy)": [(5, 0.9), (9, 0.8)],
        "newly solved (any sample)": [(9, 0.25)],
        "3 styles or more": [(0, 1.0), (7, 0.7), (9, 0.5)],
    }


def test_a_single_k_leaves_a_note(draw):
    panels = draw([{"step": 4, "eval/pass@1": 0.2, "eval/avg@1": 0.2, "eval/keep_rate_greedy": 0.9}])
    assert notes(panels["pass@k"]) == ["not in the metrics"] and notes(panels["Diversity"]) == []
