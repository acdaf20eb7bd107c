"""A clock that stands still until somebody sleeps, and counters in files as Linux shows them."""

from dataclasses import dataclass, field


@dataclass
class FakeTime:
    """`work` is what a model does, with `busy` threads at once, and `sleep` what pacing does."""

    now: float = 100.0
    cpu: float = 7.0
    busy: float = 1.0
    busy_asleep: float = 0.0
    sleeps: list = field(default_factory=list)

    def clock(self):
        return self.now

    def cpu_time(self):
        return self.cpu

    def work(self, seconds):
        self.now += seconds
        self.cpu += seconds * self.busy

    def sleep(self, seconds):
        assert seconds > 0
        self.sleeps.append(seconds)
        self.now += seconds
        self.cpu += seconds * self.busy_asleep


def write_zone(root, zone, name, microjoules, reach=262143328850):
    folder = root / "sys/class/powercap" / zone
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{reach}\n")
    (folder / "energy_uj").write_text(f"{int(microjoules)}\n")
    return folder / "energy_uj"


def write_battery(root, discharging):
    folder = root / "sys/class/power_supply/BAT0"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "type").write_text("Battery\n")
    (folder / "status").write_text("Discharging\n" if discharging else "Charging\n")
