"""CUDA C++ on the host: compiled as it is; a block's threads are the host's, or one."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from threading import RLock
from typing import Any

COMPILER = shutil.which("g++")
_LOCK = RLock()
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

# Not <cmath>: it takes longer to compile than a kernel, and has overloads for integers
_HEADER = """
#define __global__
#define __launch_bounds__(n)
#define __shared__ static
struct Index { int x; };
extern thread_local Index blockIdx, threadIdx;
extern Index blockDim, gridDim;
void __syncthreads();
inline double __longlong_as_double(long long bits) { return __builtin_bit_cast(double, bits); }
#define UNARY(name) extern "C" double name(double); extern "C" float name##f(float); \\
    inline float name(float x) { return name##f(x); }
#define BINARY(name) extern "C" double name(double, double); \\
    extern "C" float name##f(float, float); \\
    inline float name(float x, float y) { return name##f(x, y); }
#define TEST(name) inline bool name(double x) { return __builtin_##name(x); } \\
    inline bool name(float x) { return __builtin_##name(x); }
UNARY(exp) UNARY(expm1) UNARY(log) UNARY(log1p) UNARY(log2) UNARY(log10) UNARY(sqrt)
UNARY(sin) UNARY(cos) UNARY(tan) UNARY(asin) UNARY(acos) UNARY(atan)
UNARY(sinh) UNARY(cosh) UNARY(tanh) UNARY(asinh) UNARY(acosh) UNARY(atanh)
UNARY(floor) UNARY(ceil) UNARY(trunc) UNARY(rint) UNARY(fabs)
BINARY(pow) BINARY(atan2) BINARY(hypot)
TEST(isfinite) TEST(isnan) TEST(isinf)
"""


class CompileException(Exception):
    """As CuPy's: no RuntimeError."""


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


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Cache a function's results; threads wait for each other, and compile nothing twice."""
    cached = cache(function)

    @wraps(function)
    def locked(*args: Any) -> Any:
        with _LOCK:
            return cached(*args)

    return locked


@once
def build(source: str, *needed: Path) -> Path:
    """Compile a shared library, which loads those that it needs."""
    name = hashlib.sha256(repr((source, needed)).encode()).hexdigest()[:16]
    path = _FOLDER / f"{name}.cpp"
    path.write_text(source)
    done = subprocess.run(
        [COMPILER, "-std=c++20", "-O0", "-ffp-contract=off", "-shared", "-fPIC", "-pthread",
         "-o", path.with_suffix(".so"), path, "-Wl,--no-as-needed", *needed],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise CompileException(done.stderr)
    return path.with_suffix(".so")


@once
def launcher() -> ctypes.CDLL:
    """What calls a kernel for all threads of all blocks."""
    return ctypes.CDLL(str(build(_LAUNCHER)), mode=ctypes.RTLD_GLOBAL)


@once
def library(source: str) -> ctypes.CDLL:
    """Compiled kernels, each with its caller."""
    launcher()
    return ctypes.CDLL(str(build(_HEADER + with_callers(source))))
