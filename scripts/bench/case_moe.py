"""The sparse block of the decoder, at the widths of Qwen3-VL-30B-A3B with 64 experts, of which 8 serve a token.

Stock is measured by each of its experts implementations that PyTorch runs here; the first row of the table is its
default, and `beside` compares with the others. What decoding reads is the weights of the chosen experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from bench_contest import Contest, Way
from bench_measure import tensor_agreement
from bench_settings import Settings


DTYPES = ("bfloat16",)
EXPERTS, TOP_K = 64, 8
HIDDEN, INNER = 2048, 768
QUICK_HIDDEN, QUICK_INNER = 256, 96
# Copying the weights of every token's experts takes minutes and gigabytes for a prompt.
MOST_TOKENS_OF_BATCHED = 8
IMPLEMENTATIONS = ("grouped_mm", "eager", "batched_mm")


def rows(settings: Settings) -> Iterator[Contest]:
    for dtype_name in settings.dtypes:
        blocks = cache(partial(_blocks, settings, settings.torch_dtype(dtype_name)))
        for tokens in (1, 8, 64) if settings.quick else (1, 4, 8, 64, 256, 1024):
            phase = "prefill" if tokens > MOST_TOKENS_OF_BATCHED else "decode"
            yield Contest(
                label=f"{tokens:,} tokens, {dtype_name}",
                sizes={"phase": phase, "context": tokens, "dtype": dtype_name, "experts": EXPERTS, "top_k": TOP_K},
                ways=partial(_ways, blocks, settings, tokens),
                agreement=tensor_agreement,
                calls=8 if tokens <= MOST_TOKENS_OF_BATCHED else 1,
            )


def _ways(blocks, settings: Settings, tokens: int) -> dict[str, Way]:
    from qwen3_vl.optim.weights.moe_grouped import GroupedExperts

    ours, stock = blocks()
    calls = 8 if tokens <= MOST_TOKENS_OF_BATCHED else 1
    hidden = stock.gate.weight.shape[1]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, tokens, hidden, generator=generator).to(settings.device, stock.gate.weight.dtype)
    technique = GroupedExperts()
    read = _bytes_of_chosen(stock, x)

    def work(block: Any) -> torch.Tensor:
        with torch.no_grad():
            for _ in range(calls):
                output = block(x)
        return output

    def way(block: Any, implementation: str, **options: Any) -> Way:
        def prepare() -> None:
            block.experts.config._experts_implementation = implementation

        return Way(partial(work, block), prepare=prepare, reads_bytes=read, **options)

    names = [name for name in IMPLEMENTATIONS if name != "batched_mm" or tokens <= MOST_TOKENS_OF_BATCHED]
    ways = {f"stock, {name}": way(stock, name) for name in names}
    others = tuple(ways)[1:]
    if settings.against_itself:
        return ways
    technique.apply(ours)
    return {**ways, "grouped_experts": way(ours, "eager", against=others)}


def _bytes_of_chosen(block: Any, x: torch.Tensor) -> int:
    with torch.no_grad():
        _, _, indices = block.gate(x.view(-1, x.shape[-1]))
    of_one = block.experts.gate_up_proj[0].nbytes + block.experts.down_proj[0].nbytes
    return of_one * len(indices.unique())


def _blocks(settings: Settings, dtype: torch.dtype) -> tuple[Any, Any]:
    """Our block and stock's with the same parameters."""
    from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextSparseMoeBlock

    from qwen3_vl.configuration.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig as OurConfig
    from qwen3_vl.modeling_qwen3_vl.modeling_moe import Qwen3VLMoeTextSparseMoeBlock as OurBlock

    sizes = {
        "hidden_size": QUICK_HIDDEN if settings.quick else HIDDEN,
        "moe_intermediate_size": QUICK_INNER if settings.quick else INNER,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
    }
    torch.manual_seed(0)
    with torch.device("meta"):
        stock, ours = Qwen3VLMoeTextSparseMoeBlock(Qwen3VLMoeTextConfig(**sizes)), OurBlock(OurConfig(**sizes))
    weights = {
        name: torch.randn(weight.shape, dtype=dtype, device=settings.device) / weight.shape[-1] ** 0.5
        for name, weight in stock.state_dict().items()
    }
    for block in (stock, ours):
        block.load_state_dict(weights, strict=True, assign=True)
        block.eval()
    return ours, stock
