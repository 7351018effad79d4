"""What the machine does while a step works, as MLflow's page shows it: processor, memory, disk, network, GPUs.

Sampled by the process that sends a run's records, never by the one that trains. Names, units and environment variables
are those of MLflow's own system metrics; its monitor would end with the first request that the server does not answer.
GPUs are asked for by `nvidia-smi`: NVML's Python binding would be one more dependency.
"""

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from opensora.tracking.spool import SYSTEM, SpoolWriter, count_records

ENABLED = "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"  # unless it is false
INTERVAL = "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"
EVERY_S = 10.0
PREFIX = "system/"
MEGABYTE, MEBIBYTE = 1e6, 2**20
GPU_FIELDS = ("index", "utilization.gpu", "memory.used", "memory.total", "power.draw", "enforced.power.limit")
GPU_COMMAND = ("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits")
GPU_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 1.0


class SystemMetrics:
    """A thread that samples the machine into a spool of its own beside that of a run.

    Args:
        root: folder of all results, whose disk is looked at.
        place: of the run's spool.
        say: told if the interval cannot be read.
    """

    def __init__(self, root: Path, place: Path, say: Callable[[str], None]) -> None:
        self._root, self._spool, self._say = root, SpoolWriter(place / SYSTEM), say
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="system metrics")

    def start(self) -> None:
        """Sample until `stop`, unless that is switched off."""
        if os.environ.get(ENABLED, "").lower() not in ("false", "0"):
            self._thread.start()

    def stop(self) -> None:
        """Sample no more; what was sampled is in the spool."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)

    def _watch(self) -> None:
        machine, every_s = Machine(self._root), self._read_interval()
        step = count_records(self._spool.path.parent)  # a run that goes on counts on
        while not self._stopped.wait(every_s):
            values = {PREFIX + name: round(value, 1) for name, value in machine.sample().items()}
            if self._stopped.is_set():  # nobody would send it
                break
            self._spool.append({"kind": "metrics", "step": step, "values": values, "time": time.time_ns() // 1_000_000})
            step += 1

    def _read_interval(self) -> float:
        text = os.environ.get(INTERVAL) or str(EVERY_S)
        with suppress(ValueError):
            if 0 < (seconds := float(text)) <= threading.TIMEOUT_MAX:
                return seconds
        self._say(f"{INTERVAL} is {text}, which is no number of seconds; the machine is sampled every {EVERY_S:g} s")
        return EVERY_S


class Machine:
    """This machine; in a container the network is its own, the rest is the node's.

    Args:
        folder: on the disk that counts.
    """

    def __init__(self, folder: Path) -> None:
        import psutil

        self._folder = folder
        self._has_gpus = shutil.which(GPU_COMMAND[0]) is not None
        self._network = psutil.net_io_counters()
        psutil.cpu_percent()  # the next call measures from here

    def sample(self) -> dict[str, float]:
        """By MLflow's names without the prefix; what cannot be measured is absent.

        `cpu_utilization_percentage` since the sample before, `network_..._megabytes` since the beginning.
        """
        import psutil

        memory = psutil.virtual_memory()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
        }
        with suppress(OSError):
            disk = psutil.disk_usage(str(self._folder))
            values["disk_usage_percentage"] = disk.percent
            values["disk_usage_megabytes"] = disk.used / MEGABYTE
            values["disk_available_megabytes"] = disk.free / MEGABYTE
        if (start := self._network) and (now := psutil.net_io_counters()):
            values["network_receive_megabytes"] = (now.bytes_recv - start.bytes_recv) / MEGABYTE
            values["network_transmit_megabytes"] = (now.bytes_sent - start.bytes_sent) / MEGABYTE
        if self._has_gpus:
            with suppress(OSError, subprocess.SubprocessError):
                done = subprocess.run(GPU_COMMAND, capture_output=True, text=True, timeout=GPU_TIMEOUT_S, check=True)
                values |= parse_gpus(done.stdout)
        return values


def parse_gpus(text: str) -> dict[str, float]:
    """Metrics of the lines that GPU_COMMAND prints, one a GPU; a field such as `[N/A]` is absent."""
    values: dict[str, float] = {}
    for line in text.splitlines():
        fields = dict(zip(GPU_FIELDS, (part.strip() for part in line.split(",")), strict=False))
        numbers = {}
        for name, field in fields.items():
            with suppress(ValueError):
                numbers[name] = float(field)
        if "index" not in numbers:
            continue
        gpu = f"gpu_{numbers['index']:.0f}_"
        if "utilization.gpu" in numbers:
            values[f"{gpu}utilization_percentage"] = numbers["utilization.gpu"]
        if "memory.used" in numbers:
            values[f"{gpu}memory_usage_megabytes"] = numbers["memory.used"] * MEBIBYTE / MEGABYTE
        if "power.draw" in numbers:
            values[f"{gpu}power_usage_watts"] = numbers["power.draw"]
        for part, whole, name in (
            ("memory.used", "memory.total", "memory_usage_percentage"),
            ("power.draw", "enforced.power.limit", "power_usage_percentage"),
        ):
            if part in numbers and numbers.get(whole):
                values[f"{gpu}{name}"] = 100 * numbers[part] / numbers[whole]
    return values
