"""`convert`, `revert` and `patch`: rnnkit's layers and cells in models, and in code, made for torch.nn's."""

import importlib
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from rnnkit.cells import GRUCell, LSTMCell, RNNCell
from rnnkit.layers import GRU, LSTM, RNN

#: torch.nn's classes, as they were when rnnkit was imported, and rnnkit's.
OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: RNN,
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.RNNCell: RNNCell,
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
}
THEIRS = {ours: theirs for theirs, ours in OURS.items()}


@dataclass(frozen=True)
class Report:
    """What was exchanged in a model.

    Attributes:
        exchanged: the name of each module, as in `named_modules`, and the class it has now.
        left: the name of each that might have been, and why it was not.
    """

    exchanged: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name or '(the model)'}: now {what}" for name, what in self.exchanged.items()]
        lines += [f"{name or '(the model)'}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines) or "nothing to exchange"


def convert(model: nn.Module) -> Report:
    """Make every RNN, LSTM, GRU and cell of torch.nn in a model one of rnnkit's, in place.

    The modules stay the same objects with the same parameters, so that optimizers, hooks, parametrizations, shared
    modules, mode, device and dtype stay what they are; only what computes them changes.

    Args:
        model: a model, or such a layer itself; changed in place.

    Returns:
        What was exchanged and what was left: subclasses of torch.nn's, which may compute something else, and
        scripted modules.

    Raises:
        TypeError: `model` is no module.
    """
    return _exchange(model, OURS)


def revert(model: nn.Module) -> Report:
    """Undo `convert`: every layer and cell of rnnkit becomes torch.nn's, in place.

    A layer's `recompute` and `frozen` are lost; parameters that `freeze` changed stay as they are.

    Args:
        model: a model, or such a layer itself; changed in place.

    Returns:
        What was exchanged and what was left, as in `convert`.

    Raises:
        TypeError: `model` is no module.
    """
    return _exchange(model, THEIRS)


def _exchange(model: nn.Module, to: dict[type[nn.Module], type[nn.Module]]) -> Report:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
    report = Report()
    package = "rnnkit" if to is OURS else "torch.nn"
    for name, module in model.named_modules():
        given = parametrize.type_before_parametrizations(module)
        if why := _why_left(module, given, to):
            report.left[name] = why
        elif given in to:
            _become(module, to[given])
            report.exchanged[name] = f"{package}.{to[given].__name__}"
    return report


def _why_left(module: nn.Module, given: type, to: dict[type[nn.Module], type[nn.Module]]) -> str:
    """Empty for what is to be exchanged, has nothing to do with these classes, or is what it is to be."""
    if isinstance(module, torch.jit.ScriptModule):
        names = [cls.__name__ for cls in OURS]
        return "it is scripted" if getattr(module, "original_name", "") in names else ""
    if given in to:
        return "its forward was replaced by another" if "forward" in vars(module) else ""
    if given in to.values():
        return ""
    package = "torch.nn" if to is OURS else "rnnkit"
    bases = [f"{package}.{cls.__name__}" for cls in to if issubclass(given, cls)]
    # rnnkit's cells are subclasses of torch.nn's.
    if not bases or (to is OURS and issubclass(given, tuple(OURS.values()))):
        return ""
    return f"{given.__module__}.{given.__qualname__} is a subclass of {bases[0]}"


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Gives a module another class, which has the same parameters."""
    if parametrize.is_parametrized(module):
        # Its class is one that torch made for it alone, with a property for each parametrized tensor.
        own = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
        cls = type(f"Parametrized{cls.__name__}", (cls,), own)
    for name in ("recompute", "frozen", "_packed"):
        vars(module).pop(name, None)
    module.__class__ = cls


_PLACES: tuple[ModuleType, ...] = (nn, nn.modules, nn.modules.rnn)


class patch:
    """torch.nn's RNN, LSTM, GRU and cells are rnnkit's: in a `with` block, or, without one, from now on.

    Code that says `torch.nn.LSTM(...)`, or imports it from there, in this time builds rnnkit's layers; what it got
    hold of before stays torch.nn's, and so do modules that are there already: these can neither be pickled meanwhile,
    as their class goes by another's name, nor are they a `torch.nn.LSTM` to `isinstance`, until `convert` exchanges
    them. Not for one thread alone: the whole process sees it. Patches are undone in the reverse of their order.

        with rnnkit.patch():
            model = package.Model()
    """

    def __init__(self) -> None:
        self._before: list[tuple[ModuleType, str, Any]] = []
        for place in _PLACES:
            for theirs, ours in OURS.items():
                self._put(place, theirs.__name__, ours)
        # torch.compile leaves what is a torch.nn.LSTM, by that name, out of its graphs, unless it is told not to.
        self._put(importlib.import_module("torch._dynamo.config"), "allow_rnn", True)

    def _put(self, place: ModuleType, name: str, value: Any) -> None:
        self._before.append((place, name, getattr(place, name)))
        setattr(place, name, value)

    def __enter__(self) -> "patch":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def undo(self) -> None:
        """Puts back what was there before, where it is not left to the end of a `with` block."""
        while self._before:
            setattr(*self._before.pop())
