"""Weights over a shared directory: every bit arrives, every fault is named, and nothing is there half."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rl.convert.hf.writer import LayoutWriter
from megatron_rl.convert.tables.digest import as_text, digest
from megatron_rl.errors import UserError
from megatron_rl.weight_sync.disk import (
    DiskPublisher,
    apply,
    frames,
    remove_newer,
    remove_older,
    write_delta,
    write_full,
)
from megatron_rl.weight_sync.disk.links import find_links, read_link
from tests.forked import run_child

Tensors = dict[str, Tensor]
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Any bits: NaN with payloads, infinities, subnormal numbers."""
    info = torch.iinfo(INTEGERS[dtype.itemsize])
    return torch.randint(info.min, info.max, shape, generator=generator, dtype=INTEGERS[dtype.itemsize]).view(dtype)


def random_tensors(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "model.a.weight": ((31, 17), torch.bfloat16), "model.b.weight": ((40, 13), torch.float32),
        "model.norm.weight": ((70,), torch.bfloat16), "model.c.weight": ((5, 129), torch.float8_e4m3fn),
        "model.c.weight_scale": ((), torch.float32), "model.experts": ((3, 4, 5), torch.float16),
    }  # fmt: skip
    return {name: random_bits(shape, dtype, generator) for name, (shape, dtype) in shapes.items()}


def changed(tensors: Tensors, frac: float, seed: int) -> Tensors:
    """Another version: a share of the elements has other bits."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, tensor in tensors.items():
        other = random_bits(tuple(tensor.shape), tensor.dtype, generator)
        mask = torch.rand(tensor.shape, generator=generator) < frac
        result[name] = torch.where(mask, *(t.view(INTEGERS[t.itemsize]) for t in (other, tensor))).view(tensor.dtype)
    return result


def write_checkpoint(directory: Path, tensors: Tensors) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "any", "dtype": "bfloat16"}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


def assert_same_bits(checkpoint: Path, tensors: Tensors) -> None:
    found = load_file(checkpoint / "model.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        integers = INTEGERS[tensor.itemsize]
        assert torch.equal(found[name].reshape(-1).view(integers), tensor.reshape(-1).view(integers)), name


@pytest.fixture(autouse=True)
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several frames a tensor, the last of them shorter."""
    from megatron_rl.weight_sync.disk import restore, write

    for module in (frames, write, restore):
        monkeypatch.setattr(module, "FRAME_ELEMENTS", 100)


@pytest.fixture
def links(tmp_path: Path) -> Path:
    return tmp_path / "links"


def write_chain(links: Path, *fractions: float, seed: int = 0) -> list[Tensors]:
    """Version 0 as a full link, and a delta for each fraction."""
    versions = [random_tensors(seed)]
    write_full(versions[0].items(), links, 0)
    for number, frac in enumerate(fractions, start=1):
        versions.append(changed(versions[-1], frac, seed=100 * seed + number))
        write_delta(versions[-2].__getitem__, versions[-1].items(), links, number)
    return versions


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("seed", range(6))
def test_every_version_arrives_bit_for_bit_from_wherever_one_starts(seed: int, links: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(seed)
    fractions = [(0.0, 0.01, 0.1, 0.5, 1.0)[i] for i in torch.randint(0, 5, (4,), generator=generator).tolist()]
    versions = write_chain(links, *fractions, seed=seed)
    newest = len(versions) - 1
    start = int(torch.randint(0, newest, (), generator=generator))
    # a checkpoint that no link knows, one that is known by its weights, then each result in its turn
    from_nothing = apply(links, write_checkpoint(tmp_path / "other", random_tensors(99)), newest)
    assert_same_bits(from_nothing, versions[newest])
    base = write_checkpoint(tmp_path / "base", versions[start])
    assert_same_bits(apply(links, base, newest, tmp_path / "at once"), versions[newest])
    for version in range(start + 1, newest + 1):
        base = apply(links, base, version)
        assert base.name == f"base.v{version}" or fractions[version - 1] == 0.0
        assert_same_bits(base, versions[version])
        assert json.loads((base / "config.json").read_text()) == {"model_type": "any", "dtype": "bfloat16"}


def test_deltas_do_not_need_the_full_link(links: Path, tmp_path: Path) -> None:
    versions = write_chain(links, 0.1, 0.1)
    base = write_checkpoint(tmp_path / "base", versions[0])
    shutil.rmtree(links / "00000000.full")
    assert_same_bits(apply(links, base, 2), versions[2])


@pytest.mark.parametrize("frac", [0.0, 0.001, 0.1, 0.13, 1.0])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32])
def test_a_frame_leads_there_and_back(frac: float, dtype: torch.dtype) -> None:
    old = {"x": random_bits((5003,), dtype, torch.Generator().manual_seed(3))}
    a, b = (frames.bits_of(tensors["x"]) for tensors in (old, changed(old, frac, seed=4)))
    data, frame = frames.encode(b, a)
    assert frame.changed == (a != b).sum() and (frac > 0.01 or len(data) < 50 + 8 * frame.changed)
    bits = a.copy()
    frames.decode_onto(data, frame, bits)
    assert (bits == b).all()
    frames.decode_onto(data, frame, bits)
    assert (bits == a).all()


def test_manifests_hold_the_digests_that_every_transport_compares(links: Path) -> None:
    versions = write_chain(links, 0.3)
    link = read_link(links / "00000001.delta")
    for name, stored in link.tensors.items():
        for tensors, text in zip(versions, (stored.before, stored.after)):
            if tensors[name].dim() in (1, 2):
                extent = tuple(tensors[name].shape)
                assert text == as_text(digest(name, tensors[name], (0,) * len(extent), extent))
    assert sum(frame.changed for frame in link.tensors["model.b.weight"].frames) > 0


@pytest.mark.parametrize("victim", ["00000000.full", "00000001.delta", "00000002.delta"])
def test_any_damaged_byte_is_found_and_its_link_named(victim: str, links: Path, tmp_path: Path) -> None:
    versions = write_chain(links, 0.05, 0.6)
    other = write_checkpoint(tmp_path / "other", random_tensors(99))
    generator = torch.Generator().manual_seed(1)
    for file in ("data", "manifest.json"):
        path = links / victim / file
        good = path.read_bytes()
        for place in torch.randint(0, len(good), (12,), generator=generator).tolist():
            spoiled = bytearray(good)
            spoiled[place] ^= 1 << int(torch.randint(0, 8, (), generator=generator))
            path.write_bytes(spoiled)
            with pytest.raises(UserError, match=victim):
                apply(links, other, 2)
            assert sorted(p.name for p in tmp_path.iterdir()) == ["links", "other"]
        path.write_bytes(good[:-1])
        rule = "manifest.json is damaged" if file == "manifest.json" else f"data has {len(good) - 1} bytes instead of"
        with pytest.raises(UserError, match=f"{victim}: {rule}"):
            apply(links, other, 2)
        path.write_bytes(good)
    assert_same_bits(apply(links, other, 2), versions[2])


def test_missing_links_are_named(links: Path, tmp_path: Path) -> None:
    versions = write_chain(links, 0.1, 0.1, 0.1)
    base = write_checkpoint(tmp_path / "base", versions[0])
    other = write_checkpoint(tmp_path / "other", random_tensors(99))
    with pytest.raises(UserError, match=r"00000009.full: is missing; the newest there is 3"):
        apply(links, base, 9)
    shutil.move(links / "00000002.delta", tmp_path / "kept")
    for start in (base, other):
        with pytest.raises(UserError, match=r"00000002.delta: is missing"):
            apply(links, start, 3)
    (links / "00000002.delta").mkdir()
    with pytest.raises(UserError, match=r"00000002.delta: manifest.json is missing"):
        apply(links, base, 3)
    with pytest.raises(UserError, match=r"nowhere: cannot be read"):
        apply(tmp_path / "nowhere", base, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "kept", "links", "other"]


def test_links_out_of_order_are_named(links: Path, tmp_path: Path) -> None:
    versions = write_chain(links, 0.1, 0.1, 0.1)
    base = write_checkpoint(tmp_path / "base", versions[0])
    for source, target in (("1", "x"), ("2", "1"), ("x", "2")):
        os.rename(links / f"0000000{source}.delta", links / f"0000000{target}.delta")
    with pytest.raises(UserError, match=r"00000002.delta: holds 00000001.delta"):
        apply(links, base, 3)
    # a link of another run in the place of ours
    write_chain(tmp_path / "another", 0.1, 0.1, seed=7)
    shutil.rmtree(links / "00000002.delta")
    shutil.copytree(tmp_path / "another" / "00000002.delta", links / "00000002.delta")
    with pytest.raises(UserError, match=r"00000002.delta: does not lead to"):
        apply(links, base, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["another", "base", "links"]


def test_a_base_that_is_not_what_it_says_is_named(links: Path, tmp_path: Path) -> None:
    versions = write_chain(links, 0.1, 0.1)
    base = apply(links, write_checkpoint(tmp_path / "base", versions[0]), 1)
    bad = dict(versions[1]) | {"model.b.weight": versions[1]["model.b.weight"] + 1}
    save_file(bad, base / "model.safetensors")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"base.v1: model.b.weight: is not that of version 1"):
        apply(links, base, 2)
    assert contents(tmp_path) == before


def test_the_result_that_is_there_already_is_used(links: Path, tmp_path: Path) -> None:
    versions = write_chain(links, 0.1)
    base = write_checkpoint(tmp_path / "base", versions[0])
    first = apply(links, base, 1)
    before = contents(tmp_path)
    assert apply(links, base, 1) == apply(links, first, 1) == first
    assert contents(tmp_path) == before
    with pytest.raises(UserError, match="not an empty directory"):
        apply(links, base, 1, into=base)


def killed_after(count: int, tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
    for number, item in enumerate(tensors.items()):
        if number == count:
            os.kill(os.getpid(), signal.SIGKILL)
        yield item


def test_a_writer_killed_in_between_leaves_no_link(links: Path, tmp_path: Path) -> None:
    versions = write_chain(links, 0.1)
    names = sorted(find_links(links))
    new = changed(versions[1], 0.1, seed=5)
    old = versions[1].__getitem__
    for count in (1, 4):
        assert run_child(lambda: write_full(killed_after(count, new), links, 2)) == -signal.SIGKILL  # noqa: B023
        assert run_child(lambda: write_delta(old, killed_after(count, new), links, 2)) == -signal.SIGKILL  # noqa: B023
        assert sorted(find_links(links)) == names
        assert sorted(p.name for p in links.iterdir() if p.name[0] == ".") == [
            ".00000002.delta.partial", ".00000002.full.partial"
        ]  # fmt: skip
    write_delta(old, new.items(), links, 2)
    assert_same_bits(apply(links, write_checkpoint(tmp_path / "base", versions[0]), 2), new)
    remove_older(links, 0)
    assert not [p for p in links.iterdir() if p.name[0] == "."]


def test_a_server_killed_in_between_leaves_no_checkpoint(
    links: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = write_chain(links, 0.1)
    base = write_checkpoint(tmp_path / "base", versions[0])
    add = LayoutWriter.add

    def die_at_the_third(self: LayoutWriter, name: str, tensor: Tensor) -> None:
        add(self, name, tensor)
        if len(self._missing) == len(versions[0]) - 3:
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(LayoutWriter, "add", die_at_the_third)
        assert run_child(lambda: apply(links, base, 1)) == -signal.SIGKILL
    assert sorted(p.name for p in tmp_path.iterdir()) == [".base.v1.partial", "base", "links"]
    assert_same_bits(apply(links, base, 1), versions[1])


def test_a_full_disk_is_a_user_error_and_leaves_nothing(links: Path) -> None:
    versions = write_chain(links)
    before = contents(links)

    def write() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        with pytest.raises(UserError, match=r"could not be written \(File too large\)"):
            write_full(versions[0].items(), links, 1)

    assert run_child(write) == 0
    assert contents(links) == before


def test_wrong_versions_and_tensors_are_refused(links: Path) -> None:
    versions = write_chain(links, 0.1)
    old, new = versions[1].__getitem__, changed(versions[1], 0.2, seed=9)
    before = contents(links)
    cases: list[tuple[str, Callable[[], object]]] = [
        ("version = 1: must be higher than the 1", lambda: write_full(new.items(), links, 1)),
        ("version = -1: must be higher", lambda: write_full(new.items(), links, -1)),
        ("has no link", lambda: write_delta(old, new.items(), links.parent / "empty", 1)),
        ("is not version 1", lambda: write_delta(versions[0].__getitem__, new.items(), links, 2)),
        (
            "other: = .*version 1 has no such",
            lambda: write_delta(old, {"other:": new["model.experts"]}.items(), links, 2),
        ),
        (r"bfloat16 \[31, 17\]", lambda: write_delta(old, {"model.a.weight": torch.ones(31, 17)}.items(), links, 2)),
        ("int64", lambda: write_full({"x": torch.ones(3, dtype=torch.int64)}.items(), links, 2)),
    ]
    for message, action in cases:
        with pytest.raises(UserError, match=message):
            action()
    with pytest.raises(ValueError, match=r"1 tensors were not written, for example model\.norm\.weight"):
        write_delta(old, [item for item in new.items() if item[0] != "model.norm.weight"], links, 2)
    assert contents(links) == before


def test_an_error_is_raised_once_all_tensors_were_asked_for(links: Path) -> None:
    """Behind the iterator stand collectives: the other ranks wait in them."""
    tensors = iter(random_tensors(0).items())
    with pytest.raises(UserError, match="must not be negative"):
        write_full(tensors, links, -1)
    assert next(tensors, None) is None


def test_published_versions_can_be_had_from_any_that_is_kept(links: Path, tmp_path: Path) -> None:
    publisher = DiskPublisher(links, full_every=4, keep_versions=3)
    versions = [random_tensors(0)]
    known = {0: write_checkpoint(tmp_path / "v0", versions[0])}
    other = write_checkpoint(tmp_path / "other", random_tensors(99))
    kinds = []
    for version in range(1, 14):
        versions.append(changed(versions[-1], 0.05, seed=version))
        kinds.append([path.suffix for path in publisher.publish(versions[version].items(), version)])
        for start, base in known.items():
            if start >= version - 3:
                assert_same_bits(apply(links, base, version, tmp_path / f"{start} to {version}"), versions[version])
        assert_same_bits(apply(links, other, version, tmp_path / f"to {version}"), versions[version])
        known[version] = tmp_path / f"to {version}"
    assert kinds == [[".full"]] + ([[".delta"]] * 3 + [[".delta", ".full"]]) * 3
    deltas = [(version, "delta") for version in (10, 11, 12, 13)]
    assert sorted(find_links(links)) == [(9, "full"), *deltas, (13, "full")]


def test_a_failed_version_is_followed_by_a_full_one(links: Path, tmp_path: Path) -> None:
    publisher = DiskPublisher(links)
    tensors = random_tensors(0)
    publisher.publish(tensors.items(), 1)
    new = changed(tensors, 0.1, seed=1)
    with pytest.raises(ZeroDivisionError):
        publisher.publish(((name, tensor if name != "model.experts" else 1 / 0) for name, tensor in new.items()), 2)
    assert sorted(p.name for p in links.iterdir()) == ["00000001.full"]
    assert [path.name for path in publisher.publish(new.items(), 2)] == ["00000002.full"]
    assert_same_bits(apply(links, write_checkpoint(tmp_path / "base", tensors), 2), new)


def test_a_resumed_run_replaces_what_it_writes_anew(links: Path, tmp_path: Path) -> None:
    versions = write_chain(links, 0.1, 0.1, 0.1)
    base = write_checkpoint(tmp_path / "base", versions[0])
    ahead = apply(links, base, 3)
    resumed = changed(versions[1], 0.1, seed=50)
    publisher = DiskPublisher(links)
    publisher.publish(resumed.items(), 2)
    assert sorted(find_links(links)) == [(0, "full"), (1, "delta"), (2, "full")]
    later = changed(resumed, 0.1, seed=51)
    publisher.publish(later.items(), 3)
    publisher.publish(changed(later, 0.1, seed=52).items(), 4)
    # a server with the other version 3 takes the full link: its stamp tells them apart
    assert_same_bits(apply(links, ahead, 4), changed(later, 0.1, seed=52))
    assert remove_newer(links, 3) == [links / "00000004.delta", links / "00000003.delta"]


def test_a_frame_that_would_fill_the_memory_is_refused() -> None:
    bits = np.zeros(64, np.uint16)
    new = bits.copy()
    new[5] = 7
    for content in (bytes(2**20), b"", (2**30).to_bytes(4, "little") + b"\1\0"):  # too long, too short, outside
        data = zstandard.ZstdCompressor().compress(content)
        with pytest.raises(frames.Damaged):
            frames.decode_onto(data, frames.Frame(len(data), 1, zlib.crc32(data)), bits)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(6))
    with pytest.raises(frames.Damaged, match="size"):
        frames.decode_onto(unsized, frames.Frame(len(unsized), 1, zlib.crc32(unsized)), bits)
    assert not bits.any()
    frames.decode_onto(*frames.encode(new, bits), bits)
    assert bits[5] == 7
