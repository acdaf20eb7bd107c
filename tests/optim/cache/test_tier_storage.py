"""The slow tier alone: what comes back, space that is used again, faults of the disk, and that no file is left."""

import copy
import errno
import gc
import os
import resource
import subprocess
import sys
import threading

import pytest
import torch
from helpers import one_line

from qwen3_vl.optim.cache import tier_storage
from qwen3_vl.optim.cache.tier_storage import FileStorage, HostStorage, TierFileError


def tensors(seed=0, size=5):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, size, generator=generator),
        torch.randn(size, 3, generator=generator).bfloat16().mT,
        torch.randint(256, (3,), generator=generator, dtype=torch.uint8),
    ]


def assert_gives(ticket, expected):
    for actual, original in zip(ticket.get(torch.device("cpu")), expected, strict=True):
        assert actual.dtype == original.dtype and torch.equal(actual, original)


def open_files(folder):
    """Files in `folder` that this process holds open, with or without a name."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue
    return [name for name in found if name.startswith(str(folder))]


@pytest.mark.parametrize("kind", ["file", "host"])
def test_tensors_come_back(tmp_path, kind):
    storage = FileStorage(tmp_path) if kind == "file" else HostStorage()
    given = [tensors(seed) for seed in range(4)]
    tickets = [storage.put(x) for x in given]
    before = [[x.clone() for x in group] for group in given]
    given[0][0].zero_()
    for ticket, expected in zip(tickets, before, strict=True):
        ticket.prefetch()
        assert_gives(ticket, expected)
        assert ticket.nbytes == sum(x.nbytes for x in expected)
    assert copy.deepcopy(storage) is storage


def test_space_is_used_again_and_the_file_goes_with_the_last_ticket(tmp_path):
    storage = FileStorage(tmp_path)
    assert not storage.is_open and storage.stored_bytes == 0
    tickets = [storage.put(tensors(seed)) for seed in range(3)]
    size = tickets[0].nbytes
    assert storage.stored_bytes == 3 * size and len(open_files(tmp_path)) == 1
    assert os.listdir(tmp_path) == [], "the file has a name"
    for seed in range(3, 9):
        tickets[seed % 3] = None
        tickets[seed % 3] = storage.put(tensors(seed))
    assert os.fstat(storage._file.fileno()).st_size == 3 * size
    for seed, ticket in enumerate(tickets, 6):
        assert_gives(ticket, tensors(seed))
    del ticket
    tickets.clear()
    storage.collect()
    assert not storage.is_open and open_files(tmp_path) == []
    assert_gives(storage.put(tensors(1)), tensors(1))


def test_the_file_goes_with_the_storage(tmp_path):
    storage = FileStorage(tmp_path)
    ticket = storage.put(tensors())
    del storage
    assert_gives(ticket, tensors())
    del ticket
    gc.collect()
    assert open_files(tmp_path) == []


def test_a_killed_process_leaves_no_file(tmp_path):
    code = (
        "import os, sys, torch\n"
        "from qwen3_vl.optim.cache.tier_storage import FileStorage\n"
        "storage = FileStorage(sys.argv[1])\n"
        "ticket = storage.put([torch.zeros(1000)])\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=120)
    assert done.returncode == -9 and os.listdir(tmp_path) == []


def test_threads_share_a_file(tmp_path):
    storage, wrong = FileStorage(tmp_path), []

    def work(index):
        held = {}
        for step in range(60):
            seed = 100 * index + step
            held[step % 5] = (seed, storage.put(tensors(seed, 5 + seed % 3)))
            for seed, ticket in held.values():
                got = ticket.get(torch.device("cpu"))
                if not all(torch.equal(a, b) for a, b in zip(got, tensors(seed, 5 + seed % 3), strict=True)):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert storage.stored_bytes == 0 and not storage.is_open


# --- Faults ---


class WeakFile:
    """A file that writes and reads little at a time, and fails when told to."""

    def __init__(self, file, faults):
        self.file, self.faults = file, faults

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, part):
        if self.faults.get("write") is not None:
            self.file.write(part[:3])  # a part arrives before the disk is full
            raise OSError(self.faults["write"], os.strerror(self.faults["write"]))
        return self.file.write(part[:7])

    def readinto(self, target):
        if self.faults.get("read") is not None:
            raise OSError(self.faults["read"], os.strerror(self.faults["read"]))
        return self.file.readinto(target[:11])


@pytest.fixture
def faults(monkeypatch):
    """Switches for the files that are made from now on."""
    switches, original = {}, tier_storage.tempfile.TemporaryFile
    monkeypatch.setattr(
        tier_storage.tempfile, "TemporaryFile", lambda **options: WeakFile(original(**options), switches)
    )
    return switches


def test_writes_and_reads_in_small_pieces(tmp_path, faults):
    storage = FileStorage(tmp_path)
    kept = [storage.put(tensors(seed)) for seed in range(2)]
    for seed, ticket in enumerate(kept):
        assert_gives(ticket, tensors(seed))


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_write_that_fails_holds_nothing(tmp_path, faults, error):
    storage = FileStorage(tmp_path)
    first = storage.put(tensors())
    faults["write"] = error
    with pytest.raises(
        TierFileError, match=f"the tier file in {tmp_path} cannot take .*{os.strerror(error)}"
    ) as caught:
        storage.put(tensors(1))
    assert "name another folder" in one_line(caught.value)
    assert storage.stored_bytes == first.nbytes
    assert_gives(first, tensors())
    faults.clear()
    assert_gives(storage.put(tensors(2)), tensors(2))
    assert_gives(first, tensors())


def test_the_first_write_that_fails_leaves_no_file(tmp_path, faults):
    storage = FileStorage(tmp_path)
    faults["write"] = errno.ENOSPC
    with pytest.raises(TierFileError, match="No space left"):
        storage.put(tensors())
    assert not storage.is_open and open_files(tmp_path) == []


def test_a_limit_of_the_system_on_files(tmp_path):
    """A real refusal by the kernel, beside the injected ones."""
    storage, limits = FileStorage(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    first = storage.put([torch.ones(100)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(TierFileError, match="File too large"):
            storage.put([torch.ones(10000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_gives(storage.put([torch.ones(10000)]), [torch.ones(10000)])
    assert_gives(first, [torch.ones(100)])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("cut", "was cut short: .* bytes are not there"),
        ("changed", "holds other bytes than were written"),
        ("closed", "cannot be read"),
        ("error", "cannot be read .*Input/output error"),
    ],
)
def test_what_cannot_be_read_back_is_said(tmp_path, faults, fault, message):
    storage = FileStorage(tmp_path)
    first, second = storage.put(tensors(0)), storage.put(tensors(1))
    if fault == "cut":
        os.ftruncate(storage._file.fileno(), first.nbytes + 4)
    elif fault == "changed":
        storage._file.seek(first.nbytes + 9)
        storage._file.file.write(b"\x55\xaa")
    elif fault == "closed":
        storage._file.close()
    else:
        faults["read"] = errno.EIO
    with pytest.raises(TierFileError, match=message) as caught:
        second.get(torch.device("cpu"))
    assert str(tmp_path) in one_line(caught.value)
    second.prefetch()
    if fault in ("cut", "changed"):
        assert_gives(first, tensors(0))


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_a_folder_that_takes_no_file(tmp_path, kind):
    folder = tmp_path / "other"
    if kind == "a file":
        folder.write_text("")
    with pytest.raises(ValueError, match=f"no tier file can be made in {folder}") as caught:
        FileStorage(folder)
    assert "folder=" in one_line(caught.value)


def test_reading_ahead_is_only_a_hint(tmp_path, monkeypatch):
    ticket, asked = FileStorage(tmp_path).put(tensors()), []

    def advise(*args):
        asked.append(args)
        raise OSError("not supported")

    monkeypatch.setattr(os, "posix_fadvise", advise)
    ticket.prefetch()
    assert asked[0][1:] == (0, ticket.nbytes, os.POSIX_FADV_WILLNEED)
    monkeypatch.delattr(os, "posix_fadvise")
    ticket.prefetch()
    assert_gives(ticket, tensors())
