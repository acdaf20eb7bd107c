"""Linear layers that share one weight matrix and differ by a low-rank product of their own."""

import torch
from torch import nn
from torch.nn import functional as F


# Of a larger matrix all singular vectors take too long for the few that are wanted.
EXACT_UP_TO = 512
MOMENT_FLOOR = 1e-3


class LowRankLinear(nn.Linear):
    """`x W^T + (x A^T) B^T + b`, where `weight` W is one parameter of several such layers, and A, B, b are its own.

    A subclass of `nn.Linear`, so that adapters (PEFT) attach to it. They must not be merged into `weight`, which
    belongs to other layers too.

    Args:
        weight (`nn.Parameter`, *optional*): (out, in), shared and not copied; `None` where it is tied later.
        down (`torch.Tensor`): A, (rank, in).
        up (`torch.Tensor`): B, (out, rank).
        bias (`nn.Parameter`, *optional*): (out,).
    """

    def __init__(
        self, weight: nn.Parameter | None, down: torch.Tensor, up: torch.Tensor, bias: nn.Parameter | None = None
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = down.shape[1], up.shape[0]
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        self.adapter_down = nn.Parameter(down)
        self.adapter_up = nn.Parameter(up)

    @property
    def rank(self) -> int:
        return self.adapter_down.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = F.linear(F.linear(x, self.adapter_down), self.adapter_up)
        return F.linear(x, self.weight, self.bias) + own

    def expanded(self) -> torch.Tensor:
        """The (out, in) weight of a plain linear layer that computes the same; summed in float32."""
        return expand_low_rank(self.weight, self.adapter_down, self.adapter_up)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def is_low_rank(module: nn.Module) -> bool:
    """Whether `module` is a [`LowRankLinear`], of this module or of its copy in a Hub folder."""
    return hasattr(module, "adapter_down")


@torch.no_grad()
def expand_low_rank(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`weight` (out, in) plus `up` (out, rank) times `down` (rank, in), summed in float32, in the weight's dtype."""
    return torch.addmm(weight.float(), up.float(), down.float()).to(weight.dtype)


@torch.no_grad()
def low_rank_factors(
    matrix: torch.Tensor, rank: int, moment: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The closest matrix of `rank` to `matrix` (out, in), as A (rank, in) and B (out, rank), float32.

    By truncated singular value decomposition (Eckart and Young, 1936), for large matrices a randomised one (Halko et
    al., arXiv 0909.4061). Rows and columns beyond the smaller side of the matrix are zero.

    Args:
        moment (`torch.Tensor`, *optional*): (in, in), the second moment of what the matrix is multiplied with. Closest
            then means in the products, as in SVD-LLM (arXiv 2403.07378).
    """
    matrix = matrix.float()
    root, inverse = (None, None) if moment is None else _roots(moment)
    left, values, right = _leading(matrix if root is None else matrix @ root, rank)
    scale = values.sqrt()
    down, up = matrix.new_zeros(rank, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], rank)
    right = scale[:, None] * right
    down[: len(values)] = right if inverse is None else right @ inverse
    up[:, : len(values)] = left * scale
    return down, up


@torch.no_grad()
def fit_shared(
    weights: list[torch.Tensor], rank: int, moments: list[torch.Tensor] | None = None, rounds: int = 8
) -> torch.Tensor:
    """The matrix (out, in) from which all `weights` are nearest to differing by matrices of `rank`, float32.

    In turns: the low-rank differences to the matrix, then the mean of what they leave. It begins at the first weight;
    from the mean the differences of a pair are each other's negatives, and half of their rank is lost.

    Args:
        moments (`list[torch.Tensor]`, *optional*): one a weight; see [`low_rank_factors`].
    """
    shared = weights[0].float()
    moments = moments or [None] * len(weights)
    total = None if moments[0] is None else torch.linalg.inv(sum(map(_regular, moments)))
    for _ in range(rounds):
        left_over = torch.zeros_like(shared)
        for weight, moment in zip(weights, moments, strict=True):
            down, up = low_rank_factors(weight.float() - shared, rank, moment)
            rest = weight.float() - up @ down
            left_over += rest if moment is None else rest @ _regular(moment)
        shared = left_over / len(weights) if total is None else left_over @ total
    return shared


def _regular(moment: torch.Tensor) -> torch.Tensor:
    """A moment that can be inverted, since samples need not reach every direction."""
    return moment + MOMENT_FLOOR * moment.diagonal().mean() * torch.eye(len(moment), device=moment.device)


def _roots(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The symmetric square root of a moment, and its inverse."""
    values, vectors = torch.linalg.eigh(_regular(moment))
    roots = values.clamp_min(torch.finfo(values.dtype).tiny).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def _leading(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first `rank` singular vectors and values."""
    kept = min(rank, *matrix.shape)
    if min(matrix.shape) <= EXACT_UP_TO:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrix, min(kept + 16, *matrix.shape), niter=4)
        right = right.T
    return left[:, :kept], values[:kept], right[:kept]
