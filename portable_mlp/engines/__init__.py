"""Engines: how a backend runs one step over the batches of an epoch.

All run the same step (`portable_mlp.steps`); they differ in what stands between the step
and the library.

- *eager* calls it (`base`).
- *replay* records it once (`recording`) as a `program`, finds each result a place (`memory`),
  writes calls that leave it there (`calls`, in the words of `dialects`), and repeats those
  (`replay`): NumPy and torch.  NumPy's become, between the matrix products, loops in C
  (`loops`) where there is a `compiler`.
- *scan* hands a loop of steps to JAX's compiler (`scan`).
- *capture* records it, writes it as CUDA kernels (`kernels`, in the words of `cplusplus` and
  `elements`), and replays a graph of their launches (`capture`): CuPy.
"""

from portable_mlp.engines.base import EPOCHS_AT_ONCE, Engine, Task
from portable_mlp.engines.capture import CaptureEngine
from portable_mlp.engines.replay import ReplayEngine
from portable_mlp.engines.scan import ScanEngine

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
