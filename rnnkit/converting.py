"""`convert`, `revert` and `patch` put rnnkit's layers and cells in models and code written for torch.nn's."""

import importlib
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from rnnkit import foreign_calls, options
from rnnkit.cells import GRUCell, LSTMCell, RNNCell
from rnnkit.interop import Interop, unlike_torchs
from rnnkit.layers import GRU, LSTM, RNN

#: torch.nn's classes, as they were when rnnkit was imported -> rnnkit's.
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
    """Which modules of a model were exchanged.

    Attributes:
        exchanged: the name of each exchanged module, as in `named_modules` -> its class now.
        left: the name of each recurrent module that was not exchanged -> the reason.
    """

    exchanged: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name or '(the model)'}: now {what}" for name, what in self.exchanged.items()]
        lines += [f"{name or '(the model)'}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines) or "nothing to exchange"


def convert(model: nn.Module) -> Report:
    """Turn every RNN, LSTM, GRU and cell of torch.nn in a model into rnnkit's, in place.

    Only the class of each module changes. The modules stay the same objects with the same parameters, so that
    optimizers, hooks, parametrizations, shared modules, mode, device and dtype are unaffected.

    Args:
        model: a model, or a layer or cell itself; changed in place.

    Returns:
        Which modules were exchanged, and which were left. Subclasses of torch.nn's classes are left, since they may
        compute something else, and so are scripted modules.

    Raises:
        TypeError: `model` is no module.
    """
    return _exchange(model, OURS)


def revert(model: nn.Module) -> Report:
    """Undo `convert`: turn every layer and cell of rnnkit in a model into torch.nn's, in place.

    A module's `init`, `recompute` and `frozen` are lost. The `requires_grad` that `freeze` set to False stays False.

    Args:
        model: a model, or a layer or cell itself; changed in place.

    Returns:
        Which modules were exchanged, and which were left, as in `convert`.

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
    """Why a recurrent module is not exchanged; empty if it is exchanged, needs no exchange or is not recurrent."""
    if isinstance(module, torch.jit.ScriptModule):
        names = [cls.__name__ for cls in OURS]
        return "it is scripted" if getattr(module, "original_name", "") in names else ""
    if given in to:
        if "forward" in vars(module):
            return "its forward was replaced by another"
        return unlike_torchs(module)
    if to is THEIRS and isinstance(module, Interop) and not hasattr(module, "_torchs"):
        return unlike_torchs(module)  # a cell of one's own
    if given in to.values():
        return ""
    package = "torch.nn" if to is OURS else "rnnkit"
    bases = [f"{package}.{cls.__name__}" for cls in to if issubclass(given, cls)]
    # rnnkit's cells are subclasses of torch.nn's, and not to be reported.
    if not bases or (to is OURS and issubclass(given, tuple(OURS.values()))):
        return ""
    return f"{given.__module__}.{given.__qualname__} is a subclass of {bases[0]}"


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Changes a module's class to `cls`, which has the same parameters."""
    if parametrize.is_parametrized(module):
        # torch made a class for this module alone, with a property for each parametrized tensor.
        own = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
        cls = type(f"Parametrized{cls.__name__}", (cls,), own)
    for name in (*options.OPTIONS, "_initializer", "_cell", "_packed"):
        vars(module).pop(name, None)
    module.__class__ = cls


_PLACES: tuple[ModuleType, ...] = (nn, nn.modules, nn.modules.rnn)


class patch:
    """Replaces torch.nn's RNN, LSTM, GRU and cells, or recurrences of other packages, by rnnkit's.

    In a `with` block or, without one, from now on.

    Code that calls `torch.nn.LSTM(...)`, or imports it from torch.nn, builds rnnkit's layers while the patch is
    active. Classes that were imported before stay torch.nn's. So do modules that exist already: until `convert`
    exchanges them, they cannot be pickled and `isinstance(module, torch.nn.LSTM)` is False for them, since that name
    now means another class. A patch holds for the whole process, not for one thread. Patches have to be undone in the
    reverse of their order.

        with rnnkit.patch():
            model = package.Model()

    Args:
        packages: whose recurrences to replace instead of torch.nn's: any of "torch", "xlstm" (the sLSTM of backend
            "vanilla"), "tirex", "tirex2" (their sLSTM) and "flashrnn" (the package's function `flashrnn`, for code that
            looks it up there from then on; see `rnnkit.flashrnn`). The sLSTMs are replaced in models that exist
            already, too; parameters stay as they are. On other devices than the CPU, and where rnnkit has no such
            function or rule for gradients, the packages' own code runs.

    Raises:
        ValueError: a package is not one of these.
        ImportError: a package is not installed, or its version is not known.
    """

    def __init__(self, *packages: str) -> None:
        self._before: list[tuple[Any, str, Any]] = []
        known = ("torch", *foreign_calls.PLACES)
        for package in packages:
            if package not in known:
                expected = ", ".join(map(repr, known))
                raise ValueError(f"expected packages to be among {expected}, got {package!r}")
        found = [foreign_calls.replacement(one) for one in packages if one != "torch"]
        if not packages or "torch" in packages:
            for place in _PLACES:
                for theirs, ours in OURS.items():
                    self._put(place, theirs.__name__, ours)
            # torch.compile leaves instances of `torch.nn.LSTM` out of its graphs unless allow_rnn is set.
            self._put(importlib.import_module("torch._dynamo.config"), "allow_rnn", True)
        for of_package in found:
            self._put(*of_package)

    def _put(self, place: Any, name: str, value: Any) -> None:
        self._before.append((place, name, getattr(place, name)))
        setattr(place, name, value)

    def __enter__(self) -> "patch":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def undo(self) -> None:
        """Restores what was replaced; the end of a `with` block does it, too."""
        while self._before:
            setattr(*self._before.pop())
