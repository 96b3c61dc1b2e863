"""`rnnkit.flashrnn` against loops over its formulas, and `rnnkit.patch` of packages that call such functions.

Packages that are not installed are stood in for by modules with their classes' names, attributes and layouts;
examples/slstm_packages.py runs the packages themselves.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnnkit

pytestmark = pytest.mark.usefixtures("backend")

B, T, N, D = 3, 5, 2, 4

#: For each function: its states, and its gates with an input part, a recurrent part and a bias.
SIZES = {"elman": (1, 1, 1, 1), "lstm": (2, 4, 4, 4), "gru": (1, 3, 3, 4), "slstm": (4, 4, 4, 4)}
each_function = pytest.mark.parametrize("function", SIZES)


def arguments(function: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Wx, R, b and states in FlashRNN's layouts."""
    n_states, of_input, recurrent, biases = SIZES[function]
    shapes = [(B, T, of_input, N, D), (recurrent, N, D, D), (biases, N, D), (n_states, B, 1, N, D)]
    drawn = [torch.randn(shape, dtype=dtype) for shape in shapes]
    drawn[3] = drawn[3].abs()  # an sLSTM divides by n
    return [tensor.requires_grad_() for tensor in drawn]


def loop(function: str, Wx: Tensor, R: Tensor, b: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """One step after the other."""
    now = list(states[:, :, 0].unbind(0))  # [B, N, D] each
    every = []
    for t in range(Wx.size(1)):
        x = Wx[:, t].unbind(1)
        r = [torch.stack([now[0][:, n] @ of_gate[n].t() for n in range(N)], 1) for of_gate in R]
        if function == "gru":
            reset, z = (torch.sigmoid(x[k] + r[k + 1] + b[k + 1]) for k in (0, 1))
            now = [z * now[0] + (1 - z) * torch.tanh(x[2] + b[3] + reset * (r[0] + b[0]))]
        else:
            raw = [of_x + of_r + of_b for of_x, of_r, of_b in zip(x, r, b, strict=True)]
            now = step(function, raw, now)
        every.append(torch.stack(now))
    return torch.stack(every, 2), torch.stack(now).unsqueeze(2)


def step(function: str, raw: list[Tensor], states: list[Tensor]) -> list[Tensor]:
    if function == "elman":
        return [raw[0].tanh()]
    i, f, z, o = raw
    if function == "lstm":
        c = f.sigmoid() * states[1] + i.sigmoid() * z.tanh()
        return [o.sigmoid() * c.tanh(), c]
    _, c, n, m = states
    log_f = m + torch.nn.functional.logsigmoid(f)
    scale = torch.where(n == 0, i, torch.maximum(i, log_f))
    i, f = torch.exp(i - scale), torch.exp(log_f - scale)
    c, n = f * c + i * z.tanh(), f * n + i
    return [o.sigmoid() * c / n, c, n, scale]


def assert_same(found: Any, expected: Any, wanted: list[Tensor], tolerance: float = 1e-12) -> None:
    """The same results and, of arbitrary gradients, the same gradients."""
    grads = [torch.randn_like(one) for one in expected]
    results = [
        [*some, *torch.autograd.grad(some, wanted, grads, allow_unused=True)]
        for some in (found, expected)
    ]
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


@each_function
def test_functions_are_the_formulas(function: str) -> None:
    given = arguments(function)
    assert_same(rnnkit.flashrnn(*given, function=function), loop(function, *given), given)


@each_function
def test_without_states_they_are_zeros(function: str) -> None:
    *given, states = arguments(function)
    expected = loop(function, *given, torch.zeros_like(states))
    assert_same(rnnkit.flashrnn(*given, function=function), expected, given)


@dataclass
class Config:
    """Another order of the axes."""

    function: str
    input_shape: str = "TBGHD"
    recurrent_shape: str = "HPGD"
    bias_shape: str = "HDG"
    output_shape: str = "STBHD"
    gradient_recurrent_cut: bool = False
    gradient_recurrent_clipval: float | None = None
    forward_clipval: float | None = None


@each_function
def test_other_orders_of_axes(function: str) -> None:
    given = arguments(function)
    Wx, R, b, states = given
    every, last = rnnkit.flashrnn(
        Wx.transpose(0, 1),
        R.permute(1, 3, 0, 2),
        b.permute(1, 2, 0),
        states.transpose(1, 2),
        config=Config(function),
    )
    found = every.transpose(1, 2), last.transpose(1, 2)
    assert_same(found, loop(function, *given), given)


@each_function
def test_dtypes(function: str) -> None:
    """Computed in the dtype of Wx, whatever the others have."""
    Wx, *others = arguments(function, torch.float32)
    low = Wx.detach().bfloat16()
    every, last = rnnkit.flashrnn(low, *others, function=function, backend="cuda", dtype="bfloat16")
    assert every.dtype == last.dtype == torch.bfloat16
    expected, _ = loop(function, low.float(), *[t.bfloat16().float() for t in others])
    torch.testing.assert_close(every.float(), expected, rtol=0.05, atol=0.05)


def test_under_compile_and_twice_differentiated() -> None:
    given = arguments("slstm")
    whole = torch.compile(rnnkit.flashrnn, fullgraph=True, backend="aot_eager")
    assert_same(whole(*given, function="slstm"), loop("slstm", *given), given)

    def run(*tensors: Tensor) -> Tensor:
        return rnnkit.flashrnn(*tensors, function="lstm")[0]

    Wx, R, b, states = (t.detach()[..., :1] for t in arguments("lstm"))
    small = [t.clone().requires_grad_() for t in (Wx, R[:, :, :1], b, states)]
    assert torch.autograd.gradgradcheck(run, small)


def test_initial_values_of_a_config() -> None:
    given = arguments("lstm")
    config = SimpleNamespace(function="lstm", initial_val=[0.5, -0.25])
    states = (
        torch.tensor([0.5, -0.25], dtype=torch.float64).view(2, 1, 1, 1, 1).expand(2, B, 1, N, D)
    )
    expected = loop("lstm", *given[:3], states)
    assert_same(rnnkit.flashrnn(*given[:3], config=config), expected, given[:3])


@pytest.mark.parametrize("function", ["lstm", "slstm"])
def test_under_autocast_it_is_computed_in_the_dtype_of_the_input(function: str) -> None:
    given = arguments(function, torch.float32)
    expected = rnnkit.flashrnn(*given, function=function)
    with torch.autocast("cpu", torch.bfloat16):
        found = rnnkit.flashrnn(*given, function=function)
    assert_same(found, expected, given, tolerance=1e-6)


def test_wrong_arguments() -> None:
    Wx, R, b, states = arguments("lstm")

    def refused(kind: type[Exception], match: str, *given: Any, **options: Any) -> None:
        with pytest.raises(kind, match=match):
            rnnkit.flashrnn(*given, **options)

    refused(ValueError, "function to be one of 'elman', .*, got 'GRU'", Wx, R, b, function="GRU")
    refused(RuntimeError, "Wx to have at least one time step and one head", Wx[:, :0], R, b)
    refused(TypeError, "R to be a Tensor, got list", Wx, [R], b)
    refused(
        RuntimeError,
        r"Wx with the axes B, T, G=4, H, D, got shape \[3, 5, 4\]",
        Wx[..., 0, 0],
        R,
        b,
    )
    refused(RuntimeError, "Wx with the axes B, T, G=3, H, D, got", Wx, R, b, function="gru")
    refused(RuntimeError, "R with the axes G=4, H=2, D=4, P=4, got", Wx, R[..., :3], b)
    refused(RuntimeError, "b with the axes G=4, H=2, D=4, got", Wx, R, b[:, :1])
    refused(RuntimeError, "states with the axes S=2, B=3, T=1, H=2, D=4, got", Wx, R, b, states[:1])
    config = Config("lstm", "BTGHD", "GHDP", "GHD", "SBTHD", gradient_recurrent_clipval=0.1)
    refused(ValueError, "no gradient_recurrent_clipval, got 0.1", Wx, R, b, config=config)


# Packages


class StandIn(nn.Module):
    """A cell of xlstm or TiRex: what rnnkit's functions in their place read of it."""

    def __init__(self, kernel: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            function="slstm", num_heads=N, num_gates=4, head_dim=D, embedding_dim=N * D
        )
        self._recurrent_kernel_, self._bias_ = nn.Parameter(kernel), nn.Parameter(bias)

    @property
    def _recurrent_kernel(self) -> Tensor:
        return self._recurrent_kernel_

    @property
    def _bias(self) -> Tensor:
        return self._bias_

    def _impl(self, training: bool, input: Tensor, state: Tensor) -> Any:
        return "their own"

    def _impl_torch(self, input: Tensor, state: Tensor) -> Any:
        return "their own"

    def slstm_flashrnn(self, *_: Any) -> Any:
        return "their own"


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules in the place of the packages."""
    modules = {
        "flashrnn": {"flashrnn": lambda *_, **__: "their own"},
        "tirex.models.slstm.cell": {"sLSTMCell": type("sLSTMCell", (StandIn,), {})},
        "tirex2.model.component.flashrnn_slstm": {"_FlashRNNLayer": type("_L", (StandIn,), {})},
        "xlstm.blocks.slstm.cell": {"sLSTMCell_vanilla": type("sLSTMCell", (StandIn,), {})},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        for k in range(1, name.count(".") + 1):
            parent = ".".join(name.split(".")[:k])
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setitem(sys.modules, name, module)
    yield


def as_states(states: Tensor) -> Tensor:
    """[4, B, 1, N, D] as [4, B, E]."""
    return states[:, :, 0].flatten(2)


def test_xlstm(packages: None) -> None:
    given = arguments("slstm")
    Wx, R, b, states = given
    every, _ = loop("slstm", *given)
    kernel = R.permute(1, 0, 2, 3).reshape(N, 4 * D, D).detach()
    cell = sys.modules["xlstm.blocks.slstm.cell"].sLSTMCell_vanilla(kernel, b.detach().flatten())
    input, state = Wx.transpose(0, 1).flatten(2), as_states(states)
    with rnnkit.patch("xlstm"):
        found = cell._impl(True, input, state)
    assert torch.equal(found[:, 0], state)
    expected = every.transpose(1, 2).flatten(3)
    assert_same([found[:, 1:]], [expected], [Wx, states])
    assert cell._impl(True, input, state) == "their own"


def test_xlstms_other_functions_are_its_own(packages: None) -> None:
    cell = sys.modules["xlstm.blocks.slstm.cell"].sLSTMCell_vanilla(torch.ones(1), torch.ones(1))
    cell.config.function = "another"
    with rnnkit.patch("xlstm"):
        assert cell._impl(True, torch.ones(1), torch.ones(1)) == "their own"


def test_tirex(packages: None) -> None:
    given = arguments("slstm", torch.float32)
    Wx, R, b, states = given
    every, last = loop("slstm", *given)
    kernel = R.permute(1, 3, 0, 2).flatten(2).detach()
    cell = sys.modules["tirex.models.slstm.cell"].sLSTMCell(
        kernel, b.transpose(0, 1).flatten().detach()
    )
    with rnnkit.patch("tirex"):
        found = cell._impl_torch(Wx.transpose(0, 1), as_states(states))
    expected = every[0].transpose(0, 1).flatten(2), as_states(last)
    assert_same(found, expected, [Wx, states], tolerance=2e-4)
    assert cell._impl_torch(Wx, states) == "their own"


def test_tirex2_and_flashrnn(packages: None) -> None:
    given = arguments("slstm")
    Wx, R, b, states = given
    layer = sys.modules["tirex2.model.component.flashrnn_slstm"]._FlashRNNLayer(
        R.detach(), b.detach()
    )
    config = SimpleNamespace(function="slstm", recurrent_shape="HPGD", bias_shape="HGD")
    with rnnkit.patch("tirex2", "flashrnn"):
        of_package = sys.modules["flashrnn"].flashrnn(*given, function="slstm")
        found = layer.slstm_flashrnn(Wx, R.permute(1, 3, 0, 2), b.transpose(0, 1), config, states)
    assert_same(found, loop("slstm", *given), given)
    assert_same(of_package, loop("slstm", *given), given)
    assert sys.modules["flashrnn"].flashrnn() == layer.slstm_flashrnn() == "their own"


def test_what_rnnkit_does_not_have_is_left_to_the_packages(packages: None) -> None:
    """Rules for gradients, and other devices than the CPU."""
    given = arguments("slstm")
    layer = sys.modules["tirex2.model.component.flashrnn_slstm"]._FlashRNNLayer(*given[1:3])
    config = SimpleNamespace(function="slstm", gradient_recurrent_clipval=0.1)
    on_meta = [tensor.to("meta") for tensor in given[:3]]
    with rnnkit.patch("tirex2", "flashrnn"):
        run = sys.modules["flashrnn"].flashrnn
        assert run(*given, "slstm", config) == run(*given, config=config) == "their own"
        assert run(*on_meta) == "their own"
        assert layer.slstm_flashrnn(*given[:3], config) == "their own"


def test_a_patch_of_packages_leaves_torch(packages: None) -> None:
    lstm = nn.LSTM
    with rnnkit.patch("xlstm"):
        assert nn.LSTM is lstm
    with rnnkit.patch("xlstm", "torch"):
        assert nn.LSTM is rnnkit.LSTM
    assert nn.LSTM is lstm


def test_wrong_packages(packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"packages to be among 'torch', 'flashrnn', .*, got 'keras'"
    ):
        rnnkit.patch("xlstm", "keras")
    monkeypatch.delattr(sys.modules["xlstm.blocks.slstm.cell"], "sLSTMCell_vanilla")
    before = nn.LSTM
    with pytest.raises(
        ImportError, match=r"xlstm to have .*sLSTMCell_vanilla\._impl: this version"
    ):
        rnnkit.patch("torch", "xlstm")
    assert nn.LSTM is before
