"""Training as people do it: parts frozen, weights shared, wrapped or replaced, tensors written in place."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from configurations import (
    CELLS,
    LAYERS,
    MODULES,
    STACKED,
    Case,
    backward,
    named_results,
    run,
)
from devices import on_each_device
from tolerances import GRADIENT, relative_error
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import rnnkit

CASES = [
    *STACKED,
    *(Case(name, hx=True) for name in CELLS),
    Case("lstm", hx=True, proj_size=2, lengths=(2, 5, 4)),
]


on_cases = pytest.mark.parametrize("case", on_each_device(CASES), ids=str)


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, result in actual.items():
        if (
            result.is_cuda
        ):  # products are added up in other orders than cuDNN's, and terms may cancel
            assert relative_error(result, expected[name]) <= 2 * GRADIENT[result.dtype], name
            continue
        torch.testing.assert_close(
            result,
            expected[name],
            atol=2e-5,
            rtol=1e-4,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@on_cases
def test_any_part_may_need_a_gradient(backend: str, case: Case) -> None:
    """Each tensor alone, and all but each: its gradient is the same, and the others have none."""
    ours, _ = case.twins()
    expected = run(case, ours, case.leaves())
    names = [name.removeprefix("grad ") for name in expected if name.startswith("grad ")]
    alone = [{name} for name in names]
    for wanted in [*alone, *(set(names) - one for one in alone), set(names[1:3]), set(names[-2:])]:
        leaves = case.leaves()
        for name, tensor in {**leaves, **dict(ours.named_parameters())}.items():
            tensor.requires_grad_(name in wanted)
        actual = run(case, ours, leaves)
        assert {name for name in names if f"grad {name}" in actual} == wanted
        assert_close(actual, {name: expected[name] for name in actual})


@on_cases
@pytest.mark.parametrize("index", [0, 1, 2])
def test_gradients_from_one_result_alone(backend: str, case: Case, index: int) -> None:
    """The others' gradients are not given, which is not an error and counts as zero."""
    gradients = []
    for module in case.twins():
        leaves = case.leaves()
        results = list(named_results(case, module(*case.arguments(leaves))).values())
        backward([results[index % len(results)]])
        wanted = {**leaves, **dict(module.named_parameters())}
        gradients.append(
            {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in wanted.items()}
        )
    assert_close(*gradients)


# In-place writes between the forward and the backward pass


def _gradients_after_write(
    case: Case, module: nn.Module, victim: str, in_place: bool, needed: bool
) -> dict[str, Tensor] | None:
    """All gradients, None if the write is refused; out of place, what a write should amount to.

    `needed`: whether input and states need gradients, too.
    """
    module = copy.deepcopy(module)
    leaves = {name: leaf.requires_grad_(needed) for name, leaf in case.leaves().items()}
    arguments = case.arguments(leaves)
    results = named_results(case, module(*arguments))
    written = {**leaves, **dict(module.named_parameters())}
    if case.lengths is not None:
        written["input"] = arguments[0].data
    try:
        if victim not in results and in_place:
            with torch.no_grad():
                written[victim].mul_(1.5)
        elif victim in results:
            results[victim] = results[victim].mul_(1.5) if in_place else results[victim] * 1.5
        backward(results.values())
    except RuntimeError as error:
        assert "inplace" in str(error)
        return None
    wanted = {**leaves, **dict(module.named_parameters())}
    return {name: tensor.grad for name, tensor in wanted.items() if tensor.grad is not None}


WRITTEN = [
    *(Case(name, hx=True, num_layers=n) for name in LAYERS for n in (1, 2)),
    *(Case(name, hx=True, bidirectional=True, batch_first=True) for name in LAYERS),
    *(Case(name, hx=True, lengths=(2, 5, 4)) for name in LAYERS),
    *(
        Case(name, hx=True, dtype=dtype)
        for name in MODULES
        for dtype in (torch.float64, torch.float16)
    ),
    *(Case(name, hx=True) for name in CELLS),
    Case("lstm", hx=True, proj_size=2),
    Case("lstm", hx=True, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("case", on_each_device(WRITTEN), ids=str)
@pytest.mark.parametrize("needed", [True, False])
def test_in_place_writes_before_the_backward_pass(backend: str, case: Case, needed: bool) -> None:
    """Refused or without effect, never wrong; refused for weights, input and states where torch.nn refuses.

    Results that scripts may write to with torch.nn they may write to here. What torch.nn refuses for
    reasons of its own making (a bias, a result, a weight that no gradient needs) need not be refused. It is asked
    on the CPU.
    """
    ours, theirs = case.twins()
    theirs, on_cpu = theirs.cpu(), case.on("cpu")
    parameters = [name for name, _ in ours.named_parameters()]
    results = list(named_results(on_cpu, theirs(*on_cpu.arguments(on_cpu.leaves()))))
    for victim in [*case.leaves(), *parameters, *results]:
        expected = _gradients_after_write(on_cpu, theirs, victim, True, needed)
        actual = _gradients_after_write(case, ours, victim, True, needed)
        if actual is None:
            assert expected is None or victim not in results, f"torch.nn allows a write to {victim}"
            continue
        always_needed = needed and victim not in results and "bias" not in victim
        assert expected is not None or not always_needed, f"a write to {victim} went unnoticed"
        right = _gradients_after_write(case, ours, victim, False, needed)
        assert right is not None
        assert actual.keys() == right.keys()
        for name, gradient in actual.items():
            assert torch.equal(gradient, right[name]), f"grad {name} after a write to {victim}"


# Modules put together, wrapped and watched


@on_cases
def test_one_module_used_twice(backend: str, case: Case) -> None:
    """Its parameters get the sum of both uses' gradients."""
    gradients = []
    for module in case.twins():
        leaves = case.leaves()
        first = named_results(case, module(*case.arguments(leaves)))
        second = named_results(
            case, module(*case.arguments({**leaves, "input": 2 * leaves["input"]}))
        )
        backward([*first.values(), *second.values()])
        wanted = {**leaves, **dict(module.named_parameters())}
        gradients.append({name: tensor.grad for name, tensor in wanted.items()})
    assert_close(*gradients)


@pytest.mark.parametrize("module", LAYERS)
def test_tied_parameters(backend: str, device: str, module: str) -> None:
    """One tensor as several weights: of two layers, of both directions, of another module."""
    stack = {"num_layers": 2, "bidirectional": True}
    case = Case(module, input_size=12, hx=True, device=device, **stack)
    runs = []
    for layer in case.twins():
        layer.weight_hh_l1 = layer.weight_hh_l0_reverse = layer.weight_hh_l0
        layer.weight_ih_l1 = layer.weight_ih_l0
        layer.bias_hh_l0 = layer.bias_ih_l0
        runs.append(run(case, layer, case.leaves()))
    assert "grad weight_hh_l1" not in runs[0]
    assert_close(*runs)


@pytest.mark.parametrize("module", LAYERS)
def test_layers_between_layers(backend: str, device: str, module: str) -> None:
    """A frozen layer passes gradients to the one before it, and gets none."""
    case = Case(module, input_size=6, device=device)
    gradients = []
    for layer in case.twins():
        below = nn.Linear(6, 6, device=device)
        nn.init.eye_(below.weight)
        nn.init.zeros_(below.bias)
        layer.requires_grad_(False)
        backward([layer(below(case.leaves()["input"]))[0]])
        assert all(parameter.grad is None for parameter in layer.parameters())
        gradients.append({"weight": below.weight.grad, "bias": below.bias.grad})
    assert_close(*gradients)


@on_cases
def test_no_gradient_needed_no_graph(backend: str, case: Case) -> None:
    ours, _ = case.twins()
    ours.requires_grad_(False)
    leaves = {name: leaf.detach() for name, leaf in case.leaves().items()}
    for result in named_results(case, ours(*case.arguments(leaves))).values():
        assert not result.requires_grad
        assert result.is_leaf


def _hooked(module: nn.Module, seen: list[Any]) -> nn.Module:
    """Every kind of hook, each of which changes something that must reach the results."""
    module.register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    module.register_forward_hook(lambda _, __, result: (seen.append("forward"), result)[1])
    for name, weight in module.named_parameters():
        weight.register_hook(lambda gradient: gradient * 3)
        weight.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    return module


def _weight_normed(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module, _matrix(module))


def _pruned(module: nn.Module) -> nn.Module:
    return prune.l1_unstructured(module, _matrix(module), amount=0.5)


def _plain_tensors(module: nn.Module) -> nn.Module:
    """As meta-learning and hypernetworks do: weights that are results of other tensors."""
    for name, weight in list(module.named_parameters()):
        delattr(module, name)
        module.register_parameter(f"raw_{name}", weight)
        setattr(module, name, weight * 0.5)
    return module


class _Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def _matrix(module: nn.Module) -> str:
    """The recurrent weight's name."""
    return next(name for name, _ in module.named_parameters() if name.startswith("weight_hh"))


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": _weight_normed,
    "parametrized weight_norm": lambda m: parametrizations.weight_norm(m, _matrix(m)),
    "orthogonal": lambda m: parametrizations.orthogonal(m, _matrix(m)),
    "parametrize": lambda m: parametrize.register_parametrization(m, _matrix(m), _Halved()),
    "prune": _pruned,
    "plain tensors": _plain_tensors,
    "hooks": lambda m: _hooked(m, []),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("module", MODULES)
def test_wrapped_weights(backend: str, device: str, module: str, wrapper: str) -> None:
    """Two steps, for what is derived from a weight must be derived anew after it changes."""
    case = Case(module, hx=True, device=device)
    ours, theirs = case.twins()
    places, twins = (case, case.on("cpu")), [WRAPPERS[wrapper](m) for m in (ours, theirs.cpu())]
    twins[0].load_state_dict(twins[1].state_dict())
    for _ in range(1 if wrapper == "plain tensors" else 2):
        assert_close(*(run(at, m, at.leaves()) for at, m in zip(places, twins, strict=True)))
        for twin in twins:
            torch.optim.SGD(twin.parameters(), lr=0.1).step()


@pytest.mark.parametrize("module", MODULES)
def test_hooks_run_once_in_order(backend: str, device: str, module: str) -> None:
    case = Case(module, hx=True, device=device)
    calls: list[list[Any]] = [[], []]
    for twin, seen in zip(case.twins(), calls, strict=True):
        twin.register_full_backward_hook(lambda *_, seen=seen: seen.append("full backward"))
        run(case, _hooked(twin, seen), case.leaves())
    assert sorted(calls[0]) == sorted(calls[1])
    assert calls[0][0] == "forward"


@pytest.mark.parametrize("module", MODULES)
def test_functional_call(backend: str, device: str, module: str) -> None:
    case = Case(module, hx=True, device=device)
    other = {name: torch.randn_like(w) / 2 for name, w in case.make(rnnkit).named_parameters()}
    gradients = []
    for twin in case.twins():
        weights = {name: weight.clone().requires_grad_() for name, weight in other.items()}
        result = torch.func.functional_call(twin, weights, tuple(case.arguments(case.leaves())))
        results = named_results(case, result)
        backward(results.values())
        gradients.append(results | {f"grad {name}": w.grad for name, w in weights.items()})
        assert all(parameter.grad is None for parameter in twin.parameters())
    assert_close(*gradients)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_loop_with_carried_states(
    backend: str, device: str, module: str, optimizer: Any
) -> None:
    """Truncated backpropagation: losses stay torch.nn's over 20 steps with clipping."""
    layers = 2 if module in LAYERS else 1
    case = Case(module, input_size=6, num_layers=layers, hx=True, device=device)
    losses = []
    for twin in case.twins():
        steps = optimizer(twin.parameters(), lr=0.05)
        input, hx = case.arguments(case.leaves())
        losses.append([])
        for _ in range(20):
            results = twin(input.detach(), hx)
            output = next(iter(named_results(case, results).values()))
            hx = results if case.is_cell else results[1]
            hx = tuple(h.detach() for h in hx) if isinstance(hx, tuple) else hx.detach()
            loss = (output - input.tanh().roll(1, -1)).square().mean()
            steps.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            steps.step()
            losses[-1].append(loss.detach())
    ours, theirs = (torch.stack(loss) for loss in losses)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert (
        ours[-1] < ours[0] if device == "cpu" else (ours != ours[0]).any()
    )  # other random numbers there


@pytest.mark.parametrize("module", MODULES)
def test_backward_twice(backend: str, device: str, module: str) -> None:
    case = Case(module, hx=True, device=device)
    for retain in (True, False):
        ours, _ = case.twins()
        results = named_results(case, ours(*case.arguments(case.leaves())))
        total = sum(result.sum() for result in results.values())
        total.backward(retain_graph=retain)
        once = {name: p.grad.clone() for name, p in ours.named_parameters()}
        if not retain:
            with pytest.raises(RuntimeError, match="second time"):
                total.backward()
            continue
        total.backward()
        assert_close(
            {n: p.grad for n, p in ours.named_parameters()}, {n: 2 * g for n, g in once.items()}
        )
