"""`LayerNorms`: the base of RNN, LSTM and GRU that has the parameters of layer normalization."""

from typing import Any

import torch
from torch import Tensor, nn

from rnnkit import parameters, stack
from rnnkit.specs import NORMS


class LayerNorms(nn.RNNBase):
    """Has the parameters of layer normalization for each layer and direction, if `layer_norm`.

    `norm_ih` and `norm_hh` [G*H] are the factors of the normalized products, without biases of their own: `bias_ih` and
    `bias_hh` are added to them. An LSTM also has the factor `norm_c` and the bias `norm_c_bias` [H] of its
    normalized c. The names end like torch.nn's: `norm_ih_l0_reverse`.
    """

    _normalizes = False

    def __init__(self, *args: Any, layer_norm: bool = False, **kwargs: Any) -> None:
        if not isinstance(layer_norm, bool):
            raise TypeError(f"expected layer_norm to be a bool, got {layer_norm!r}")
        super().__init__(*args, **kwargs)
        if layer_norm:
            self._normalizes = True
            like = self._flat_weights[0]
            assert like is not None
            for names in self._all_weights:
                for name in self._norm_names(names):
                    width = (
                        like.size(0)
                        if name.startswith(("norm_ih", "norm_hh"))
                        else self.hidden_size
                    )
                    self.register_parameter(name, nn.Parameter(like.new_empty(width)))
            self._reset_norms()

    @property
    def layer_norm(self) -> bool:
        """Whether products, and an LSTM's c, are normalized, as the constructor was told."""
        return self._normalizes

    def _norm_names(self, names: list[str]) -> list[str]:
        """The parameters' names of the layer and direction whose weights have these names; empty for none."""
        return parameters.norms(self, {"weight_ih": names[0]})

    def _norms(self, names: list[str]) -> list[Tensor | None]:
        """The tensors of `specs.NORMS` of the layer and direction whose weights have these names."""
        found = stack.parameters(self, self._norm_names(names))
        return [*found, *[None] * (len(NORMS) - len(found))]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize the parameters again: as torch.nn does, and factors of layer normalization to ones."""
        super().reset_parameters()
        self._reset_norms()

    @torch.no_grad()
    def _reset_norms(self) -> None:
        for names in self._all_weights:
            for name in self._norm_names(names):
                value = 0.0 if name.startswith("norm_c_bias") else 1.0
                if name in self._parameters:
                    nn.init.constant_(getattr(self, name), value)
                else:  # parametrized
                    setattr(self, name, torch.full_like(getattr(self, name), value))

    def extra_repr(self) -> str:
        """torch.nn's `extra_repr`, followed by `layer_norm` where it is set."""
        return super().extra_repr() + ", layer_norm=True" * self.layer_norm
