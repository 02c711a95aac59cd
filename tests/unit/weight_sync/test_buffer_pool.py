"""Buffers that are kept from one update to the next, and opened by other processes."""

from __future__ import annotations

import gc
import os

import torch

from megatron_rl.weight_sync.shared import NUM_BUFFERS, BucketReader, BucketWriter, BufferPool

CPU = torch.device("cpu")


def test_a_stream_gets_its_buffers_again_unless_it_needs_larger_ones() -> None:
    pool = BufferPool(CPU)
    first = pool.plain(0, 100)
    assert len(first) == NUM_BUFFERS and [len(buffer) for buffer in first] == [100] * NUM_BUFFERS
    again, other, larger = pool.plain(0, 60), pool.plain(1, 100), pool.plain(0, 200)
    assert [b.data_ptr() for b in again] == [b.data_ptr() for b in first] and len(again[0]) == 60
    assert not {b.data_ptr() for b in (*other, *larger)} & {b.data_ptr() for b in first}


def test_readers_of_the_next_update_see_the_same_memory_and_counters_of_their_own() -> None:
    pool = BufferPool(CPU)
    places = []
    for value in (1, 2):
        writer = BucketWriter(1, 64, pool)
        reader = BucketReader(writer.handle(), 0)
        assert not reader.is_there(0) and writer.is_free(0, [0])
        writer.buffer(0).fill_(value)
        writer.publish(0)
        assert reader.is_there(0) and reader.buffer(0).tolist() == [value] * 64
        assert not writer.is_free(NUM_BUFFERS, [0])
        reader.done(0)
        assert writer.is_free(NUM_BUFFERS, [0])
        places.append(writer.buffer(0).data_ptr())
    assert places[0] == places[1]


def test_nothing_stays_open() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    pool = BufferPool(CPU)
    for size in (64, 128, 256):
        BucketWriter(1, size, pool)
    assert len(os.listdir("/proc/self/fd")) == before + NUM_BUFFERS
    del pool
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
