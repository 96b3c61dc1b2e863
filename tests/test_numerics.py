"""Values at the edges of what a number can be: NaN, infinities, saturated gates, denormals."""

import copy
from collections.abc import Callable

import pytest
import torch
from configurations import DTYPES, LAYERS, MODULES, Case, named_results, run, run_on_cpu
from torch import Tensor, nn

import rnnkit
from rnnkit import backends


def results_of_twins(case: Case, spoil: object) -> list[dict[str, Tensor]]:
    """Both modules' results after `spoil(leaves, weights)` wrote into what the call takes; torch.nn's are the CPU's."""
    results = []
    ours, theirs = case.twins()
    for module, there in ((ours, case), (theirs.cpu(), case.on("cpu"))):
        leaves = {name: leaf.detach() for name, leaf in there.leaves().items()}
        with torch.no_grad():
            spoil(leaves, dict(module.named_parameters()))  # type: ignore[operator]
            found = named_results(there, module(*there.arguments(leaves)))
        results.append({name: result.cpu() for name, result in found.items()})
    return results


def places(case: Case) -> list[tuple[str, int]]:
    """An element of each tensor of a call, and of each gate's row in the weights, by flat index."""
    found = []
    module = case.make(nn)
    sizes = {name: leaf.numel() for name, leaf in case.leaves().items()}
    found += [(name, index) for name, size in sizes.items() for index in (0, size // 2, size - 1)]
    for name, weight in module.named_parameters():
        gates = weight.size(0) // case.hidden_size
        stride = weight.stride(0) * case.hidden_size
        found += [
            (name, gate * stride + offset) for gate in range(gates) for offset in (0, stride - 1)
        ]
    return found


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("module", MODULES)
def test_nan_and_infinity_go_where_torch_s_go(
    backend: str, device: str, module: str, value: float
) -> None:
    """Through ReLU and through every gate: hiding a NaN hides a diverged training.

    Where an infinity meets a gate that is all but closed, torch.nn's 0·∞ may be finite here.
    """
    stack = {"bidirectional": module in LAYERS}
    case = Case(module, steps=3, hidden_size=17, hx=True, device=device, **stack)
    for name, index in places(case):

        def spoil(leaves: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
            {**leaves, **weights}[name].view(-1)[index] = value  # noqa: B023

        ours, theirs = results_of_twins(case, spoil)
        for key, result in ours.items():
            expected = theirs[key]
            known = torch.ones_like(expected).bool() if value != value else ~expected.isnan()
            torch.testing.assert_close(
                result[known],
                expected[known],
                equal_nan=True,
                msg=lambda text, place=f"{key} after {value} in {name}[{index}]": (
                    f"{place}: {text}"
                ),
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("module", MODULES)
def test_saturated_gates_stay_finite(
    backend: str, device: str, module: str, dtype: torch.dtype
) -> None:
    """Pre-activations of ±1e4 and beyond: exp must not overflow, in neither pass.

    A ReLU does not saturate; float16 overflows in its gradients, as in torch.nn.
    """
    case = Case(module, steps=3, hidden_size=17, hx=True, dtype=dtype, device=device)
    ours, theirs = case.twins()
    for twin in (ours, theirs):
        with torch.no_grad():
            for name, weight in twin.named_parameters():
                if "bias_ih" in name:
                    signs = torch.where(torch.arange(weight.numel()) % 3 == 0, -1, 1)
                    weight.copy_(signs * torch.linspace(5e3, 2e4, weight.numel()))
                elif "relu" in module:
                    weight.mul_(0.01)
    expected = run_on_cpu(case, theirs)
    roundings = 4 * torch.finfo(dtype).eps
    for name, result in run(case, ours, case.leaves()).items():
        assert result.isfinite().all() or "relu" in module, name
        pair = result.cpu(), expected[name]
        if (
            device == "cuda" and dtype == torch.float16
        ):  # what overflows by a rounding may just not do so there
            most = 0.99 * torch.finfo(dtype).max
            pair = tuple(t.clamp(-most, most) for t in pair)
        torch.testing.assert_close(*pair, rtol=roundings, atol=roundings)


@pytest.mark.parametrize("module", MODULES)
def test_denormals_stay_the_caller_s(backend: str, device: str, module: str) -> None:
    """A kernel may take them for zero, while it runs and on its own threads only."""
    case = Case(module, steps=20, batch=8, hidden_size=64, hx=True, bias=False, device=device)

    def spoil(leaves: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        for leaf in leaves.values():
            leaf.mul_(1e-42)

    ours, theirs = results_of_twins(case, spoil)
    for name, result in ours.items():
        torch.testing.assert_close(result, theirs[name], rtol=0, atol=1e-37, msg=name)
    run(case, case.twins()[0], case.leaves())
    many = torch.full([1_000_000], 1e-42)  # enough of them for every thread of torch's
    assert (many / 2).all()


@pytest.mark.skipif(
    bool(backends.unavailable("cpp")), reason=f"no C++ kernels: {backends.EXTENSION_REASON}"
)
@pytest.mark.parametrize("module", LAYERS)
def test_denormals_count_as_zero(module: str) -> None:
    """In the CPU's kernels, where they would slow each operation on many CPUs."""
    case = Case(module, steps=50, batch=8, input_size=64, hidden_size=64, hx=True, bias=False)
    layer, _ = case.twins()
    found = []
    with rnnkit.backend("cpp"):
        for scale in (1e-40, 0.0):
            leaves = {name: leaf.detach() * scale for name, leaf in case.leaves().items()}
            assert scale == 0 or any(leaf.count_nonzero() > 0 for leaf in leaves.values())
            with torch.no_grad():
                found.append(layer(*case.arguments(leaves))[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("hx", [False, True])
@pytest.mark.parametrize("module", MODULES)
def test_recurrent_weights_are_multiplied_at_the_first_step(
    backend: str, device: str, module: str, hx: bool, value: float
) -> None:
    """Zeros times NaN or infinity is NaN: a diverged weight is seen at T 1, and at the first step of more."""
    for steps in (1, 3) if module in LAYERS else (1,):
        case = Case(module, steps=steps, hidden_size=17, hx=hx, device=device)

        def spoil(leaves: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
            next(w for name, w in weights.items() if "weight_hh" in name)[3, 5] = value

        ours, theirs = results_of_twins(case, spoil)
        for name, result in ours.items():
            assert result.isnan().any() == theirs[name].isnan().any(), name


@pytest.mark.skipif(
    bool(backends.unavailable("cpp")), reason=f"no C++ kernels: {backends.EXTENSION_REASON}"
)
@pytest.mark.parametrize(
    ("module", "function", "most"), [("rnn_tanh", torch.tanh, 1.1), ("gru", torch.sigmoid, 2.5)]
)
def test_activations_in_units_in_the_last_place(
    module: str, function: Callable[[Tensor], Tensor], most: float
) -> None:
    """Of every 499th float, through biases alone. All floats were tried once: csrc/common/lanes.h tells the result."""
    size = 8192
    x = torch.arange(0, 2**31, 499, dtype=torch.int64).to(torch.int32).view(torch.float32)
    x = x[(x >= 2.0**-126) & (x < 87)]
    x = torch.cat([x, -x])
    x = x[: x.numel() // size * size].view(-1, size)
    layer = getattr(rnnkit, MODULES[module][0])(1, size, bias=True)
    for weight in layer.parameters():
        nn.init.zeros_(weight)
    found, nothing, one = [], torch.zeros(1, 1, 1), torch.ones(1, 1, size)
    with torch.no_grad():
        for row in x:
            if module == "rnn_tanh":
                layer.bias_ih_l0.copy_(row)
                found.append(layer(nothing)[0].view(-1))
            else:  # h' = (1 - z) n + z h, where n is 0 and h is 1
                layer.bias_ih_l0[size : 2 * size] = row
                found.append(layer(nothing, one)[0].view(-1))
    result, expected = torch.stack(found), function(x.double())
    nearest = expected.float().abs()
    unit = torch.nextafter(nearest, torch.tensor(torch.inf)) - nearest
    normal = nearest >= 2.0**-125  # below, kernels flush to 0
    assert ((result.double() - expected).abs() / unit)[normal].max() <= most


@pytest.mark.parametrize("batch", [2, 40])
@pytest.mark.parametrize("layer", ["LSTM", "GRU", "RNN"])
def test_very_wide_inputs(layer: str, batch: int) -> None:
    """Sums over 20 000 inputs: as near to float64 as torch.nn's, where each is the root mean square of many."""
    found, theirs = 0.0, 0.0
    for _ in range(4):
        module = getattr(nn, layer)(20_000, 16)
        x = torch.randn(2, batch, 20_000)
        ours = copy.deepcopy(module)
        rnnkit.convert(ours)
        truth = copy.deepcopy(module).double()(x.double())[0]
        with torch.no_grad():
            found += float((ours(x)[0] - truth).square().mean())
            theirs += float((module(x)[0] - truth).square().mean())
    assert found**0.5 <= 2 * theirs**0.5


def test_memory_is_poisoned(device: str) -> None:
    """The fixture works that makes every test here see what is read before it is written."""
    assert torch.empty(3, device=device).isnan().all()
    assert torch.ones(3, dtype=torch.bfloat16, device=device).new_empty(3).isnan().all()
