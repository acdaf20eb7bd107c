"""Routers live in a file of their own beside official weights."""

from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers.utils import logging
from transformers.utils.hub import cached_file

from .save_wrapper import SaveWrapper


logger = logging.get_logger(__name__)

TECHNIQUE = "learned_routing"
# In a folder of its own: serving engines load every safetensors file that lies beside config.json.
FOLDER, FILE_NAME = "optim", "learned_routing.safetensors"
ROUTER = "token_router"


class RoutingSaver(SaveWrapper):
    """Saves official weights, the routers apart from them, and the technique in the profile of `config.json`."""

    def __init__(self, model, settings: dict):
        super().__init__(model)
        self.settings = settings

    def save(self, save_directory, is_main_process: bool, state_dict: dict, **kwargs):
        routers = {name: state_dict.pop(name) for name in list(state_dict) if f".{ROUTER}." in name}
        config, before = self.model.config, getattr(self.model.config, "optim", None)
        try:
            config.optim = {**(before if isinstance(before, dict) else {}), TECHNIQUE: self.settings}
            if is_main_process:
                folder = Path(save_directory, FOLDER)
                folder.mkdir(parents=True, exist_ok=True)
                tensors = {_short(name): tensor.detach().cpu().contiguous() for name, tensor in routers.items()}
                save_file(tensors, folder / FILE_NAME, metadata={"format": "pt"})
            return super().save(save_directory, is_main_process, state_dict, **kwargs)
        finally:
            config.optim = before


def _short(name: str) -> str:
    """The name from `layers` on, which is the same in a model with a head and without."""
    return name[name.index("layers.") :]


def router_tensors(model) -> dict | None:
    """The trained routers of the checkpoint that `model` was loaded from, or `None`."""
    source = getattr(model.config, "name_or_path", "")
    if not source:
        return None
    local = Path(source, FOLDER, FILE_NAME)
    if not Path(source).is_dir():
        found = cached_file(
            source, FILE_NAME, subfolder=FOLDER, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
        )  # fmt: skip
        local = None if found is None else Path(found)
    return load_file(local) if local is not None and local.is_file() else None


def load_routers(layers, blocks: list[int], tensors: dict | None, source: str) -> bool:
    """Fills the routers of `blocks`; whether there was something to fill them with.

    Raises:
        ValueError: for tensors of other blocks or another width.
    """
    if tensors is None:
        return False
    for block in blocks:
        prefix = f"layers.{block}.{ROUTER}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        try:
            getattr(layers[block], ROUTER).load_state_dict(own)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"the routers in {source} do not fit block {block}: {reason} Name the blocks they were trained for."
            ) from None
    return True
