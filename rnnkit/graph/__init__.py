"""A cell's step, written once in Python: traced to a graph of scalar operations, derived, and printed for kernels.

`trace` makes the graph, `derive` its backward pass, `cpp` and `triton` their text; `builtin` has rnnkit's own cells.
"""

from rnnkit.graph.derive import Derived, derive
from rnnkit.graph.trace import Graph, Value, run, trace

__all__ = ["Derived", "Graph", "Value", "derive", "run", "trace"]
