"""What the cases of `bench/gpu.py` share: seconds and peak memory on a device, the matmul
ceiling, and lines of results.
"""

import json
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from gpu_models import FULL, SMOKE, Size


class Place(NamedTuple):
    "Where a case runs, and what it may use."

    device: str  # cuda or cpu
    size: Size
    inputs: Path
    lines: Path  # results are added here as they come
    ends: float  # when to begin nothing more, of time.monotonic

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def half(self) -> str:
        "The type that is computed in."
        return "bfloat16" if self.cuda else "float32"

    def is_late(self) -> bool:
        return time.monotonic() > self.ends

    def tell(self, case: str, side: str, **more: Any):
        "A line of the results."
        with self.lines.open("a") as file:
            file.write(json.dumps(dict(case=case, side=side) | more) + "\n")


def place_of(a: Any, inputs: Path) -> Place:
    "As the command line says."
    size = SMOKE if a.smoke else FULL
    return Place(a.device, size, inputs, a.lines, time.monotonic() + a.limit)


def now(place: Place) -> float:
    "Seconds, when the device has done all it was given."
    import torch

    if place.cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_from_here(place: Place):
    "Forget what memory was used before."
    import torch

    if place.cuda:
        torch.cuda.reset_peak_memory_stats()


def peak(place: Place) -> float | None:
    "Most memory in use since then, MB."
    import torch

    return round(torch.cuda.max_memory_allocated() / 2**20) if place.cuda else None


def empty(place: Place):
    "Give back what nobody holds."
    import gc

    import torch

    gc.collect()
    if place.cuda:
        torch.cuda.empty_cache()


def seconds_of(run: Callable[[], Any], place: Place, warm: int = 2, times: int = 5) -> float:
    "Of one call, the mean of several."
    for _ in range(warm):
        run()
    start = now(place)
    for _ in range(times):
        run()
    return (now(place) - start) / times


@contextmanager
def told(place: Place, case: str, side: str, **more: Any):
    "An error inside is a line of the results; what comes behind goes on."
    try:
        yield
    except Exception as e:  # whatever a kernel, a compiler or a peer may say
        said = f"{type(e).__name__}: {str(e)[:600]}"
        place.tell(case, side, error=said, **more)


def ceiling(place: Place) -> float:
    "Operations per second of one large matrix product, in the type that is computed in."
    import torch

    n = place.size.gemm
    dtype = getattr(torch, place.half)
    left = torch.randn(n, n, device=place.device).to(dtype)
    right = torch.randn(n, n, device=place.device).to(dtype)
    return 2 * n**3 / seconds_of(lambda: left @ right, place, warm=3, times=10)
