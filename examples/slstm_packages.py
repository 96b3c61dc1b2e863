"""The sLSTM of xlstm, TiRex and TiRex-2, and FlashRNN's functions: their own PyTorch code beside rnnkit's in its place.

    python examples/slstm_packages.py

makes a virtual environment of its own (--venv), installs torch, rnnkit from this repository and the packages, and runs
each package's cell on random weights and inputs, as it is and under `rnnkit.patch`. It prints the largest difference of
outputs, states and gradients relative to the largest value of each, and the times of a forward and backward pass,
median of five. It exits with 1 if they differ by more than rounding. Nothing but packages is downloaded: no weights.

TiRex computes in bfloat16 and rounds its states to it in each step; rnnkit computes the same in float32. There, both
are also compared with the cell in float64, to which rnnkit has to be nearer.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported in the environment of its own only
    from torch import Tensor, nn

REPOSITORY = Path(__file__).resolve().parent.parent
#: What is installed, without the packages' own dependencies, most of which their cells do not import; and these.
PACKAGES = ("xlstm==2.0.6", "tirex-ts==1.4.2", "tirex-2==0.4.0", "flashrnn==1.0.8", "mlstm-kernels")
NEEDED = (
    "omegaconf",
    "dacite",
    "einops",
    "scikit-learn",
    "safetensors",
    "setuptools>=77",
    "pandas",
    "huggingface_hub",
    "lightning",
    "numpy",
)
TOLERANCE = 2e-5  # float32 over some hundred steps
B, T, N, D = 8, 64, 4, 64  # batch, steps, heads, units of a head

Results = Sequence["Tensor"]
Step = Callable[[], Results]


def with_gradients(run: Callable[[], Results], wanted: Sequence[Tensor]) -> Step:
    """The results, and the gradients of `wanted` for fixed gradients of the results."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        grads = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in run()]

    def step() -> Results:
        results = run()
        return [*results, *torch.autograd.grad(results, wanted, grads)]

    return step


def random_parameters(module: nn.Module) -> list[Tensor]:
    import torch

    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return list(module.parameters())


def xlstm() -> Step:
    import torch
    from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

    config = sLSTMCellConfig(hidden_size=N * D, num_heads=N, backend="vanilla", dtype="float32")
    cell = sLSTMCell(config)
    x = torch.randn(B, T, 4 * N * D, requires_grad=True)
    return with_gradients(lambda: cell(x), [x, *random_parameters(cell)])


def tirex() -> Step:
    import torch
    from tirex.models.slstm.cell import sLSTMBlockConfig, sLSTMCell

    cell = sLSTMCell(sLSTMBlockConfig(N * D, N), "torch")
    x = torch.randn(B, T, 4 * N * D, requires_grad=True)
    return with_gradients(lambda: cell(x, None), [x, *random_parameters(cell)])


def tirex_in_float64() -> Results:
    """The same parameters and input as `tirex`, by its own function of steps."""
    import torch
    from tirex.models.slstm.cell import sLSTMBlockConfig, sLSTMCell, sLSTMCellTorch

    cell = sLSTMCell(sLSTMBlockConfig(N * D, N), "torch")
    x = torch.randn(B, T, 4 * N * D, requires_grad=True)
    parameters = random_parameters(cell)

    def run() -> Results:
        kernel, bias = (parameter.double() for parameter in cell.parameters())
        by_gate = bias.view(N, 4, D).transpose(0, 1).flatten()
        states = x.new_zeros(4, B, N * D).double()
        given = x.double().transpose(0, 1)
        float_before, torch.Tensor.float = torch.Tensor.float, torch.Tensor.double
        try:  # the function casts to float32 in each step
            output, last = sLSTMCellTorch.slstm_forward(given, states, kernel, by_gate)
        finally:
            torch.Tensor.float = float_before
        return [output.view(T, B, N, D).permute(1, 2, 0, 3).float(), last.float()]

    return with_gradients(run, [x, *parameters])()


def tirex2() -> Step:
    import torch
    from tirex2.model.component.flashrnn_slstm import FlashRNNLayerConfig, sLSTMFlashRNNLayer

    config = FlashRNNLayerConfig(
        embedding_dim=N * D,
        num_heads=N,
        backend="vanilla",
        recurrent_shape="HPGD",
        bias_shape="HGD",
    )
    layer = sLSTMFlashRNNLayer(config, 0, 1)
    x = torch.randn(B, T, N * D, requires_grad=True)
    return with_gradients(lambda: (layer(x),), [x, *random_parameters(layer)])


def flashrnn(function: str) -> Callable[[], Step]:
    def make() -> Step:
        import flashrnn
        import torch

        gates = {"elman": (1, 1, 1), "gru": (3, 3, 4)}.get(function, (4, 4, 4))
        Wx = torch.randn(B, T, gates[0], N, D, requires_grad=True)
        R = (torch.randn(gates[1], N, D, D) / 16).requires_grad_()
        b = torch.randn(gates[2], N, D, requires_grad=True)
        options = {"function": function, "backend": "vanilla", "dtype": "float32"}
        return with_gradients(lambda: flashrnn.flashrnn(Wx, R, b, **options), [Wx, R, b])

    return make


#: What is run: its name, the package to patch, and what makes a forward and backward pass of it.
RUNS: dict[str, tuple[str, Callable[[], Step]]] = {
    "xlstm sLSTMCell": ("xlstm", xlstm),
    "TiRex sLSTMCell": ("tirex", tirex),
    "TiRex-2 sLSTMFlashRNNLayer": ("tirex2", tirex2),
    **{
        f"flashrnn {function}": ("flashrnn", flashrnn(function))
        for function in ("elman", "lstm", "gru", "slstm")
    },
}


def difference(found: Results, expected: Results) -> float:
    """The largest, relative to the largest value of each tensor."""
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def timed(step: Step) -> tuple[Results, float]:
    """What it returns, and the median of its milliseconds."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        results = step()
        seconds.append(time.perf_counter() - start)
    return results, 1e3 * median(seconds)


def compare(threads: int) -> int:
    """Prints a line for each of RUNS. Returns how many differ."""
    import torch

    import rnnkit

    torch.set_num_threads(threads)
    print(
        f"torch {torch.__version__}, {threads} threads; B {B}, T {T}, {N} heads of {D}, forward and backward"
    )
    failures = 0
    for name, (package, make) in RUNS.items():
        torch.manual_seed(0)
        step = make()
        theirs, their_ms = timed(step)
        with rnnkit.patch(package):
            ours, our_ms = timed(step)
        apart = difference([t.detach() for t in ours], [t.detach() for t in theirs])
        fits, told = apart < TOLERANCE, f"differs by {apart:.1e}"
        if package == "tirex":
            torch.manual_seed(0)
            truth = [t.detach() for t in tirex_in_float64()]
            errors = [difference([t.detach() for t in of], truth) for of in (ours, theirs)]
            fits = errors[0] < min(TOLERANCE, errors[1])
            told = f"differs from float64 by {errors[0]:.1e}, its own by {errors[1]:.1e}"
        failures += not fits
        ratio = (
            f"{their_ms:7.1f} ms its own, {our_ms:6.1f} ms rnnkit, {their_ms / our_ms:5.1f} times"
        )
        print(f"{name:27} {ratio}; {told}{'' if fits else '  TOO FAR'}", flush=True)
    return failures


def make_environment(folder: Path) -> Path:
    """A virtual environment with everything, unless it is there. Returns its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        for arguments in (
            ["torch==2.13.0", "setuptools>=77"],
            ["--no-build-isolation", str(REPOSITORY)],
            [*NEEDED],
            ["--no-deps", *PACKAGES],
        ):
            subprocess.run([*pip, *arguments], check=True)
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", type=Path, default=REPOSITORY / "build" / "slstm-packages")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--here", action="store_true", help="run in this Python, install nothing")
    options = parser.parse_args()
    if options.here:
        return int(compare(options.threads) > 0)
    python = make_environment(options.venv.resolve())
    command = [str(python), __file__, "--here", "--threads", str(options.threads)]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": ""}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
