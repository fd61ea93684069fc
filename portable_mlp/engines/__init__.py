"""Engines: how a backend runs one step over the batches of an epoch.

All run the same step (`portable_mlp.steps`).  They differ in what stands between the step and the
library.

- *eager* calls the step (`base`).
- *replay* records the step once, as a graph of operations (`graph.recording`, `graph.program`),
  plans where each result lies in memory (`host.memory`), writes the calls that leave it there
  (`host.python_source`, in the library's words: `host.dialects`), and repeats them
  (`host.replay`): NumPy and torch.  For NumPy, what stands between the matrix products becomes
  loops in C (`host.loops`), where there is a compiler (`host.compiler`).
- *scan* hands a loop of steps to JAX's compiler (`jax_scan`).
- *capture* records the step, too, groups its operations into CUDA kernels (`cuda.fusion`), writes
  these (`cuda.kernels`, in the words of `graph.c_source` and `graph.elements`), and replays a graph
  of their launches (`cuda.capture`): CuPy.
"""

from portable_mlp.engines.base import EPOCHS_AT_ONCE, Engine, Task
from portable_mlp.engines.cuda.capture import CaptureEngine
from portable_mlp.engines.host.replay import ReplayEngine
from portable_mlp.engines.jax_scan import ScanEngine

ENGINES: dict[str, type[Engine]] = {
    engine.name: engine for engine in (Engine, ReplayEngine, ScanEngine, CaptureEngine)
}

__all__ = [
    "ENGINES",
    "EPOCHS_AT_ONCE",
    "CaptureEngine",
    "Engine",
    "ReplayEngine",
    "ScanEngine",
    "Task",
]
