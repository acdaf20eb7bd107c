"""Where the weights that were packed lie until they are wanted back."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


PLACES = ("file", "keep", "drop")


class Originals:
    """Takes weights out of a model's memory and gives back the same bits.

    Args:
        place (`str`): `"file"` writes every weight into a safetensors file of its own and frees its memory; `"keep"`
            leaves it in memory, so nothing is saved; `"drop"` frees it for good.
        folder (`str`, *optional*): for the files, which go when they were read or with the process; by default the
            system's folder for temporary files.
    """

    def __init__(self, place: str, folder: str | None = None):
        self.place = place
        self.folder = None
        self.kept: dict[nn.Parameter, torch.Tensor | Path] = {}
        if place == "file":
            try:
                self.folder = tempfile.TemporaryDirectory(prefix="qwen3_vl_originals_", dir=folder)
            except OSError as error:
                raise _cannot_write(folder or tempfile.gettempdir(), error) from error

    def take(self, weight: nn.Parameter) -> None:
        """Puts a weight away; `weight.data` is empty afterwards unless the place is `"keep"`.

        Raises:
            OSError: if it cannot be written.
        """
        if weight in self.kept or self.place == "keep":
            self.kept.setdefault(weight, weight.data)
            return
        if self.place == "file":
            path = Path(self.folder.name, f"{len(self.kept)}.safetensors")
            try:
                save_file({"weight": weight.data.contiguous()}, path)
            except Exception as error:
                raise _cannot_write(self.folder.name, error) from error
            self.kept[weight] = path
        else:
            self.kept[weight] = weight.data[:0]
        weight.data = weight.data.new_empty(0)

    def give_back(self, device: torch.device | None = None) -> None:
        """Puts all weights back, the same bits in the same parameters.

        Raises:
            ValueError: if they were dropped.
        """
        if self.place == "drop" and self.kept:
            raise ValueError('the original weights were dropped (originals="drop"); load the model again.')
        for weight, kept in self.kept.items():
            data = load_file(kept)["weight"] if isinstance(kept, Path) else kept
            weight.data = data if device is None else data.to(device)
        self.kept.clear()
        if self.folder is not None:
            self.folder.cleanup()


def _cannot_write(folder: str, error: Exception) -> OSError:
    return OSError(
        f"the original weights cannot be written to {folder} ({error}); name another originals_folder, or choose "
        'originals="keep" or "drop".'
    )
