"""Fragments of C++ for CUDA kernels: types, functions, and templates of kernels.

The loops in C for the host use the same types and functions.
"""

from __future__ import annotations

TYPES = {
    "float32": "float", "float64": "double", "bool": "bool", "int8": "signed char",
    "int16": "short", "int32": "int", "int64": "long long", "uint8": "unsigned char",
    "uint16": "unsigned short", "uint32": "unsigned", "uint64": "unsigned long long",
}  # fmt: skip

# As in NumPy, NaN propagates through a maximum.  Of two equal values, which may be zeros of
# either sign, it is the second
_GREATER = "({0} > {1} || {0} != {0} ? {0} : {1})"
_LESS = "({0} < {1} || {0} != {0} ? {0} : {1})"

FUNCTIONS = {
    **{name: f"({{0}} {sign} {{1}})" for name, sign in {
        "add": "+", "subtract": "-", "multiply": "*", "divide": "/", "less": "<",
        "less_equal": "<=", "greater": ">", "greater_equal": ">=", "equal": "==",
        "not_equal": "!=", "logical_and": "&&", "logical_or": "||", "bitwise_and": "&",
        "bitwise_or": "|", "bitwise_xor": "^", "left_shift": "<<", "right_shift": ">>",
    }.items()},
    **{name: f"{name}({{0}})" for name in (
        "exp", "expm1", "log", "log1p", "log2", "log10", "sqrt", "sin", "cos", "tan",
        "sinh", "cosh", "tanh", "floor", "ceil", "trunc", "rint", "isfinite", "isnan",
        "isinf",
    )},
    **{f"arc{name}": f"a{name}({{0}})" for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")},
    "negative": "(-{0})", "logical_not": "(!{0})", "invert": "(~{0})",
    "square": "({0} * {0})", "reciprocal": "(1 / {0})", "power": "pow({0}, {1})",
    "arctan2": "atan2({0}, {1})", "hypot": "hypot({0}, {1})", "where": "({0} ? {1} : {2})",
    "maximum": _GREATER, "minimum": _LESS,
    "sign": "({0} > 0 ? 1 : {0} < 0 ? -1 : {0})",
    "logaddexp": "({0} == {1} ? {0} + 0.6931471805599453"
                 " : ({0} > {1} ? {0} : {1}) + log1p(exp(-fabs({0} - {1}))))",
}  # fmt: skip
"""Elementwise functions as expressions; operands are names or in parentheses."""

# For each reduction, the value to start from, and how two partial results are combined
COMBINE = {"sum": ("0", "({0} + {1})"), "prod": ("1", "({0} * {1})"),
            "max": ("-INF", _GREATER), "min": ("INF", _LESS)}  # fmt: skip

PREAMBLE = """\
#define INF __longlong_as_double(0x7ff0000000000000LL)
#define NOT_A_NUMBER __longlong_as_double(0x7ff8000000000000LL)
"""

POINTWISE = """
extern "C" __global__ void {name}({parameters}) {{
{numbers}    int first = blockIdx.x * blockDim.x + threadIdx.x, all = gridDim.x * blockDim.x;
    for (int i = first; i < {points}; i += all) {{
{body}
    }}
}}
"""

# The launch bound keeps the compiler to 64 registers a thread: with more, a block of 1024
# threads could not be launched
TOTAL = """
extern "C" __global__ __launch_bounds__(1024) void {name}({parameters}) {{
{numbers}    __shared__ {type} parts[1024];
    {type} a = {start};
    int first = blockIdx.x * blockDim.x + threadIdx.x, all = gridDim.x * blockDim.x;
    for (int i = first; i < {points}; i += all) {{
        {type} b = {value};
        a = {combined};
    }}
    parts[threadIdx.x] = a;
    __syncthreads();
    for (int w = blockDim.x / 2; w > 0; w /= 2) {{
        if (threadIdx.x < w) {{
            {type} b = parts[threadIdx.x + w];
            a = {combined};
            parts[threadIdx.x] = a;
        }}
        __syncthreads();
    }}
    if (threadIdx.x == 0) out[blockIdx.x] = a;
}}
"""

GATHER = """
extern "C" __global__ void gather({parameters}) {{
    int first = blockIdx.x * blockDim.x + threadIdx.x, all = gridDim.x * blockDim.x;
{body}
}}
"""

LAST = """
extern "C" __global__ void {name}({parameters}, double* results) {{
{numbers}    if (blockIdx.x == 0 && threadIdx.x == 0) {{
{body}
        ++*step;
    }}
}}
"""
