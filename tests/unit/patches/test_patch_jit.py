"""Nothing of Megatron-Core is compiled, and compiling still works for everybody else."""

from __future__ import annotations

import pytest
import torch
from megatron.core import jit as megatron_jit
from megatron.core.fusions import fused_bias_dropout, fused_bias_swiglu

from megatron_rl.patches.megatron_core import jit


def test_fused_functions_are_plain() -> None:
    for function in (fused_bias_swiglu.swiglu, fused_bias_dropout.bias_dropout_add_fused_train):
        assert not hasattr(function, "_torchdynamo_orig_callable"), function


def test_modules_imported_later_are_not_compiled_either() -> None:
    def function() -> None: ...

    assert megatron_jit.jit_fuser(function) is function


def test_torch_compile_is_itself_again() -> None:
    assert torch.compile.__module__ == "torch"


def test_it_is_an_error_to_come_after_the_first_import() -> None:
    with pytest.raises(RuntimeError, match=r"megatron\.core is already imported"), jit.without_compiler():
        pass
