"""`freeze`: layers for serving, whose weights are packed once instead of at every call."""

from typing import TypeVar

from torch import nn

from rnnkit.layers import _Layers

Module = TypeVar("Module", bound=nn.Module)


def freeze(module: Module) -> Module:
    """Make a model's rnnkit layers ready for many calls that need no gradients.

    Ordinarily each call packs the weights for the kernels, since nothing tells when they change. A frozen
    layer packs them once, here, and keeps them, in about as much memory again as the weights take (twice in
    float16, which is packed as float32), for as long as the module lives. It is worth most where sequences
    are short and layers large.

    Puts the whole of `module` in evaluation mode, and the layers' parameters in need of no gradient.
    A frozen layer's `repr` says so; `load_state_dict` and `to` have it pack again. **Any other write to
    its parameters is not seen.** Under autocast and in compiled graphs weights are packed at each call
    all the same. To go on training, set the layer's `frozen` to False and its parameters'
    `requires_grad` to True.

    Args:
        module: a layer, or a model with layers in it; changed in place.

    Returns:
        `module`.

    Raises:
        ValueError: there is no RNN, LSTM or GRU of rnnkit in `module`.
        RuntimeError: later, where a frozen layer's input, `hx` or parameters need a gradient.
    """
    layers = [part for part in module.modules() if isinstance(part, _Layers)]
    if not layers:
        raise ValueError(
            f"expected module to hold an RNN, LSTM or GRU of rnnkit, got {type(module).__name__}"
        )
    for layer in layers:
        layer.requires_grad_(False)
        layer.frozen, layer._packed = True, ()
        layer._packed_weights(layer._weights())
    return module.eval()
