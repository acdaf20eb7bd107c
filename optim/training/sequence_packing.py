"""Samples of any length side by side in one row, without padding and without seeing each other."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers.utils import logging

from .packing_bins import pack_bins
from .packing_samples import IGNORED, PICTURES, PackedSample, SampleError, read_sample
from .packing_sources import PackedBatchSampler, PackedRows, PackedStream


logger = logging.get_logger(__name__)

# Those whose packed rows give the loss and gradients of the samples alone (flex has gradients on accelerators only).
EXACT_IN_TRAINING = ("eager", "sdpa", "flex_attention", "qwen3_vl_exact", "qwen3_vl_memory_efficient")


@dataclass
class PackingStatistics:
    """What was packed in this process; workers of a `DataLoader` count their own.

    Args:
        samples, rows, tokens, label_tokens (`int`): what was packed, padding not counted.
        padding_tokens (`int`): behind the shorter rows of a batch of several.
        skipped: how many samples were left out, by reason.
    """

    samples: int = 0
    rows: int = 0
    tokens: int = 0
    label_tokens: int = 0
    padding_tokens: int = 0
    skipped: Counter = field(default_factory=Counter)


class AdaptiveSequencePacking:
    """Packs processed samples (text, several pictures and videos each, or none) into rows for training.

    In a row the plain positions begin anew with each sample, so that the model's own masks keep samples apart, and
    M-RoPE positions are those of the sample alone; the first token of a sample is no target. So loss and gradients
    are those of the samples one by one. Rows are filled best-fit-decreasing under a budget of tokens and one of vision
    patches. Give no `attention_mask` beside a packed batch, and no cache: the model would take the row for one text.

    An object is a `data_collator` by itself, for lists of samples or of rows that the methods below make:
    - `Trainer(train_dataset=packing.rows(dataset), data_collator=packing)`, packed as a whole, a row for an item;
    - `Trainer(train_dataset=packing.stream(dataset), data_collator=packing)`, packed from a bounded buffer;
    - `DataLoader(dataset, batch_sampler=packing.batches(sizes), collate_fn=packing)`, packed anew in every epoch.
    With rows and streams `per_device_train_batch_size` counts rows, and only at 1 is there no padding behind the
    shorter ones. Several processes need `accelerator_config={"dispatch_batches": False}`, which leaves batches whole.

    Source: Krell et al., Efficient Sequence Packing without Cross-contamination (arXiv 2107.02027).

    Args:
        config: a Qwen3-VL model, or the configuration of one.
        row_tokens (`int`): tokens that a row may hold.
        row_patches (`int`, *optional*): vision patches (before merging) that a row may hold; any number by default.
        on_error (`str`): `"raise"`, or `"skip"` to leave bad samples out, warn and count them in `statistics`.
    Raises:
        ValueError: for budgets below 1, or an attention implementation that does not keep to samples in training.
    """

    def __init__(self, config, row_tokens: int = 4096, row_patches: int | None = None, on_error: str = "raise"):
        self.config = getattr(config, "config", config)
        if not hasattr(self.config, "vision_config"):
            raise ValueError(
                f"config must be a Qwen3-VL model or its configuration, got {type(config).__name__}; pass the model."
            )
        for name, budget in (("row_tokens", row_tokens), ("row_patches", row_patches)):
            if budget is not None and budget < 1:
                raise ValueError(f"{name} must be >= 1, got {budget}; leave it out for the default.")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}; choose one of them.")
        self.row_tokens, self.row_patches, self.on_error = row_tokens, row_patches, on_error
        self.statistics = PackingStatistics()
        self._check_attention()

    def __call__(self, samples: Sequence[Mapping | Sequence[PackedSample]]) -> dict[str, torch.Tensor | bool]:
        """One batch of what a `DataLoader` fetched.

        Args:
            samples: processed samples, which are packed here (see [`read_sample`] for their columns), and rows of
                `rows` or `stream`, which stay as they are.
        Returns:
            the model's arguments: `input_ids`, `labels` and `mm_token_type_ids` (rows, longest row), `position_ids`
            (4, rows, longest row), `use_cache=False`, and all pixels and grids in the order of the rows.
        Raises:
            ValueError: for a bad sample, or if none is left.
        """
        self._check_attention()
        rows = [list(item) for item in samples if isinstance(item, (list, tuple))]
        loose = [(at, item) for at, item in enumerate(samples) if not isinstance(item, (list, tuple))]
        read = [self.read(item, f"sample {at} of the batch") for at, item in loose]
        rows = [row for row in rows + self.fill([sample for sample in read if sample is not None]) if row]
        if not rows:
            raise ValueError(
                f"none of {len(samples)} samples of this batch can be trained on; use packing.stream(dataset), which "
                "goes on to the next ones."
            )
        return self._join(rows)

    def rows(self, dataset, sizes: Sequence | None = None) -> PackedRows:
        """A map-style dataset whose items are rows of `dataset`, packed as a whole. See [`PackedRows`]."""
        return PackedRows(self, dataset, sizes)

    def stream(self, dataset: Iterable[Mapping], buffer_samples: int = 64) -> PackedStream:
        """A dataset of rows packed from a bounded buffer of an iterable's samples. See [`PackedStream`]."""
        return PackedStream(self, dataset, buffer_samples)

    def batches(self, sizes: Sequence, seed: int = 0, window_samples: int = 4096) -> PackedBatchSampler:
        """A batch sampler whose batches are rows, packed anew in every epoch. See [`PackedBatchSampler`]."""
        return PackedBatchSampler(self, sizes, seed, window_samples)

    def read(self, sample: Mapping | PackedSample, name: str) -> PackedSample | None:
        """A checked sample that fits into a row; `None` for a bad one where those are skipped."""
        if isinstance(sample, PackedSample):
            return sample
        try:
            checked = read_sample(sample, name, self.config)
            self.check_size(checked.size, name)
        except SampleError as error:
            self.leave_out(error)
            return None
        return checked

    def check_size(self, size: tuple[int, int], name: str) -> None:
        """Raises a `SampleError` if a sample of so many tokens and patches does not fit into a row."""
        for count, budget, what in zip(
            size, (self.row_tokens, self.row_patches), ("tokens", "vision patches"), strict=True
        ):
            if budget is not None and count > budget:
                argument = "row_tokens" if what == "tokens" else "row_patches"
                raise SampleError(
                    "too_long",
                    f"{name} has {count} {what} but a row holds {budget}; raise {argument}, shorten the "
                    "sample, or set on_error='skip'.",
                )

    def leave_out(self, error: SampleError) -> None:
        """Raises the error, or counts it where bad samples are skipped."""
        if self.on_error == "raise":
            raise error
        self.statistics.skipped[error.reason] += 1
        logger.warning(f"{error} It is skipped.")

    def fill(self, samples: Sequence[PackedSample]) -> list[list[PackedSample]]:
        """Samples that fit, in rows."""
        bins = pack_bins([sample.size for sample in samples], self.row_tokens, self.row_patches)
        return [[samples[index] for index in row] for row in bins]

    def _join(self, rows: list[list[PackedSample]]) -> dict[str, torch.Tensor | bool]:
        samples = [sample for row in rows for sample in row]
        tokens = [sum(len(sample.input_ids) for sample in row) for row in rows]
        pad = getattr(self.config.text_config, "pad_token_id", None) or 0
        longest = max(tokens)

        def table(values_of, fill: int) -> torch.Tensor:
            joined = [torch.cat([values_of(sample) for sample in row], dim=-1) for row in rows]
            return torch.stack([torch.nn.functional.pad(x, (0, longest - x.shape[-1]), value=fill) for x in joined])

        axes = table(lambda sample: sample.positions, 0).transpose(0, 1)
        plain = table(lambda sample: torch.arange(len(sample.input_ids)), 0)
        for row, used in enumerate(tokens):  # what pads a row is a sequence of its own
            plain[row, used:] = torch.arange(longest - used)
        batch = {
            "input_ids": table(lambda sample: sample.input_ids, pad),
            "labels": table(lambda sample: sample.labels, IGNORED),
            "mm_token_type_ids": table(lambda sample: sample.types, 0),
            "position_ids": torch.cat((plain[None], axes)),
            # With a cache, samples of a row would see each other.
            "use_cache": False,
        }
        for names in PICTURES.values():
            for name in names:
                parts = [sample.pictures[name] for sample in samples if name in sample.pictures]
                if parts:
                    batch[name] = torch.cat(parts)
        self._count(len(samples), tokens, longest, int((batch["labels"] != IGNORED).sum()))
        # `accelerate` cuts all that comes of a stream to the first dimension of the first value: the longest leads.
        names = sorted(batch, key=lambda name: len(batch[name]) if name != "use_cache" else 0, reverse=True)
        return {name: batch[name] for name in names}

    def _count(self, samples: int, tokens: list[int], longest: int, label_tokens: int) -> None:
        counts = self.statistics
        counts.samples += samples
        counts.rows += len(tokens)
        counts.tokens += sum(tokens)
        counts.label_tokens += label_tokens
        counts.padding_tokens += longest * len(tokens) - sum(tokens)

    def _check_attention(self) -> None:
        name = getattr(self.config.text_config, "_attn_implementation", None)
        if name is not None and name not in EXACT_IN_TRAINING:
            raise ValueError(
                f"attention {name!r} does not give packed samples the gradients that they have alone; train with one "
                f"of {', '.join(EXACT_IN_TRAINING)}."
            )
