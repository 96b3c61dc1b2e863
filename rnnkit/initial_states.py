"""`InitialStates`: the base of RNN, LSTM and GRU that has the states before the first step as parameters."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from rnnkit.call import batch_of


class InitialStates(nn.RNNBase):
    """Has `h_0` [L*D, P] and, for an LSTM, `c_0` [L*D, H] as parameters, if `learn_initial_state`."""

    _learns = False

    @property
    def _state_names(self) -> tuple[str, ...]:
        return ("h", "c") if self.mode == "LSTM" else ("h",)

    def _learned_names(self) -> list[str]:
        """The parameters' names, in the order of the states."""
        return [f"{name}_0" for name in self._state_names]

    def __init__(self, *args: Any, learn_initial_state: bool = False, **kwargs: Any) -> None:
        if not isinstance(learn_initial_state, bool):
            raise TypeError(
                f"expected learn_initial_state to be a bool, got {learn_initial_state!r}"
            )
        super().__init__(*args, **kwargs)
        if learn_initial_state:
            self._learns = True
            layers = self.num_layers * (2 if self.bidirectional else 1)
            like = self._flat_weights[0]
            assert like is not None
            for k, name in enumerate(self._learned_names()):
                width = self.hidden_size if k else self.proj_size or self.hidden_size
                self.register_parameter(name, nn.Parameter(like.new_zeros(layers, width)))

    @property
    def learn_initial_state(self) -> bool:
        """Whether a call without `hx` begins with parameters, as the constructor was told."""
        return self._learns

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize the parameters again: as torch.nn does, the initial states to zeros."""
        super().reset_parameters()
        for name in self._learned_names():
            if name in self._parameters:
                nn.init.zeros_(getattr(self, name))
            elif self._learns and parametrize.is_parametrized(self, name):
                setattr(self, name, torch.zeros_like(getattr(self, name)))

    def extra_repr(self) -> str:
        """torch.nn's `extra_repr`, followed by `learn_initial_state` where it is set."""
        return super().extra_repr() + ", learn_initial_state=True" * self.learn_initial_state

    def _learned(self, input: Tensor | PackedSequence) -> Any:
        """The initial states as `hx` of a call with this input: [L*D, N, width], or without N; None for a bad input."""
        if isinstance(input, PackedSequence):
            batch = _batch_of(input)
        elif isinstance(input, Tensor) and input.dim() in (2, 3):
            batch = input.size(0 if self.batch_first else 1) if input.dim() == 3 else None
        else:
            return None
        of_all = [getattr(self, name) for name in self._learned_names()]
        if batch is not None:
            of_all = [state.unsqueeze(1).expand(-1, batch, -1) for state in of_all]
        return of_all[0] if len(of_all) == 1 else tuple(of_all)


def _batch_of(input: PackedSequence) -> Any:
    """N. A graph knows it as the size of a tensor where the sequences were sorted, else only at run time."""
    if torch.compiler.is_compiling() and input.sorted_indices is not None:
        return input.sorted_indices.size(0)
    return batch_of(input.data, input.batch_sizes)
