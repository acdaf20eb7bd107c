"""Where packed rows come from: a dataset in rows, an iterable in rows, and a batch sampler over sizes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from .packing_bins import pack_bins
from .packing_samples import PICTURES, PackedSample, SampleError, sample_size


def measure(dataset) -> list[tuple[int, int]]:
    """Tokens and vision patches of every sample of a map-style dataset, in one pass over it.

    Of a `datasets.Dataset` only the columns that tell the size are read, unless they are made on the fly.
    """
    needed = {"input_ids", "attention_mask", *(grid for _, grid in PICTURES.values())}
    columns = getattr(dataset, "column_names", None)
    if columns is not None and "input_ids" in columns and hasattr(dataset, "select_columns"):
        dataset = dataset.select_columns([name for name in columns if name in needed])
    return [sample_size(dataset[index]) for index in range(len(dataset))]


def fitting(packing, sizes: Sequence) -> dict[int, tuple[int, int]]:
    """Sizes of the samples that fit into a row, by index; a plain number is a count of tokens."""
    found = {}
    for index, size in enumerate(sizes):
        tokens, patches = size if hasattr(size, "__len__") else (size, 0)
        try:
            packing.check_size((tokens, patches), f"sample {index}")
        except SampleError as error:
            packing.leave_out(error)
        else:
            found[index] = int(tokens), int(patches)
    return found


def bins_of(packing, sizes: dict[int, tuple[int, int]], order: Sequence[int]) -> list[list[int]]:
    """Rows of those samples of `order`, by index."""
    rows = pack_bins([sizes[index] for index in order], packing.row_tokens, packing.row_patches)
    return [[order[place] for place in row] for row in rows]


class PackedRows(Dataset):
    """A map-style dataset in rows: item i is the list of samples of row i, for the packing object to collate.

    The whole set is packed once, so rows are as full as they get, and `Trainer` shuffles and resumes them as it does
    any items.

    Args:
        packing ([`AdaptiveSequencePacking`]): budgets, and what happens to bad samples.
        dataset: map-style, with processed samples.
        sizes (*optional*): (tokens, vision patches) of each sample, or tokens alone; measured by default.
    """

    def __init__(self, packing, dataset, sizes: Sequence | None = None):
        self.packing, self.dataset = packing, dataset
        known = fitting(packing, measure(dataset) if sizes is None else sizes)
        self.bins = bins_of(packing, known, list(known))

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> list[PackedSample]:
        read = [self.packing.read(self.dataset[at], f"sample {at}") for at in self.bins[index]]
        return [sample for sample in read if sample is not None]


class PackedStream(IterableDataset):
    """Rows of a stream, each the best one for the sample that has waited longest in a bounded buffer.

    Every sample leaves the buffer in the end, the order depends on nothing but the stream, and `set_epoch` is handed
    on to it. In a worker of a `DataLoader` a stream that is no `IterableDataset`, and so does not share itself out,
    gives each worker its part.

    Args:
        packing ([`AdaptiveSequencePacking`]): budgets, and what happens to bad samples.
        source: iterable of processed samples, as a streaming `datasets.IterableDataset`.
        buffer_samples (`int`): samples, with their pixels, that are held to choose from.
    """

    def __init__(self, packing, source: Iterable[Mapping], buffer_samples: int = 64):
        if buffer_samples < 1:
            raise ValueError(f"buffer_samples must be >= 1, got {buffer_samples}; a few dozen fill rows well.")
        self.packing, self.source, self.buffer_samples = packing, source, buffer_samples

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[PackedSample]]:
        held: list[PackedSample] = []
        for sample in self._samples():
            held.append(sample)
            if len(held) >= self.buffer_samples:
                row = self._rows(held)[0]
                yield [held[index] for index in row]
                taken = set(row)
                held = [sample for index, sample in enumerate(held) if index not in taken]
        yield from ([held[index] for index in row] for row in self._rows(held))

    def _rows(self, held: list[PackedSample]) -> list[list[int]]:
        """Rows in the order of their first sample, so that the first holds the one that has waited longest."""
        return pack_bins([sample.size for sample in held], self.packing.row_tokens, self.packing.row_patches)

    def _samples(self) -> Iterator[PackedSample]:
        numbered = enumerate(self.source)
        worker = get_worker_info()
        if worker is not None and not isinstance(self.source, IterableDataset):
            numbered = islice(numbered, worker.id, None, worker.num_workers)
        for index, sample in numbered:
            checked = self.packing.read(sample, f"sample {index} of the stream")
            if checked is not None:
                yield checked


class PackedBatchSampler(Sampler):
    """Batches of indices, each one packed row; another arrangement in every epoch.

    Samples are shuffled, packed in windows and the rows shuffled again, all by seed and epoch alone. `state_dict` and
    `load_state_dict` go on in the middle of an epoch with the same next row.

    Args:
        packing ([`AdaptiveSequencePacking`]): budgets, and what happens to samples that are too long.
        sizes: (tokens, vision patches) of each sample, or tokens alone; see [`measure`].
        seed (`int`): of the arrangement.
        window_samples (`int`): how many samples are packed together; more fill rows better, fewer mix better.
    """

    def __init__(self, packing, sizes: Sequence, seed: int = 0, window_samples: int = 4096):
        if window_samples < 1:
            raise ValueError(f"window_samples must be >= 1, got {window_samples}; a few thousand fill rows well.")
        self.packing, self.seed, self.window_samples = packing, seed, window_samples
        self.sizes = fitting(packing, sizes)
        self.epoch, self.next_row = 0, 0
        self._first_row = 0  # where the next pass begins, other than at 0 only once after a state was loaded
        self._planned: tuple[int, list[list[int]]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Takes the arrangement of an epoch; the one that is going on already stays where it is."""
        if epoch != self.epoch:
            self.epoch, self.next_row, self._first_row = epoch, 0, 0

    def __len__(self) -> int:
        """Rows of this epoch."""
        return len(self.plan())

    def __iter__(self) -> Iterator[list[int]]:
        rows = self.plan()
        first, self._first_row = self._first_row, 0
        for row in range(first, len(rows)):
            self.next_row = row + 1
            yield rows[row]
        self.next_row = 0

    def plan(self) -> list[list[int]]:
        """All rows of this epoch, by index."""
        if self._planned is None or self._planned[0] != self.epoch:
            chance = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            known = list(self.sizes)
            order = [known[at] for at in torch.randperm(len(known), generator=chance).tolist()]
            windows = (order[at : at + self.window_samples] for at in range(0, len(order), self.window_samples))
            rows = [row for window in windows for row in bins_of(self.packing, self.sizes, window)]
            self._planned = self.epoch, [rows[at] for at in torch.randperm(len(rows), generator=chance).tolist()]
        return self._planned[1]

    def state_dict(self) -> dict[str, int]:
        """Where the epoch stands, by what was handed out: workers of a `DataLoader` are ahead of the training."""
        return {"seed": self.seed, "epoch": self.epoch, "next_row": self.next_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            ValueError: for the state of another seed, whose rows are others.
        """
        if state["seed"] != self.seed:
            raise ValueError(f"the state is of seed {state['seed']} but this sampler has {self.seed}; use the same.")
        self.epoch, self.next_row = state["epoch"], state["next_row"]
        self._first_row = self.next_row
