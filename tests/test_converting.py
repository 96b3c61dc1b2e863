"""`rnnkit.convert`, `revert` and `patch`: models and code that were made for torch.nn."""

import copy
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from configurations import LAYERS, MODULES
from configurations import Case as ModuleCase
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import rnnkit
from rnnkit.converting import OURS


class Own(nn.LSTM):
    """Somebody's subclass."""


class Model(nn.Module):
    """Layers and cells in all kinds of places."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.encoder = nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True)
        self.rest = nn.ModuleList([nn.GRU(12, 5), nn.RNN(5, 4, nonlinearity="relu"), Own(4, 4)])
        self.cells = nn.ModuleDict({"lstm": nn.LSTMCell(4, 4), "gru": nn.GRUCell(4, 4)})
        self.shared = self.cells["gru"]
        self.last = nn.RNNCell(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.encoder(self.embedding(tokens))[0]
        for layer in self.rest:
            x = layer(x)[0]
        h = x[-1]
        h = self.shared(self.cells["gru"](self.cells["lstm"](h)[0]))
        return self.last(h)


TOKENS = torch.arange(21).view(3, 7) % 11

EXCHANGED = {
    "encoder": "LSTM",
    "rest.0": "GRU",
    "rest.1": "RNN",
    "cells.lstm": "LSTMCell",
    "cells.gru": "GRUCell",
    "last": "RNNCell",
}


def results(model: nn.Module) -> list[Tensor]:
    """The output and all gradients."""
    model.zero_grad()
    output = model(TOKENS)
    output.square().sum().backward()
    return [output.detach(), *(p.grad for p in model.parameters())]


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def test_there_and_back() -> None:
    model = Model()
    before, parameters, modules = results(model), [*model.parameters()], [*model.modules()]
    theirs, keys = classes(model), model.state_dict().keys()
    report = rnnkit.convert(model)
    assert report.exchanged == {name: f"rnnkit.{cls}" for name, cls in EXCHANGED.items()}
    assert report.left == {"rest.2": f"{__name__}.Own is a subclass of torch.nn.LSTM"}
    assert f"rest.2: left, {__name__}.Own is a subclass of torch.nn.LSTM" in str(report)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert model.state_dict().keys() == keys
    torch.testing.assert_close(results(model), before)
    assert rnnkit.convert(model).exchanged == {}

    report = rnnkit.revert(model)
    assert report.exchanged == {name: f"torch.nn.{cls}" for name, cls in EXCHANGED.items()}
    assert report.left == {}
    assert classes(model) == theirs
    torch.testing.assert_close(results(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_itself(name: str) -> None:
    """As if rnnkit had made it: the same attributes, results and repr."""
    ours, theirs = ModuleCase(name).twins()
    converted = copy.deepcopy(theirs)
    rnnkit.convert(converted)
    assert type(converted) is type(ours) and repr(converted) == repr(ours)
    x = torch.randn(5, 3, 4) if name in LAYERS else torch.randn(3, 4)
    torch.testing.assert_close(converted(x), ours(x), rtol=0, atol=0)
    assert pickle.loads(pickle.dumps(converted)).state_dict().keys() == ours.state_dict().keys()


def test_optimizer_goes_on() -> None:
    """Momentum and all: the losses are those of a run without the exchange."""
    losses = []
    for exchange in (False, True):
        torch.manual_seed(1)
        model = Model()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for step in range(6):
            if exchange and step in (2, 4):
                (rnnkit.convert if step == 2 else rnnkit.revert)(model)
            optimizer.zero_grad()
            loss = model(TOKENS).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    torch.testing.assert_close(losses[:6], losses[6:])


def test_hooks_and_mode_stay() -> None:
    layer = nn.GRU(4, 5).eval()
    seen = []
    layer.register_forward_hook(lambda *_: seen.append("forward"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    rnnkit.convert(layer)
    assert not layer.training
    layer(torch.randn(3, 2, 4, requires_grad=True))[0].sum().backward()
    assert seen == ["forward", "backward"]


def test_dtype_and_device_stay() -> None:
    layer = nn.LSTM(4, 5, dtype=torch.float64)
    rnnkit.convert(layer)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    meta = nn.LSTM(4, 5, device="meta")
    rnnkit.convert(meta)
    assert meta(torch.empty(3, 2, 4, device="meta"))[0].shape == (3, 2, 5)


def test_parametrizations_stay() -> None:
    layer = nn.LSTM(4, 5)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    x = torch.randn(3, 2, 4)
    before = layer(x)[0]
    rnnkit.convert(layer)
    assert isinstance(layer, rnnkit.LSTM) and parametrize.is_parametrized(layer)
    torch.testing.assert_close(layer(x)[0], before)
    with torch.no_grad():
        layer.parametrizations.weight_hh_l0.original0.mul_(2)
    assert not torch.allclose(layer(x)[0], before)
    rnnkit.revert(layer)
    assert isinstance(layer, nn.LSTM) and parametrize.is_parametrized(layer)
    parametrize.remove_parametrizations(layer, "weight_hh_l0")
    assert type(layer) is nn.LSTM


def test_parametrization_is_removed_after_convert() -> None:
    layer = nn.GRU(4, 5)
    parametrizations.weight_norm(layer, "weight_ih_l0")
    rnnkit.convert(layer)
    parametrize.remove_parametrizations(layer, "weight_ih_l0")
    assert type(layer) is rnnkit.GRU
    layer(torch.randn(3, 2, 4))[0].sum().backward()


def test_pruned_weights_stay() -> None:
    layer = nn.GRU(4, 5)
    prune.l1_unstructured(layer, "weight_hh_l0", amount=0.5)
    x = torch.randn(3, 2, 4)
    before = layer(x)[0]
    rnnkit.convert(layer)
    torch.testing.assert_close(layer(x)[0], before)
    assert (layer.weight_hh_l0 == 0).sum() >= 37


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripted_modules_are_left() -> None:
    model = nn.Sequential()
    model.add_module("scripted", torch.jit.script(nn.LSTM(3, 4)))
    assert rnnkit.convert(model).left == {"scripted": "it is scripted"}


@pytest.mark.parametrize("what", [None, 1, nn.LSTM])
@pytest.mark.parametrize("change", (rnnkit.convert, rnnkit.revert))
def test_no_module(change: object, what: object) -> None:
    with pytest.raises(TypeError, match=r"expected model to be a torch.nn.Module, got"):
        change(what)


def test_nothing_to_exchange() -> None:
    assert str(rnnkit.convert(nn.Linear(2, 3))) == "nothing to exchange"


def test_revert_forgets_what_torch_has_not() -> None:
    layer = rnnkit.freeze(rnnkit.GRU(4, 5, recompute=True, grad_clip=1, grad_cut=2))
    layer.grad_clip = layer.grad_cut = None
    layer.convert_update_gate("writes").convert_update_gate("keeps")
    rnnkit.revert(layer)
    assert type(layer) is nn.GRU and vars(layer).keys() == vars(nn.GRU(4, 5)).keys()


def test_checkpoints_both_ways() -> None:
    model, other = Model(), Model()
    rnnkit.convert(other)
    other.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(results(model), results(other))


@pytest.mark.parametrize("ours_first", [True, False], ids=["to torch.nn", "from torch.nn"])
def test_checkpoint_files_both_ways(ours_first: bool, tmp_path: Path) -> None:
    """As safetensors, and as torch saves them, loaded with weights_only."""
    saved, loaded = Model(), Model()
    rnnkit.convert(saved if ours_first else loaded)
    torch.save(saved.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    loaded.load_state_dict(state, strict=True)
    torch.testing.assert_close(results(saved), results(loaded))

    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    other = Model()
    if not ours_first:
        rnnkit.convert(other)
    safetensors.save_model(saved, tmp_path / "model.safetensors")
    safetensors.load_model(other, tmp_path / "model.safetensors", strict=True)
    torch.testing.assert_close(results(saved), results(other))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_old_pickles_of_torch_s_layers_after_convert(name: str) -> None:
    """State as torch pickled it before there were projections, set before or after convert."""
    layer = getattr(nn, name)(3, 4, bidirectional=True)
    state = layer.__getstate__()
    del state["proj_size"]
    state["all_weights"] = state.pop("_all_weights")
    x = torch.ones(2, 1, 3)
    before, after = getattr(nn, name)(3, 4), getattr(nn, name)(3, 4)
    before.__setstate__(dict(state))
    rnnkit.convert(before)
    rnnkit.convert(after)
    after.__setstate__(dict(state))
    for revived in (before, after):
        assert type(revived) is getattr(rnnkit, name)
        torch.testing.assert_close(revived(x), layer(x))


def test_a_replaced_forward_is_left() -> None:
    """As accelerate replaces it, with one that calls the forward that was there."""
    model = nn.Sequential(nn.LSTM(3, 4))
    before = model[0].forward
    model[0].forward = lambda *arguments: before(*arguments)
    report = rnnkit.convert(model)
    assert report.left == {"0": "its forward was replaced by another"}
    assert type(model[0]) is nn.LSTM and not report.exchanged


# patch


def test_patch_in_a_block() -> None:
    with rnnkit.patch():
        model = Model()
        assert nn.LSTM is rnnkit.LSTM and nn.modules.rnn.GRUCell is rnnkit.GRUCell
        assert torch._dynamo.config.allow_rnn
    assert all(getattr(nn, theirs.__name__) is theirs for theirs in OURS)
    assert not torch._dynamo.config.allow_rnn
    found = classes(model)
    assert {name: found[name] for name in EXCHANGED} == {
        name: getattr(rnnkit, cls) for name, cls in EXCHANGED.items()
    }


def test_patch_for_good_and_back() -> None:
    patched = rnnkit.patch()
    try:
        assert type(nn.GRU(2, 3)) is rnnkit.GRU
    finally:
        patched.undo()
    assert nn.GRU is not rnnkit.GRU
    patched.undo()  # once more does nothing


def test_patch_is_undone_by_an_error_and_nests() -> None:
    theirs = nn.LSTM
    with pytest.raises(ZeroDivisionError), rnnkit.patch():
        with rnnkit.patch():
            pass
        assert nn.LSTM is rnnkit.LSTM
        1 / 0  # noqa: B018
    assert nn.LSTM is theirs


def test_same_initial_values_and_losses_under_patch() -> None:
    found = []
    for patched in (False, True):
        torch.manual_seed(3)
        if patched:
            with rnnkit.patch():
                model = Model()
        else:
            model = Model()
        found.append(results(model)[0])
    # `Own` was made before, and stays torch.nn's.
    torch.testing.assert_close(*found)


def test_subclasses_made_under_patch() -> None:
    with rnnkit.patch():

        class Theirs(nn.LSTM):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x)[0]

        assert Theirs(3, 4)(torch.ones(2, 1, 3)).shape == (2, 1, 4)
    assert issubclass(Theirs, rnnkit.LSTM)


def test_pickles_of_torch_s_layers_become_rnnkit_s_under_patch() -> None:
    layer = nn.LSTM(3, 4)
    pickled = pickle.dumps(layer)
    with rnnkit.patch():
        loaded = pickle.loads(pickled)
    assert type(loaded) is rnnkit.LSTM
    x = torch.ones(2, 1, 3)
    torch.testing.assert_close(loaded(x)[0], layer(x)[0])


def test_compiled_under_patch() -> None:
    """Though torch.compile knows torch.nn's layers by name, and leaves them out."""
    with rnnkit.patch():
        layer = nn.GRU(3, 4)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(5, 2, 3)
        torch.testing.assert_close(compiled(x)[0], layer(x)[0])


def test_patch_in_another_s_code() -> None:
    """A module that imports torch.nn's names after the patch, in a process of its own."""
    program = """
        import rnnkit
        rnnkit.patch()
        from torch.nn import LSTM
        from torch.nn.modules.rnn import GRU
        print(LSTM.__module__, GRU.__module__)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["rnnkit.layers", "rnnkit.layers"]
