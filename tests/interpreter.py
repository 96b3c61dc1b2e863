"""Triton's interpreter: runs the Triton kernels on CPU tensors, in the place of the ops.

Every address that a kernel reads or writes must be one of the launch's tensors.
"""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from devices import OpsOfGpu
from torch import Tensor

from rnnkit import backends

_OPS = torch.ops.rnnkit


def why_not() -> str:
    """Why it cannot run here; empty when it can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton compiles for the GPU here: TRITON_INTERPRET is not set"
    return ""


@contextmanager
def ops() -> Iterator[None]:
    """In this block `torch.ops.rnnkit` and the layers run on CPU tensors what they would run on a GPU without CUDA."""
    with (
        mock.patch.object(torch.ops, "rnnkit", OpsOfGpu(_OPS)),
        mock.patch.object(backends, "serving", lambda _: "triton"),
        mock.patch.object(backends, "fast_path", lambda _: None),
        _inside_tensors(),
    ):
        yield


@contextmanager
def _inside_tensors() -> Iterator[None]:
    builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
    scan = importlib.import_module("rnnkit.triton.scan")
    memory: list[tuple[int, int]] = []

    def checked(access: Callable, place_of_mask: int) -> Callable:
        def check(pointers: Any, *arguments: Any) -> Any:
            wanted = pointers.data[arguments[place_of_mask].data]
            inside = wanted != wanted
            for begin, end in memory:
                inside |= (wanted >= begin) & (wanted < end)
            assert inside.all(), f"{(~inside).sum()} of {inside.size} addresses are in no tensor"
            return access(pointers, *arguments)

        return check

    def launch(*arguments: Any, real: Callable = scan._launch, **constants: Any) -> None:
        each = [one for a in arguments for one in (a if isinstance(a, tuple) else [a])]
        memory[:] = [_span(tensor) for tensor in each if isinstance(tensor, Tensor)]
        real(*arguments, **constants)

    with ExitStack() as stack:
        for name, place_of_mask in (("create_masked_load", 0), ("create_masked_store", 1)):
            access = checked(getattr(builder, name), place_of_mask)
            stack.enter_context(mock.patch.object(builder, name, access))
        stack.enter_context(mock.patch.object(scan, "_launch", launch))
        yield


@contextmanager
def products_in_order() -> Iterator[None]:
    """In this block products add up their terms in one order: numpy's order depends on a row's place among the rows."""
    interpreter = importlib.import_module("triton.runtime.interpreter")

    def dot(left: Any, right: Any, total: Any, *_: Any) -> Any:
        terms = left.data[:, :, None] * right.data[None].astype(total.data.dtype)
        return interpreter.TensorHandle(terms.sum(1) + total.data, total.dtype.scalar)

    with mock.patch.object(interpreter.interpreter_builder, "create_dot", dot):
        yield


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses of its first value and after its last."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.itemsize if tensor.numel() else begin
