"""The devices that tests run on: the CPU and, marked `gpu`, the current CUDA device; or the CPU in its place."""

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from rnnkit import gpu, ops

#: The CPU leaves no trace in a test's name (a pytest before 8.4 knows no nameless parameters).
DEVICES = (
    pytest.param("cpu", id=getattr(pytest, "HIDDEN_PARAM", "cpu")),
    pytest.param("cuda", marks=pytest.mark.gpu),
)


def on_each_device(cases: Iterable[Any]) -> list[Any]:
    """The cases as they are, and again with "cuda" for their `device`."""
    cases = list(cases)
    return [*cases, *on_gpu(cases)]


def on_gpu(cases: Iterable[Any]) -> list[Any]:
    """The cases with "cuda" for their `device`."""
    return [
        pytest.param(dataclasses.replace(case, device="cuda"), marks=pytest.mark.gpu)
        for case in cases
    ]


@contextmanager
def products_without_onednn() -> Iterator[None]:
    """Products of matrices on the CPU are ATen's own.

    Where a CPU has AMX, oneDNN's of bfloat16 spread a row's NaN into other rows
    (https://github.com/uxlfoundation/oneDNN/issues/5717).
    """
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


class OpsOfGpu:
    """In the place of `torch.ops.rnnkit`: layers take CPU tensors the way of CUDA tensors, other ops are `others`."""

    layer_forward = staticmethod(products_without_onednn()(ops.of_call(gpu.layer_forward)))
    layer_backward = staticmethod(products_without_onednn()(ops.of_backward(gpu.layer_backward)))

    def __init__(self, others: Any) -> None:
        self._others = others

    def __getattr__(self, name: str) -> Any:
        return getattr(self._others, name)
