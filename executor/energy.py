"""Energy meters, and the watts of the device classes.

A meter's name goes with every figure it gives, because figures of different meters do not
compare: the reference (arXiv 2605.09623) counts 12 W x compute time on its edge, RAPL counts a
processor package, NVML a graphics card, the Pi's PMIC the board's rails.
"""

from __future__ import annotations

import importlib
import logging
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from executor.errors import ConfigError
from executor.profile import NodePower

__all__ = [
    "DEVICE_POWER",
    "ConstantPowerMeter",
    "Meter",
    "NvmlMeter",
    "PiPmicMeter",
    "PowerModelMeter",
    "RaplMeter",
    "best_meter",
    "device_power",
]

POWERCAP = Path("/sys/class/powercap")
VCGENCMD = ("vcgencmd", "pmic_read_adc")
REFERENCE_EDGE_W = 12.0
# Sum of the rails to the board's input, as users fitted it against a meter (unverified here).
PMIC_SCALE, PMIC_OFFSET_W = 1.1451, 0.5879

_log = logging.getLogger(__name__)
_RAIL = re.compile(r"^\s*(\w+)_([AV])\s+(?:current|volt)\(\d+\)=([\d.]+)[AV]\s*$", re.MULTILINE)

_PI_RADIO = (
    "transmit: assumed, after the form of the Wi-Fi upload model of Kaup et al., PowerPi, "
    "doi 10.1109/LCN.2014.6925777, at 40 Mbit/s"
)
# compute_w and transmit_w come on top of idle_w.
DEVICE_POWER: dict[str, NodePower] = {
    power.device: power
    for power in (
        NodePower(
            device="pi4",
            idle_w=2.7,
            compute_w=3.7,
            transmit_w=0.26,
            source="Raspberry Pi 4 B, 540 mA idle and 1280 mA under stress on 4 cores at 5 V: "
            "J. Geerling, pidramble.com, power consumption benchmarks (USB meter readings of 2.2 W "
            f"and 5.4 W at chipwired.com agree within 20 %); {_PI_RADIO}",
        ),
        NodePower(
            device="pi5",
            idle_w=4.0,
            compute_w=8.0,
            transmit_w=0.26,
            source="12 W in all while computing: arXiv 2605.09623 (edge); idle assumed; "
            f"{_PI_RADIO}",
        ),
        NodePower(
            device="laptop",
            idle_w=5.0,
            compute_w=15.0,
            transmit_w=1.0,
            source="i7-10510U, 2.549 J / 0.170 s of package energy: arXiv 2605.09623 (fog), also "
            "its TDP; idle and transmit assumed",
        ),
        NodePower(
            device="server",
            idle_w=6.0,
            compute_w=22.5,
            transmit_w=0.5,
            source="assumed: 4 cores' share of a 64-core, 360 W processor; idle and transmit too",
        ),
        NodePower(
            device="gpu-server",
            idle_w=50.0,
            compute_w=31.8,
            transmit_w=0.5,
            source="RTX 4070 Ti desktop, 0.037 J / 1.164 ms of board energy at batch 1: arXiv "
            "2605.09623 (cloud); idle and transmit assumed",
        ),
    )
}


def device_power(device: str) -> NodePower:
    """The watts of a device class.

    Raises:
        ConfigError: No such class.
    """
    try:
        return DEVICE_POWER[device]
    except KeyError:
        known = ", ".join(DEVICE_POWER)
        raise ConfigError(f"unknown device class {device!r}; expected one of {known}") from None


class Meter(Protocol):
    """Counts a node's energy.

    Attributes:
        name: What the figures are, e.g. "rapl"; reported with every one of them.
    """

    name: str

    def note_work(self, active_s: float = 0.0, transmit_s: float = 0.0) -> None:
        """The node computed and transmitted for so long; meters that measure do not need it."""
        ...

    def read_j(self) -> float | None:
        """Joules since the meter was made; None while its source cannot be read."""
        ...


class ConstantPowerMeter:
    """The reference's edge meter: a constant power over the seconds of compute, nothing else."""

    def __init__(self, watts: float = REFERENCE_EDGE_W) -> None:
        self.name = f"constant-{watts:g}W"
        self._watts = watts
        self._total_j = 0.0

    def note_work(self, active_s: float = 0.0, transmit_s: float = 0.0) -> None:
        """Count `active_s`."""
        self._total_j += self._watts * active_s

    def read_j(self) -> float | None:
        """Joules of all compute so far."""
        return self._total_j


class PowerModelMeter:
    """A device class's watts: idle all the time, compute and transmit on top."""

    def __init__(self, power: NodePower, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = f"power-model-{power.device}"
        self._power = power
        self._clock = clock
        self._start_s = clock()
        self._work_j = 0.0

    def note_work(self, active_s: float = 0.0, transmit_s: float = 0.0) -> None:
        """Count both."""
        self._work_j += self._power.compute_w * active_s + self._power.transmit_w * transmit_s

    def read_j(self) -> float | None:
        """Joules since the meter was made."""
        return self._power.idle_w * (self._clock() - self._start_s) + self._work_j


class RaplMeter:
    """Intel and AMD processor packages, from Linux powercap.

    Raises:
        ConfigError: No package zone, or not readable (by default only root may read it).
    """

    name = "rapl"

    def __init__(self, root: Path = POWERCAP) -> None:
        self._zones: dict[Path, int] = {}  # zone: its counter's range, uJ
        self._last_uj: dict[Path, int] = {}
        self._total_uj = 0
        try:
            for zone in sorted(Path(root).glob("intel-rapl:*")):
                # Zones of a package's parts (intel-rapl:0:1) are counted in the package.
                if zone.name.count(":") == 1 and _text(zone / "name").startswith("package"):
                    self._zones[zone] = int(_text(zone / "max_energy_range_uj"))
                    self._last_uj[zone] = int(_text(zone / "energy_uj"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cannot read RAPL under {root}: {error}; run as root, or allow reading energy_uj"
            ) from error
        if not self._zones:
            raise ConfigError(f"no RAPL package zone (intel-rapl:N) under {root}")

    def note_work(self, active_s: float = 0.0, transmit_s: float = 0.0) -> None:
        """Not needed."""

    def read_j(self) -> float | None:
        """Joules of all packages; must be called at least once per range of the counter."""
        try:
            now_uj = {zone: int(_text(zone / "energy_uj")) for zone in self._zones}
        except (OSError, ValueError):
            return None
        for zone, range_uj in self._zones.items():
            step = now_uj[zone] - self._last_uj[zone]
            # The counter runs from 0 to its range, both included.
            self._total_uj += step if step >= 0 else step + range_uj + 1
        self._last_uj = now_uj
        return self._total_uj / 1e6


class _SampledMeter:
    """Integrates samples of power: (P0 + P1) / 2 x t between two of them."""

    name: str

    def __init__(
        self, power_w: Callable[[], float], clock: Callable[[], float], min_interval_s: float
    ) -> None:
        self._power_w = power_w
        self._clock = clock
        self._min_interval_s = min_interval_s
        self._total_j = 0.0
        self._last_s = clock()
        self._last_w = self._power_w()

    def note_work(self, active_s: float = 0.0, transmit_s: float = 0.0) -> None:
        """Not needed."""

    def read_j(self) -> float | None:
        """Joules so far; samples only where the last sample is old enough, as sampling costs."""
        now_s = self._clock()
        elapsed_s = now_s - self._last_s
        if elapsed_s < self._min_interval_s:
            return self._total_j + self._last_w * elapsed_s
        try:
            power_w = self._power_w()
        except ConfigError as error:
            _log.debug("%s: %s", self.name, error)
            return None
        self._total_j += (self._last_w + power_w) / 2.0 * elapsed_s
        self._last_s, self._last_w = now_s, power_w
        return self._total_j


class NvmlMeter(_SampledMeter):
    """An NVIDIA card's power, sampled through NVML.

    Raises:
        ConfigError: pynvml is not installed, or there is no such card.
    """

    name = "nvml"

    def __init__(
        self,
        index: int = 0,
        *,
        clock: Callable[[], float] = time.monotonic,
        min_interval_s: float = 0.02,
    ) -> None:
        try:
            self._nvml: Any = importlib.import_module("pynvml")
        except ImportError as error:
            raise ConfigError("NVML needs pynvml: pip install nvidia-ml-py") from error
        try:
            self._nvml.nvmlInit()
            self._card = self._nvml.nvmlDeviceGetHandleByIndex(index)
        except self._nvml.NVMLError as error:
            raise ConfigError(f"NVML: no card {index}: {error}") from error
        super().__init__(self._sample_w, clock, min_interval_s)

    def _sample_w(self) -> float:
        try:
            return float(self._nvml.nvmlDeviceGetPowerUsage(self._card)) / 1000.0
        except self._nvml.NVMLError as error:
            raise ConfigError(f"NVML: cannot read the card's power: {error}") from error


class PiPmicMeter(_SampledMeter):
    """A Raspberry Pi 5's rails from its power management chip, scaled to the board's input.

    Raises:
        ConfigError: `vcgencmd` is missing or reports no rails.
    """

    name = "pi-pmic"

    def __init__(
        self,
        command: Sequence[str] = VCGENCMD,
        *,
        clock: Callable[[], float] = time.monotonic,
        min_interval_s: float = 0.5,
    ) -> None:
        self._command = tuple(command)
        super().__init__(self._sample_w, clock, min_interval_s)

    def _sample_w(self) -> float:
        try:
            text = subprocess.run(
                self._command, capture_output=True, text=True, timeout=2.0, check=True
            ).stdout
        except (OSError, subprocess.SubprocessError) as error:
            raise ConfigError(f"cannot read the PMIC: {error}") from error
        rails: dict[str, dict[str, float]] = {"A": {}, "V": {}}
        for rail, kind, value in _RAIL.findall(text):
            rails[kind][rail] = float(value)
        both = rails["A"].keys() & rails["V"].keys()
        if not both:
            raise ConfigError(f"{' '.join(self._command)}: no rail with volts and amperes")
        rails_w = sum(rails["A"][rail] * rails["V"][rail] for rail in both)
        return PMIC_SCALE * rails_w + PMIC_OFFSET_W


def best_meter(
    device: str,
    *,
    emulated: bool = False,
    torch_device: str = "cpu",
    powercap: Path = POWERCAP,
    vcgencmd: Sequence[str] = VCGENCMD,
) -> Meter:
    """The meter nearest to a measurement that works here, else the device class's power model.

    Args:
        device: Device class, key of `DEVICE_POWER`.
        emulated: The node only stands for such a device (the testbed), so this machine's own
            meters say nothing about it.
        torch_device: Where the node computes.
        powercap: Where Linux's powercap tree is.
        vcgencmd: The command that prints the Pi's rails.

    Raises:
        ConfigError: Unknown device class.
    """
    power = device_power(device)
    makers: list[Callable[[], Meter]] = []
    if torch_device.startswith("cuda"):
        index = int(torch_device.partition(":")[2] or 0)
        makers.append(lambda: NvmlMeter(index))
    elif device == "pi5":
        makers.append(lambda: PiPmicMeter(vcgencmd))
    elif device != "pi4":
        makers.append(lambda: RaplMeter(powercap))
    for make in makers if not emulated else []:
        try:
            return make()
        except ConfigError as error:
            _log.info("%s: %s; using its power model", device, error)
    return PowerModelMeter(power)


def _text(path: Path) -> str:
    return path.read_text().strip()
