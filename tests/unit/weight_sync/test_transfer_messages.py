"""What travels between a trainer and a server's weight loader is plain data, and nothing else is taken."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megatron_rl.convert.architecture.shape import read_shape
from megatron_rl.weight_sync import receiver
from megatron_rl.weight_sync.fp8_format import Fp8Format
from megatron_rl.weight_sync.pieces import ServedForm, TrainingLayout
from megatron_rl.weight_sync.places import GpuPlace, Places
from megatron_rl.weight_sync.served import RolloutLayout
from megatron_rl.weight_sync.shared import from_plain, to_plain
from megatron_rl.weight_sync.spec import Transfer, TransferSpec
from tests.tiny_models import make_tiny_model


def spec(model: Path) -> TransferSpec:
    return TransferSpec(
        host="127.0.0.1",
        port=1,
        store_key="00" * 32,
        attempt="transfer/a/1",
        server=0,
        transfer=Transfer(
            cargo="shards",
            shape=read_shape(model),
            training=TrainingLayout(tp_size=2, vpp_size=2, etp_size=1),
            rollout=RolloutLayout(1, tp_size=2),
            places=Places((GpuPlace(0, 1), GpuPlace(0)), (GpuPlace(1, 0), GpuPlace(1, 1))),
            form=ServedForm("bfloat16", Fp8Format("block", power_of_two=True)),
            bucket_bytes=1000,
        ),
        network="gloo",
        timeout_s=0.5,
    )


FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "deepseek_v3")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_spec_survives_as_json(family: str, tmp_path: Path) -> None:
    sent = spec(make_tiny_model(tmp_path / "model", family, tied=False, seed=0))
    text = sent.to_json()
    assert json.loads(text)["transfer"]["shape"]["family"] == sent.transfer.shape.family
    assert TransferSpec.from_json(text) == sent


class Planted:
    """Unpickling it creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.mark,)


def test_a_pickle_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = tmp_path / "ran"
    pickle.loads(pickle.dumps(Planted(mark)))
    assert mark.exists(), "the pickle does what it should"
    mark.unlink()
    receiver.take(nn.Linear(1, 1), pickle.dumps(Planted(mark)), 0)
    assert not mark.exists() and "Invalid JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [{"network": "mpi"}, {"port": "x"}, {"transfer": {}}, {"transfer": {"cargo": "code"}}]
)
def test_a_wrong_field_is_refused(wrong: dict[str, object], tmp_path: Path) -> None:
    text = spec(make_tiny_model(tmp_path / "model", "qwen3", tied=False, seed=0)).to_json()
    with pytest.raises(ValueError):
        TransferSpec.from_json(json.dumps(json.loads(text) | wrong).encode())


def test_the_handle_of_gpu_memory_is_plain_data() -> None:
    place = (0, b"\x00\xffhandle", 4096, 512, False, b"counter", 3, b"event", True)
    arguments = (Tensor, torch.Size([2, 3]), (3, 1), 7, torch.storage.TypedStorage, torch.bfloat16, *place)
    plain = json.loads(json.dumps(to_plain(arguments)))
    assert tuple(from_plain(plain)) == arguments
