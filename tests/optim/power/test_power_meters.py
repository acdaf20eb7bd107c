"""Counters of energy and CPU time: sums, wrap-arounds, jumps, and what cannot be read."""

import os
import sys
import types

import pytest
from helpers import one_line
from power_trees import write_zone

from qwen3_vl.optim.power import power_meters
from qwen3_vl.optim.power.power_meters import CpuTimeMeter, NvmlMeter, RaplMeter, pick_meter


def test_packages_are_summed_and_their_parts_left_out(tmp_path, time):
    first = write_zone(tmp_path, "intel-rapl:0", "package-0", 5e6)
    second = write_zone(tmp_path, "intel-rapl:1", "package-1", 9e6)
    for zone, name in (("intel-rapl:0:0", "core"), ("intel-rapl:0:1", "dram"), ("intel-rapl:2", "psys")):
        write_zone(tmp_path, zone, name, 1e9)
    write_zone(tmp_path, "intel-rapl-mmio:0", "package-0", 77e6)
    meter = RaplMeter(tmp_path, time.clock)
    assert meter.read() == 0 and meter.measures_power
    time.now += 1
    first.write_text("8000000")
    second.write_text("9500000")
    for path in (tmp_path / "sys/class/powercap").glob("intel-rapl*[:o]*/energy_uj"):
        if path not in (first, second):
            path.write_text("5000000000")
    assert meter.read() == pytest.approx(3.5)
    assert meter.read() == pytest.approx(3.5)


def test_the_mapped_interface_counts_where_there_is_no_other(tmp_path, time):
    counter = write_zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0)
    meter = RaplMeter(tmp_path, time.clock)
    counter.write_text("2000000")
    assert meter.read() == pytest.approx(2)


def test_wrap_around(tmp_path, time):
    counter = write_zone(tmp_path, "intel-rapl:0", "package-0", 999_000_000, reach=1_000_000_000)
    meter, total = RaplMeter(tmp_path, time.clock), 0.0
    value = 999_000_000
    for _ in range(30):  # 10 rounds of the counter
        value, total = (value + 333_000_000) % 1_000_000_000, total + 333
        time.now += 1
        counter.write_text(str(value))
        assert meter.read() == pytest.approx(total)


def test_jumps_do_not_count(tmp_path, time):
    counter = write_zone(tmp_path, "intel-rapl:0", "package-0", 100_000_000_000)
    meter = RaplMeter(tmp_path, time.clock)
    time.now += 1
    counter.write_text("100050000000")
    assert meter.read() == pytest.approx(50)
    time.now += 1
    counter.write_text("1000000")  # reset: a wrap-around would be 162 kJ in a second
    assert meter.read() == pytest.approx(50)
    time.now += 1
    counter.write_text("31000000")
    assert meter.read() == pytest.approx(80)
    counter.write_text("900031000000")
    assert meter.read() == pytest.approx(80)


def test_a_counter_without_a_range_that_falls(tmp_path, time):
    counter = write_zone(tmp_path, "intel-rapl:0", "package-0", 50_000_000, reach="")
    meter = RaplMeter(tmp_path, time.clock)
    counter.write_text("10000000")
    assert meter.read() == 0
    counter.write_text("12000000")
    assert meter.read() == pytest.approx(2)


def test_counters_that_cannot_be_read(tmp_path, time, monkeypatch):
    with pytest.raises(OSError, match="no processor package is listed"):
        RaplMeter(tmp_path, time.clock)
    counter = write_zone(tmp_path, "intel-rapl:0", "package-0", 5)
    counter.write_text("nothing")
    with pytest.raises(OSError, match="holds no number"):
        RaplMeter(tmp_path, time.clock)
    counter.unlink()
    counter.mkdir()  # reads as an error for root too
    with pytest.raises(OSError):
        RaplMeter(tmp_path, time.clock)
    meter, reason = pick_meter("cpu", tmp_path, time.clock, time.cpu_time)
    assert isinstance(meter, CpuTimeMeter) and reason.startswith("CPU time of this process, since ")


def test_counters_for_root_alone(tmp_path, time, monkeypatch):
    counter = write_zone(tmp_path, "intel-rapl:0", "package-0", 5)
    counter.chmod(0)
    if os.access(counter, os.R_OK):  # root reads it all the same

        def refuse(path, *arguments, **options):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(type(counter), "read_text", refuse)
        monkeypatch.setattr(power_meters, "_package_zones", lambda folder: [counter.parent])
        monkeypatch.setattr(power_meters, "_read_text", lambda path: "1000")
    with pytest.raises(OSError, match=r"is for root alone; `sudo chmod a\+r") as caught:
        RaplMeter(tmp_path, time.clock)
    one_line(caught.value)


def test_a_meter_that_stops_stays_where_it_was(tmp_path, time, caplog):
    counter = write_zone(tmp_path, "intel-rapl:0", "package-0", 0)
    meter = RaplMeter(tmp_path, time.clock)
    counter.write_text("4000000")
    assert meter.taken() == pytest.approx(4)
    counter.unlink()
    with pytest.raises(OSError):
        meter.read()
    with caplog.at_level("WARNING"):
        assert meter.taken() == pytest.approx(4) and meter.taken() == pytest.approx(4)
    assert sum("the meter rapl stopped" in record.message for record in caplog.records) == 1


def test_cpu_time(time):
    meter = CpuTimeMeter(time.cpu_time)
    time.busy = 2.0
    time.work(1.5)
    assert meter.read() == pytest.approx(3.0) and meter.unit == "CPU s" and not meter.measures_power
    real = CpuTimeMeter()
    sum(range(200_000))
    assert 0 < real.read() < 60


def fake_nvml(joules, broken=()):
    """`pynvml` as far as it is used, with `joules[handle]`."""
    nvml = types.SimpleNamespace(NVMLError=type("NVMLError", (Exception,), {}), joules=joules)

    def function(name, act):
        def call(*arguments):
            if name in broken:
                raise nvml.NVMLError("Not Supported")
            return act(*arguments)

        setattr(nvml, name, call)

    function("nvmlInit", lambda: None)
    function("nvmlDeviceGetHandleByIndex", lambda index: index)
    function("nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
    function("nvmlDeviceGetTotalEnergyConsumption", lambda handle: round(joules[handle] * 1000))
    return nvml


def test_a_gpu(monkeypatch, time, tmp_path):
    joules = {0: 5.0, 1: 100.0, "GPU-abc": 1000.0}
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(joules))
    meter, reason = pick_meter("cuda:1", tmp_path, time.clock)
    assert isinstance(meter, NvmlMeter) and "GPU 1" in reason
    by_name = NvmlMeter("GPU-abc", time.clock)
    joules[1], joules["GPU-abc"] = 350.0, 1003.0
    time.now += 1
    assert meter.read() == pytest.approx(250) and by_name.read() == pytest.approx(3)
    joules[1] = 2.0  # the driver was loaded anew
    assert meter.read() == pytest.approx(250)


@pytest.mark.parametrize("broken", ["nvmlInit", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetTotalEnergyConsumption"])
def test_a_gpu_that_does_not_tell(monkeypatch, broken, tmp_path, time):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml({0: 1.0}, broken=(broken,)))
    write_zone(tmp_path, "intel-rapl:0", "package-0", 5)
    meter, reason = pick_meter("cuda", tmp_path, time.clock)
    assert isinstance(meter, CpuTimeMeter) and "Not Supported" in reason


def test_without_the_package_and_on_other_devices(monkeypatch, tmp_path, time):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py" in pick_meter("cuda:0", tmp_path, time.clock)[1]
    assert "mps" in pick_meter("mps", tmp_path, time.clock)[1]
    write_zone(tmp_path, "intel-rapl:0", "package-0", 5)
    assert isinstance(pick_meter("cpu", tmp_path, time.clock)[0], RaplMeter)
