"""A method that learns from rows which exist already, and whose loss reads the reference's log-probs."""

from __future__ import annotations

from torch import Tensor

from megatron_rl.algorithms.sft import SFT
from megatron_rl.losses.kl import kl_estimate
from megatron_rl.losses.terms import TokenTerms
from megatron_rl.types import MicroBatch
from tests.e2e.conftest import Case, run_main
from tests.forked import run_ranks


class NearReference(SFT):
    """Supervised fine-tuning that stays near the model it started from."""

    needs = frozenset({"ref_log_probs"})

    def loss(self, log_probs: Tensor, entropy: Tensor, batch: MicroBatch) -> TokenTerms:
        """``-log p + 0.1 * KL(policy, reference)``."""
        kl = kl_estimate(log_probs, batch.vectors["ref_log_probs"], "k2")
        terms = super().loss(log_probs, entropy, batch)
        return TokenTerms(loss=terms.loss + 0.1 * kl, means={"kl/reference": kl.detach()})


def train(arguments: list[str]) -> int:
    """Run the training program with the method above."""
    from megatron_rl import run

    run.build_algorithm = NearReference
    return run_main(arguments)


def test_the_offline_loop_fills_the_reference(case: Case) -> None:
    config = case.root / "offline.yaml"
    config.write_text(
        "trainer: {stage: sft, precision: fp32, max_steps: 6, accelerator: cpu, devices: 2}\n"
        f"exp_manager: {{exp_dir: {case.root}, name: offline, export_hf: false}}\n"
        f"policy: {{model_path: {case.model}, train_global_batch_size: 8, optim: {{lr: 1.0e-2}}}}\n"
        f"algorithm: {{name: sft}}\ndata: {{task: gsm8k, train: {case.train}}}\n"
    )
    assert run_ranks(train, 2, [str(config)], timeout_s=120) == [0, 0]
    rows = case.rows("offline")
    # The first update is at the reference, so the same packs give the same bits; later ones have left it.
    assert rows[0]["step"] == 1 and rows[0]["kl/reference"] == 0.0
    assert rows[-1]["kl/reference"] > 1e-3
