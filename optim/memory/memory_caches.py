"""The caches that a plan chooses from, with the bytes that each holds."""

from dataclasses import dataclass

from ..cache.kv_quantization import quantized_bytes
from ..cache.memory_pool import HUGE_PAGE_BYTES
from .memory_shapes import ModelShapes


PAGE_TOKENS = 64
GROUP_SIZE = 64
RESIDUAL_TOKENS = 128


@dataclass(frozen=True)
class CacheChoice:
    """A kind of cache.

    Args:
        name (`str`): `dynamic` (stock's), `paged`, `int8`, `int4` or `int2`.
        bits (`int`): of a stored entry, 0 for the model's own precision.
    """

    name: str
    bits: int = 0

    @property
    def exact(self) -> bool:
        return not self.bits

    def bytes_held(self, shapes: ModelShapes, rows: int, tokens: int, itemsize: int) -> int:
        """Keys and values of all layers for `rows` rows of `tokens` tokens, scales and bounds included."""
        per_token = 2 * shapes.kv_width * itemsize
        if self.name == "dynamic":
            return rows * tokens * shapes.layers * per_token
        if self.name == "paged":
            pages = -(-tokens // PAGE_TOKENS)
            # Besides its tokens, a page holds the smallest and largest key of each channel.
            return rows * shapes.layers * pages * (PAGE_TOKENS + 1) * per_token
        row = quantized_bytes(
            tokens, shapes.kv_heads, shapes.head_dim, itemsize, self.bits, GROUP_SIZE, RESIDUAL_TOKENS
        )
        return rows * shapes.layers * row

    def rounding(self, shapes: ModelShapes, rows: int, tokens: int, itemsize: int) -> int:
        """What pages of the system take on a CPU beyond `bytes_held`: each head's keys and values are rounded up."""
        if self.name != "paged":
            return 0
        head = rows * shapes.layers * -(-tokens // PAGE_TOKENS) * PAGE_TOKENS * shapes.head_dim * itemsize
        return 2 * shapes.kv_heads * (-head % HUGE_PAGE_BYTES)


CACHES = {
    choice.name: choice
    for choice in (
        CacheChoice("dynamic"),
        CacheChoice("paged"),
        CacheChoice("int8", 8),
        CacheChoice("int4", 4),
        CacheChoice("int2", 2),
    )
}


def cache_choices(attention: str, lossy: bool, head_dim: int) -> list[CacheChoice]:
    """The caches to try, best first: of the exact ones the one that suits the attention, then fewer and fewer bits."""
    exact = CACHES["paged" if attention.startswith("qwen3_vl_") else "dynamic"]
    packed = lossy and head_dim % 16 == 0
    return [exact, *(CACHES[name] for name in ("int8", "int4", "int2") if packed)]


def find_cache(name: str) -> CacheChoice:
    """Raises a `ValueError` for a name that is not in `CACHES`."""
    if name not in CACHES:
        raise ValueError(f"cache must be one of {', '.join(CACHES)}, got {name!r}.")
    return CACHES[name]
