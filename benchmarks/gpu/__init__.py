"""rnnkit beside torch.nn (cuDNN) on a GPU: `python -m benchmarks.gpu` measures.

grid.py says what, layers.py with whom, worker.py measures it in one process that has both libraries, supervisor.py
restarts that process where a kernel hung or crashed, goals.py judges and tables.py tells the results.
"""
