"""What is read from trees of `/proc` and `/sys` as machines, containers and laptops show them."""

import os
import subprocess
import sys

import pytest
from helpers import one_line

from qwen3_vl.configuration import hardware_detection
from qwen3_vl.configuration.cgroup_limits import cgroup_cores, cgroup_memory
from qwen3_vl.configuration.hardware_detection import GIB, Hardware, detect_hardware, read_on_battery


MEMINFO = "MemTotal:       16777216 kB\nMemFree: 1 kB\n"
CPUINFO = "processor\t: 0\nflags\t\t: fpu avx avx2 avx512f avx512_bf16 amx_tile amx_int8\n"


def tree(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)


@pytest.mark.parametrize(
    ("files", "cores", "memory"),
    [
        ({}, None, None),
        ({"sys/fs/cgroup/cpu.max": "max 100000", "sys/fs/cgroup/memory.max": "max"}, None, None),
        ({"sys/fs/cgroup/cpu.max": "250000 100000", "sys/fs/cgroup/memory.max": 2 * GIB}, 2.5, 2 * GIB),
        (  # version 2, in a group below a stricter one
            {
                "proc/self/cgroup": "0::/outer/inner",
                "sys/fs/cgroup/outer/inner/cpu.max": "400000 100000",
                "sys/fs/cgroup/outer/cpu.max": "150000 100000",
                "sys/fs/cgroup/outer/inner/memory.max": 3 * GIB,
                "sys/fs/cgroup/outer/memory.max": "max",
            },
            1.5,
            3 * GIB,
        ),
        (  # version 1
            {
                "proc/self/cgroup": "4:memory:/job\n3:cpu,cpuacct:/job\n0::/",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": 300000,
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": 100000,
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": -1,
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": 100000,
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": GIB,
                "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
            },
            3.0,
            GIB,
        ),
        (  # a container that sees its own part only
            {
                "proc/self/cgroup": "2:memory:/docker/abc\n1:cpu:/docker/abc",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": 200000,
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000,
                "sys/fs/cgroup/memory/memory.limit_in_bytes": 5 * GIB,
            },
            2.0,
            5 * GIB,
        ),
        ({"sys/fs/cgroup/cpu.max": "nonsense", "sys/fs/cgroup/memory.max": ""}, None, None),
        ({"proc/self/cgroup": "no colons", "sys/fs/cgroup/memory.max": "-5"}, None, None),
    ],
)
def test_cgroups(tmp_path, files, cores, memory):
    tree(tmp_path, files)
    assert cgroup_cores(tmp_path) == cores
    assert cgroup_memory(tmp_path) == memory


def test_a_machine(tmp_path, eight_cores):
    tree(tmp_path, {"proc/meminfo": MEMINFO, "proc/cpuinfo": CPUINFO})
    found = detect_hardware(tmp_path, gpu=False)
    assert found.cpu_cores == 6 and found.memory_bytes == 16 * GIB
    assert found.instruction_sets == ("AVX2", "AVX512F", "AVX512_BF16", "AMX_TILE", "AMX_INT8")
    assert found.gpu_name is None and found.on_battery is None
    assert "CPU cores: 6 (affinity allows 6 of 8)" in found.lines()
    assert hash(found) == hash(detect_hardware(tmp_path, gpu=False))


@pytest.mark.parametrize(("quota", "cores"), [("50000 100000", 1), ("390000 100000", 3), ("900000 100000", 6)])
def test_the_least_of_affinity_quota_and_memory(tmp_path, eight_cores, quota, cores):
    limits = {"sys/fs/cgroup/cpu.max": quota, "sys/fs/cgroup/memory.max": 4 * GIB}
    found = detect_hardware(tree(tmp_path, {"proc/meminfo": MEMINFO, **limits}), gpu=False)
    assert (found.cpu_cores, found.memory_bytes) == (cores, 4 * GIB)
    (line,) = [line for line in found.lines() if line.startswith("memory")]
    assert "4.0 GiB" in line and "16.0 GiB" in line
    more = tree(tmp_path, {"sys/fs/cgroup/memory.max": 64 * GIB})
    assert detect_hardware(more, gpu=False).memory_bytes == 16 * GIB


def test_an_empty_tree(tmp_path, eight_cores):
    found = detect_hardware(tmp_path, gpu=False)
    assert found.cpu_cores == 6 and found.memory_bytes is None and found.instruction_sets == ()
    assert len(found.lines()) == 6


@pytest.mark.parametrize(
    ("supplies", "expected"),
    [
        ({}, None),
        ({"BAT0": ("Battery", "status", "Discharging"), "AC": ("Mains", "online", "0")}, True),
        ({"BAT0": ("Battery", "status", "Discharging"), "AC": ("Mains", "online", "1")}, False),
        ({"BAT0": ("Battery", "status", "Full"), "AC": ("Mains", "online", "0")}, True),
        ({"BAT0": ("Battery", "status", "Charging"), "ucsi": ("USB", "online", "0")}, False),
        ({"BAT0": ("Battery", "status", "Discharging")}, True),
        ({"BAT0": ("Battery", "status", "Full")}, False),
        ({"AC": ("Mains", "online", "1")}, False),
        ({"ucsi": ("USB", "online", "0")}, False),
        ({"odd": ("UPS", "online", "1")}, None),
    ],
)
def test_power_supplies(tmp_path, supplies, expected):
    for name, (kind, entry, value) in supplies.items():
        folder = f"sys/class/power_supply/{name}"
        tree(tmp_path, {f"{folder}/type": kind, f"{folder}/{entry}": value})
    assert read_on_battery(tmp_path) is expected


def test_the_battery_of_a_mouse_is_none(tmp_path):
    mouse = {"type": "Battery", "scope": "Device", "status": "Discharging"}
    tree(tmp_path, {f"sys/class/power_supply/mouse/{name}": text for name, text in mouse.items()})
    assert read_on_battery(tmp_path) is None


def test_the_compiler_that_native_kernels_take(tmp_path, monkeypatch):
    compiler = tmp_path / "my-c++"
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert detect_hardware(tmp_path, gpu=False).compiler == str(compiler)
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    found = detect_hardware(tmp_path, gpu=False)
    assert found.compiler is None and any("plain PyTorch" in line for line in found.lines())


def test_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware_detection, "_first_gpu", lambda: ("Some GPU", 24 * GIB, (8, 9)))
    found = detect_hardware(tmp_path)
    assert (found.gpu_name, found.gpu_memory_bytes, found.gpu_capability) == ("Some GPU", 24 * GIB, (8, 9))
    assert "GPU: Some GPU, 24.0 GiB, capability 8.9" in found.lines()
    assert found.to_dict()["gpu_capability"] == [8, 9]
    assert detect_hardware(tmp_path, gpu=False).gpu_name is None
    described = Hardware.from_specs({"gpu_memory": 6 * GIB}, tmp_path)
    assert (described.gpu_memory_bytes, described.gpu_capability) == (6 * GIB, None)
    assert Hardware.from_specs({"gpu_memory": 0}, tmp_path).gpu_name is None
    assert Hardware.from_specs({"cpu_cores": 2}, tmp_path).gpu_name == "Some GPU"


def test_a_broken_driver_is_no_gpu(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")

    def broken(device):
        raise RuntimeError("CUDA driver version is insufficient")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    assert detect_hardware(tmp_path).gpu_name is None


def test_the_specs_of_the_reference(tmp_path, eight_cores):
    specs = {"gpu_memory": 6 * 1024 * 1024 * 1024, "cpu_cores": 4, "memory_gb": 8}
    found = Hardware.from_specs(specs, tmp_path)
    assert (found.gpu_memory_bytes, found.cpu_cores, found.memory_bytes) == (6 * GIB, 4, 8 * GIB)
    assert "memory: 8.0 GiB (as given)" in found.lines()
    assert Hardware.from_specs({"memory_gb": 0.5}, tmp_path) == Hardware(
        cpu_cores=6, memory_bytes=GIB // 2, compiler=found.compiler
    )


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ({"gpu_memroy": 1}, "no 'gpu_memroy'; did you mean 'gpu_memory'"),
        ({"zzz": 1}, "known: gpu_memory, cpu_cores, memory_gb"),
        ({3: 1}, "no 3"),
        ({"gpu_memory": -1}, "gpu_memory must be a whole number of bytes"),
        ({"gpu_memory": 1.5}, "gpu_memory must be"),
        ({"cpu_cores": 0}, "cpu_cores must be a whole number >= 1, got 0"),
        ({"cpu_cores": -2}, "cpu_cores must be"),
        ({"cpu_cores": True}, "cpu_cores must be"),
        ({"cpu_cores": None}, "cpu_cores must be"),
        ({"memory_gb": 0}, "memory_gb must be a number of GiB above 0"),
        ({"memory_gb": -8}, "memory_gb must be"),
        ({"memory_gb": float("nan")}, "memory_gb must be"),
        ({"memory_gb": float("inf")}, "memory_gb must be"),
        ({"memory_gb": "8"}, "memory_gb must be"),
        ([("cpu_cores", 4)], "must be a dictionary of gpu_memory"),
    ],
)
def test_bad_specs(specs, words):
    with pytest.raises(ValueError) as caught:
        Hardware.from_specs(specs)
    assert words in one_line(caught.value)


def test_no_torch_until_a_gpu_is_asked_for():
    program = (
        "import sys; from qwen3_vl.configuration.hardware_detection import detect_hardware; "
        "found = detect_hardware(gpu=False); "
        "assert found.cpu_cores >= 1 and found.memory_bytes > 2**20; assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
