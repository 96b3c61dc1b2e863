"""JAX as its users write an RNN: the input's product hoisted out of `lax.scan`, all of it under `jit`."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks.cases import Case
from benchmarks.providers import Arrays, Computation, Unsupported

Step = Callable[[Any, Any], tuple[Any, Any]]


class JaxScan:
    """Layers as scans; XLA has as many threads as there are CPUs the process may run on."""

    def __init__(self, name: str, threads: int, device: str) -> None:
        if device != "cpu":
            raise Unsupported("compared on the CPU only")
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        import jax

        self.jax = jax

    def versions(self) -> dict[str, str]:
        return {"jax": self.jax.__version__}

    def synchronize(self) -> None: ...

    def prepare(self, case: Case, arrays: Arrays) -> Computation:
        if case.ragged:
            raise Unsupported("no packed batches")
        jax, jnp = self.jax, self.jax.numpy
        jax.config.update("jax_enable_x64", case.dtype == "float64")
        data = {name: jax.device_put(jnp.asarray(a, case.dtype)) for name, a in arrays.items()}
        x, grad_output = data.pop("x"), data.pop("grad_output", None)
        if case.mode == "inference":
            run = jax.jit(partial(forward, case))
            return Computation(lambda: jax.block_until_ready(run(data, x)), _arrays)

        @jax.jit
        def training_step(weights: Any, x: Any, grad_output: Any) -> Any:
            def outputs(weights: Any, x: Any) -> tuple[Any, Any]:
                results = forward(case, weights, x)
                return results["output"], results

            _, pull, results = jax.vjp(outputs, weights, x, has_aux=True)
            grad_weights, grad_x = pull(grad_output)
            gradients = {f"grad_{name}": gradient for name, gradient in grad_weights.items()}
            return results | gradients | {"grad_x": grad_x}

        return Computation(
            lambda: jax.block_until_ready(training_step(data, x, grad_output)), _arrays
        )


def forward(case: Case, weights: Any, x: Any) -> dict[str, Any]:
    """The stack of scans, named as in torch.nn."""
    import jax.numpy as jnp

    finals, outputs = [], []
    for suffix, _ in case.suffixes():
        states, output = scan(case, weights, suffix, x)
        finals.append(states)
        outputs.append(output)
        if len(outputs) == case.directions:
            x = outputs[0] if case.directions == 1 else jnp.concatenate(outputs, axis=-1)
            outputs = []
    stacked = [jnp.stack(states) for states in zip(*finals, strict=True)]
    return {"output": x, **dict(zip(("h_n", "c_n"), stacked, strict=False))}


def scan(case: Case, weights: Any, suffix: str, x: Any) -> tuple[Any, Any]:
    """One layer in one direction: final states, outputs."""
    import jax.numpy as jnp
    from jax import lax

    w_hh, b_hh = weights[f"weight_hh{suffix}"], weights[f"bias_hh{suffix}"]
    gates = x @ weights[f"weight_ih{suffix}"].T + weights[f"bias_ih{suffix}"]  # [T, N, G*H]
    step: Step
    if case.cell == "GRU":
        step = partial(gru, w_hh, b_hh)  # the bias is multiplied by r
    else:
        gates = gates + b_hh
        step = partial(lstm, w_hh, weights.get(f"weight_hr{suffix}"))
        step = partial(rnn, w_hh) if case.cell == "RNN" else step
    sizes = (case.output_size, case.H)[: 2 if case.cell == "LSTM" else 1]
    states = tuple(jnp.zeros((case.N, size), x.dtype) for size in sizes)
    return lax.scan(step, states, gates, reverse=suffix.endswith("_reverse"))


def rnn(w_hh: Any, states: Any, gates: Any) -> tuple[Any, Any]:
    import jax.numpy as jnp

    h = jnp.tanh(gates + states[0] @ w_hh.T)
    return (h,), h


def lstm(w_hh: Any, w_hr: Any, states: Any, gates: Any) -> tuple[Any, Any]:
    import jax.numpy as jnp
    from jax.nn import sigmoid

    h, c = states
    i, f, g, o = jnp.split(gates + h @ w_hh.T, 4, axis=-1)
    c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
    h = sigmoid(o) * jnp.tanh(c)
    h = h if w_hr is None else h @ w_hr.T
    return (h, c), h


def gru(w_hh: Any, b_hh: Any, states: Any, gates: Any) -> tuple[Any, Any]:
    import jax.numpy as jnp
    from jax.nn import sigmoid

    (h,) = states
    r, z, n = jnp.split(gates, 3, axis=-1)
    hr, hz, hn = jnp.split(h @ w_hh.T + b_hh, 3, axis=-1)
    z = sigmoid(z + hz)
    h = (1 - z) * jnp.tanh(n + sigmoid(r + hr) * hn) + z * h
    return (h,), h


def _arrays(results: dict[str, Any]) -> Arrays:
    return {
        name: np.asarray(value, np.float64 if value.dtype == np.float64 else np.float32)
        for name, value in results.items()
    }
