"""Inference engines on ONNX's own RNN, LSTM and GRU operators: ONNX Runtime and OpenVINO."""

from typing import Any

import numpy as np

from benchmarks.cases import GATES, Case
from benchmarks.providers import Arrays, Computation, Unsupported

#: Places of ONNX's gates among torch.nn's: LSTM i, o, f, g of i, f, g, o; GRU z, r, n of r, z, n.
GATE_ORDER = {"RNN": [0], "LSTM": [0, 3, 1, 2], "GRU": [1, 0, 2]}
OPSET, IR_VERSION = 17, 8


def reordered(case: Case, array: Any) -> Any:
    """`array`, [G*H, ...], with ONNX's order of gates."""
    gates = array.reshape(GATES[case.cell], case.H, *array.shape[1:])
    return gates[GATE_ORDER[case.cell]].reshape(array.shape)


def initializers(case: Case, arrays: Arrays, layer: int) -> Arrays:
    """W [D, G*H, I], R [D, G*H, H] and B [D, 2*G*H] of a layer."""
    ends = [f"_l{layer}{end}" for end in ("", "_reverse")[: case.directions]]
    w, r, b_ih, b_hh = (
        np.stack([reordered(case, arrays[kind + end]) for end in ends])
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    return {f"W{layer}": w, f"R{layer}": r, f"B{layer}": np.concatenate([b_ih, b_hh], axis=1)}


def model(case: Case, arrays: Arrays) -> bytes:
    """The stack as an ONNX model with fixed sizes."""
    from onnx import TensorProto, checker, helper, numpy_helper

    states = ("h_n", "c_n")[: 2 if case.cell == "LSTM" else 1]
    attributes: dict[str, Any] = {"hidden_size": case.H}
    attributes["direction"] = "bidirectional" if case.directions == 2 else "forward"
    if case.cell == "GRU":
        attributes["linear_before_reset"] = 1
    constants = {"axis": np.array([1]), "merged": np.array([0, 0, -1])}
    nodes, x = [], "x"
    for layer in range(case.layers):
        constants |= initializers(case, arrays, layer)
        inputs = [x, *(f"{kind}{layer}" for kind in "WRB")]
        finals = [f"{state}{layer}" for state in states]
        nodes.append(helper.make_node(case.cell, inputs, [f"Y{layer}", *finals], **attributes))
        x = "output" if layer == case.layers - 1 else f"x{layer + 1}"
        if case.directions == 1:  # [T, D, N, H] to [T, N, D*H]
            nodes.append(helper.make_node("Squeeze", [f"Y{layer}", "axis"], [x]))
        else:
            turned = helper.make_node("Transpose", [f"Y{layer}"], [f"Z{layer}"], perm=[0, 2, 1, 3])
            nodes += [turned, helper.make_node("Reshape", [f"Z{layer}", "merged"], [x])]
    for state in states:
        of_layers = [f"{state}{layer}" for layer in range(case.layers)]
        nodes.append(helper.make_node("Concat", of_layers, [state], axis=0))
    shape = [case.layers * case.directions, case.N, case.H]
    shapes = dict.fromkeys(states, shape)
    shapes["output"] = [case.T, case.N, case.directions * case.H]
    graph = helper.make_graph(
        nodes,
        case.cell,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [case.T, case.N, case.I])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()],
        [numpy_helper.from_array(np.ascontiguousarray(a), n) for n, a in constants.items()],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    checker.check_model(made)
    serialized: bytes = made.SerializeToString()
    return serialized


def require(case: Case, dtypes: tuple[str, ...]) -> None:
    """Raises Unsupported for what ONNX's operators or the engines do not do."""
    if case.mode != "inference":
        raise Unsupported("inference only")
    if case.ragged or case.projection:
        raise Unsupported("no packed batches" if case.ragged else "no projections")
    if case.dtype not in dtypes:
        raise Unsupported(f"no {case.dtype}")


class OnnxRuntime:
    """ONNX Runtime's CPU provider."""

    def __init__(self, name: str, threads: int, device: str) -> None:
        if device != "cpu":
            raise Unsupported("compared on the CPU only")
        import onnx
        import onnxruntime

        self.onnx, self.library, self.threads = onnx, onnxruntime, threads

    def versions(self) -> dict[str, str]:
        return {"onnxruntime": self.library.__version__, "onnx": self.onnx.__version__}

    def synchronize(self) -> None: ...

    def prepare(self, case: Case, arrays: Arrays) -> Computation:
        require(case, ("float32",))
        options = self.library.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        session = self.library.InferenceSession(
            model(case, arrays), options, providers=["CPUExecutionProvider"]
        )
        names = [output.name for output in session.get_outputs()]
        feed = {"x": arrays["x"]}
        return Computation(
            lambda: session.run(names, feed), lambda results: dict(zip(names, results, strict=True))
        )


class OpenVino:
    """OpenVINO's CPU plugin, set to the least latency."""

    def __init__(self, name: str, threads: int, device: str) -> None:
        if device != "cpu":
            raise Unsupported("compared on the CPU only")
        import onnx
        import openvino

        self.onnx, self.library, self.threads = onnx, openvino, threads
        self.core = openvino.Core()

    def versions(self) -> dict[str, str]:
        return {"openvino": self.library.__version__, "onnx": self.onnx.__version__}

    def synchronize(self) -> None: ...

    def prepare(self, case: Case, arrays: Arrays) -> Computation:
        capable = "BF16" in self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        require(case, ("float32", "bfloat16") if capable else ("float32",))
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self.threads,
            "INFERENCE_PRECISION_HINT": "f32" if case.dtype == "float32" else "bf16",
        }
        read = self.core.read_model(model(case, arrays))
        request = self.core.compile_model(read, "CPU", settings).create_infer_request()
        feed = {"x": arrays["x"]}

        def call() -> Any:
            return request.infer(feed, share_inputs=True, share_outputs=True)

        return Computation(
            call, lambda results: {n: np.array(results[n]) for n in self._names(case)}
        )

    @staticmethod
    def _names(case: Case) -> tuple[str, ...]:
        return ("output", "h_n", "c_n")[: 3 if case.cell == "LSTM" else 2]
