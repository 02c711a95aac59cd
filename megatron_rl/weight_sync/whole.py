"""Updates by whole tensors, the trainer's end: where servers do not hold what shards could fill.

Every rank gathers the tensors; those that have servers of their machine to serve put them into shared memory, and rank 0 sends
them to servers elsewhere. Our weight loader gives them to SGLang's own, which takes each rank's part.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from megatron_rl.convert.architecture.shape import ModelShape
from megatron_rl.convert.tables.table import float32_tensors, hf_tensors
from megatron_rl.parallel.agree import gather_json
from megatron_rl.process import activity
from megatron_rl.weight_sync.meeting import Delivery, Post, ServerMeeting
from megatron_rl.weight_sync.outlets import LocalOutlet, NetworkOutlet
from megatron_rl.weight_sync.pieces import ITEM_BYTES, ServedForm, TrainingLayout
from megatron_rl.weight_sync.served import RolloutLayout
from megatron_rl.weight_sync.shared import BufferPool
from megatron_rl.weight_sync.spec import Transfer, TransferSpec
from megatron_rl.weight_sync.whole_bucket import HEADER, Packer


class WholeSender:
    """Sender of whole tensors to servers with our weight loader. Every method is a collective."""

    def __init__(
        self,
        tensors: Callable[[], Iterable[tuple[str, Tensor]]],
        shape: ModelShape,
        training: TrainingLayout,
        meeting: ServerMeeting,
        *,
        form: ServedForm,
        device: torch.device,
    ) -> None:
        """Args:
        tensors: yields the current weights under their Hugging Face names; a collective that gives every rank all of them.
        shape: of the model.
        training: of the trainer.
        meeting: of this trainer and its servers.
        form: of the servers' parameters.
        device: of this rank.
        """
        self._tensors, self._shape, self._training = tensors, shape, training
        self._meeting, self._form, self._pool = meeting, form, BufferPool(device)
        self.metrics: dict[str, float] = {}
        """Figures of the last ``send``."""

    def send(self, servers: Sequence[int], layout: RolloutLayout, *, post: Post | None) -> dict[int, Delivery]:
        """Send the current weights to servers.

        Args:
            servers: numbers within the layout, the same on every rank.
            layout: of all servers of the engine.
            post: on rank 0; None on other ranks.

        Returns:
            The outcome by server, the same on every rank.
        """
        places, size = self._meeting.rendezvous.places(layout), self._bucket_bytes()
        what = Transfer("whole", self._shape, self._training, layout, places, self._form, size)
        specs, futures = self._meeting.invite(servers, what, post)
        there, deliveries = self._meeting.join(specs, futures)
        failures = self._transfer(specs, there, {server for server in there if server not in deliveries})
        deliveries |= self._meeting.agree(failures)
        rest = [server for server in there if server not in deliveries]
        deliveries |= self._meeting.conclude(rest, specs, futures, lambda *_: Delivery("loaded", ""))
        self._meeting.forget_groups(specs, deliveries)
        return deliveries

    def _bucket_bytes(self) -> int:
        """Return the bytes of every bucket: the largest tensor fits."""
        wide, item = float32_tensors(self._shape), ITEM_BYTES[self._form.trained]
        sizes = (prod(extent) * (4 if name in wide else item) for name, extent in hf_tensors(self._shape).items())
        return HEADER + max(self._meeting.rendezvous.bucket_bytes, *sizes)

    def _transfer(self, specs: Mapping[int, TransferSpec], there: Sequence[int], alive: set[int]) -> dict[int, str]:
        """Hand on all tensors; return by server why it has not got everything from this rank."""
        outlets = self._outlets(specs, there, alive)
        number, num_sent = 0, 0
        packer = Packer([outlet.room(0) for outlet in outlets]) if outlets else None

        def hand_on() -> Packer:
            nonlocal number
            assert packer is not None
            packer.close()
            for outlet in outlets:
                outlet.hand_on(number, next(iter(specs.values())).transfer.bucket_bytes)
            number += 1
            return Packer([outlet.room(number) for outlet in outlets])

        for name, tensor in self._tensors():  # to the end on every rank: collectives stand behind it
            if packer is not None:
                packer = packer if packer.has_room(tensor) else hand_on()
                packer.add(name, tensor)
                num_sent += tensor.nbytes * len(outlets)
            activity.beat()
        if packer is not None:
            packer = hand_on()
            hand_on()  # an empty one: the end
        for outlet in outlets:
            outlet.finish(number)
        self.metrics["weight_sync/sent_bytes"] = float(sum(gather_json(num_sent, self._meeting.cpu_group)))
        return {server: detail for outlet in outlets for server, detail in outlet.failures.items()}

    def _outlets(
        self, specs: Mapping[int, TransferSpec], there: Sequence[int], alive: set[int]
    ) -> list[LocalOutlet | NetworkOutlet]:
        """Return what this rank hands tensors to: one for all readers of its memory, one for each rank elsewhere."""
        outlets: list[LocalOutlet | NetworkOutlet] = []
        if not there:
            return outlets
        any_spec, limit_s = specs[there[0]], self._meeting.rendezvous.timeout_s
        size = any_spec.transfer.bucket_bytes
        if readers := any_spec.readers(self._meeting.rank, there):
            servers = [receiver // any_spec.transfer.rollout.tp_size for receiver in readers]
            local = LocalOutlet(
                servers, size, pool=self._pool, limit_s=limit_s,
                problem=lambda server: self._meeting.problem(specs[server]),
            )  # fmt: skip
            self._meeting.store.set(any_spec.stream_key(self._meeting.rank), json.dumps(local.handle()))
            outlets.append(local)
        for spec in (specs[server] for server in there):
            for tp_rank, receiver in enumerate(spec.receivers):
                if self._meeting.rank == 0 and spec.transfer.whole_sender(receiver) is None:
                    failure = "" if spec.server in alive else "its group was not made"
                    outlets.append(
                        NetworkOutlet(
                            self._meeting.group(spec), 1 + tp_rank, size, server=spec.server, pool=self._pool,
                            number=len(outlets), limit_s=limit_s, failure=failure,
                        )
                    )  # fmt: skip
        return outlets
