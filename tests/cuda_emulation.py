"""CUDA's part of what a captured step needs, on NumPy: kernels compiled by a C++ compiler.

The emitted source runs as it is; a block's threads are threads of the host, or one.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from portable_mlp.engines.capture import CaptureError, layout

COMPILER = shutil.which("g++")
_FOLDER = Path(tempfile.mkdtemp(prefix="kernels"))
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)

_LAUNCHER = """
#include <barrier>
#include <thread>
#include <vector>
struct Index { int x; };
thread_local Index blockIdx, threadIdx;
Index blockDim, gridDim;
static std::barrier<>* meeting;
void __syncthreads() { if (blockDim.x > 1) meeting->arrive_and_wait(); }
extern "C" void launch(void (*call)(void**), void** arguments, int blocks, int threads) {
    blockDim.x = threads;
    gridDim.x = blocks;
    std::barrier<> own(threads);
    meeting = &own;
    for (int b = 0; b < blocks; ++b) {
        auto run = [=](int t) { blockIdx.x = b; threadIdx.x = t; call(arguments); };
        std::vector<std::thread> others;
        for (int t = 1; t < threads; ++t) others.emplace_back(run, t);
        run(0);
        for (auto& other : others) other.join();
    }
}
"""

_HEADER = """
#include <cmath>
using namespace std;
#define __global__
#define __shared__ static
struct Index { int x; };
extern thread_local Index blockIdx, threadIdx;
extern Index blockDim, gridDim;
void __syncthreads();
"""


def with_callers(source: str) -> str:
    """Behind each kernel, a function that takes its arguments as an array of pointers."""
    lines: list[str] = []
    caller = ""
    for line in source.splitlines():
        lines.append(line)
        if line.startswith('extern "C" __global__'):
            name, parameters = line.split("void ", 1)[1].rsplit(")", 1)[0].split("(", 1)
            kinds = [p.strip().rsplit(" ", 1)[0] for p in parameters.split(",")]
            given = ", ".join(f"({kind})a[{i}]" for i, kind in enumerate(kinds))
            caller = f'extern "C" void call_{name}(void** a) {{ {name}({given}); }}'
        elif line == "}":
            lines.append(caller)
    return "\n".join(lines)


@cache
def _library(source: str, mode: int = ctypes.RTLD_LOCAL) -> ctypes.CDLL:
    name = hashlib.sha256(source.encode()).hexdigest()[:16]
    path = _FOLDER / f"{name}.cpp"
    path.write_text(source)
    done = subprocess.run(
        [COMPILER, "-std=c++20", "-O0", "-ffp-contract=off", "-shared", "-fPIC", "-pthread",
         "-o", path.with_suffix(".so"), path],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + source
    return ctypes.CDLL(str(path.with_suffix(".so")), mode=mode)


class Emulation:
    """What `portable_mlp.engines.capture.Cuda` is, on the host.

    Parameters
    ----------
    threads : int, default=1
        Of a block, at most.
    refuses : str, default=""
        Why nothing can be captured.
    """

    def __init__(self, threads: int = 1, refuses: str = "") -> None:
        self.threads = threads
        self.refuses = refuses
        self.n_launched = self.n_captured = self.n_replayed = 0

    def array(self, memory, view):
        assert memory.flags.c_contiguous
        strides = tuple(stride * view.dtype.itemsize for stride in view.strides)
        return np.ndarray(view.shape, view.dtype, memory.data, view.place.offset, strides)

    def compile(self, source):
        launcher = _library(_LAUNCHER, ctypes.RTLD_GLOBAL)
        library = _library(_HEADER + with_callers(source))

        def launch(kernel, arguments):
            assert all(a.flags.c_contiguous for a in arguments)
            pointers = (ctypes.c_void_p * len(arguments))(*(a.ctypes.data for a in arguments))
            threads = min(kernel.threads, self.threads)
            self.n_launched += 1
            launcher.launch(library[f"call_{kernel.name}"], pointers, kernel.blocks, threads)

        return launch

    def multiply(self, left, right, out):
        assert out.flags.c_contiguous
        for a in (left, right):
            transpose, step = layout(a)
            # As cuBLAS sees it: columns of a piece, so many elements from each other
            n, m = a.shape if transpose else a.shape[::-1]
            seen = np.lib.stride_tricks.as_strided(
                a, (n, m), (a.dtype.itemsize, step * a.dtype.itemsize)
            )
            np.testing.assert_array_equal(seen if transpose else seen.T, a)
        self.n_launched += 1
        np.matmul(left, right, out=out)

    def capture(self, work):
        if self.refuses:
            raise CaptureError(self.refuses)
        self.n_captured += 1

        def replay():
            self.n_replayed += 1
            work()

        return replay
