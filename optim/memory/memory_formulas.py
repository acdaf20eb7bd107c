"""The tensors that are alive at the peak of each phase of `generate()`, counted in bytes.

Every formula lists what the plain model of this package holds at one moment: the tower while it resamples its
position table, rotates queries or widens the MLP, the decoder in attention and in the MLP, a decoding step. The
largest of these moments is the phase's peak. Tests hold them to the tensors that really are alive; what the allocator
keeps besides is `heap_slack`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .memory_request import RequestSizes
from .memory_shapes import ModelShapes


FLOAT = 4
PIXEL_BYTES = 4  # processors give float32
# What the C library's heap was seen to keep at most: holes of smaller blocks than the 32 MiB that go back at once.
MOST_HEAP_SLACK = 64 * 2**20
# Row-wise bookkeeping of `generate()`: ids, types, masks, four-row positions in int64.
TOKEN_BYTES = 64


@dataclass(frozen=True)
class PhasePeak:
    """The bytes of a phase's peak and the size of its largest single tensor."""

    bytes: int
    largest_block: int


def largest(peaks: Sequence[PhasePeak]) -> PhasePeak:
    return max(peaks, key=lambda peak: peak.bytes, default=PhasePeak(0, 0))


def heap_slack(block: int) -> int:
    """What the C library's heap keeps of freed blocks, by the largest block in use.

    Up to three holes of that size, as measured at 1,024 to 8,192 tokens of 2B widths. On the CPU alone: there, with
    `MALLOC_MMAP_THRESHOLD_=65536`, the measured peak is that of the live tensors within 1 %.
    """
    return min(3 * block, MOST_HEAP_SLACK)


def frame_groups(grids: Sequence[tuple[int, int, int]], max_patches: int | None) -> list[list[tuple[int, int, int]]]:
    """Grids cut into groups of whole frames with at most `max_patches` patches; one group without a limit.

    A frame that is larger than the limit is a group of its own.
    """
    grids = [tuple(grid) for grid in grids]
    if max_patches is None:
        return [grids] if grids else []
    groups: list[list[tuple[int, int, int]]] = []
    room = 0
    for time, height, width in grids:
        frame = height * width
        while time:
            if room < frame:
                groups.append([])
                room = max(max_patches, frame)
            taken = min(time, room // frame)
            groups[-1].append((taken, height, width))
            room -= taken * frame
            time -= taken
    return groups


def tower_peak(
    shapes: ModelShapes, grids: Sequence[tuple[int, int, int]], itemsize: int, max_patches: int | None, attention: str
) -> PhasePeak:
    """The tower's own peak over pictures or videos of all rows, without its output and the given pixels."""
    patches = sum(time * height * width for time, height, width in grids)
    if not patches:
        return PhasePeak(0, 0)
    pixels = patches * shapes.pixel_width
    # `isfinite` makes absolute values and three flags; then the pixels in the model's dtype stay until the end.
    check = PhasePeak(pixels * (PIXEL_BYTES + 2), pixels * PIXEL_BYTES)
    cast = 0 if itemsize == PIXEL_BYTES else pixels * itemsize
    groups = frame_groups(grids, max_patches)
    # In groups, the whole output is there from the first one on, and each group's own beside it.
    output = tower_output(shapes, patches, itemsize) if len(groups) > 1 else 0
    peaks = [_group_peak(shapes, group, itemsize, attention) for group in groups]
    peak = largest(peaks)
    return largest([check, PhasePeak(peak.bytes + cast + output, max(peak.largest_block, cast))])


def _group_peak(shapes: ModelShapes, grids, itemsize: int, attention: str) -> PhasePeak:
    """The largest moment of one run of the tower."""
    width, patches = shapes.vision_hidden, sum(time * height * width for time, height, width in grids)
    frames = {(height, wide): height * wide for _, height, wide in grids}
    table = FLOAT * width * sum(frames.values())
    taps = 4 * max(frames.values()) * width
    # Four samples of the table a patch, in the weights' dtype, cast, and weighted in float32.
    resample = table + taps * (itemsize + FLOAT + (FLOAT if itemsize != FLOAT else 0)) + patches * width * itemsize
    place = table + patches * width * (FLOAT + 3 * itemsize)
    angles = patches * (width // shapes.vision_heads) * FLOAT
    features = patches // shapes.merge * shapes.hidden * itemsize * shapes.deepstack
    held = angles + features + patches * width * itemsize
    normed = patches * width * itemsize
    if itemsize == FLOAT:  # no casts: a quarter less, but the halves stay in float32
        rotation = patches * width * (3 + 4) * itemsize
    else:
        rotation = patches * width * (3 * itemsize + 2 * FLOAT + 3 * FLOAT + itemsize)
    scores = 0
    if attention == "eager":
        per_run = max(time * (height * wide) ** 2 for time, height, wide in grids)
        scores = score_bytes(shapes.vision_heads * per_run, itemsize)
    attend = patches * width * (3 + 3 + 2) * itemsize + scores
    mlp = patches * 2 * shapes.vision_inner * itemsize
    merge = patches * width * 3 * itemsize + features // max(shapes.deepstack, 1)
    inside = max(rotation, attend, mlp, merge)
    block = max(2 * patches * width * FLOAT, patches * shapes.vision_inner * itemsize, scores // 2)
    return largest(
        [PhasePeak(resample, taps * FLOAT), PhasePeak(place, table), PhasePeak(held + normed + inside, block)]
    )


def tower_output(shapes: ModelShapes, patches: int, itemsize: int) -> int:
    """Bytes of the last hidden states, the visual tokens and the DeepStack features of `patches`."""
    tokens = patches // shapes.merge * shapes.hidden * (1 + shapes.deepstack)
    return (patches * shapes.vision_hidden + tokens) * itemsize


def prefill_peak(
    shapes: ModelShapes,
    sizes: RequestSizes,
    rows: int,
    itemsize: int,
    chunk: int | None,
    attention: str,
    cache: str,
) -> PhasePeak:
    """The prefill's own peak at the last chunks, without the cache's content and the tower's outputs."""
    prompt = sizes.prompt
    step = min(chunk or prompt, prompt)
    visual = sizes.image + sizes.video
    chunked = step < prompt
    # Every chunk's features are cut out before the first chunk runs.
    features = rows * visual * shapes.hidden * itemsize * (1 + shapes.deepstack)
    slices = features if chunked else 0
    visual_here = min(visual, step)
    tokens = rows * step
    deepstack = rows * visual_here * shapes.hidden * itemsize * shapes.deepstack
    held = slices + deepstack + rows * prompt * TOKEN_BYTES + 2 * tokens * shapes.head_dim * itemsize
    hidden = tokens * shapes.hidden * itemsize
    query, kv = tokens * shapes.query_width * itemsize, tokens * shapes.kv_width * itemsize
    # Queries and keys before, rotated halves, products and sums.
    rotate = 3 * hidden + kv + max(5 * query + kv, 2 * query + 5 * kv)
    history = history_copies(shapes, rows, prompt if chunked else step, itemsize, attention, cache, step)
    attend = 3 * hidden + 2 * query + 2 * kv + history
    norm = 4 * hidden + 2 * tokens * shapes.hidden * FLOAT
    place = 2 * hidden + 2 * rows * visual_here * shapes.hidden * itemsize
    layers = 5 if shapes.layers > 1 else 4
    mlp = layers * hidden + mlp_bytes(shapes, tokens, itemsize)
    logits = hidden + rows * shapes.vocabulary * (itemsize + 2 * FLOAT)
    block = max(hidden, tokens * max(shapes.inner, shapes.query_width) * itemsize)
    if shapes.experts_per_token:
        block = max(block, hidden * shapes.experts_per_token)
    return PhasePeak(held + max(rotate, attend, norm, place, mlp, logits), block)


def mlp_bytes(shapes: ModelShapes, tokens: int, itemsize: int) -> int:
    """The widest moment of a feed-forward layer, dense or sparse, without its input."""
    dense = 3 * tokens * shapes.inner * itemsize
    routed = tokens * shapes.experts_per_token * itemsize
    inside = routed * (2 * shapes.hidden + 3 * shapes.expert_inner)
    return max(dense, inside, 5 * routed * shapes.hidden)


def history_copies(
    shapes: ModelShapes, rows: int, tokens: int, itemsize: int, attention: str, cache: str, queries: int
) -> int:
    """What attention to `tokens` keys makes of one layer's history before or while it reads it."""
    ours = attention.startswith("qwen3_vl_")
    layer = rows * tokens * shapes.kv_width * itemsize
    if cache == "dynamic":
        # Appended by concatenation: the old keys or values are alive beside the new ones, but not while they are read.
        return max(layer, _read_copies(shapes, rows, tokens, itemsize, attention, queries))
    # Others are gathered, or unpacked, where the attention cannot read them in place.
    gathered = 0 if ours else 2 * layer
    if ours and cache != "paged" and queries not in (1, tokens):
        # Packed histories are read in pieces, whose parts are merged in float32.
        gathered = rows * queries * shapes.query_width * (2 * FLOAT + itemsize)
    return gathered + _read_copies(shapes, rows, tokens, itemsize, attention, queries)


def _read_copies(shapes: ModelShapes, rows: int, tokens: int, itemsize: int, attention: str, queries: int) -> int:
    """What an attention function makes besides its output."""
    repeated = 2 * rows * tokens * shapes.query_width * itemsize
    if attention == "eager":
        return repeated + score_bytes(rows * shapes.heads * queries * tokens, itemsize)
    # Our own read grouped heads in place; so does the plain kernel for one query and for plainly causal ones.
    if attention != "sdpa" or queries in (1, tokens):
        return 0
    # A mask of flags, and the additive one that the kernel makes of it.
    return repeated + rows * queries * tokens * (1 + itemsize)


def score_bytes(scores: int, itemsize: int) -> int:
    """What eager attention makes of so many scores: two copies, or one with its float32 cast and softmax."""
    return scores * (2 * FLOAT if itemsize == FLOAT else itemsize + 2 * FLOAT)


def decode_peak(
    shapes: ModelShapes, sizes: RequestSizes, rows: int, itemsize: int, attention: str, cache: str
) -> PhasePeak:
    """A decoding step's own peak, without the cache's content."""
    layer = rows * sizes.cached * shapes.kv_width * itemsize
    history = history_copies(shapes, rows, sizes.cached, itemsize, attention, cache, 1)
    hidden = 5 * rows * shapes.hidden * itemsize + mlp_bytes(shapes, rows, itemsize)
    logits = rows * shapes.vocabulary * (itemsize + 2 * FLOAT)
    block = max(layer if history else 0, rows * shapes.vocabulary * FLOAT)
    return PhasePeak(rows * sizes.cached * TOKEN_BYTES + history + max(hidden, logits), block)
