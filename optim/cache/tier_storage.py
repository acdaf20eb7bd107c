"""The slow tier of a KV cache: tensors in the host's memory, or in a file that leaves nothing behind.

The file has no name where the system allows that, so nobody can take it away, and it is gone with the process even if
that is killed. It is read by ordinary reads into memory of our own and not through a mapping: a file that somebody cut
short, or a disk that fails, ends a process that reads a mapping, while a read gives an error that can be handled.
"""

import contextlib
import os
import tempfile
import zlib
from collections import deque
from threading import RLock

import torch


class TierFileError(OSError):
    """The tier file could not be written to or read back; says why and what to do."""


class HostStorage:
    """Holds tensors of an accelerator in the host's memory, page-locked where the device has use for that."""

    where = "the host's memory"

    def put(self, tensors: list[torch.Tensor]) -> "HostTicket":
        """Copies `tensors`; the returned ticket gives them back."""
        host = [x.detach().cpu().clone() if x.device.type == "cpu" else x.detach().cpu() for x in tensors]
        if any(x.device.type == "cuda" for x in tensors):
            host = [x.pin_memory() for x in host]
        return HostTicket(host)

    def collect(self) -> None:
        """Nothing to do: memory goes with the tickets."""

    def __deepcopy__(self, memo):
        return self


class HostTicket:
    """Stands for tensors in a [`HostStorage`]."""

    def __init__(self, tensors: list[torch.Tensor]):
        self._tensors = tensors
        self.nbytes = sum(x.nbytes for x in tensors)

    def get(self, device: torch.device) -> list[torch.Tensor]:
        """The tensors, on `device`."""
        return [x.to(device, non_blocking=True) for x in self._tensors]

    def prefetch(self) -> None:
        """Nothing to do: they are in memory."""


class FileStorage:
    """Holds tensors in one temporary file, with a checksum each. Threads may share it.

    Space of tickets that are gone is used again; when the last one goes, so does the file.

    Args:
        folder (`str`, *optional*): where the file is made; by default the system's folder for temporary files, which
            on some systems is memory.
    Raises:
        ValueError: if a folder is given in which no file can be made.
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        self.folder = os.path.abspath(tempfile.gettempdir() if folder is None else folder)
        self.where = f"the tier file in {self.folder}"
        self._lock = RLock()
        self._released: deque[tuple[int, int]] = deque()
        self._close()
        if folder is not None:
            try:
                self._open()
            except TierFileError as error:
                raise ValueError(str(error)) from error
            self._close()

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tickets."""
        self.collect()
        return self._used

    @property
    def is_open(self) -> bool:
        """Whether there is a file at the moment."""
        return self._file is not None

    def put(self, tensors: list[torch.Tensor]) -> "FileTicket":
        """Writes `tensors`; the returned ticket gives them back.

        Raises:
            TierFileError: if that fails, as on a full disk; then nothing is held.
        """
        parts = [_bytes_of(x) for x in tensors]
        size, checksum = sum(len(part) for part in parts), 0
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        with self._lock:
            self.collect()
            if self._file is None:
                self._open()
            offset = self._take(size)
            try:
                self._write(offset, parts)
            except BaseException as error:
                self._give(offset, size)
                if not isinstance(error, OSError):
                    raise
                raise TierFileError(
                    f"{self.where} cannot take {size} more bytes ({error.strerror or error}); free space there, name "
                    "another folder, or give the tiers in memory more tokens."
                ) from error
        return FileTicket(self, offset, size, checksum, [(tuple(x.shape), x.dtype) for x in tensors])

    def read(self, offset: int, size: int, checksum: int) -> torch.Tensor:
        """Bytes (size,) uint8 from `offset` on.

        Raises:
            TierFileError: if they cannot be read, are not all there, or are not what was written.
        """
        buffer = torch.empty(size, dtype=torch.uint8)
        target = memoryview(buffer.numpy())
        done = 0
        try:
            with self._lock:
                self._file.seek(offset)
                while done < size and (got := self._file.readinto(target[done:])):
                    done += got
        except (OSError, ValueError) as error:  # the latter for a file that was closed
            raise TierFileError(f"{self.where} cannot be read ({error})") from error
        if done < size:
            raise TierFileError(f"{self.where} was cut short: {size - done} of {size} bytes are not there")
        if zlib.crc32(target) != checksum:
            raise TierFileError(f"{self.where} holds other bytes than were written")
        return buffer

    def prefetch(self, offset: int, size: int) -> None:
        """Asks the system to read ahead; returns at once."""
        file = self._file
        if file is not None and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError, ValueError):
                os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)

    def release_later(self, offset: int, size: int) -> None:
        """Gives a ticket's space back at the next call. Takes no lock, so that a finalizer may call it at any time."""
        self._released.append((offset, size))

    def collect(self) -> None:
        """Takes back the space of tickets that are gone; without any, the file is removed."""
        with self._lock:
            while self._released:
                self._give(*self._released.popleft())

    def __deepcopy__(self, memo):
        return self

    def _open(self) -> None:
        try:
            file = tempfile.TemporaryFile(dir=self.folder, prefix="qwen3_vl_tier_", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise TierFileError(
                f"no tier file can be made in {self.folder} ({error.strerror}); name a folder that exists and can be "
                "written to as folder=."
            ) from error
        self._file = file

    def _close(self) -> None:
        file = getattr(self, "_file", None)
        self._file, self._end, self._used = None, 0, 0
        self._free: dict[int, list[int]] = {}
        if file is not None:
            with contextlib.suppress(OSError):  # as late errors of writes that nobody will read any more
                file.close()

    def _take(self, size: int) -> int:
        self._used += size
        if self._free.get(size):
            return self._free[size].pop()
        offset, self._end = self._end, self._end + size
        return offset

    def _give(self, offset: int, size: int) -> None:
        self._used -= size
        self._free.setdefault(size, []).append(offset)
        if not self._used:
            self._close()

    def _write(self, offset: int, parts: list[memoryview]) -> None:
        self._file.seek(offset)
        for part in parts:
            while len(part):
                written = self._file.write(part)
                if not written:
                    raise OSError("nothing was written")
                part = part[written:]


class FileTicket:
    """Stands for tensors in a [`FileStorage`]; their space is given back with it."""

    def __init__(self, storage: FileStorage, offset: int, size: int, checksum: int, layout: list):
        self.storage, self.nbytes = storage, size
        self._offset, self._checksum, self._layout = offset, checksum, layout

    def get(self, device: torch.device) -> list[torch.Tensor]:
        """The tensors, read back and checked, on `device`.

        Raises:
            TierFileError: if the file does not hold them any more.
        """
        buffer, tensors, start = self.storage.read(self._offset, self.nbytes, self._checksum), [], 0
        for shape, dtype in self._layout:
            size = torch.Size(shape).numel() * dtype.itemsize
            tensors.append(buffer[start : start + size].view(dtype).view(shape).to(device))
            start += size
        return tensors

    def prefetch(self) -> None:
        """Has the system read it from the disk meanwhile."""
        self.storage.prefetch(self._offset, self.nbytes)

    def __del__(self):
        self.storage.release_later(self._offset, self.nbytes)


def _bytes_of(x: torch.Tensor) -> memoryview:
    return memoryview(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
