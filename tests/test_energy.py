import sys
import types

import pytest

from executor import energy
from executor.energy import (
    DEVICE_POWER,
    ConstantPowerMeter,
    NvmlMeter,
    PiPmicMeter,
    PowerModelMeter,
    RaplMeter,
    best_meter,
    device_power,
)
from executor.errors import ConfigError

RAILS = """\
 3V7_WL_SW_A current(0)=0.10000000A
   VDD_CORE_A current(7)=2.00000000A
 3V7_WL_SW_V volt(8)=4.00000000V
   VDD_CORE_V volt(15)=0.80000000V
      EXT5V_V volt(24)=5.10000000V
"""


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def zone(root, name, label, energy_uj, range_uj=1_000_000):
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(label + "\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return folder


def rails_command(tmp_path, text):
    file = tmp_path / "rails.txt"
    file.write_text(text)
    return ("cat", str(file)), file


def test_every_device_names_its_source():
    assert {"pi4", "pi5", "laptop", "server", "gpu-server"} <= set(DEVICE_POWER)
    for name, power in DEVICE_POWER.items():
        assert power.device == name
        assert min(power.idle_w, power.compute_w, power.transmit_w) > 0
        assert len(power.source) > 20
    # The reference's edge draws 12 W while it computes.
    assert device_power("pi5").idle_w + device_power("pi5").compute_w == 12.0
    with pytest.raises(ConfigError, match=r"'toaster'.*pi4"):
        device_power("toaster")


def test_the_reference_meter_counts_compute_alone():
    meter = ConstantPowerMeter()
    meter.note_work(active_s=0.667, transmit_s=9.0)
    assert meter.read_j() == pytest.approx(8.004)
    assert meter.name == "constant-12W"


def test_the_power_model_counts_idle_compute_and_transmit():
    clock = Clock()
    meter = PowerModelMeter(device_power("pi4"), clock)
    clock.now_s += 10.0
    meter.note_work(active_s=2.0)
    meter.note_work(transmit_s=1.0)
    assert meter.read_j() == pytest.approx(27.0 + 7.4 + 0.26)
    assert meter.name == "power-model-pi4"


def test_rapl_sums_packages_and_wraps_around(tmp_path):
    first = zone(tmp_path, "intel-rapl:0", "package-0", 999_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 5_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 0)
    zone(tmp_path, "intel-rapl:2", "psys", 0)
    meter = RaplMeter(tmp_path)
    assert meter.read_j() == 0.0
    (first / "energy_uj").write_text("2000\n")  # 999000 .. 1000000, 0 .. 2000
    (second / "energy_uj").write_text("6000\n")
    assert meter.read_j() == pytest.approx((3_001 + 1_000) / 1e6)
    (first / "energy_uj").write_text("2500\n")
    assert meter.read_j() == pytest.approx((3_501 + 1_000) / 1e6)


def test_rapl_that_goes_away_reads_none_and_comes_back(tmp_path):
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 1_000)
    meter = RaplMeter(tmp_path)
    (folder / "energy_uj").write_text("not a number")
    assert meter.read_j() is None
    (folder / "energy_uj").write_text("3000")
    assert meter.read_j() == pytest.approx(0.002)


def test_rapl_refuses_a_machine_without_it(tmp_path):
    with pytest.raises(ConfigError, match="no RAPL package zone"):
        RaplMeter(tmp_path / "absent")
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    with pytest.raises(ConfigError, match="cannot read RAPL"):
        RaplMeter(tmp_path)


def test_the_pmic_sums_the_rails_that_have_both(tmp_path):
    command, file = rails_command(tmp_path, RAILS)
    clock = Clock()
    meter = PiPmicMeter(command, clock=clock)
    watts = 1.1451 * (0.4 + 1.6) + 0.5879
    clock.now_s += 0.1  # too soon to sample again: the last power holds
    file.write_text("")
    assert meter.read_j() == pytest.approx(0.1 * watts)
    file.write_text(RAILS.replace("=2.00000000A", "=4.00000000A"))
    clock.now_s += 0.9
    later_watts = 1.1451 * (0.4 + 3.2) + 0.5879
    assert meter.read_j() == pytest.approx((watts + later_watts) / 2)
    clock.now_s += 1.0
    file.unlink()
    assert meter.read_j() is None


def test_the_pmic_refuses_a_machine_without_it(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the PMIC"):
        PiPmicMeter(("no-such-command-here",))
    with pytest.raises(ConfigError, match="no rail"):
        PiPmicMeter(rails_command(tmp_path, "error=1 error_msg=unknown\n")[0])


@pytest.fixture
def fake_nvml(monkeypatch):
    nvml = types.ModuleType("pynvml")
    nvml.NVMLError = type("NVMLError", (Exception,), {})
    nvml.milliwatts = 20_000

    def handle(index):
        if index > 0:
            raise nvml.NVMLError("Invalid Argument")
        return "card"

    def power(card):
        if nvml.milliwatts is None:
            raise nvml.NVMLError("GPU is lost")
        return nvml.milliwatts

    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByIndex = handle
    nvml.nvmlDeviceGetPowerUsage = power
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


def test_nvml_integrates_samples_as_the_reference_does(fake_nvml):
    clock = Clock()
    meter = NvmlMeter(clock=clock)
    fake_nvml.milliwatts = 40_000
    clock.now_s += 2.0
    assert meter.read_j() == pytest.approx(60.0)
    clock.now_s += 1.0
    fake_nvml.milliwatts = None
    assert meter.read_j() is None
    fake_nvml.milliwatts = 40_000
    assert meter.read_j() == pytest.approx(100.0)
    with pytest.raises(ConfigError, match="no card 1"):
        NvmlMeter(1)


def test_a_missing_pynvml_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ConfigError, match="pip install nvidia-ml-py"):
        NvmlMeter()


def test_the_best_meter_is_the_one_that_works(tmp_path, fake_nvml):
    absent = tmp_path / "absent"
    zone(tmp_path / "powercap", "intel-rapl:0", "package-0", 0)
    powercap = tmp_path / "powercap"
    command, _ = rails_command(tmp_path, RAILS)
    assert best_meter("laptop", powercap=powercap).name == "rapl"
    assert best_meter("laptop", powercap=absent).name == "power-model-laptop"
    assert best_meter("pi5", vcgencmd=command).name == "pi-pmic"
    assert best_meter("pi5", vcgencmd=("no-such-command",)).name == "power-model-pi5"
    assert best_meter("pi4", powercap=powercap).name == "power-model-pi4"
    assert best_meter("gpu-server", torch_device="cuda:0").name == "nvml"
    assert best_meter("gpu-server", torch_device="cuda:1").name == "power-model-gpu-server"
    # A paced process is not the device it stands for, so this machine's counters are not its.
    assert best_meter("server", emulated=True, powercap=powercap).name == "power-model-server"
    with pytest.raises(ConfigError, match="unknown device class"):
        best_meter("toaster")


def test_all_meters_take_work_and_read_joules(tmp_path, fake_nvml):
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    meters: list[energy.Meter] = [
        ConstantPowerMeter(),
        PowerModelMeter(device_power("pi4")),
        RaplMeter(tmp_path),
        PiPmicMeter(rails_command(tmp_path, RAILS)[0]),
        NvmlMeter(),
    ]
    for meter in meters:
        meter.note_work(active_s=0.1, transmit_s=0.1)
        assert meter.read_j() >= 0.0
    assert len({meter.name for meter in meters}) == len(meters)
