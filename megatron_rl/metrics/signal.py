"""Signs that a run learns nothing, as one line for the console: what was seen, for how many steps, and what to try."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

NUM_STEPS = 5
"""Steps over which a sign must hold."""
CUT_FROM, CUT_UNTIL = 0.5, 0.4
"""Share of cut responses from which a warning is due, and below which it has ended."""
_RIGHT, _WRONG, _CUT, _GRADIENT, _ROLLOUTS = (
    "groups/all_right_frac", "groups/all_wrong_frac", "response_length/cut_frac", "grad_norm", "num_rollouts",
)  # fmt: skip
_FAILED = ("dropped/score_crash", "dropped/score_timeout")
_KEPT = (_RIGHT, _WRONG, _CUT, _GRADIENT, _ROLLOUTS, *_FAILED)

_TRIES = {
    "failed": "mend the reward: the rollouts say what each failure was (megatron-rl view)",
    "wrong": "try easier problems, more rollouts a group, the chat template of the model, or look at what it writes "
    "(megatron-rl view)",
    "right": "try harder problems",
    "equal": "try problems that are neither always nor never solved, or algorithm.use_dynamic_sampling=true",
    "cut": "raise rollout.max_new_tokens",
    "gradient": "look at rewards and learning rate",
}
"""What to try about each sign; of several, the first two that were seen."""


class SignalWatch:
    """Looks at the rows of a run. A sign is said when it appears, and again only after it had ended."""

    def __init__(self, num_steps: int = NUM_STEPS) -> None:
        self._rows: deque[Mapping[str, float]] = deque(maxlen=num_steps)
        self._said: frozenset[str] = frozenset()

    def see(self, metrics: Mapping[str, float]) -> str | None:
        """Take the row of one more training step; return a line that warns, or None.

        Example:
            ``warning: every group of the last 5 steps is wrong; the gradient is 0; try easier problems, ...``
        """
        self._rows.append({key: metrics[key] for key in _KEPT if key in metrics})
        if len(self._rows) < (self._rows.maxlen or 0):
            return None
        seen = self._signs()
        is_new = not seen.keys() <= self._said
        self._said = frozenset(seen)
        if not is_new:
            return None
        tries = [_TRIES[name] for name in seen if name != "gradient" or len(seen) == 1][:2]
        return f"warning: {'; '.join(seen.values())}. Hint: {'; '.join(tries)}"

    def _signs(self) -> dict[str, str]:
        """Return name and sentence of each sign in the last steps, the worst first."""
        steps = f"the last {len(self._rows)} steps"
        right, wrong, cut, gradient = (self._values(key) for key in (_RIGHT, _WRONG, _CUT, _GRADIENT))
        signs: dict[str, str] = {}
        failed = sum(row.get(key, 0.0) for row in self._rows for key in _FAILED)
        if failed and failed >= sum(self._values(_ROLLOUTS)) > 0:
            signs["failed"] = f"no response of {steps} could be judged"
        if wrong and min(wrong) >= 1:
            signs["wrong"] = f"every group of {steps} is wrong"
        elif right and min(right) >= 1:
            signs["right"] = f"every group of {steps} is right"
        elif wrong and right and min(r + w for r, w in zip(right, wrong)) > 1 - 1e-9:
            signs["equal"] = f"no group of {steps} has right and wrong rollouts"
        if cut and sum(cut) / len(cut) >= (CUT_UNTIL if "cut" in self._said else CUT_FROM):
            share = sum(cut) / len(cut)
            signs["cut"] = f"{share:.0%} of responses in {steps} are cut at rollout.max_new_tokens".replace("%", " %")
        if gradient and not any(gradient):
            signs["gradient"] = f"the gradient of {steps} is 0"
        return signs

    def _values(self, key: str) -> list[float]:
        """Return a metric of the last steps; nothing where one of them lacks it."""
        found = [row[key] for row in self._rows if key in row]
        return found if len(found) == len(self._rows) else []
