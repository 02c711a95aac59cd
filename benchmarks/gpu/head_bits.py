"""The error of a log-prob, given the hidden states: our head in bfloat16 against float64, on tokens drawn from the model.

log_prob_error_mean, _max     absolute; entropy_error_max likewise
bf16_logits_error_max         of log-probs from logits that were rounded to bfloat16, as a plain product leaves them
logits_std                    their standard deviation
"""

from __future__ import annotations

import argparse

from common import emit, join_alone

from megatron_rl.process.lifetime import leave


def main() -> int:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="sizes for a machine without a GPU")
    tokens, hidden_size, words = (64, 64, 512) if parser.parse_args().tiny else (2048, 5120, 152_064)
    device = join_alone()

    import torch
    import torch.distributed as dist

    from megatron_rl.parallel.vocab import vocab_parallel_statistics

    generator = torch.Generator(device).manual_seed(1)
    hidden = torch.randn(tokens, hidden_size, device=device, generator=generator).bfloat16()
    weight = (3.0 / hidden_size**0.5 * torch.randn(words, hidden_size, device=device, generator=generator)).bfloat16()
    labels, true, rounded, entropy, spread = [], [], [], [], []
    for rows in hidden.split(256):
        logits = rows.double() @ weight.double().t()
        log_p = logits.log_softmax(-1)
        label = torch.multinomial(log_p.exp(), 1, generator=generator)
        labels.append(label[:, 0])
        true.append(log_p.gather(1, label)[:, 0])
        rounded.append((rows @ weight.t()).float().log_softmax(-1).gather(1, label)[:, 0])
        entropy.append(-(log_p.exp() * log_p).sum(-1))
        spread.append(logits.std())
    found = vocab_parallel_statistics(
        hidden, weight, torch.cat(labels), vocab_size=words, temperature=1.0, tp_group=dist.group.WORLD
    )
    error = (found.log_probs - torch.cat(true)).abs()
    emit(
        {
            "log_prob_error_mean": float(error.mean()),
            "log_prob_error_max": float(error.max()),
            "entropy_error_max": float((found.entropy - torch.cat(entropy)).abs().max()),
            "bf16_logits_error_max": float((torch.cat(rounded) - torch.cat(true)).abs().max()),
            "logits_std": float(torch.stack(spread).mean()),
        }
    )
    return 0


if __name__ == "__main__":
    leave(main())
