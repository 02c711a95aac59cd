"""What is said about a driver, a torch and a Transformer Engine that do not go together, on machines that we do not have."""

from __future__ import annotations

import pytest

from megatron_rl.config import installed
from megatron_rl.config.installed import BINDINGS
from megatron_rl.errors import UserError

TORCH_ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
FITTING = {
    "transformer-engine": "2.11.0",
    BINDINGS: "2.11.0",
    "transformer-engine-cu12": None,
    "transformer-engine-cu13": "2.11.0",
}
OF_CUDA_13 = ["torch>=2.1", "einops", "transformer_engine_cu13==2.11.0"]


@pytest.mark.parametrize(
    ("cuda", "driver", "has_device", "expected"),
    [
        (None, (13, 0), True, "torch 2.11.0, a build without CUDA"),
        ("13.0", (12, 8), True, "a driver for CUDA 12.8, and torch 2.11.0 was built for CUDA 13.0"),
        ("13.0", None, True, "no driver library"),
        ("13.0", None, False, None),
        ("13.0", (13, 0), True, None),
        ("12.8", (13, 1), True, None),  # drivers run what was built for an older CUDA
        ("13.2", (13, 0), True, None),  # and any minor release of theirs
    ],
)
def test_why_torch_sees_no_gpu(
    cuda: str | None, driver: tuple[int, int] | None, has_device: bool, expected: str | None
) -> None:
    found = installed.why_no_gpu(torch="2.11.0", cuda=cuda, driver=driver, has_device=has_device)
    assert (found is None) == (expected is None)
    assert found is None or (expected in found[0] and found[1])


def test_the_least_driver_is_named() -> None:
    found = installed.why_no_gpu(torch="2.11.0", cuda="13.0", driver=(12, 8), has_device=True)
    assert found is not None and "580" in found[1]


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 3), (12, 1), (13, 0)])
def test_gpus_that_torch_has_kernels_for(capability: tuple[int, int]) -> None:
    installed.check_kernels(torch="2.11.0", capability=capability, built_for=TORCH_ARCHITECTURES)


@pytest.mark.parametrize("capability", [(7, 0), (6, 1), (11, 0)])
def test_gpus_without_kernels_are_named(capability: tuple[int, int]) -> None:
    said = f"compute capability {capability[0]}.{capability[1]}, and torch 2.11.0 has kernels for 7.5, 8.0, "
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        installed.check_kernels(torch="2.11.0", capability=capability, built_for=TORCH_ARCHITECTURES)


def test_parts_of_one_release_fit() -> None:
    installed.check_transformer_engine(torch="2.11.0", cuda="13.0", versions=FITTING, requirements=OF_CUDA_13)


def test_without_bindings_there_is_nothing_to_fit() -> None:
    alone = {**dict.fromkeys(FITTING), "transformer-engine": "2.11.0"}
    installed.check_transformer_engine(torch="2.11.0", cuda="13.0", versions=alone, requirements=[])


@pytest.mark.parametrize(
    ("cuda", "changed", "requirements", "expected"),
    [
        ("12.8", {}, OF_CUDA_13, "built for CUDA 13, and torch 2.11.0 for CUDA 12.8"),
        ("13.0", {}, ["transformer-engine-cu12==2.11.0"], "built for CUDA 12, and torch 2.11.0 for CUDA 13.0"),
        ("13.0", {"transformer-engine-cu12": "2.11.0"}, OF_CUDA_13, "finds transformer-engine-cu12 as well"),
        ("13.0", {"transformer-engine-cu13": "2.9.0"}, OF_CUDA_13, "has version 2.11.0, and transformer-engine-cu13 2.9.0"),
        ("13.0", {"transformer-engine-cu13": None}, OF_CUDA_13, "and transformer-engine-cu13 is not installed"),
        ("13.0", {"transformer-engine": "2.13.0"}, OF_CUDA_13, "has version 2.11.0, and transformer-engine 2.13.0"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_named(
    cuda: str, changed: dict[str, str | None], requirements: list[str], expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        installed.check_transformer_engine(
            torch="2.11.0", cuda=cuda, versions=FITTING | changed, requirements=requirements
        )
    assert expected in str(caught.value) and "make sglang PLATFORM=gpu" in str(caught.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            ImportError("transformer_engine_torch.so: undefined symbol: _ZN3c104cuda9SetDevice"),
            "was built against another torch than 2.12.0",
        ),
        (ImportError("libcudart.so.12: cannot open shared object file: No such file"), "misses a library"),
        (ModuleNotFoundError("No module named 'onnxscript'", name="onnxscript"), "needs onnxscript, which is not"),
        (
            RuntimeError("Found empty `transformer-engine` meta package"),
            "cannot be imported (RuntimeError: Found empty",
        ),
    ],
)
def test_why_a_compiled_package_does_not_import(error: Exception, expected: str) -> None:
    assert expected in str(installed.not_importable("transformer_engine.pytorch", error, "2.12.0"))


def test_versions_of_this_environment() -> None:
    assert installed.version_of("pytest") == pytest.__version__
    assert installed.version_of("no-such-package-anywhere") is None


def test_the_engine_is_found_by_its_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bindings leave no module of their own name, so a search for one finds nothing in a sound environment."""
    asked: list[str] = []

    def version(package: str) -> str:
        asked.append(package)
        return "2.11.0"

    monkeypatch.setattr(installed.metadata, "version", version)
    assert installed.has_transformer_engine() and asked == ["transformer-engine-torch"]


OF_SGLANG = [
    "aiohttp",
    "torch==2.11.0",
    "torchao>=0.9",
    "transformers==5.12.1",
    "torchcodec==0.17.0; sys_platform != 'linux'",
]


def test_a_server_with_another_transformers_than_its_own_is_named() -> None:
    fitting = {"torch": "2.11.0+cu130", "transformers": "5.12.1"}
    installed.check_pins("sglang", requirements=OF_SGLANG, versions=fitting)
    installed.check_pins("sglang", requirements=OF_SGLANG, versions={"transformers": None})
    for name, version in (("transformers", "5.17.0"), ("torch", "2.13.0+cpu")):
        with pytest.raises(UserError, match=rf"is made for {name} .*, and {version.split('+')[0]}"):
            installed.check_pins("sglang", requirements=OF_SGLANG, versions=fitting | {name: version})
