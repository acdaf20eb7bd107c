"""What the control groups of Linux, versions 1 and 2, leave to this process."""

from pathlib import Path


# Where version 1 has no limit it writes one that no machine reaches.
UNLIMITED_BYTES = 2**60


def cgroup_cores(root: str | Path = "/") -> float | None:
    """CPU time per second that the cgroup of this process and those above it allow; `None` for no limit.

    Args:
        root (`str` or `Path`): folder that holds `proc` and `sys`.
    """
    limits = []
    for folder in _folders(Path(root), "cpu"):
        words = (_read(folder / "cpu.max") or "").split()  # version 2: "quota period", or "max period"
        if len(words) != 2:
            words = [_read(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
        quota, period = (int(word) if word.lstrip("-").isdigit() else -1 for word in words)
        if quota > 0 and period > 0:
            limits.append(quota / period)
    return min(limits, default=None)


def cgroup_memory(root: str | Path = "/") -> int | None:
    """Bytes that the cgroup of this process and those above it allow; `None` for no limit."""
    limits = []
    for folder in _folders(Path(root), "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name) or ""
            if text.isdigit() and 0 < int(text) < UNLIMITED_BYTES:
                limits.append(int(text))
    return min(limits, default=None)


def _folders(root: Path, controller: str) -> list[Path]:
    """The folders of this process' group and of all above it, in each hierarchy that has the controller."""
    mounts, folders = root / "sys/fs/cgroup", []
    for line in (_read(root / "proc/self/cgroup") or "0::/").splitlines():
        number, names, path = (*line.split(":", 2), "", "")[:3]
        if number == "0" and not names:
            mounted = [mounts, mounts / "unified"]
        elif controller in names.split(","):
            mounted = [mounts / names, mounts / controller]
        else:
            continue
        # A container often sees only its own part of the tree, under the path that it has outside.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for mount in mounted:
            folders += [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return folders


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
