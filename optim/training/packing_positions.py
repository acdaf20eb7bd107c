"""M-RoPE positions of one sample, as the model computes them for it alone.

A text token takes one position on all three axes; a picture or video frame takes its row and column beside the
position at which it starts, and text goes on behind its longer side. Source: Qwen2-VL (arXiv 2409.12191), section 2.1;
every frame of a video stands alone in Qwen3-VL (arXiv 2511.21631).
"""

import torch


TEXT, IMAGE, VIDEO = 0, 1, 2


def sample_positions(types: torch.Tensor, grids: dict[int, torch.Tensor], merge: int) -> torch.Tensor:
    """Positions (3, tokens) int64 of a sample without padding.

    Args:
        types (`torch.Tensor`): (tokens,), 0 for text, 1 and 2 for the placeholders of pictures and videos.
        grids: of a modality, (pictures, 3) patches in time, height and width, in the order of the placeholders.
        merge (`int`): patches that a visual token spans in height and width.
    Raises:
        ValueError: if the placeholders are not those that the grids call for. It says what is wrong, and the caller
            says with which sample.
    """
    advance = (types == TEXT).long()
    offsets = torch.zeros(3, len(types), dtype=torch.long)
    for modality, name in ((IMAGE, "image"), (VIDEO, "video")):
        where = (types == modality).nonzero().squeeze(-1)
        pictures = _pictures(modality, grids.get(modality), merge)
        needed = sum(time * height * width for time, height, width in pictures)
        if needed != len(where):
            raise ValueError(
                f"has {len(where)} {name} placeholder tokens but {name}_grid_thw calls for {needed}; pass ids and "
                "grids of the same processor call"
            )
        for time, height, width in pictures:
            tokens, where = where.split((time * height * width, len(where) - time * height * width))
            if int(tokens[-1] - tokens[0]) != len(tokens) - 1:
                raise ValueError(
                    f"has {name} placeholder tokens that other tokens interrupt; {name}_grid_thw must follow the "
                    "order of the placeholders"
                )
            offsets[:, tokens] = torch.cartesian_prod(*map(torch.arange, (time, height, width))).view(-1, 3).T
            advance[tokens[-1]] = max(height, width)
    return advance.cumsum(0) - advance + offsets


def _pictures(modality: int, grids: torch.Tensor | None, merge: int) -> list[tuple[int, int, int]]:
    """What stands in one run of placeholders, in visual tokens: a picture, or a frame of a video."""
    sizes = [
        (time, height // merge, width // merge) for time, height, width in ([] if grids is None else grids.tolist())
    ]
    if modality == IMAGE:
        return sizes
    return [(1, height, width) for time, height, width in sizes for _ in range(time)]
