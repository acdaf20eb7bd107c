"""The vision tower's outputs for pictures that come again, wherever they stand in a prompt."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from threading import RLock

import torch

from ..technique_optim import Technique, refuse_unknown
from .memory_pool import require_positive
from .model_fingerprint import ModelFingerprint
from .picture_digest import describes_pixels, picture_digests


@dataclass(frozen=True)
class FeatureStatistics:
    """What a [`VisionFeatureCache`] did since it was made, and holds now.

    Args:
        hits, misses (`int`): pictures and videos that were there, and that had to be encoded.
        pictures_held, bytes_held (`int`): what is kept.
    """

    hits: int
    misses: int
    pictures_held: int
    bytes_held: int


class VisionFeatureCache(Technique):
    """Keeps the visual tokens and DeepStack features of pictures and videos; `generate()` encodes only unknown ones.

    Exact: attention in the tower stays inside a picture or frame, so its features do not depend on its neighbours.
    They may on how many patches a matrix product rounds together: a picture that was encoded beside others can differ
    in the last bit from one encoded alone. A call of which nothing is known runs as without the cache.

    A picture is known by a hash of its patches and their grid (see `picture_digests`). When a weight of the tower, its
    adapters or its attention changes, all is dropped (see [`ModelFingerprint`]). Not used where gradients are on, and
    features that are not finite are not kept. With [`PrefixCache`] only pictures behind the known prefix come here.

    Threads may share it. Copies and pickles are empty.

    Args:
        config: taken and not needed, as all techniques may be given the model's.
        max_bytes (`int`): of features, default 256 MiB; a picture of 1,024 x 1,024 takes 16 MiB in bfloat16 with the
            published 2B model. The least recently used go first; a picture that is larger is not kept.
    Raises:
        ValueError: for a size below 1 or unknown settings.
    """

    name = "vision_feature_cache"
    exact = True

    def __init__(self, config=None, max_bytes: int = 2**28, **unknown):
        refuse_unknown(self.name, unknown, ("max_bytes",))
        require_positive("max_bytes", max_bytes)
        super().__init__(max_bytes=max_bytes)
        self.max_bytes = max_bytes
        self._lock = RLock()
        self._pictures: OrderedDict[bytes, _Features] = OrderedDict()  # the least recently used first
        self._fingerprint: ModelFingerprint | None = None
        self._bytes = self._hits = self._misses = 0

    def apply(self, model) -> None:
        """Puts itself in the place where `generate()` looks: `model.vision_feature_cache`.

        Raises:
            ValueError: if the model has another one.
        """
        if getattr(model, "vision_feature_cache", self) is not self:
            raise ValueError("the model has a vision feature cache already; revert that one first.")
        model.vision_feature_cache = self

    def revert(self, model) -> None:
        """Takes itself from the model; what is kept stays until `clear()`."""
        if getattr(model, "vision_feature_cache", None) is self:
            del model.vision_feature_cache

    def encode(self, tower, run: Callable, pixels: torch.Tensor, grids: torch.Tensor):
        """The tower's output for some pictures, encoding those that are not known; each of them once.

        Args:
            tower (`nn.Module`): whose weights decide.
            run (callable): takes pixels and grids, returns an output with `pooler_output` (a tensor for every picture)
                and `deepstack_features` (the same for every level), as `get_image_features` does.
            pixels (`torch.Tensor`): (patches, width); grids (`torch.Tensor`): (pictures, 3).
        Returns:
            such an output, without hidden states; or what `run` gives where nothing can be kept.
        """
        if torch.is_grad_enabled() or not describes_pixels(pixels, grids):
            return run(pixels, grids)
        keys = picture_digests(pixels, grids)
        fingerprint, known = self._look_up(tower, keys)
        missing = [place for place, key in enumerate(keys) if key not in known and keys.index(key) == place]
        if missing:
            output = run(*_select(pixels, grids, missing))
            new = {keys[place]: features for place, features in zip(missing, _Features.split(output), strict=True)}
            known |= new
            self._keep(fingerprint, new)
        with self._lock:
            self._misses += len(missing)
            self._hits += len(keys) - len(missing)
        return _Features.join([known[key] for key in keys])

    def clear(self) -> None:
        """Drops all that is kept."""
        with self._lock:
            self._pictures.clear()
            self._bytes = 0

    def statistics(self) -> FeatureStatistics:
        with self._lock:
            return FeatureStatistics(self._hits, self._misses, len(self._pictures), self._bytes)

    def __reduce__(self):
        return partial(type(self), **self.settings), ()

    def _look_up(self, tower, keys: list[bytes]) -> tuple[ModelFingerprint, dict]:
        with self._lock:
            if self._fingerprint is None or not self._fingerprint.matches(tower):
                self.clear()
                self._fingerprint = ModelFingerprint(tower)
            known = {key: self._pictures[key] for key in keys if key in self._pictures}
            for key in known:
                self._pictures.move_to_end(key)
            return self._fingerprint, known

    def _keep(self, fingerprint: ModelFingerprint, new: dict) -> None:
        new = {key: features for key, features in new.items() if features.bytes <= self.max_bytes}
        new = {key: features for key, features in new.items() if features.finite()}
        with self._lock:
            if fingerprint is not self._fingerprint:  # the weights changed while this was computed
                return
            for key, features in new.items():
                if key not in self._pictures:
                    self._pictures[key] = features
                    self._bytes += features.bytes
            while self._bytes > self.max_bytes:
                _, dropped = self._pictures.popitem(last=False)
                self._bytes -= dropped.bytes


@dataclass(frozen=True, eq=False)
class _Features:
    """One picture: the class of the tower's output, visual tokens (n, hidden size), and the same for every level."""

    output_class: type
    pooled: torch.Tensor
    levels: tuple[torch.Tensor, ...]

    @classmethod
    def split(cls, output) -> "list[_Features]":
        # On copies: a picture's part would keep the memory of all, and may be used outside of inference mode later.
        with torch.inference_mode(False):
            return [
                cls(type(output), pooled.clone(), tuple(level.clone() for level in levels))
                for pooled, *levels in zip(output.pooler_output, *(output.deepstack_features or ()), strict=True)
            ]

    @staticmethod
    def join(pictures: "list[_Features]"):
        return pictures[0].output_class(
            pooler_output=tuple(picture.pooled for picture in pictures),
            deepstack_features=[tuple(level) for level in zip(*(picture.levels for picture in pictures), strict=True)],
        )

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.pooled, *self.levels))

    def finite(self) -> bool:
        return all(bool(torch.isfinite(tensor).all()) for tensor in (self.pooled, *self.levels))


def _select(pixels: torch.Tensor, grids: torch.Tensor, pictures: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and grids of some of the pictures; untouched if of all."""
    if len(pictures) == len(grids):
        return pixels, grids
    chosen = torch.zeros(len(grids), dtype=torch.bool)
    chosen[pictures] = True
    patches = torch.repeat_interleave(chosen, grids.prod(-1).cpu())
    return pixels[patches.to(pixels.device)], grids[chosen.to(grids.device)]
