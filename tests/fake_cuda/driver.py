"""CUDA's rules on the host: who owns memory, what runs when, what may be captured.

What CUDA would do silently wrong is written down in `Driver.faults`; what it refuses raises.
Nothing runs before somebody waits for it, or before CuPy's own functions work on the same
stream: so what is not ordered by CUDA's rules comes too late.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from bisect import bisect_right, insort
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

NAMES = {
    2: "cudaErrorMemoryAllocation: out of memory",
    3: "cudaErrorInitializationError: initialization error",
    35: "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version",
    100: "cudaErrorNoDevice: no CUDA-capable device is detected",
    101: "cudaErrorInvalidDevice: invalid device ordinal",
    400: "cudaErrorInvalidResourceHandle: invalid resource handle",
    700: "cudaErrorIllegalAddress: an illegal memory access was encountered",
    900: "cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing",
    901: "cudaErrorStreamCaptureInvalidated: operation failed due to a previous error during"
    " capture",
    906: "cudaErrorStreamCaptureImplicit: operation would make the legacy stream depend on a"
    " capturing blocking stream",
}


class CUDARuntimeError(RuntimeError):
    """As CuPy's: with a status."""

    def __init__(self, status: int) -> None:
        super().__init__(NAMES[status])
        self.status = status


class OutOfMemoryError(MemoryError):
    """As that of CuPy's pool."""


@dataclass(order=True)
class Allocation:
    """A piece of device memory; known by its address, it keeps nothing alive."""

    address: int
    size: int
    device: int = field(compare=False)
    stream: Queue = field(compare=False)
    alive: bool = field(default=True, compare=False)


@dataclass
class Capture:
    """What a stream records instead of running it."""

    nodes: list[Node] = field(default_factory=list)
    invalid: str = ""


@dataclass(eq=False)
class Queue:
    """A stream as the driver sees it."""

    pointer: int
    device: int
    blocking: bool
    work: deque[Callable[[], None]] = field(default_factory=deque)
    capture: Capture | None = None
    captured: bool = False
    alive: bool = True


@dataclass(frozen=True)
class Node:
    """A launch: a function of raw addresses, and whose memory these were."""

    name: str
    run: Callable[[], None]
    memory: tuple[Allocation, ...]


def _join_neighbours(pieces: list[tuple[int, int]]) -> None:
    """Make one piece of memory of those that touch, in place."""
    joined: list[tuple[int, int]] = []
    for address, size in sorted(pieces):
        if joined and sum(joined[-1]) == address:
            joined[-1] = joined[-1][0], joined[-1][1] + size
        else:
            joined.append((address, size))
    pieces[:] = joined


class Driver:
    """A machine with GPUs.

    Parameters
    ----------
    mode : {"poison", "reuse"}
        What happens to freed memory: it is overwritten, or handed out again, the smallest
        piece that is large enough first, as by CuPy's pool.
    n_devices : int
    limit : int, optional
        Bytes of memory of each device.
    threads : int
        Of a block, at most: kernels run with any number.

    Attributes
    ----------
    faults : list of str
        Broken rules that CUDA would not report.
    invalidated : list of str
        What invalidated a capture.
    counts : Counter
        Of kernels, products, captures and replays.
    hooks : dict
        By event ("allocate", "launch", "product", "begin_capture", "capturing", "end_capture",
        "replay"): a function that is called with what it is about.  It may raise, but in
        "capturing".
    """

    ARENA = 1 << 30
    GUARD = 1 << 20  # a wrong index of a kernel stays within the arena

    def __init__(
        self, mode: str = "poison", n_devices: int = 2, limit: int | None = None, threads: int = 1
    ) -> None:
        self.mode, self.n_devices, self.limit, self.threads = mode, n_devices, limit, threads
        self.faults: list[str] = []
        self.invalidated: list[str] = []
        self.counts: Counter[str] = Counter()
        self.hooks: dict[str, Callable[..., None]] = {}
        self.lock = threading.RLock()
        self.local = threading.local()
        self.process = os.getpid()
        self.failed: CUDARuntimeError | None = None
        self.blas: Any = None
        self._arena = mmap.mmap(-1, self.ARENA)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._arena))
        self._top = self._base + self.GUARD
        self._live: list[Allocation] = []
        self._freed: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        self._null = [Queue(0, device, True) for device in range(n_devices)]
        self._streams: dict[int, Queue] = {}
        self._pointers = iter(range(0x1000, 1 << 30, 0x10))

    def event(self, name: str, *about: Any) -> None:
        self.check()
        if name in self.hooks:
            self.hooks[name](*about)

    def check(self) -> None:
        if os.getpid() != self.process:
            raise CUDARuntimeError(3)
        if self.failed is not None:
            raise self.failed

    # ------------------------------------------------------------ devices

    @property
    def device(self) -> int:
        """The thread's current device."""
        return getattr(self.local, "device", 0)

    @device.setter
    def device(self, number: int) -> None:
        self.check()
        if not 0 <= number < self.n_devices:
            raise CUDARuntimeError(101)
        self.local.device = number

    # ------------------------------------------------------------ memory

    def allocate(self, n_bytes: int) -> Allocation:
        """Take memory on the current device, for the current stream."""
        size = max(-(-int(n_bytes) // 512) * 512, 512)
        with self.lock:
            self.event("allocate", size)
            taken = self.taken(self.device)
            if self.limit is not None and taken + size > self.limit:
                raise OutOfMemoryError(
                    f"Out of memory allocating {size:,} bytes (allocated so far: {taken:,} bytes)."
                )
            stream = self.current
            made = Allocation(self._place(size, stream), size, self.device, stream)
            insort(self._live, made)
        return made

    def _place(self, size: int, stream: Queue) -> int:
        """Find an address: of freed memory if it is reused, else of memory never used before."""
        free = self._freed[self.device, stream.pointer]
        piece = None
        if self.mode == "reuse":
            piece = min((p for p in free if p[1] >= size), key=lambda p: p[1], default=None)
        elif self._top + size > self._base + self.ARENA:
            # The one freed first, as long as it is large enough
            if not (free and free[0][1] >= size):
                _join_neighbours(free)
            piece = next((p for p in free if p[1] >= size), None)
        if piece is not None:
            free.remove(piece)
            if piece[1] > size:
                free.append((piece[0] + size, piece[1] - size))
            return piece[0]
        address = self._top
        self._top += size
        assert self._top <= self._base + self.ARENA, "the emulation's memory is used up"
        self._fill(address, size)  # what was never written is no number
        return address

    def free(self, allocation: Allocation) -> None:
        """Give memory back; the work that is queued on its stream comes first."""
        with self.lock:
            allocation.alive = False
            self._live.remove(allocation)
            stream, address, size = allocation.stream, allocation.address, allocation.size
            self._freed[allocation.device, stream.pointer].append((address, size))
            if self.mode == "poison":
                if stream.alive and stream.work:
                    stream.work.append(lambda: self._fill(address, size))
                else:
                    self._fill(address, size)

    def _fill(self, address: int, size: int) -> None:
        ctypes.memset(address, 0xFF, size)

    def taken(self, device: int) -> int:
        """Bytes that are in use."""
        return sum(a.size for a in self._live if a.device == device)

    def find(self, address: int, n_bytes: int) -> Allocation | None:
        """Whose memory this is, if it is in use."""
        with self.lock:
            i = bisect_right(self._live, address, key=lambda a: a.address) - 1
        if i >= 0:
            a = self._live[i]
            if address + n_bytes <= a.address + a.size:
                return a
        return None

    def raw(self, address: int, shape: Any, dtype: Any, strides: Any = None) -> np.ndarray:
        """What is at an address, whoever owns it."""
        return np.ndarray(shape, dtype, self._arena, address - self._base, strides)

    # ------------------------------------------------------------ streams

    @property
    def current(self) -> Queue:
        """The thread's current stream on its current device."""
        streams = self.local.__dict__.setdefault("streams", {})
        found: Queue = streams.get(self.device, self._null[self.device])
        return found

    @current.setter
    def current(self, queue: Queue) -> None:
        self.local.__dict__.setdefault("streams", {})[queue.device] = queue

    def stream(self, blocking: bool) -> Queue:
        """Create a stream on the current device."""
        self.check()
        queue = Queue(next(self._pointers), self.device, blocking)
        self._streams[queue.pointer] = queue
        return queue

    def queue(self, pointer: int) -> Queue | None:
        """The stream of a pointer on the current device; None if it was destroyed."""
        return self._null[self.device] if pointer == 0 else self._streams.get(pointer)

    def destroy(self, queue: Queue) -> None:
        with self.lock:
            if os.getpid() == self.process:
                self.flush(queue)
            queue.alive = False
            self._streams.pop(queue.pointer, None)

    def submit(self, queue: Queue, node: Node) -> None:
        """Queue a launch on a stream, or add it to what the stream captures."""
        with self.lock:
            self.check()
            if not queue.alive:
                raise CUDARuntimeError(400)
            if queue.capture is not None:
                if queue.capture.invalid:
                    raise CUDARuntimeError(901)
                queue.capture.nodes.append(node)
                return
            self._order(queue)
            self.verify([node])
            queue.work.append(node.run)

    def verify(self, nodes: Iterable[Node]) -> None:
        """Note what is launched on memory that has been freed."""
        for node in nodes:
            if not all(a.alive for a in node.memory):
                self.faults.append(f"{node.name} uses memory that was freed")

    def _order(self, queue: Queue) -> None:
        """Let the legacy default stream and blocking streams wait for each other."""
        if queue.pointer == 0:
            for other in list(self._streams.values()):
                if other.device == queue.device and other.blocking:
                    if other.capture is not None:
                        self._invalidate(other, "work on the legacy default stream")
                        raise CUDARuntimeError(906)
                    self.flush(other)
        elif queue.blocking:
            self.flush(self._null[queue.device])

    def flush(self, queue: Queue) -> None:
        """Run what is queued."""
        with self.lock:
            while queue.work:
                work = queue.work.popleft()
                try:
                    work()
                except CUDARuntimeError as error:
                    self.failed = error  # what fails on the device ends the whole process's CUDA
                    queue.work.clear()

    def synchronize(self, queue: Queue) -> None:
        """Wait for a stream."""
        with self.lock:
            self.check()
            if queue.capture is not None:
                self._invalidate(queue, "synchronisation of the stream that captures")
                raise CUDARuntimeError(900)
            self._order(queue)
            self.flush(queue)
            self.check()

    def synchronize_device(self, device: int, why: str) -> None:
        """Wait for all streams of a device, which none of them may be capturing for."""
        with self.lock:
            self.check()
            queues = [self._null[device], *self._streams.values()]
            own = [q for q in queues if q.device == device]
            for queue in own:
                if queue.capture is not None:
                    self._invalidate(queue, why)
            if any(queue.capture is not None for queue in own):
                raise CUDARuntimeError(900)
            for queue in own:
                self.flush(queue)
            self.check()

    def _invalidate(self, queue: Queue, why: str) -> None:
        assert queue.capture is not None
        queue.capture.invalid = queue.capture.invalid or why
        self.invalidated.append(why)

    # ------------------------------------------------------------ graphs

    def begin_capture(self, queue: Queue) -> None:
        self.event("begin_capture")
        if queue.pointer == 0:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        if queue.capture is not None:
            raise CUDARuntimeError(900)
        queue.capture, queue.captured = Capture(), True
        self.event("capturing")

    def end_capture(self, queue: Queue) -> list[Node]:
        self.check()
        capture, queue.capture = queue.capture, None
        if capture is None:
            raise CUDARuntimeError(900)
        if capture.invalid:
            raise CUDARuntimeError(901)
        self.event("end_capture", capture.nodes)
        self.counts["captures"] += 1
        return capture.nodes

    def replay(self, nodes: list[Node], device: int) -> None:
        """Launch a graph on the current stream."""
        with self.lock:
            self.event("replay")
            queue = self.current
            if queue.capture is not None or queue.device != device:
                raise CUDARuntimeError(400)
            self._order(queue)
            self.verify(nodes)
            self.counts["replays"] += 1
            queue.work.extend(node.run for node in nodes)
