"""How fast 100,000 rows of log-normal lengths are dealt to micro-batches of 16,384 tokens, and how full those are.

useful_share       tokens over the budgets of all micro-batches
seconds            the slowest of the rank counts
ratio_of_costs     dearest over cheapest rank, attention counted
"""

from __future__ import annotations

import json
import random
import time

from megatron_rl.data.pack import plan_micro_batches

ROWS, BUDGET, QUADRATIC_LENGTH = 100_000, 16_384, 12 * 4096


def main() -> None:
    """Measure for 1, 8 and 64 data-parallel ranks; the worst of each figure is the last line."""
    generator = random.Random(1)
    lengths = [min(BUDGET, max(16, int(generator.lognormvariate(7, 1)))) for _ in range(ROWS)]
    found = []
    for ranks in (1, 8, 64):
        started = time.perf_counter()
        plan = plan_micro_batches(lengths, num_ranks=ranks, max_tokens=BUDGET, quadratic_length=QUADRATIC_LENGTH)
        seconds = time.perf_counter() - started
        costs = [sum(lengths[row] * (1 + lengths[row] / QUADRATIC_LENGTH) for b in rank for row in b) for rank in plan]
        found.append((sum(lengths) / (BUDGET * sum(map(len, plan))), seconds, max(costs) / min(costs)))
        print(f"{ranks:3} ranks: {found[-1][0]:.1%} useful, {seconds:.2f} s, costs within {found[-1][2] - 1:.2%}")
    useful, seconds_of, ratios = zip(*found)
    figures = {"useful_share": min(useful), "seconds": max(seconds_of), "ratio_of_costs": max(ratios)}
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
