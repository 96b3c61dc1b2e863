"""Random malformed calls for `fuzz.py`: of the modules, of the ops and of the extension's fast path.

A call is a valid one in which one to three arguments, or attributes of the module, were changed. It may raise, or
give what the reference gives. `check` makes the call of one number and tells what is wrong with what came of it.
"""

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import kernel_cases
import torch
from configurations import CELLS, LAYERS, Case, tensors_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence

import rnnkit
from rnnkit import backends, ops, specs, stack
from rnnkit.call import BackwardCall, Keep, LayerCall

OPS = ("layer_forward", "layer_backward", "pack_weights")
#: The fields of `LayerCall`.
CALL = tuple(field.name for field in fields(LayerCall))
KINDS = (*OPS, "layer_forward", "layer_backward", "direct_layers", "direct_cell", *["module"] * 5)

#: Words in an error's text that tell of a check that was not made.
INTERNAL = ("_M_", "basic_string", "vector::", "INTERNAL ASSERT", "std::")

#: More steps than this are not given to the reference, which takes them one by one.
MOST_STEPS = 10_000


#: A tensor where none belongs.
X = torch.ones(2)


class Subclass(Tensor):
    """A tensor of another type."""


@dataclass
class Call:
    """A malformed call.

    Attributes:
        words: what is called, and what was changed.
        call: makes it.
        reference: what the call gives where it is valid; None where nothing tells.
        arguments: what is given, for a look at its values.
        defined: whether it says what the results are, rather than holding what belongs to another call.
        lenient: whether it may give a result where the reference raises.
        fewest: results that there must be, where there are any.
    """

    words: str
    call: Callable[[], Any]
    reference: Callable[[], Any] | None
    arguments: list[Any]
    defined: bool = True
    lenient: bool = False
    fewest: int = 0


# What a tensor is changed into


def _resized(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    copy.untyped_storage().resize_(0)
    return copy


def _inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def _strided(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, -1)[..., ::2]


def _nested(tensor: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(tensor.unbind(0)))


def _fake(tensor: Tensor) -> Tensor:
    return FakeTensorMode().from_tensor(tensor)


TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "of a dimension less": lambda t: t[0],
    "of a dimension more": lambda t: t[None],
    "of no dimension": lambda t: t.new_zeros(()),
    "flat": lambda t: t.flatten(),
    "narrow": lambda t: t[..., :-1],
    "wide": lambda t: torch.cat([t, t[..., :1]], -1),
    "short": lambda t: t[:-1],
    "long": lambda t: torch.cat([t, t[:1]]),
    "transposed": lambda t: t.transpose(0, -1),
    "without rows": lambda t: t[:0],
    "without columns": lambda t: t[..., :0],
    "without a batch": lambda t: t[:, :0],
    "of shape [2**33, 0, ...]": lambda t: t.new_empty(2**33, 0, *t.shape[2:]),
    "of shape [2**33, 0, 3]": lambda t: t.new_empty(2**33, 0, 3),
    "of shape [1, 2**40, 0]": lambda t: t.new_empty(1, 2**40, 0),
    "float64": lambda t: t.double(),
    "bfloat16": lambda t: t.bfloat16(),
    "int64": lambda t: t.long(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "conjugate": lambda t: t.to(torch.complex64).conj(),
    "on meta": lambda t: t.to("meta"),
    "on meta and narrow": lambda t: t[..., :-1].to("meta"),
    "None": lambda t: None,
    "sparse": lambda t: t.to_sparse(),
    "sparse in rows": lambda t: t.to_sparse_csr(),
    "nested": _nested,
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "of oneDNN's layout": lambda t: t.to_mkldnn(),
    "expanded": lambda t: t[:1].expand_as(t),
    "expanded from one": lambda t: t.flatten()[:1].expand_as(t),
    "strided": _strided,
    "negated lazily": lambda t: torch._neg_view(-t),
    "of a conjugate": lambda t: torch.complex(t, -t).conj().imag,
    "without storage": _resized,
    "a number": lambda t: 3,
    "a string": lambda t: "input",
    "a list": lambda t: t.tolist(),
    "an array": lambda t: t.numpy(),
    "wanting a gradient": lambda t: t.clone().requires_grad_(),
    "of inference mode": _inference,
    "a parameter": lambda t: nn.Parameter(t),
    "a parameter without values": lambda t: nn.UninitializedParameter(),
    "of a subclass": lambda t: t.as_subclass(Subclass),
    "fake": _fake,
}

BATCH_SIZES: dict[str, Callable[[Tensor], Any]] = {
    "increasing": lambda t: t.flip(0) + torch.arange(len(t)),
    "negative": lambda t: torch.cat([t, t.new_tensor([1, -1])]),
    "all negative": lambda t: -t,
    "with a zero": lambda t: torch.cat([t, t.new_zeros(1)]),
    "int32": lambda t: t.int(),
    "float32": lambda t: t.float(),
    "2-D": lambda t: t[None],
    "of no dimension": lambda t: t[0],
    "on meta": lambda t: t.to("meta"),
    "empty": lambda t: t[:0],
    "too short": lambda t: t[:-1],
    "too long": lambda t: torch.cat([t, t[-1:]]),
    "overflowing": lambda t: torch.full_like(t, 2**62),
    "huge": lambda t: torch.tensor([2**62, 2**62, 2**62, 2**62]),
    "without storage": _resized,
    "strided": _strided,
    "expanded": lambda t: t[:1].expand(2**20),
    "None": lambda t: None,
    "a list": lambda t: t.tolist(),
    "sparse": lambda t: t.to_sparse(),
    "fake": _fake,
}

CELL_NAMES: tuple[Any, ...] = ("", "lstmm", "LSTM", "gru\0", "rnn", None, 3, *specs.CELLS)
NUMBERS: dict[str, tuple[Any, ...]] = {
    "cell": CELL_NAMES,
    "keep": (-1, 0, 1, 2, 3, 7, 2**31, 2**63 - 1, -(2**63), 2**64, None, 1.5, True),
    "directions": (-1, 0, 1, 2, 3, 4, 2**31, 2**62, -(2**62), -(2**63), 2**64, None),
    "input_size": (-1, 0, 1, 2, 2**62, 2**64, None),
    "projected": (-1, 0, 1, 2, 2**62, 2**64, None),
    "batch_first": (0, 1, None, True, "yes"),
    "grad_clip": (-1.0, 0.0, 0.5, 1e300, float("inf"), float("nan"), None, "x"),
    "grad_cut": (-1, 0, 1, 2, 3, 2**62, 2**64, None, 1.5),
    "heads": (-1, 0, 1, 2, 3, 2**31, 2**62, -(2**63), 2**64, None, 1.5),
}

LISTS: dict[str, Callable[[list[Any]], Any]] = {
    "shorter by one": lambda items: items[:-1],
    "without the first": lambda items: items[1:],
    "longer by one": lambda items: [*items, *items[:1]],
    "longer by None": lambda items: [*items, None],
    "doubled": lambda items: items * 2,
    "tripled": lambda items: items * 3,
    "reversed": lambda items: items[::-1],
    "empty": lambda items: [],
    "of None": lambda items: [None] * len(items),
    "None": lambda items: None,
    "a tuple": tuple,
    "the first alone": lambda items: items[0] if items else None,
    "all wanting a gradient": lambda items: [
        t.clone().requires_grad_() if isinstance(t, Tensor) else t for t in items
    ],
    "all on meta": lambda items: [
        t.to("meta") if isinstance(t, Tensor) else t for t in items
    ],
}  # fmt: skip


def changed(name: str, value: Any, rng: random.Random) -> tuple[Any, str]:
    """`value`, or something in it, made into something else; and in words what."""
    if isinstance(value, PackedSequence):
        field = rng.choice(("data", "batch_sizes", "batch_sizes", "sorted_indices"))
        new, words = changed(field, getattr(value, field), rng)
        return value._replace(**{field: new}), f"{name}.{words}"
    if isinstance(value, list | tuple) and value and name != "needs" and rng.random() < 0.75:
        place = rng.randrange(len(value))
        new, words = changed(f"{name}[{place}]", value[place], rng)
        return type(value)([*value[:place], new, *value[place + 1 :]]), words
    if isinstance(value, list | tuple):
        return _one_of(LISTS, name, list(value), rng)
    # A change of what is no ordinary tensor is torch's own, and so is a tensor in the place of a list.
    of_torch = not _plain(value) or name in ("states", "weights", "grads", "batch_sizes[0]")
    if isinstance(value, Tensor) and of_torch:
        return value, f"{name} left so"
    if isinstance(value, Tensor):
        return _one_of(BATCH_SIZES if name == "batch_sizes" else TENSORS, name, value, rng)
    new = rng.choice(NUMBERS.get(name, (None, True, False, 0, 3, -1, "x", X, [], [X], (X, X))))
    return new, f"{name}={'a tensor' if new is X else repr(new).splitlines()[0]}"


def _one_of(
    changes: dict[str, Callable[[Any], Any]], name: str, value: Any, rng: random.Random
) -> tuple[Any, str]:
    """`value` changed by one of these, of those that it can be changed by."""
    while True:
        what = rng.choice(list(changes))
        try:
            return changes[what](value), f"{name} {what}"
        except Exception:
            continue


def change(arguments: dict[str, Any], rng: random.Random) -> str:
    """Changes none to three of the arguments; in words which."""
    words = []
    for _ in range(rng.choice((0, 1, 1, 1, 1, 1, 2, 2, 3))):
        name = rng.choice(list(arguments))
        arguments[name], what = changed(name, arguments[name], rng)
        words.append(what)
    return "; ".join(words) or "nothing changed"


# Calls


def _op_case(rng: random.Random) -> kernel_cases.Case:
    cell, hidden = rng.choice(list(specs.CELLS)), rng.randint(2, 9)
    ragged = sorted((rng.randint(1, 4) for _ in range(rng.randint(2, 5))), reverse=True)
    projected = rng.randint(1, hidden - 1) if cell == "lstm" and rng.random() < 0.3 else 0
    zones = rng.random() < 0.3
    return kernel_cases.Case(
        cell,
        (rng.randint(2, 4), rng.randint(2, 5), rng.randint(2, 6), hidden),
        directions=rng.randint(1, 2),
        lengths=tuple(ragged) if rng.random() < 0.4 else (),
        projected=projected,
        bias=rng.random() < 0.7,
        states=rng.random() < 0.7,
        dtype=rng.choice([torch.float32] * 4 + [torch.float64, torch.bfloat16]),
        off_kink=True,
        resets=rng.choice((0.0, 0.0, 0.3)),
        reset_states=rng.random() < 0.5,
        operand_mask=rng.random() < 0.3,
        zoneout=(0.0 if projected else 0.2 * zones, 0.4 * zones),
        expects=rng.random() < 0.5,
        norm=rng.random() < 0.25,
        heads=rng.choice((1, 1, 1, 2, 3)),
        multiplies=rng.random() < 0.8,
    )


def _op(kind: str, rng: random.Random) -> Call:
    case = _op_case(rng)
    if kind == "pack_weights":
        case = replace(case, multiplies=True)
    it = kernel_cases.call(case, rng.getrandbits(30))
    keep = rng.choice((0, 1, 2))
    own: dict[str, Any] = {name: getattr(it, name) for name in CALL}
    if kind == "layer_forward":
        packed = None
        if case.multiplies and rng.random() < 0.5:
            packed = torch.ops.rnnkit.pack_weights(it.cell, it.weights, it.heads)
        own |= {"packed": packed, "keep": keep if packed is None else 0}
    elif kind == "layer_backward":
        keep = max(keep, 1)
        outputs, _, reserve = it.forward(keep)
        needs = [need and rng.random() < 0.8 for need in it.all_needs]
        own |= {"grads": it.grads, "output": outputs[0], "reserve": reserve, "keep": keep}
        # Sums of low precision are compared as float32, in which the reference does not have them.
        flow = rng.random() < 0.3 and it.input.dtype == it.sum_dtype
        own |= {"needs": needs, "flow": flow}
    else:
        own = {"cell": it.cell, "weights": it.weights, "heads": it.heads}
    before = dict(own)
    words = change(own, rng)
    # What belongs to other arguments says nothing where those changed.
    belonging: tuple[str, ...] = ()
    if kind == "layer_backward":
        belonging = ("cell", "input", "states", "weights", "output", "reserve", "keep", "heads")
        belonging += ("reset", "operand_mask", "zoneout", "kept")
    elif own.get("packed") is not None:
        belonging = ("cell", "weights", "packed", "heads")
    kept = all(_same(own[name], before[name]) for name in belonging)
    if it.input.dtype != it.sum_dtype:  # see `flow` above
        kept &= own.get("flow") is before.get("flow")
    foreign = own.get("packed") is not before.get("packed")
    foreign |= any(own.get(name) is not before.get(name) for name in ("output", "reserve"))
    return Call(
        f"{kind}: {words}",
        lambda: getattr(torch.ops.rnnkit, kind)(*own.values()),
        _composite(kind, own) if kept and kind != "pack_weights" else None,
        list(own.values()),
        defined=not foreign,
    )


def _composite(kind: str, own: dict[str, Any]) -> Callable[[], Any]:
    others = {name: value for name, value in own.items() if name not in CALL}

    def composite() -> Any:
        call = LayerCall(**{name: own[name] for name in CALL})
        if kind == "layer_backward":
            return ops.backward_composite(BackwardCall(call, **others))
        return ops.forward_composite(call, None, Keep.NOTHING)[:2]

    return composite


def _same(one: Any, other: Any) -> bool:
    """Whether they hold the same values."""
    try:
        if isinstance(one, Tensor):
            return torch.equal(one, other)
        if isinstance(one, list | tuple):
            return len(one) == len(other) and all(map(_same, one, other))
        return bool(one == other)
    except Exception:
        return False


def _direct(kind: str, rng: random.Random) -> Call:
    layers, directions = (1, 1) if kind == "direct_cell" else (rng.randint(1, 2), rng.randint(1, 2))
    case = _op_case(rng)
    steps, batch, _, hidden = case.sizes
    kept = kernel_cases.Case(
        case.cell, (steps, batch, hidden, hidden), directions, dtype=case.dtype
    )
    calls = [kernel_cases.call(kept, rng.getrandbits(30)) for _ in range(layers)]
    if directions == 2 and layers == 2:  # the second layer's input is of both
        wide = kernel_cases.Case(
            case.cell, (steps, batch, 2 * hidden, hidden), directions, dtype=case.dtype
        )
        calls[1] = kernel_cases.call(wide, rng.getrandbits(30))
    flat = [w for it in calls for w in it.weights]
    weights = [flat[i : i + len(specs.WEIGHTS)] for i in range(0, len(flat), len(specs.WEIGHTS))]
    states = [torch.cat(of_layers) for of_layers in zip(*(it.states for it in calls), strict=True)]
    given, input, step = rng.random() < 0.6, calls[0].input, kind == "direct_cell"
    if step:
        input, states = input[0], [state[0] for state in states]
    hx: Any = (tuple(states) if len(states) > 1 else states[0]) if given else None
    own: dict[str, Any] = {"cell": case.cell, "input": input, "hx": hx, "weights": weights}
    if not step:
        frozen = rng.random() < 0.4
        packed = stack.pack(case.cell, weights, directions=directions) if frozen else ()
        batch_first = rng.random() < 0.3
        own |= {"packed": list(packed), "directions": directions}
        own |= {"input_size": input.size(-1), "projected": hidden, "batch_first": batch_first}
        if batch_first:
            own["input"] = input.transpose(0, 1)
    own |= {"keep": rng.choice((1, 2))}
    if not step:
        own |= {"grad_clip": rng.choice((None, 0.5)), "grad_cut": rng.choice((None, 2))}
    before = dict(own)
    words = change(own, rng)
    foreign = not _same(own.get("packed"), before.get("packed"))
    stale = before.get("packed") and not _same(own["weights"], before["weights"])

    def reference() -> Any:
        x = own["input"]
        states = () if own["hx"] is None else own["hx"] if len(before_states) > 1 else (own["hx"],)
        if step:
            finals = stack.run(
                own["cell"], x[None], [s[None] for s in states], own["weights"], step=True
            )[1]
            finals = tuple(final[0] for final in finals)
            return finals if len(finals) > 1 else finals[0]
        x = x.transpose(0, 1) if own["batch_first"] else x
        (output,), finals = stack.run(
            own["cell"],
            x,
            states,
            own["weights"],
            directions=own["directions"],
            grad_clip=0.0 if own["grad_clip"] is None else own["grad_clip"],
            grad_cut=0 if own["grad_cut"] is None else own["grad_cut"],
        )
        output = output.transpose(0, 1) if own["batch_first"] else output
        return output, finals if len(finals) > 1 else finals[0]

    before_states = states

    def call() -> Any:
        found = getattr(backends.EXTENSION, kind)(*own.values())
        return found if found is None else _with_gradients(found, own)

    return Call(
        f"{kind}: {words}",
        call,
        None
        if stale or foreign
        else lambda: _on_reference(lambda: _with_gradients(reference(), own)),
        list(own.values()),
        defined=not foreign,
    )


def _on_reference(call: Callable[[], Any]) -> Any:
    with rnnkit.backend("reference"):
        return call()


def _leaves(arguments: Any) -> list[Tensor]:
    """The tensors in arguments that want a gradient."""
    if isinstance(arguments, dict):
        arguments = list(arguments.values())
    if isinstance(arguments, Tensor):
        return [arguments] if arguments.requires_grad and arguments.is_leaf else []
    if isinstance(arguments, list | tuple):
        return [leaf for argument in arguments for leaf in _leaves(argument)]
    return []


def _with_gradients(
    results: Any, arguments: Any, between: Callable[[list[Tensor]], None] | None = None
) -> list[Tensor]:
    """The results, and the gradients of their sum, if any, which are then forgotten."""
    tensors = tensors_of(results)
    differentiable = [tensor for tensor in tensors if tensor.requires_grad]
    leaves = list({id(leaf): leaf for leaf in _leaves(arguments)}.values())
    if not differentiable or not leaves:
        return tensors
    total = sum(tensor.sum() for tensor in differentiable)
    if between is not None:
        between(tensors)
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [*tensors, *(grad for grad in found if grad is not None)]


ATTRIBUTES: dict[str, tuple[Any, ...]] = {
    "bidirectional": (True, False),
    "num_layers": (0, 1, 2, 3, -1),
    "bias": (True, False, None),
    "proj_size": (0, 1, 2, 9, -1),
    "hidden_size": (0, 1, 3, 12, -1, 2**40),
    "input_size": (0, 1, 3, 12, -1),
    "mode": ("LSTM", "GRU", "RNN_TANH", "RNN_RELU", "lstm", "", "RNN"),
    "nonlinearity": ("tanh", "relu", "gelu", None),
    "batch_first": (True, False, None, 1),
    "recompute": (True, None, 3),
    "frozen": (True, False, None),
    "dropout": (0.5, 1.0, 2.0, -1.0),
    "_all_weights": ([], [[]], [["weight_ih_l0"]]),
    "_packed": ((), None, (X,), [torch.zeros(4, dtype=torch.uint8)] * 2),
}

#: Attributes that are to fit the weights.
SIZES = ("bidirectional=", "num_layers=", "input_size=")

#: Changes after which torch.nn's results say nothing: it takes biases for the next layer's weights, or states of one
#: size for another, reads strided batch sizes as if they were not, or has no such thing.
UNLIKE = (
    *("bias=", "hidden_size=", "_all_weights=", "_packed="),
    *("sorted_indices", "batch_sizes strided", "batch_sizes expanded"),
)

#: What may happen to a tensor between the forward and the backward pass.
BETWEEN: dict[str, Callable[[Tensor], Any]] = {
    "was resized to nothing": lambda t: t.untyped_storage().resize_(0),
    "was given other data": lambda t: setattr(t, "data", t.new_zeros(1)),
    "was given data of another dtype": lambda t: setattr(t, "data", t.detach().double()),
    "was written to": lambda t: t.detach().zero_(),
    "was resized": lambda t: t.detach().resize_(1),
}


def _module(rng: random.Random, package: Any) -> Call:
    """The same call of rnnkit's module or of torch.nn's, for an `rng` in the same state."""
    name = rng.choice([*LAYERS, *LAYERS, *CELLS])
    cell, hidden = name in CELLS, rng.randint(2, 9)
    options: dict[str, Any] = {} if cell else {
        "steps": rng.randint(1, 4),
        "num_layers": rng.randint(1, 2),
        "batch_first": rng.random() < 0.3,
        "bidirectional": rng.random() < 0.4,
        "proj_size": rng.randint(1, hidden - 1) if name == "lstm" and rng.random() < 0.3 else 0,
    }  # fmt: skip
    batch = rng.choice((None, 1, 3, 4, 4))
    if not cell and batch and rng.random() < 0.4:
        options["lengths"] = (*(rng.randint(1, options["steps"]) for _ in range(batch - 1)),)
        options["lengths"] += (options["steps"],)
    low = () if "relu" in name else (torch.bfloat16,)  # a ReLU near zero falls to either side
    case = Case(
        name,
        batch=batch,
        input_size=hidden if rng.random() < 0.3 else rng.randint(2, 6),
        hidden_size=hidden,
        bias=rng.random() < 0.7,
        hx=rng.random() < 0.6,
        dtype=rng.choice([torch.float32] * 4 + [torch.float64, *low]),
        off_kink=True,
        **options,
    )
    torch.manual_seed(rng.getrandbits(30))
    module = case.twins()[0 if package is rnnkit else 1]
    frozen = rng.random() < 0.3 and not cell
    gradients = not frozen and rng.random() < 0.7
    if frozen:
        rnnkit.freeze(module) if package is rnnkit else module.eval()
    wanting = {n: leaf.requires_grad_(gradients) for n, leaf in case.leaves().items()}
    positional = case.arguments(wanting)
    own = dict(zip(("input", "hx"), positional, strict=False))
    words, between = [str(case)] + ["frozen"] * frozen + ["no_grad"] * (not gradients), None
    what = rng.choice(("arguments", "arguments", "attribute", "attribute", "parameter", "between"))
    if what == "arguments":
        words.append(change(own, rng))
    elif what == "between":
        between, told = _between(rng, module, own)
        words.append(told)
    for _ in range(rng.choice((1, 1, 2))):
        if what == "attribute":
            attribute = rng.choice([a for a in ATTRIBUTES if hasattr(case, a) or not cell])
            value = rng.choice(ATTRIBUTES[attribute])
            setattr(module, attribute, value)
            words.append(f"{attribute}={str(value).splitlines()[0]}")
        elif what == "parameter":
            parameter = rng.choice([n for n, _ in module.named_parameters()])
            new, told = changed(parameter, getattr(module, parameter).detach(), rng)
            _put(module, parameter, new)
            words.append(told)
    given = list(own.values())
    if "lengths" in options and any("hx" in w and "storage" in w for w in words):
        given[1:] = []  # torch's own index_select would end the process
        words.append("hx not given")

    def call() -> Any:
        with torch.set_grad_enabled(gradients):
            return _with_gradients(module(*given), [given, list(module.parameters())], between)

    told = ", ".join(words)
    later = ", ".join(words[1:])
    foreign = what == "between" or (frozen and what == "parameter")
    foreign |= any(word in later for word in UNLIKE)
    # The reference can do without what torch.nn asks of a sparse tensor.
    return Call(
        told,
        call,
        None,
        [*given, *module.parameters()],
        not foreign,
        lenient="sparse" in told or (what == "attribute" and not any(a in later for a in SIZES)),
        fewest=1 + ("lstm" in name) + (not cell),
    )


def _put(module: nn.Module, name: str, new: Any) -> None:
    """`new` in the place of a parameter, as one where it can be one."""
    try:
        setattr(module, name, nn.Parameter(new, requires_grad=False))
    except Exception:
        del module._parameters[name]
        setattr(module, name, new)


def _between(
    rng: random.Random, module: nn.Module, own: dict[str, Any]
) -> tuple[Callable[[list[Tensor]], None], str]:
    what = rng.choice(list(BETWEEN))
    whose = rng.choice(("input", "output", "parameter"))
    place = rng.randrange(len(list(module.parameters())))

    def between(results: list[Tensor]) -> None:
        data = own["input"].data if isinstance(own["input"], PackedSequence) else own["input"]
        tensor = {
            "input": data,
            "output": results[0],
            "parameter": list(module.parameters())[place],
        }[whose]
        BETWEEN[what](tensor)

    return between, f"{whose} {what} before the backward pass"


def malformed(seed: int, number: int) -> Call:
    """The call of this number."""

    def state() -> random.Random:
        return random.Random(f"malformed {seed} {number}")

    rng = state()
    kind = rng.choice(KINDS)
    if kind in OPS:
        return _op(kind, rng)
    if kind.startswith("direct"):
        return _direct(kind, rng)
    call, again = _module(rng, rnnkit), state()
    again.choice(KINDS)

    def theirs() -> Any:
        return _module(again, nn).call()

    return replace(call, reference=theirs if call.defined else None)


# What came of it


def _plain(arguments: Any) -> list[Tensor]:
    """The tensors with values, in whatever holds them."""
    if isinstance(arguments, Tensor):
        plain = arguments.layout == torch.strided and arguments.device.type == "cpu"
        plain = plain and not arguments.is_quantized and not arguments.is_nested
        return [arguments] if plain and type(arguments) in (Tensor, nn.Parameter) else []
    if isinstance(arguments, PackedSequence):
        return _plain(arguments.data)
    if isinstance(arguments, list | tuple):
        return [tensor for argument in arguments for tensor in _plain(argument)]
    return []


def _finite(arguments: Any) -> bool:
    with_values = [t for t in _plain(arguments) if t.numel() and t.untyped_storage().nbytes()]
    return all(bool(t.detach().isfinite().all()) for t in with_values)


def _without_memory(arguments: Any) -> bool:
    return any(t.numel() and not t.untyped_storage().nbytes() for t in _plain(arguments))


def _flat(results: Any) -> list[Tensor]:
    return [] if results is None else tensors_of(results)


def _long(arguments: Any) -> bool:
    return any(size > MOST_STEPS for tensor in _plain(arguments) for size in tensor.shape)


def check(seed: int, number: int, tell: Callable[[str, str], None]) -> str:
    """What is wrong with what came of the call of this number; "" for nothing."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    it = malformed(seed, number)
    tell("call", it.words)
    resized = it.defined and _without_memory(it.arguments)
    safe = it.defined and not resized and _finite(it.arguments)
    try:
        results = _flat(it.call())
    except Exception as error:
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if it.words.endswith("nothing changed"):
            return f"a valid call raised {text[:200]}"
        inner = any(word in str(error) for word in INTERNAL) or isinstance(error, SystemError)
        return f"the text is of the inside: {text[:200]}" if inner else ""
    if resized and results:
        return "a result of a tensor without memory"
    if len(results) < it.fewest:
        return f"{len(results)} results instead of {it.fewest}"
    if safe and not _finite(results):
        return "a result that was not written, or not finite"
    if it.reference is None or _long(it.arguments) or not results:
        return ""
    tell("compare", "")
    return _difference(results, it)


def _difference(results: list[Tensor], it: Call) -> str:
    assert it.reference is not None
    try:
        expected = _flat(it.reference())
    except Exception as error:
        if it.lenient or "nference tensor" in str(
            error
        ):  # the reference's gradients are autograd's
            return ""
        return f"a result, where the reference raises {type(error).__name__}: {str(error)[:120]!r}"
    if not _finite(expected):
        return ""
    for place, (result, truth) in enumerate(zip(results, expected, strict=False)):
        if result.shape != truth.shape or result.dtype != truth.dtype:
            found, wanted = ((t.dtype, tuple(t.shape)) for t in (result, truth))
            return f"result {place} is {found}, the reference's {wanted}"
        if result.device.type != "cpu" or not _plain(result):
            continue
        if not torch.allclose(result.double(), truth.double(), *_tolerance(result.dtype)):
            return f"result {place} is off by {float((result - truth).abs().max()):.2e}"
    return ""


def _tolerance(dtype: torch.dtype) -> tuple[float, float]:
    return (5e-2, 2e-1) if dtype.itemsize < 4 else (1e-3, 1e-3)
