"""The next-token loss without its logits: head and cross-entropy chunk by chunk, gradients on the way."""

import torch
from torch.autograd.function import once_differentiable


# Of the logits of one chunk, in the float32 of their softmax; about twice as much is held for a moment.
CHUNK_BYTES = 2**26


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: int | torch.Tensor | None = None,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """Cross-entropy of `hidden @ weight.T` with `labels`, never holding more than a chunk of the logits.

    The forward pass computes the gradients too, so that the backward pass only scales them; rows without a label cost
    nothing. Products run in the dtype of `hidden` (autocast's where that is on), the softmax in float32. The weight's
    gradient is summed over chunks in the weight's dtype, and is made only if the weight is trained. The idea is that
    of Liger Kernel (arXiv 2410.10989).

    Args:
        hidden (`torch.Tensor`): (N, C) or (..., C), as the head takes them.
        weight (`torch.Tensor`): (V, C), the head's.
        labels (`torch.Tensor`): (N,) or (...), the token that each row is to predict; not shifted here.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*): what the sum is divided by; by default the number of
            labels that are not ignored, which gives the mean. Without any label the loss is then 0, where the plain
            one is NaN.
        ignore_index (`int`): label of rows that do not count.
        chunk_rows (`int`, *optional*): rows of a chunk; by default as many as make 64 MiB of float32 logits.
    Returns:
        a scalar, float32 (float64 for float64 inputs).
    Raises:
        ValueError: if the shapes do not fit, or for `chunk_rows` below 1.
    """
    if weight.ndim != 2 or hidden.shape[-1] != weight.shape[1] or hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and labels {tuple(labels.shape)} do not fit; "
            "pass (..., C), (V, C) and (...)."
        )
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}; leave it away for the default.")
    rows = chunk_rows or max(CHUNK_BYTES // (4 * weight.shape[0]), 1)
    labels = labels.reshape(-1).to(hidden.device)
    kept = (labels != ignore_index).nonzero().squeeze(-1)
    divisor = max(len(kept), 1) if num_items_in_batch is None else num_items_in_batch
    if torch.is_tensor(divisor):
        divisor = divisor.to(hidden.device)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    total = _ChunkedLoss.apply(hidden.reshape(-1, hidden.shape[-1]), weight, labels, kept, rows, dtype)
    return total / divisor


class _ChunkedLoss(torch.autograd.Function):
    """The summed loss, and its gradients for hidden states and weight."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, kept, rows, dtype):
        ctx.save_for_backward(hidden, weight, labels, kept)
        ctx.plan = rows, dtype
        total, *ctx.gradients = _sum_chunks(hidden, weight, labels, kept, *ctx.plan, ctx.needs_input_grad[:2])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # given away at the first of several backward passes
            _, *gradients = _sum_chunks(*ctx.saved_tensors, *ctx.plan, ctx.needs_input_grad[:2])
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(grad_output)
        return *gradients, None, None, None, None


@torch.no_grad()
def _sum_chunks(hidden, weight, labels, kept, rows, dtype, wanted):
    """The summed loss of the rows `kept`, and the gradients of it that are `wanted`, else `None`."""
    with torch.autocast(hidden.device.type, enabled=False):
        head = weight.to(dtype)
        precise = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), dtype=precise, device=hidden.device)
        for_hidden = torch.zeros_like(hidden) if wanted[0] else None
        for_weight = torch.zeros_like(weight) if wanted[1] else None
        for chunk in kept.split(rows):
            inputs, target = hidden[chunk].to(dtype), labels[chunk, None]
            logits = (inputs @ head.T).to(precise)
            norm = logits.logsumexp(-1, keepdim=True)
            total += (norm - logits.gather(-1, target)).sum()
            if not any(wanted):
                continue
            # The gradient for logits is the softmax less one at the label.
            change = logits.sub_(norm).exp_()
            change.scatter_add_(-1, target, torch.full_like(norm, -1))
            change = change.to(dtype)
            if for_hidden is not None:
                for_hidden[chunk] = (change @ head).to(hidden.dtype)
            if for_weight is not None and weight.dtype == dtype:
                for_weight.addmm_(change.T, inputs)
            elif for_weight is not None:
                for_weight += change.T @ inputs
            del logits, change  # before the next chunk's are made
    return total, for_hidden, for_weight
