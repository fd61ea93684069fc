"""Measure a training step, of portable_mlp and of its peers, side by side.

    python scripts/benchmark.py --growth growth.png
    python scripts/benchmark.py --workloads 1,4 --only "portable_mlp numpy,scikit-learn"
    python scripts/benchmark.py --device gpu

or what each trick of NumPy's engine brings, whole fits of the estimators against
scikit-learn's, or the memory that a fit takes:

    python scripts/benchmark.py --tricks
    python scripts/benchmark.py --fit
    python scripts/benchmark.py --memory
    python scripts/benchmark.py --memory --device gpu

Prints Markdown.  Every contestant trains the same networks on the same rows in the
same order, without an L2 penalty, with its library's default number of threads.  Each lives
in a process of its own, so that no thread pool disturbs another, and only one computes at a
time.  Rounds are interleaved: what disturbs the machine for a while disturbs all alike.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from itertools import chain, pairwise
from math import ceil
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from contestants import (
    FITS,
    FITTERS,
    GPU_STEPPERS,
    ON_A_GPU,
    PEAKS,
    STEPPERS,
    TRICKS,
    WORKLOADS,
    Contestants,
    Workload,
    free_memory,
    growth,
    normal_rows,
)


@dataclass(frozen=True)
class Suite:
    """What is timed, by whom, and the unit."""

    workloads: dict[int, Any]
    contestants: Contestants
    unit: str
    per_second: float
    dtypes: tuple[str, ...]


AXES = ("width", "depth", "batch", "rows")
GROWERS = {name: STEPPERS[name] for name in ("portable_mlp numpy", "GEMMs alone")}
SUITES = {
    "steps": Suite(WORKLOADS, STEPPERS, "µs a step", 1e6, ("float32",)),
    "gpu": Suite(ON_A_GPU, GPU_STEPPERS, "µs a step", 1e6, ("float32",)),
    "tricks": Suite(WORKLOADS, TRICKS, "µs a step", 1e6, ("float32",)),
    "fits": Suite(FITS, FITTERS, "ms a fit", 1e3, ("float32", "float64")),
    **{axis: Suite(growth(axis), GROWERS, "µs a step", 1e6, ("float32",)) for axis in AXES},
}

# ---------------------------------------------------------------- processes


class ContestantError(Exception):
    """A contestant failed; the message says why."""


def serve(suite: str, name: str, pipe: Connection) -> None:
    """Do, in a child process, what a `Worker` asks, until it closes the pipe."""
    # JAX, once imported, would take three quarters of a GPU that all share
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    make, _ = SUITES[suite].contestants[name]
    contestant: Any = None
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        reply: Any = None
        failure = ""
        # For each request anew: a warning is given once, and would be missed at later workloads
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default", RuntimeWarning)
            try:
                if isinstance(request, int):
                    contestant.reset()
                    time.sleep(0.05)  # idle threads of the one before may still spin
                    began = time.perf_counter()
                    contestant.train(request)
                    reply = time.perf_counter() - began, contestant.curve
                elif callable(request):
                    reply = request()
                else:
                    contestant = None  # its arrays are freed before there are others,
                    gc.collect()  # even if they are in a cycle
                    contestant = make(*request)
            except Exception as error:
                kind = type(error).__name__
                failure = f"{'unavailable' if kind == 'BackendError' else kind}: {error}"
        said = []
        for each in caught:
            if issubclass(each.category, RuntimeWarning):
                said.append(one_line(each.message))
            else:
                warnings.showwarning(each.message, each.category, each.filename, each.lineno)
        pipe.send((reply, one_line(failure), said))


def one_line(text: object) -> str:
    return " ".join(str(text).split())


class Worker:
    """A contestant in a process of its own, which lives until it is closed.

    Attributes
    ----------
    curve : sequence of float
        Losses of the last run's epochs.
    head : float
        Seconds that the workload's first epochs took longer than later ones.
    said : list of str
        What it warned of since the workload was set up.
    """

    def __init__(self, suite: str, name: str) -> None:
        module = SUITES[suite].contestants[name][1]
        if not find_spec(module):
            raise ContestantError(f"missing: {module} is not installed")
        self.curve: Sequence[float] = ()
        self.head = 0.0
        self.said: list[str] = []
        context = get_context("spawn")  # a fork would share what BLAS has started
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(suite, name, theirs), daemon=True)
        self._process.start()
        theirs.close()  # else the child's end would go unnoticed

    def enter(self, workload: Workload, dtype: str, seconds: float) -> int:
        """Set up a workload; returns how many epochs take about this many seconds."""
        self.said = []
        self._ask((workload, dtype))
        first = self.time(workload.head)
        epochs = 1
        while (elapsed := self.time(epochs)) < seconds / 4:
            epochs = ceil(epochs * min(seconds / elapsed, 10.0))
        self.head = max(0.0, first - workload.head * elapsed / epochs)
        return max(1, round(epochs * seconds / elapsed))

    def time(self, epochs: int) -> float:
        """Seconds that this many epochs take, from fresh parameters."""
        elapsed, self.curve = self._ask(epochs)
        return float(elapsed)

    def memory(
        self, workload: Workload, dtype: str, peak: Callable[[], int | None]
    ) -> tuple[int | None, int | None]:
        """Bytes of a GPU that training takes, None where unknown.

        Those that ``peak`` returns, and those that the device has fewer of.
        """
        before = self._ask(free_memory)
        self._ask((workload, dtype))
        self.time(workload.head)
        most, after = self._ask(peak), self._ask(free_memory)
        return most, None if before is None else before - after

    def close(self) -> None:
        self._pipe.close()
        self._process.join()

    def _ask(self, request: Any) -> Any:
        try:
            self._pipe.send(request)
            reply, failure, said = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise ContestantError("its process died") from error
        self.said += [text for text in said if text not in self.said]
        if failure:
            raise ContestantError(failure)
        return reply


@dataclass
class Results:
    """By contestant and workload: a time in each round, losses, what went wrong, and warnings.

    ``heads`` are the seconds that the first epochs took longer than later ones.
    """

    samples: dict[str, dict[int, list[float]]]
    heads: dict[str, dict[int, float]]
    curves: dict[str, dict[int, Sequence[float]]]
    failures: dict[str, dict[int, str]]
    warnings: dict[str, dict[int, list[str]]]


def measure(args: argparse.Namespace, dtype: str) -> Results:
    """Time all contestants on all workloads, a workload after the other."""
    names, suite = args.only, SUITES[args.suite]
    results = Results(*({name: {} for name in names} for _ in range(5)))
    failures = results.failures
    workers: dict[str, Worker] = {}
    for name in names:
        try:
            workers[name] = Worker(args.suite, name)
        except ContestantError as error:
            failures[name] = dict.fromkeys(args.workloads, str(error))
    for number in args.workloads:
        workload, epochs = suite.workloads[number], {}
        for i in range(args.rounds + 1):  # the first only prepares
            print(f"{dtype}, workload {number}, round {i} of {args.rounds}", file=sys.stderr)
            turn = i % len(names)
            for name in [*names[turn:], *names[:turn]]:
                if number in failures[name]:
                    continue
                try:
                    if i == 0:
                        epochs[name] = workers[name].enter(workload, dtype, args.seconds)
                        results.samples[name][number] = []
                        results.heads[name][number] = workers[name].head
                        results.warnings[name][number] = workers[name].said
                    else:
                        steps = epochs[name] * workload.steps
                        elapsed = workers[name].time(epochs[name])
                        results.samples[name][number].append(suite.per_second * elapsed / steps)
                        results.curves[name][number] = workers[name].curve
                except ContestantError as error:
                    failures[name][number] = str(error)
                    results.samples[name].pop(number, None)
    for worker in workers.values():
        worker.close()
    return results


# ---------------------------------------------------------------- the report


def text(cell: Any) -> str:
    """Of a cell; a float with three digits, or all before the point, and None as a dash."""
    if isinstance(cell, float):
        return f"{cell:.{2 if cell < 10 else 1 if cell < 100 else 0}f}"
    return "–" if cell is None else str(cell)


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown, columns but the first aligned to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(map(text, row))} |" for row in (header, rule, *rows))


def report(args: argparse.Namespace, dtype: str, results: Results) -> Iterator[str]:
    """Paragraphs of Markdown."""
    numbers, suite = args.workloads, SUITES[args.suite]
    samples, failures = results.samples, results.failures
    medians = {name: {n: median(s) for n, s in own.items()} for name, own in samples.items()}

    marks: dict[tuple[str, str], int] = {}  # of the footnotes
    for name, warned in results.warnings.items():
        for warning in chain.from_iterable(warned.values()):
            marks.setdefault((name, warning), len(marks) + 1)

    def marked(number: float | None, names: Sequence[str], among: Iterable[int]) -> str:
        """Return a cell, with the marks of what these contestants warned of at these workloads."""
        if number is None:
            return text(None)
        own = {marks[name, w] for name in names for n in among for w in results.warnings[name][n]}
        return " ".join([text(number), *(f"[{mark}]" for mark in sorted(own))])

    def row(name: str, own: Mapping[int, float], *others: str) -> list[str]:
        return [name, *(marked(own.get(n), [name, *others], [n]) for n in numbers)]

    yield (
        f"In {dtype}, {suite.unit}: medians of {args.rounds} interleaved"
        f" rounds of about {args.seconds:g} s."
    )
    yield "\n".join(f"{number}. {suite.workloads[number]}" for number in numbers)
    yield table([suite.unit, *numbers], [row(name, own) for name, own in medians.items()])
    if marks:
        yield "\n".join(f"- [{mark}] {name}: {w}" for (name, w), mark in marks.items())
    if suite.unit == "µs a step":
        yield (
            "Milliseconds that the first epochs, at least two and 20 steps, took longer than later"
            " ones: late imports, and what JAX, torch.compile, and the C compiler of portable_mlp"
            " numpy, compile."
        )
        heads = {name: {n: 1e3 * s for n, s in own.items()} for name, own in results.heads.items()}
        yield table(["ms", *numbers], [row(name, own) for name, own in heads.items()])

    reference = next(iter(suite.contestants))
    own = medians.pop(reference, {})
    rows = []
    for name, peer in medians.items():
        ratios = {n: own[n] / peer[n] for n in numbers if n in own and n in peer}
        if ratios:
            mean = marked(geometric_mean(ratios.values()), [reference, name], ratios)
            rows.append([*row(name, ratios, reference), mean])
    if rows:
        yield f"Time of {reference} ÷ time of the peer; below 1, {reference} is faster."
        yield table([f"{reference} ÷", *numbers, "geometric mean"], rows)

    if curves := results.curves.pop(reference, {}):
        for name, others in results.curves.items():
            gaps = [largest_gap(curves[n], others[n]) for n in numbers if curves.get(n)]
            if gaps:
                yield (
                    f"Largest relative difference of the loss curves from {name}'s:"
                    f" {', '.join(f'{gap:.1e}' for gap in gaps)}."
                )

    notes = [
        f"- {name}: {reason} (workloads {', '.join(str(n) for n in bad if bad[n] == reason)})"
        for name, bad in failures.items()
        for reason in dict.fromkeys(bad.values())
    ]
    # What else the machine computes slows the threads of one product several times over
    notes += [
        f"- {name}, workload {n}: unsteady, {min(s):.3g} to {max(s):.3g} {suite.unit}"
        for name, own_samples in samples.items()
        for n, s in own_samples.items()
        if max(s) > 1.5 * min(s)
    ]
    if notes:
        yield "\n".join(notes)


def largest_gap(curve: Sequence[float], other: Sequence[float]) -> float:
    """Of two curves, epoch for epoch."""
    return max(abs(a - b) / abs(b) for a, b in zip(curve, other, strict=True))


def draw_growth(args: argparse.Namespace) -> Path:
    """How the time of a step grows with the network's and the data's size, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 6.0), layout="constrained")
    for axis, ax in zip(AXES, figure.subplots(2, 2, sharey=True).flat, strict=True):
        suite = SUITES[axis]
        settings = {"suite": axis, "workloads": [*suite.workloads], "only": [*suite.contestants]}
        found = measure(argparse.Namespace(**{**vars(args), **settings}), "float32")
        for name, style in zip(suite.contestants, ("o-", "s--"), strict=True):
            times = found.samples[name]
            ax.loglog([*times], [median(s) for s in times.values()], style, label=name)
        ax.set(xlabel={"rows": "rows in all", "batch": "rows of a batch"}.get(axis, axis))
        ax.grid(alpha=0.3, which="both")
        ax.set_ylabel("µs a step")
        ax.legend()
    figure.suptitle("64-64-64-10, batch 200, 10 000 rows, Adam, float32; one thing varied")
    figure.savefig(args.growth, dpi=120)
    return args.growth  # type: ignore[no-any-return]


def memory() -> Iterator[str]:
    """Paragraphs of Markdown: what a fit, and a prediction, take beside the data."""
    from portable_mlp import MLPClassifier

    warnings.simplefilter("ignore")
    MLPClassifier((4,), max_iter=1).fit(*normal_rows(300, 5, 3, "float32"))  # imports
    yield (
        "Peak memory of a fit by Adam in float32, beside X and y, in MB.  Allowed: the rows'"
        " order and class numbers (12 bytes a row), 3 batches of all layers' activations, and 4"
        " vectors of all parameters, 5 with early stopping."
    )
    rows: list[list[Any]] = []
    for workload in (WORKLOADS[4], WORKLOADS[5]):
        for early in (False, True):
            sizes = workload.sizes
            X, y = workload.data("float32")
            model = MLPClassifier(
                sizes[1:-1], batch_size=workload.batch, max_iter=3, early_stopping=early
            )
            peak = peak_of(model.fit, X, y)
            n_params = sum(a * b + b for a, b in pairwise(sizes))
            allowed = 12 * len(X) + 4 * (3 * workload.batch * sum(sizes) + (4 + early) * n_params)
            case = f"{workload}{', early stopping' if early else ''}"
            rows.append([case, X.nbytes / 1e6, peak / 1e6, allowed / 1e6])
    yield table(["fit", "X", "peak", "allowed"], rows)
    X, y = normal_rows(1_000_000, 20, 3, "float32")
    model = MLPClassifier((100,), max_iter=1).fit(X[:1000], y[:1000])
    rows = [
        [f"{n} rows", X[:n].nbytes / 1e6, peak_of(model.predict_proba, X[:n]) / 1e6]
        for n in (100_000, 1_000_000)
    ]
    yield "Peak memory of `predict_proba`, its result included, in MB: 20-100-3."
    yield table(["predict_proba of", "X", "peak"], rows)


def gpu_memory(names: Sequence[str]) -> Iterator[str]:
    """Paragraphs of Markdown: what training takes of a GPU, for those of `PEAKS`."""
    rows, notes = [], []
    for name in (name for name in names if name in PEAKS):
        cells: list[float | None] = []
        for number in (4, 5):
            found: Sequence[int | None] = (None, None)
            said: list[str] = []
            try:
                worker = Worker("gpu", name)
                with closing(worker):
                    said = worker.said
                    found = worker.memory(ON_A_GPU[number], "float32", PEAKS[name])
            except ContestantError as error:
                said = [*said, str(error)]
            cells += [None if n is None else n / 1e6 for n in found]
            notes += [f"- {name}, workload {number}: {each}" for each in said]
        rows.append([name, *cells])
    yield (
        "Memory of the GPU that training in float32 takes, data included, in MB: at the peak, as"
        " the library counts (CuPy all that its pool took, torch and JAX what arrays held); and"
        " by how much less is free afterwards, CUDA's context aside."
    )
    yield "\n".join(f"{number}. {ON_A_GPU[number]}" for number in (4, 5))
    yield table(["MB", *(f"{n}, {what}" for n in (4, 5) for what in ("peak", "less free"))], rows)
    if notes:
        yield "\n".join(notes)


def peak_of(function: Any, *arguments: Any) -> int:
    """Most bytes that Python and NumPy held at once during a call, beyond those before."""
    tracemalloc.start()
    function(*arguments)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def machine(device: str) -> dict[str, str]:
    """Return what the numbers hold for."""
    cpu = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    facts = {
        "date": date.today().isoformat(),
        "system": f"{platform.system()} {platform.machine()}",
        "CPU": cpu,
        "cores": str(len(affinity(0)) if affinity else os.cpu_count()),
        "Python": platform.python_version(),
    }
    asked = {"name": "GPU"}
    if device == "gpu":
        asked |= {"driver_version": "driver", "clocks.max.sm": "highest compute clock"}
    if smi := shutil.which("nvidia-smi"):
        query = [smi, f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True, check=False)
        if gpus.returncode == 0:
            columns = zip(*(line.split(", ") for line in gpus.stdout.splitlines()), strict=False)
            facts |= zip(asked.values(), map(", ".join, columns), strict=False)
    if device == "gpu":
        with suppress(Exception):  # no CuPy, no driver, no cuBLAS: no common base
            cuda = import_module("cupy").cuda
            facts["CUDA runtime"] = str(cuda.runtime.runtimeGetVersion())
            facts["cuBLAS"] = str(cuda.cublas.getVersion(cuda.get_cublas_handle()))
    distributions = packages_distributions()
    for module in dict.fromkeys([*(m for _, m in STEPPERS.values()), "cupy"]):
        if find_spec(module):
            distribution = distributions.get(module, [module])[0]
            facts[distribution] = version(distribution)
    return facts


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--fit", dest="suite", action="store_const", const="fits", default="steps",
        help="time whole fits of the estimators, instead of steps",
    )  # fmt: skip
    add(
        "--tricks", dest="suite", action="store_const", const="tricks",
        help="time steps without one or the other thing that makes NumPy's engine fast",
    )  # fmt: skip
    add(
        "--device", choices=["cpu", "gpu"], default="cpu",
        help="whose contestants (default: %(default)s)",
    )  # fmt: skip
    add("--growth", type=Path, metavar="FILE.png", help="also draw how the time of a step grows")
    add(
        "--memory", action="store_true",
        help="print the memory that a fit, or training on a GPU, takes, and nothing else",
    )  # fmt: skip
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=1.0, help="of each timed run, about")
    add("--json", type=Path, metavar="FILE", help="write every sample here too")
    add("--workloads", metavar="1,2,...", help="all by default")
    add("--only", metavar="NAME,...", help="all by default")
    add("--dtype", metavar="float32,float64", help="default: float32, of fits both")
    args = parser.parse_args()
    if args.rounds < 1 or args.seconds <= 0.0:
        parser.error("--rounds must be at least 1, and --seconds above 0")
    if args.device == "gpu" and args.suite == "steps":
        args.suite = "gpu"
    suite = SUITES[args.suite]

    def chosen(text: str | None, known: Sequence[Any], default: Sequence[Any]) -> list[Any]:
        if text is None:
            return list(default)
        by_name = {str(key): key for key in known}
        names = [name.strip() for name in text.split(",")]
        if unknown := set(names) - set(by_name):
            parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(by_name)}")
        return [by_name[name] for name in names]

    args.workloads = chosen(args.workloads, [*suite.workloads], [*suite.workloads])
    args.only = chosen(args.only, [*suite.contestants], [*suite.contestants])
    args.dtype = chosen(args.dtype, ["float32", "float64"], suite.dtypes)
    return args


def main() -> None:
    args = parse_args()
    if args.memory:
        print("\n\n".join(gpu_memory(args.only) if args.device == "gpu" else memory()))
        return
    results = {dtype: measure(args, dtype) for dtype in args.dtype}
    document = {
        "machine": machine(args.device),
        "settings": {key: getattr(args, key) for key in ("suite", "rounds", "seconds")},
        "workloads": {
            number: str(SUITES[args.suite].workloads[number]) for number in args.workloads
        },
        "unit": SUITES[args.suite].unit,
        "results": {
            dtype: {
                "samples": found.samples,
                "heads": found.heads,
                "failures": found.failures,
                "warnings": found.warnings,
            }
            for dtype, found in results.items()
        },
    }
    for dtype, found in results.items():
        print("\n\n".join(report(args, dtype, found)), end="\n\n")
    if args.growth:
        print(f"How the time grows: {draw_growth(args)}", end="\n\n")
    print("; ".join(f"{key} {value}" for key, value in document["machine"].items()))
    if args.json:
        args.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
