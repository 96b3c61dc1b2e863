"""Inputs of a case and its results in float64, and how far a provider's results are from them.

Arrays are named as torch.nn names parameters, beside `x` and `grad_output`; results are `output`, `h_n`,
`c_n` and, for training, `grad_x` and a `grad_` for each parameter. bfloat16 travels as the same values in
float32.
"""

import dataclasses
import importlib
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.base import ROOT
from benchmarks.cases import GATES, Case
from benchmarks.providers import Arrays, load


class WrongResult(Exception):
    """A result is too far from the truth, or not there."""


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Of the weights."""
    rows, size = GATES[case.cell] * case.H, case.output_size
    shapes: dict[str, tuple[int, ...]] = {}
    for suffix, inputs in case.suffixes():
        shapes[f"weight_ih{suffix}"] = (rows, inputs)
        shapes[f"weight_hh{suffix}"] = (rows, size)
        shapes[f"bias_ih{suffix}"] = shapes[f"bias_hh{suffix}"] = (rows,)
        if case.norm:
            shapes[f"norm_ih{suffix}"] = shapes[f"norm_hh{suffix}"] = (rows,)
            if case.cell == "LSTM":
                shapes[f"norm_c{suffix}"] = shapes[f"norm_c_bias{suffix}"] = (case.H,)
        if case.projection:
            shapes[f"weight_hr{suffix}"] = (case.projection, case.H)
    return shapes


def representable(array: Any, dtype: str) -> Any:
    """float64 as it is; else in float32, for bfloat16 with the lower half of the bits gone."""
    if dtype == "float64":
        return array
    array = array.astype(np.float32)
    return (array.view(np.uint32) & 0xFFFF0000).view(np.float32) if dtype == "bfloat16" else array


def inputs(case: Case) -> Arrays:
    """Weights as torch.nn initialises them, factors around 0.1, a normal input and gradient of the output."""
    numbers = np.random.default_rng(zlib.crc32(case.sizes().encode()))
    bound = case.H**-0.5
    arrays = {name: numbers.uniform(-bound, bound, shape) for name, shape in shapes(case).items()}
    for name in arrays:
        if name.startswith("norm") and "bias" not in name:
            arrays[name] = 0.1 * (
                1 + arrays[name]
            )  # around 1 an LSTM's rounding errors grow with each step
    outer = (case.rows,) if case.ragged else (case.T, case.N)
    arrays["x"] = numbers.standard_normal((*outer, case.I))
    if case.trains:
        size = case.directions * case.output_size
        arrays["grad_output"] = numbers.standard_normal((*outer, size))
    arrays = {name: representable(array, case.dtype) for name, array in arrays.items()}
    if case.resets:
        arrays["reset"] = numbers.random((case.T, case.N)) < 0.03
    if case.ragged:
        arrays["batch_sizes"] = np.array(case.batch_sizes)
    return arrays


def write(case: Case, folder: Path, threads: int) -> None:
    """inputs.npz, and truth.npz by torch.nn in float64."""
    arrays = inputs(case)
    np.savez(folder / "inputs.npz", **arrays)
    exact = {n: a.astype(np.float64) if a.dtype.kind == "f" else a for n, a in arrays.items()}
    in_double = dataclasses.replace(case.plain, dtype="float64")
    results = load("torch", threads, "cpu").prepare(in_double, exact).once()
    np.savez(folder / "truth.npz", **results)


def tolerance_table() -> Any:
    """The module tests/tolerances.py."""
    if (tests := str(ROOT / "tests")) not in sys.path:
        sys.path.append(tests)
    return importlib.import_module("tolerances")


def largest_error(case: Case, folder: Path, results: Path) -> float:
    """The largest relative error of the results in the file `results`.

    Raises:
        WrongResult: one leaves the tolerance table of the tests.
    """
    import torch

    tolerances = tolerance_table()
    errors = {}
    with np.load(folder / "truth.npz") as truth, np.load(results) as found:
        for name in truth:
            if name not in found or found[name].shape != truth[name].shape:
                shape = found[name].shape if name in found else "nothing"
                raise WrongResult(f"{name}: expected shape {truth[name].shape}, got {shape}")
            pair = torch.from_numpy(found[name]), torch.from_numpy(truth[name])
            errors[name] = tolerances.relative_error(*pair)
            table = tolerances.GRADIENT if name.startswith("grad_") else tolerances.FORWARD
            limit = table[getattr(torch, case.dtype)]
            if not errors[name] <= limit:  # a NaN must not pass
                raise WrongResult(
                    f"relative error of {name} {errors[name]:.1e}, allowed {limit:.0e}"
                )
    return float(max(errors.values()))
