"""Triton's interpreter: runs the Triton kernels on CPU tensors, in the place of the ops."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from unittest import mock

import torch
from devices import OpsOfGpu

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
        mock.patch.object(backends, "short_way", lambda _: None),
    ):
        yield
