"""Pinned requirements, their lock and setup.py say the same. Whether the pins resolve is for `make check-requirements`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "requirements"
PYTHON = {"cpu": "3.11", "gpu": "3.12"}


def read(file: str, python: str = "3.12") -> dict[str, Requirement]:
    """Requirements of a file that hold for a Python, by name."""
    lines = [line.split(" #")[0].strip() for line in (FOLDER / file).read_text().splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {
        canonicalize_name(each.name): each
        for each in found
        if each.marker is None or each.marker.evaluate({"python_version": python})
    }


def pinned(requirement: Requirement) -> str:
    """The one version that a requirement allows."""
    (only,) = requirement.specifier
    assert only.operator == "==" and "*" not in only.version, f"{requirement} is not a pin"
    return only.version


def of_setup(name: str) -> object:
    """A constant of setup.py, which cannot be imported without building something."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise LookupError(name)


EXTRAS: dict[str, list[str]] = of_setup("EXTRAS")  # type: ignore[assignment]
RUNTIME: list[str] = of_setup("RUNTIME")  # type: ignore[assignment]
FILES = sorted(path.name for path in FOLDER.iterdir())


@pytest.mark.parametrize("file", FILES)
def test_all_is_pinned_and_names_no_place(file: str) -> None:
    for python in PYTHON.values():
        assert all(map(pinned, read(file, python).values()))
    assert "://" not in (FOLDER / file).read_text()


def test_the_bundle_carries_versions_of_the_lock() -> None:
    locked = {name: pinned(each) for name, each in (read("gpu.lock") | read("bench_gpu.txt")).items()}
    carried = {name: pinned(each) for name, each in read("gpu_bundle.txt").items()}
    assert {name: locked.get(name) for name in carried} == carried


@pytest.mark.parametrize("file", ["gpu.txt", "sglang_gpu.txt"])
def test_the_lock_has_what_the_gpu_files_ask_for(file: str) -> None:
    locked = {name: pinned(each) for name, each in read("gpu.lock").items()}
    wanted = {name: pinned(each) for name, each in read(file).items()}
    assert {name: locked.get(name) for name in wanted} == wanted, "make lock"


def test_the_lock_has_one_core_of_transformer_engine() -> None:
    """Those of two CUDA releases have the same file names, and the sources of the bindings name the wrong one."""
    assert [name for name in read("gpu.lock") if name.startswith("transformer-engine-cu")] == [
        "transformer-engine-cu13"
    ]


@pytest.mark.parametrize("platform", PYTHON)
def test_pins_fit_setup(platform: str) -> None:
    pins = read(f"{platform}.txt", PYTHON[platform])
    for requirement in map(Requirement, RUNTIME):
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned(pin)), f"{platform}.txt has {pin}, setup.py {requirement}"


@pytest.mark.parametrize(("extra", "file"), [("gpu", "gpu.txt"), ("sglang", "sglang_gpu.txt")])
def test_extras_are_the_pins_of_the_gpu_files(extra: str, file: str) -> None:
    pins = read(file)
    for requirement in map(Requirement, EXTRAS[extra]):
        pin = pins[canonicalize_name(requirement.name)]
        assert (requirement.extras, str(requirement.specifier)) == (pin.extras, str(pin.specifier))


def test_nothing_is_installed_on_gpus_that_setup_does_not_know() -> None:
    known = {canonicalize_name(Requirement(each).name) for each in [*RUNTIME, *EXTRAS["gpu"]]}
    for_building = {"setuptools", "wheel", "ninja"}
    assert set(read("gpu.txt")) == known | for_building


def test_the_extra_for_developers_has_what_make_installs() -> None:
    assert set(read("dev.txt")) <= {canonicalize_name(Requirement(each).name) for each in EXTRAS["dev"]}
