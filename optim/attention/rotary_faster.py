"""Rotary embeddings with less work: a table of angles, rotation without a negated copy, one pass in the tower."""

import torch

from ..native.native_layout import native_layout, supports_layout
from ..technique_optim import Technique, refuse_unknown


# One token, or a few that an assistant drafted, of many rows. Beyond that, reading the positions costs what it saves.
TABLE_POSITIONS_AT_ONCE = 1024
FIRST_TABLE = 2048
# Tokens that are rotated at a time, so that what is written is still in the processor's cache when read again.
CHUNK = 256
_SIGNED = "_qwen3_vl_signed_sine"


class FasterRotaryEmbeddings(Technique):
    """Cosines and sines of decoded text from a growing table, and a rotation that adds in place.

    In the vision tower one native pass rotates and orders queries, keys and values, on a CPU with a C++ compiler.
    Exact: every result is bit-equal to the plain one, and so is its gradient. Angles come from the table where all
    rows are text (the three axes agree) and few, on the CPU: reading positions elsewhere would wait for the device.
    Types of rotary embedding other than `"default"`, and traced or compiled graphs, take the plain path. The M-RoPE
    index itself needs nothing here: the model computes it for whole batches.

    Args:
        config: accepted and not read.
        table_positions (`int`): positions that the table may hold at most, 2 * head_dim numbers each; larger ones are
            computed.
    Raises:
        ValueError: for an unknown setting or a negative size.
    """

    name = "faster_rotary"
    exact = True

    def __init__(self, config=None, table_positions: int = 32768, **unknown):
        refuse_unknown(self.name, unknown, ("table_positions",))
        if not isinstance(table_positions, int) or table_positions < 0:
            raise ValueError(f"table_positions must be a whole number, 0 for no table, got {table_positions!r}.")
        super().__init__(table_positions=table_positions)

    def apply(self, model) -> None:
        modules = list(model.modules())
        if not any(hasattr(module, "mrope_section") for module in modules):
            raise ValueError(f"{self.name} found no M-RoPE in {type(model).__name__}; apply it to a Qwen3-VL model.")
        for module in modules:
            if hasattr(module, "mrope_section"):
                module.forward = TabledAngles(module, self.settings["table_positions"])
            elif hasattr(module, "rotate"):
                module.rotate = FasterRotation(module)
            elif hasattr(module, "lay_out"):
                module.lay_out = FasterLayout(module)

    def revert(self, model) -> None:
        for module in model.modules():
            for name, kind in (("forward", TabledAngles), ("rotate", FasterRotation), ("lay_out", FasterLayout)):
                ours = vars(module).get(name)
                if isinstance(ours, kind):
                    ours.put_back()


class _Replacement:
    """A callable in the place of a module's attribute, which its class or whoever came before has put there.

    What the class gives is looked up at each call: a bound method that is kept would be pickled by its name, and
    found again as this object.
    """

    attribute: str

    def __init__(self, module: torch.nn.Module):
        self.module = module
        self.replaced = vars(module).get(self.attribute)

    def put_back(self) -> None:
        if self.replaced is None:
            delattr(self.module, self.attribute)
        else:
            setattr(self.module, self.attribute, self.replaced)


class TabledAngles(_Replacement):
    """The forward of a rotary module with a table a device and dtype, made by the plain forward as far as needed."""

    attribute = "forward"

    def __init__(self, module: torch.nn.Module, limit: int):
        super().__init__(module)
        self.limit = limit
        self.tables: dict[torch.dtype, torch.Tensor] = {}
        self.made_of = None

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine (B, T, head_dim) in `x.dtype` of positions (3, B, T)."""
        rows = None if torch.compiler.is_compiling() or torch.jit.is_tracing() else self._rows(x, position_ids)
        if rows is None:
            return self.plain(x, position_ids)
        return rows.unbind(2)

    def plain(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.replaced is not None:
            return self.replaced(x, position_ids)
        return type(self.module).forward(self.module, x, position_ids)

    def _rows(self, x, position_ids) -> torch.Tensor | None:
        """Cosine and sine (B, T, 2, head_dim) of the table; `None` if it does not hold what is asked for."""
        readable = type(position_ids) is torch.Tensor and position_ids.device.type == "cpu" == x.device.type
        if not readable or position_ids.is_floating_point() or self.module.rope_type != "default":
            return None
        if position_ids.numel() > TABLE_POSITIONS_AT_ONCE:
            return None
        axes = (position_ids if position_ids.ndim == 3 else position_ids[None]).tolist()
        if any(axis != axes[0] for axis in axes[1:]):
            return None
        flat = [position for row in axes[0] for position in row]
        if not flat or min(flat) < 0 or max(flat) >= self.limit:
            return None
        table = self._table(x, max(flat) + 1)
        return table[position_ids[0] if position_ids.ndim == 3 else position_ids]

    def _table(self, x: torch.Tensor, size: int) -> torch.Tensor:
        """At least `size` rows of the table for `x`: (positions, 2, head_dim)."""
        frequencies = self.module.inv_freq
        # A model that is moved or cast gets new frequencies, and one whose frequencies are written new values.
        version = 0 if frequencies.is_inference() else frequencies._version
        made_of = (frequencies, frequencies.data_ptr(), version, self.module.attention_scaling)
        if self.made_of is None or self.made_of[0] is not frequencies or self.made_of[1:] != made_of[1:]:
            self.tables, self.made_of = {}, made_of
        table = self.tables.get(x.dtype)
        held = 0 if table is None else len(table)
        if held < size:
            wanted = min(max(FIRST_TABLE, 1 << (size - 1).bit_length()), self.limit)
            parts = [] if table is None else [table]
            table = self.tables[x.dtype] = torch.cat([*parts, *self._new_rows(x, held, wanted)])
        return table

    def _new_rows(self, x: torch.Tensor, first: int, stop: int) -> list[torch.Tensor]:
        rows = []
        for start in range(first, stop, FIRST_TABLE):
            positions = torch.arange(start, min(start + FIRST_TABLE, stop))
            rows.append(torch.stack(self.plain(x, positions.expand(3, 1, -1)), dim=2)[0])
        return rows


class FasterRotation(_Replacement):
    """Rotation of queries and keys by `x * cos + swap(x) * (-sin, sin)`, in place behind the first product.

    The sign goes to the sine, once a forward, and not to a copy of half of every query and key; rounding is the same.
    """

    attribute = "rotate"

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotates queries and keys.

        Args:
            q, k (`torch.Tensor`): (B, heads, T, D), or (B, T, heads, D) with `unsqueeze_dim=2`.
            cos, sin (`torch.Tensor`): (B, T, D).
            unsqueeze_dim (`int`): where the dimension of heads is put into `cos` and `sin`.
        """
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if traced or not q.dtype == k.dtype == cos.dtype == sin.dtype:
            plain = self.replaced or type(self.module).rotate
            return plain(q, k, cos, sin, unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), signed_sine(sin).unsqueeze(unsqueeze_dim)
        tokens = 2 if unsqueeze_dim == 1 else 1
        return rotate(q, cos, sin, tokens), rotate(k, cos, sin, tokens)


class FasterLayout(_Replacement):
    """Rotation and order by head of the vision tower in one native pass; the plain way where that cannot run."""

    attribute = "lay_out"

    def __call__(self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Query, key and value (heads, patches, D) from (patches, 3, heads, D) and angles (patches, D / 2)."""
        if supports_layout(qkv, cos, sin):
            return native_layout(qkv, cos, sin)
        plain = self.replaced or type(self.module).lay_out
        return plain(qkv, cos, sin)


def signed_sine(sin: torch.Tensor) -> torch.Tensor:
    """`sin` (B, T, D) with its first half negated, made once and kept with the tensor, as all layers ask for it."""
    signed = getattr(sin, _SIGNED, None)
    if signed is None:
        first, second = sin.chunk(2, dim=-1)
        signed = torch.cat((-first, second), dim=-1)
        setattr(sin, _SIGNED, signed)
    return signed


def rotate(x: torch.Tensor, cos: torch.Tensor, signed: torch.Tensor, tokens: int) -> torch.Tensor:
    """`x` rotated; `cos` and `signed` broadcast to it, and `tokens` is the dimension of time."""
    wants_gradient = torch.is_grad_enabled() and x.requires_grad
    if wants_gradient or x.shape[tokens] < 2 * CHUNK or x.device.type != "cpu":
        return (x * cos).add_(_swap(x).mul_(signed))
    rotated = torch.empty_like(x)
    parts = (tensor.split(CHUNK, dim=tokens) for tensor in (x, cos, signed, rotated))
    for part, cosine, sine, out in zip(*parts, strict=True):
        torch.mul(part, cosine, out=out)
        out.add_(_swap(part).mul_(sine))
    return rotated


def _swap(x: torch.Tensor) -> torch.Tensor:
    """A copy with the halves of the last dimension exchanged."""
    return x.roll(x.shape[-1] // 2, dims=-1)
