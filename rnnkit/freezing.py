"""`freeze` packs the weights of layers once, for serving, instead of at every call."""

from typing import TypeVar

from torch import nn

from rnnkit.layers import _Layers

Module = TypeVar("Module", bound=nn.Module)


def freeze(module: Module) -> Module:
    """Prepare a model's rnnkit layers for many calls without gradients.

    Without it each call packs the weights for the kernels, since a layer cannot tell when they change. A frozen
    layer packs them once, here, and keeps the packed copy as long as the module lives. The copy takes about as much
    memory as the weights (twice as much in float16, which is packed as float32). Freezing helps most with short
    sequences and large layers.

    Puts the whole of `module` in evaluation mode, and sets `requires_grad` of the layers' parameters to False.
    A frozen layer says so in its `repr`. After `load_state_dict` and `to` it packs its weights again. **It does not
    notice any other write to its parameters.** Under autocast and in compiled graphs, weights are still packed at
    each call. To train again, set the layer's `frozen` to False and its parameters' `requires_grad` to True.

    Args:
        module: a layer, or a model that contains layers; changed in place.

    Returns:
        `module`.

    Raises:
        ValueError: `module` contains no RNN, LSTM or GRU of rnnkit.
        RuntimeError: raised by a later call, if the frozen layer's input, `hx` or parameters need a gradient.
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
