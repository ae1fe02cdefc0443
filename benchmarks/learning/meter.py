"""What a training takes of the first NVIDIA GPU: energy and memory, sampled while it runs."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

SECONDS_BETWEEN_SAMPLES = 0.1


@dataclass(frozen=True)
class Sample:
    """What the driver said at a time: `time` as time.time(), joules since it was loaded, bytes."""

    time: float
    joules: float
    bytes_in_use: int


class Meter:
    """Samples of the whole GPU while the block runs; all zeros without a GPU or its library.

    They mean something for one training where nothing else uses the GPU.
    """

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._device = find_device()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Meter:
        self.samples.append(self._read())
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over.set()
        self._thread.join()
        self.samples.append(self._read())

    @property
    def seconds(self) -> float:
        """From the first sample to the last."""
        return self.samples[-1].time - self.samples[0].time

    @property
    def joules(self) -> float:
        """From the first sample to the last."""
        return self.joules_until(self.samples[-1].time)

    @property
    def added_bytes(self) -> int:
        """The most memory in use, less what was in use at the beginning."""
        return max(s.bytes_in_use for s in self.samples) - self.samples[0].bytes_in_use

    def joules_until(self, moment: float) -> float:
        """From the first sample to the last one before a moment, which is as time.time() is."""
        before = [sample for sample in self.samples if sample.time <= moment]
        return before[-1].joules - before[0].joules if before else 0.0

    def _sample(self) -> None:
        while not self._is_over.wait(SECONDS_BETWEEN_SAMPLES):
            self.samples.append(self._read())

    def _read(self) -> Sample:
        if self._device is None:
            return Sample(time.time(), 0.0, 0)
        import pynvml

        return Sample(
            time.time(),
            pynvml.nvmlDeviceGetTotalEnergyConsumption(self._device) / 1000,
            int(pynvml.nvmlDeviceGetMemoryInfo(self._device).used),
        )


def find_device() -> Any:
    """NVML's handle of the first GPU; None without one."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByIndex(0)
    except Exception:  # of the import, the library or the driver: there is no such GPU
        return None
