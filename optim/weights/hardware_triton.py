"""RMSNorm, SwiGLU and rotation as Triton kernels, for CUDA devices, or with `TRITON_INTERPRET=1` for tests anywhere.

Only `hardware_kernels` imports this module, when Triton is installed. The kernels have no backward. Source of the
language: Tillet et al., "Triton: an intermediate language and compiler for tiled neural network computations", 2019.
"""

import torch


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


WIDEST_ROW = 65536  # elements that one program holds

if triton is not None:

    @triton.jit
    def rms_norm_kernel(x, weight, out, size, stride, eps, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, BLOCK)
        inside = at < size
        given = tl.load(x + row * stride + at, mask=inside, other=0.0)
        wide = given.to(tl.float32)
        # Rounded before the weight, as PyTorch does it.
        normed = (wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / size + eps)).to(given.dtype).to(tl.float32)
        scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * size + at, (scale * normed).to(given.dtype), mask=inside)

    @triton.jit
    def swiglu_kernel(gate, up, out, size, gate_stride, up_stride, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        g = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0)
        u = tl.load(up + row * up_stride + at, mask=inside, other=0.0).to(tl.float32)
        wide = g.to(tl.float32)
        active = (wide / (1.0 + tl.exp(-wide))).to(g.dtype).to(tl.float32)
        tl.store(out + row * size + at, (active * u).to(g.dtype), mask=inside)

    @triton.jit
    def rotation_kernel(
        x, cos, sin, out, heads, tokens, x_b, x_h, x_t, angle_b, angle_t, HALF: tl.constexpr, BLOCK: tl.constexpr
    ):
        # One program rotates one head of one token; `out` is contiguous (B, heads, tokens, 2 * HALF).
        row = tl.program_id(0).to(tl.int64)
        token = row % tokens
        head = row // tokens % heads
        batch = row // (tokens * heads)
        at = tl.arange(0, BLOCK)
        inside = at < HALF
        source = x + batch * x_b + head * x_h + token * x_t
        first = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + HALF + at, mask=inside, other=0.0).to(tl.float32)
        angle = batch * angle_b + token * angle_t
        cos_first = tl.load(cos + angle + at, mask=inside, other=0.0).to(tl.float32)
        cos_second = tl.load(cos + angle + HALF + at, mask=inside, other=0.0).to(tl.float32)
        sin_first = tl.load(sin + angle + at, mask=inside, other=0.0).to(tl.float32)
        sin_second = tl.load(sin + angle + HALF + at, mask=inside, other=0.0).to(tl.float32)
        to = out + row * 2 * HALF + at
        kind = out.dtype.element_ty
        tl.store(to, (first * cos_first - second * sin_first).to(kind), mask=inside)
        tl.store(to + HALF, (second * cos_second + first * sin_second).to(kind), mask=inside)


def has_triton() -> bool:
    return triton is not None


def triton_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x` (..., size) over the root mean square of its last dimension, times `weight` (size,)."""
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    block = triton.next_power_of_2(rows.shape[1])
    if len(rows):
        rms_norm_kernel[(len(rows),)](rows, weight, out, rows.shape[1], rows.stride(0), eps, BLOCK=block)
    return out.view(x.shape)


def triton_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`, both (..., size)."""
    size = gate.shape[-1]
    gates, ups = gate.reshape(-1, size), up.reshape(-1, size)
    out = torch.empty_like(gates, memory_format=torch.contiguous_format)
    block = min(1024, triton.next_power_of_2(size))
    if len(gates):
        grid = (len(gates), triton.cdiv(size, block))
        swiglu_kernel[grid](gates, ups, out, size, gates.stride(0), ups.stride(0), BLOCK=block)
    return out.view(gate.shape)


def triton_rotation(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`x` (B, heads, T, D) rotated by `cos` and `sin` (B, T, D)."""
    batch, heads, tokens, dim = x.shape
    cos, sin = (angle.expand(batch, tokens, dim).contiguous() for angle in (cos, sin))
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    strides = (*x.stride()[:3], *cos.stride()[:2])
    if x.numel():
        block = triton.next_power_of_2(dim // 2)
        rotation_kernel[(batch * heads * tokens,)](
            x, cos, sin, out, heads, tokens, *strides, HALF=dim // 2, BLOCK=block
        )
    return out
