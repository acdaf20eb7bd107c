"""The vision tower: patches of pictures and video frames to visual tokens and their DeepStack features.

Sources: Qwen3-VL Technical Report (arXiv 2511.21631); SigLIP 2 (arXiv 2502.14786) for the tower; DeepStack
(arXiv 2406.04334).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..configuration.configuration_qwen3_vl import Qwen3VLVisionConfig
from .modeling_base import Qwen3VLPreTrainedModel, Qwen3VLVisionOutput, eager_attention_forward


class PatchConv3d(nn.Conv3d):
    """A convolution over inputs of exactly one kernel's size, which is one matrix product and computed as such."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


class Qwen3VLVisionPatchEmbed(nn.Module):
    """Linear map of flat patches. It stays a convolution to checkpoints, adapters and offloading hooks."""

    def __init__(self, config: Qwen3VLVisionConfig):
        super().__init__()
        self.kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = PatchConv3d(config.in_channels, config.hidden_size, kernel_size=self.kernel, stride=self.kernel)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = pixels.to(self.proj.weight.dtype).view(len(pixels), -1, *self.kernel)
        return self.proj(patches).flatten(1)


class Qwen3VLVisionRotaryEmbedding(nn.Module):
    """Cosines and sines of the 2-D rotary embedding: half of the frequencies follow rows, half columns."""

    def __init__(self, config: Qwen3VLVisionConfig):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        if self.rope_type != "axial":
            raise ValueError(f"the vision tower has only rope_type 'axial', got {self.rope_type!r}.")
        inv_freq, self.attention_scaling = self.compute_axial_rope_parameters(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_axial_rope_parameters(config, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse wavelengths (head_dim / 4,) in radians a patch, and the factor on cosine and sine."""
        axis_dim = config.hidden_size // config.num_heads // 2
        exponents = torch.arange(0, axis_dim, 2, dtype=torch.float) / axis_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents).to(device), 1.0

    @torch.no_grad()
    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(patches, 2) rows and columns to cosine and sine, each (patches, head_dim / 2) in float32."""
        inv_freq = self.inv_freq.to(device=positions.device, dtype=torch.float)
        angles = (positions[:, :, None].float() * inv_freq).flatten(1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def rotate_and_lay_out(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Query, key and value, each (heads, patches, D), from (patches, 3, heads, D) and angles (patches, D / 2).

    Queries and keys are rotated in float32. A head's patches lie together, as attention kernels read them fastest.
    """
    qkv = qkv.permute(1, 2, 0, 3)
    query, key = rotate_queries_and_keys(qkv[:2], cos, sin)
    return query, key, qkv[2].contiguous()


class Qwen3VLVisionAttention(nn.Module):
    """Full attention inside every picture and every video frame; none between them.

    `lay_out` rotates and orders what attention reads; a technique may put an equal, faster function in its place.
    """

    lay_out = staticmethod(rotate_and_lay_out)

    def __init__(self, config: Qwen3VLVisionConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_heads
        self.head_dim = config.hidden_size // config.num_heads
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        frame_lengths: list[int],
        cu_seqlens: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        shared: "SharedUpdates | None" = None,
        **kwargs,
    ) -> tuple[torch.Tensor, tuple | None]:
        """Attends within each frame.

        Args:
            hidden_states (`torch.Tensor`): (patches, hidden size), the frames one after the other.
            frame_lengths (`list[int]`): patches of each frame, on the host, so that no layer waits for the device.
            cu_seqlens (`torch.Tensor`): (frames + 1,) int32 offsets, for variable-length kernels.
            shared ([`SharedUpdates`], *optional*): leaves the queries of some patches out.
        Returns:
            output (queries, hidden size), and the weights of every run of equal frames if the implementation gives
            them.
        """
        patches = hidden_states.shape[0]
        qkv = self.qkv(hidden_states).view(patches, 3, self.num_heads, self.head_dim)
        query, key, value = self.lay_out(qkv, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)

        if is_flash_attention_requested(self.config):
            longest = max(frame_lengths)
            output, weights = attend(
                self,
                *(x.unsqueeze(0) for x in (query, key, value)),
                attention_mask=None,
                scaling=self.scaling,
                dropout=0.0,
                cu_seq_lens_q=cu_seqlens,
                cu_seq_lens_k=cu_seqlens,
                max_length_q=longest,
                max_length_k=longest,
                is_causal=False,
                **kwargs,
            )
            return self.proj(output.reshape(patches, -1)), weights

        query_lengths = frame_lengths
        if shared is not None:
            query, query_lengths = query[:, shared.computed], shared.frame_lengths
        outputs, weights, start, first = [], [], 0, 0
        for (length, queries), frames in runs_of_equals(zip(frame_lengths, query_lengths, strict=True)):
            stop, last = start + length * frames, first + queries * frames
            # Frames of equal size are the rows of one batch: one call in place of one a frame.
            batch = (
                x.unflatten(1, (frames, -1)).transpose(0, 1)
                for x in (query[:, first:last], key[:, start:stop], value[:, start:stop])
            )
            run_output, run_weights = attend(
                self, *batch, attention_mask=None, scaling=self.scaling, dropout=0.0, is_causal=False, **kwargs
            )
            outputs.append(run_output.reshape(queries * frames, -1))
            weights.append(run_weights)
            start, first = stop, last
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return self.proj(output), None if weights[0] is None else tuple(weights)


class Qwen3VLVisionMLP(nn.Module):
    def __init__(self, config: Qwen3VLVisionConfig):
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_fc2(self.act_fn(self.linear_fc1(x)))


class Qwen3VLVisionBlock(GradientCheckpointingLayer):
    def __init__(self, config: Qwen3VLVisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.attn = Qwen3VLVisionAttention(config)
        self.mlp = Qwen3VLVisionMLP(config)

    def forward(self, hidden_states: torch.Tensor, shared: "SharedUpdates | None" = None, **kwargs) -> torch.Tensor:
        update = self.attn(self.norm1(hidden_states), shared=shared, **kwargs)[0]
        if shared is None:
            hidden_states = hidden_states + update
            return hidden_states + self.mlp(self.norm2(hidden_states))
        update = update + self.mlp(self.norm2(hidden_states[shared.computed] + update))
        return hidden_states + shared.spread(update)


@dataclass(frozen=True)
class SharedUpdates:
    """Patches whose update by a block is not computed but a weighted mean of that of patches beside them.

    They keep their own hidden states, and are seen by all others as what they are.

    Args:
        computed (`torch.Tensor`): (K,) rows of the patches with updates of their own, rising.
        frame_lengths (`list[int]`): how many those are in each frame.
        left_out (`torch.Tensor`): (G,) rows of the others.
        beside, nearness (`torch.Tensor`): (G, 4) rows for each, all of them computed, and their weights.
    """

    computed: torch.Tensor
    frame_lengths: list[int]
    left_out: torch.Tensor
    beside: torch.Tensor
    nearness: torch.Tensor

    def spread(self, update: torch.Tensor) -> torch.Tensor:
        """Updates (patches, C) out of the computed ones (K, C)."""
        rows = len(self.computed) + len(self.left_out)
        whole = update.new_zeros(rows, update.shape[1]).index_copy(0, self.computed, update)
        shared = (whole[self.beside] * self.nearness[..., None].to(update)).sum(1)
        return whole.index_copy(0, self.left_out, shared)


class Qwen3VLVisionPatchMerger(nn.Module):
    """Joins a square of neighbouring patches into one visual token of the decoder's width.

    The final merger norms each patch before joining, a DeepStack merger the joined square (`norm_after_join`).
    """

    def __init__(self, config: Qwen3VLVisionConfig, norm_after_join: bool = False):
        super().__init__()
        self.joined_size = config.hidden_size * config.spatial_merge_size**2
        self.norm_after_join = norm_after_join
        self.norm = nn.LayerNorm(self.joined_size if norm_after_join else config.hidden_size, eps=1e-6)
        self.linear_fc1 = nn.Linear(self.joined_size, self.joined_size)
        self.act_fn = nn.GELU()
        self.linear_fc2 = nn.Linear(self.joined_size, config.out_hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x.view(-1, self.joined_size)) if self.norm_after_join else self.norm(x)
        return self.linear_fc2(self.act_fn(self.linear_fc1(x.view(-1, self.joined_size))))


class Qwen3VLVisionModel(Qwen3VLPreTrainedModel):
    """The vision tower with its mergers."""

    config_class = Qwen3VLVisionConfig
    main_input_name = "hidden_states"
    input_modalities = ("image", "video")
    _can_record_outputs = {"hidden_states": Qwen3VLVisionBlock, "attentions": Qwen3VLVisionAttention}

    def __init__(self, config: Qwen3VLVisionConfig):
        super().__init__(config)
        self.spatial_merge_size = config.spatial_merge_size
        self.patch_size = config.patch_size
        self.num_grid_per_side = int(config.num_position_embeddings**0.5)
        self.deepstack_visual_indexes = list(config.deepstack_visual_indexes)

        self.patch_embed = Qwen3VLVisionPatchEmbed(config)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.rotary_pos_emb = Qwen3VLVisionRotaryEmbedding(config)
        self.blocks = nn.ModuleList(Qwen3VLVisionBlock(config) for _ in range(config.depth))
        self.merger = Qwen3VLVisionPatchMerger(config)
        self.deepstack_merger_list = nn.ModuleList(
            Qwen3VLVisionPatchMerger(config, norm_after_join=True) for _ in self.deepstack_visual_indexes
        )
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        hidden_states: torch.Tensor,
        grid_thw: torch.Tensor,
        squares_left_out: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
        sharing_blocks: int = 0,
        **kwargs,
    ) -> tuple | Qwen3VLVisionOutput:
        """Encodes pictures and frames, each on its own.

        Args:
            hidden_states (`torch.Tensor`): (patches, channels * temporal_patch_size * patch_size**2), the pixels of
                all pictures, normalised; the patches of a merge square are neighbours.
            grid_thw (`torch.Tensor`): (pictures, 3), patches in time, height and width of each.
            squares_left_out (*optional*): by frame, numbers (n,) of merge squares that the first `sharing_blocks`
                blocks do not compute, and (n, 4) those above, below, left and right of each: see [`SharedUpdates`].
        Raises:
            ValueError: if a grid does not divide by `spatial_merge_size` or the grids do not add up to `patches`.
        """
        grids = grid_thw.tolist()
        self._check_grids(grids, hidden_states)
        frame_lengths = [height * width for time, height, width in grids for _ in range(time)]
        device = hidden_states.device
        table = self._position_table(grids, device)
        positions = patch_positions(grids, self.spatial_merge_size, device)
        shared = self._share_updates(squares_left_out, frame_lengths, device) if squares_left_out else None
        cu_seqlens = F.pad(torch.tensor(frame_lengths, device=device).cumsum(0), (1, 0)).int()

        hidden_states = self.patch_embed(hidden_states)
        hidden_states = hidden_states + table.to(hidden_states)
        del table  # float32, and not to stay alive through all blocks
        position_embeddings = self.rotary_pos_emb(positions)

        deepstack_features = []
        for index, block in enumerate(self.blocks):
            hidden_states = block(
                hidden_states,
                frame_lengths=frame_lengths,
                cu_seqlens=cu_seqlens,
                position_embeddings=position_embeddings,
                shared=shared if index < sharing_blocks else None,
                **kwargs,
            )
            if index in self.deepstack_visual_indexes:
                merger = self.deepstack_merger_list[self.deepstack_visual_indexes.index(index)]
                deepstack_features.append(merger(hidden_states))

        return Qwen3VLVisionOutput(
            last_hidden_state=hidden_states,
            pooler_output=self.merger(hidden_states),
            deepstack_features=deepstack_features,
        )

    def _share_updates(self, squares, frame_lengths: list[int], device: torch.device) -> SharedUpdates:
        if is_flash_attention_requested(self.config):
            raise ValueError("patches are left out, which FlashAttention does not do; use attn_implementation='sdpa'.")
        merge, stops = self.spatial_merge_size, list(accumulate(frame_lengths))
        inside = torch.arange(merge**2, device=device)
        row, column = inside // merge, inside % merge
        # Of the square above the lowest row is next, of that below the highest, and so on; near ones weigh more.
        facing = torch.stack((merge * (merge - 1) + column, column, merge * row + merge - 1, merge * row))
        nearness = torch.stack((merge - row, row + 1, merge - column, column + 1)).T / (2 * merge + 2)
        left_out, beside, counts = [], [], []
        for stop, length, (numbers, around) in zip(stops, frame_lengths, squares, strict=True):
            start = stop - length
            left_out.append((start + numbers[:, None] * len(inside) + inside).flatten())
            beside.append((start + around[..., None] * len(inside) + facing).transpose(1, 2).flatten(0, 1))
            counts.append(length - len(left_out[-1]))
        left_out, beside = torch.cat(left_out), torch.cat(beside)
        is_computed = torch.ones(stops[-1], dtype=torch.bool, device=device)
        is_computed[left_out] = False
        weights = nearness.repeat(len(left_out) // len(inside), 1)
        return SharedUpdates(is_computed.nonzero().squeeze(-1), counts, left_out, beside, weights)

    def _position_table(self, grids: list[list[int]], device: torch.device) -> torch.Tensor:
        """The learned square table, resampled bilinearly to every grid: (patches, hidden size), float32."""
        resampled = {}
        for _, height, width in grids:
            if (height, width) not in resampled:
                resampled[height, width] = self._resample_table(height, width, device)
        return torch.cat([resampled[height, width].repeat(time, 1) for time, height, width in grids])

    def _resample_table(self, height: int, width: int, device: torch.device) -> torch.Tensor:
        side = self.num_grid_per_side
        row_taps, row_weights = linear_taps(height, side, device)
        column_taps, column_weights = linear_taps(width, side, device)
        taps = row_taps[:, None, :, None] * side + column_taps[None, :, None, :]  # (height, width, 2, 2)
        weights = row_weights[:, None, :, None] * column_weights[None, :, None, :]
        grid = (self.pos_embed(taps.flatten(2)) * weights.flatten(2)[..., None]).sum(2)
        return in_merge_order(grid, self.spatial_merge_size)

    def _check_grids(self, grids: list[list[int]], pixels: torch.Tensor) -> None:
        merge, given = self.spatial_merge_size, pixels.shape[0]
        for grid in grids:
            if grid[1] % merge or grid[2] % merge:
                raise ValueError(
                    f"grid {tuple(grid)} (time, height, width in patches) does not divide by spatial_merge_size "
                    f"{merge}; height and width must, as the processor's resizing makes them."
                )
        needed = sum(time * height * width for time, height, width in grids)
        if needed != given:
            raise ValueError(
                f"grid_thw describes {needed} patches but the pixels hold {given}; "
                "pass pixels and grids of the same processor call."
            )


def runs_of_equals(items: Iterable) -> list[tuple]:
    """Neighbours that are equal: `[4, 4, 6]` to `[(4, 2), (6, 1)]`, each (item, count)."""
    return [(item, len(list(run))) for item, run in groupby(items)]


def linear_taps(size: int, side: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Which two of `side` samples each of `size` points lies between, ends on ends, and how near: each (size, 2)."""
    points = torch.arange(size, device=device, dtype=torch.float32) * (side - 1) / max(size - 1, 1)
    lower = points.floor()
    nearness = points - lower
    taps = torch.stack((lower, (lower + 1).clamp(max=side - 1)), dim=-1).long()
    return taps, torch.stack((1 - nearness, nearness), dim=-1)


def in_merge_order(grid: torch.Tensor, merge: int) -> torch.Tensor:
    """(height, width, C) to (height * width, C), the patches of every merge square next to each other."""
    height, width, channels = grid.shape
    squares = grid.view(height // merge, merge, width // merge, merge, channels)
    return squares.transpose(1, 2).reshape(height * width, channels)


def patch_positions(grids: list[list[int]], merge: int, device) -> torch.Tensor:
    """Row and column of every patch of every frame, in merge order: (patches, 2)."""
    positions = []
    for time, height, width in grids:
        rows = torch.arange(height, device=device)[:, None].expand(height, width)
        columns = torch.arange(width, device=device)[None, :].expand(height, width)
        positions.append(in_merge_order(torch.stack((rows, columns), dim=-1), merge).repeat(time, 1))
    return torch.cat(positions)


def rotate_queries_and_keys(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates (2, heads, patches, D) by angles (patches, D / 2), in float32, and returns it in `x.dtype`.

    Half by half, which rounds as the usual form does and moves half as much memory.
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat(((first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)), dim=-1)
