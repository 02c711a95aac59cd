"""Do Transformer Engine's layers compute what the local ones do, and does packing change nothing? bfloat16, one device.

log_prob_abs_diff    mean over response tokens, local layers against Transformer Engine's, a random 4-layer model
packing_abs_diff     mean, rows packed together against one row a pack, for each kind of layer
first_log_ratio      the largest |log ratio| of the first update: 0 where passes agree to the bit
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from common import TINY, Sizes, build, join_alone, load, random_rows, write_model


def main() -> None:
    """Measure, and print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="sizes for a machine without a GPU")
    sizes = TINY if parser.parse_args().tiny else Sizes(2048, 11008, 16, 2, 151_936, 4)
    device = join_alone()

    import torch

    from megatron_rl.algorithms import build_algorithm
    from megatron_rl.model.build import build_groups_of

    model = write_model(Path(tempfile.mkdtemp()) / "model", sizes)
    lengths = [1500, 300, 900, 40, 2000, 700] if device.type == "cuda" else [60, 10, 33, 21]
    kinds = ["local", "transformer_engine"] if device.type == "cuda" else ["local"]
    groups, found, line = None, {}, {}
    for kind in kinds:
        packed, alone = (f"policy.train_micro_batch_tokens={tokens}" for tokens in (sum(lengths), max(lengths)))
        for name, tokens in (("packed", packed), ("alone", alone)):
            config = load(model, f"policy.megatron_cfg.transformer_impl={kind}", tokens)
            groups = groups or build_groups_of(config, device)
            policy, algorithm = build(config, groups), build_algorithm(config)
            rows = random_rows(lengths, sizes.vocab_size)
            policy.fill_log_probs(rows, [range(len(rows))], "old_log_probs")
            found[kind, name] = torch.cat([row.old_log_probs for row in rows])
            metrics = policy.train_step(rows, algorithm.loss)
            line[f"first_log_ratio_{kind}_{name}"] = metrics["ratio/max_abs_log_ratio"]
            del policy
        line[f"packing_abs_diff_{kind}"] = float((found[kind, "packed"] - found[kind, "alone"]).abs().mean())
    if len(kinds) == 2:
        difference = found["local", "packed"] - found["transformer_engine", "packed"]
        line["log_prob_abs_diff"] = float(difference.abs().mean())
    beyond = {name: value for name, value in line.items() if not value <= limit_of(name)}
    print(json.dumps(line | ({"failed": beyond} if beyond else {})))
    sys.exit(int(bool(beyond)))


def limit_of(name: str) -> float:
    """Two passes agree to the bit; two kinds of layers, and two packings, as well as bfloat16 allows."""
    return 0.0 if name.startswith("first_log_ratio") else 2e-3


if __name__ == "__main__":
    main()
