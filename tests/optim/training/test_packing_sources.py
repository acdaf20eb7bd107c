"""Rows of a dataset and of a stream, the batch sampler, and `Trainer` on all of them."""

from types import SimpleNamespace

import pytest
import torch
from helpers import make_pair, one_line, our_class, tiny_config_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_cases import LAYOUTS, loss_alone, make_sample, make_samples
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from qwen3_vl import AdaptiveSequencePacking
from qwen3_vl.optim.training.packing_sources import measure


datasets = pytest.importorskip("datasets")
pytest.importorskip("accelerate")

CONFIG = our_class("dense", "Config")(**tiny_config_dict("dense"))
SAMPLES = make_samples(LAYOUTS * 3)
SIZES = [(60, 30), (10, 0), (20, 5), (33, 0), (41, 39), (7, 1), (25, 25)] * 6


def packing_of(**options):
    return AdaptiveSequencePacking(CONFIG, **{"row_tokens": 60, **options})


def as_dataset():
    """As a processor leaves them in a `datasets.Dataset`: lists, and nothing where there is no picture."""
    columns = sorted({key for sample in SAMPLES for key in sample})
    rows = [{key: sample[key].tolist() if key in sample else None for key in columns} for sample in SAMPLES]
    return datasets.Dataset.from_list(rows)


def contents(rows):
    """Ids of the samples in rows, as a sorted list."""
    return sorted(tuple(sample.input_ids.tolist()) for row in rows for sample in row)


EXPECTED = sorted(tuple(sample["input_ids"][0].tolist()) for sample in SAMPLES)


def test_rows_hold_every_sample_once():
    packing = packing_of(row_patches=80)
    rows = packing.rows(as_dataset())
    items = [rows[index] for index in range(len(rows))]
    assert contents(items) == EXPECTED and len(rows) < len(SAMPLES)
    assert all(sum(sample.size[0] for sample in row) <= 60 for row in items)
    assert all(sum(sample.size[1] for sample in row) <= 80 for row in items)
    batch = packing(items[:1])
    assert batch["input_ids"].shape[0] == 1 and packing.statistics.padding_tokens == 0


def test_measures_without_pixels():
    expected = [packing_of().read(sample, "").size for sample in SAMPLES]
    assert measure(as_dataset()) == measure(SAMPLES) == expected


def test_stream_holds_every_sample_once_in_a_bounded_buffer():
    for buffer in (1, 4, 64):
        given_out = []

        def source(given_out=given_out):
            for sample in SAMPLES:
                given_out.append(sample)
                yield sample

        rows, taken = [], 0
        for row in packing_of().stream(source(), buffer_samples=buffer):
            assert len(given_out) - taken <= buffer
            rows.append(row)
            taken += len(row)
        assert contents(rows) == EXPECTED
        assert all(sum(sample.size[0] for sample in row) <= 60 for row in rows)


def test_stream_lets_nobody_wait():
    """The sample that came first is in the first row that leaves."""
    rows = list(packing_of().stream(iter(SAMPLES), buffer_samples=5))
    assert torch.equal(rows[0][0].input_ids, SAMPLES[0]["input_ids"][0])


@pytest.mark.parametrize("hf", [False, True])
def test_stream_in_workers_gives_every_sample_once(hf):
    source = as_dataset().to_iterable_dataset(num_shards=2) if hf else list(SAMPLES)
    loader = DataLoader(packing_of().stream(source), batch_size=None, num_workers=2)
    assert contents(loader) == EXPECTED


def test_stream_hands_the_epoch_on():
    shuffled = as_dataset().to_iterable_dataset().shuffle(seed=3, buffer_size=20)
    stream = packing_of().stream(shuffled, buffer_samples=4)
    orders = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        orders.append([sample.input_ids.tolist() for row in stream for sample in row])
    assert orders[0] == orders[2] != orders[1]


def test_bad_samples_of_a_source_are_named_by_their_index():
    broken = [*SAMPLES[:3], {**SAMPLES[3], "labels": None}, *SAMPLES[4:5], make_sample(["text:70"])]
    for use in (lambda x: list(x.stream(broken)), lambda x: x.batches([5, (61, 0)]), lambda x: x.rows(broken)):
        with pytest.raises(ValueError) as error:
            use(packing_of())
        assert one_line(error.value).startswith(
            ("sample 3 of the stream has no labels", "sample 1 has", "sample 5 has")
        )
    packing = packing_of(on_error="skip")
    assert sum(map(len, packing.stream(broken))) == 4
    assert packing.statistics.skipped == {"no_labels": 1, "too_long": 1}
    assert sorted(index for row in packing.batches([5, (61, 0), 7]) for index in row) == [0, 2]
    rows = packing_of(on_error="skip").rows(broken)
    assert sum(len(rows[index]) for index in range(len(rows))) == 4
    with pytest.raises(ValueError, match="buffer_samples must be >= 1"):
        packing.stream(broken, buffer_samples=0)
    with pytest.raises(ValueError, match="window_samples must be >= 1"):
        packing.batches([5], window_samples=0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.permutations(SIZES), st.integers(1, 50), st.integers(0, 5))
def test_batches_keep_budgets_in_every_epoch(sizes, window, epoch):
    sampler = packing_of(row_patches=40).batches(sizes, seed=1, window_samples=window)
    sampler.set_epoch(epoch)
    rows = list(sampler)
    assert len(rows) == len(sampler)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    assert all(sum(sizes[index][0] for index in row) <= 60 for row in rows)
    assert all(sum(sizes[index][1] for index in row) <= 40 for row in rows)


def test_batches_follow_seed_and_epoch():
    def rows(seed, epoch):
        sampler = packing_of().batches(SIZES, seed=seed, window_samples=16)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert rows(0, 1) == rows(0, 1)
    assert rows(0, 1) != rows(0, 2) and rows(0, 1) != rows(1, 1)


def test_batches_go_on_where_they_stopped():
    sampler = packing_of().batches(SIZES, seed=4)
    sampler.set_epoch(2)
    whole = list(sampler)
    begun = iter(sampler)
    head = [next(begun) for _ in range(3)]
    resumed = packing_of().batches(SIZES, seed=4)
    resumed.load_state_dict(sampler.state_dict())
    resumed.set_epoch(2)
    assert head + list(resumed) == whole
    assert list(resumed) == whole  # the next pass begins at the beginning
    with pytest.raises(ValueError, match="seed 4 but this sampler has 5"):
        packing_of().batches(SIZES, seed=5).load_state_dict(sampler.state_dict())


def test_batches_feed_a_data_loader():
    packing = packing_of()
    sampler = packing.batches(measure(SAMPLES))
    loader = DataLoader(SAMPLES, batch_sampler=sampler, collate_fn=packing, num_workers=0)
    shapes = [batch["input_ids"].shape for batch in loader]
    assert len(shapes) == len(sampler) == packing.statistics.rows
    assert all(rows == 1 for rows, _ in shapes) and packing.statistics.samples == len(SAMPLES)


def run_trainer(model, dataset, collator, folder, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{"per_device_train_batch_size": 1, "max_steps": 3, **options},
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        seed=3,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=collator)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


SOURCES = {
    "samples": lambda packing, data: data,
    "rows": lambda packing, data: packing.rows(data),
    "stream": lambda packing, data: packing.stream(data.to_iterable_dataset(), buffer_samples=8),
    "torch_formatted": lambda packing, data: packing.rows(data.with_format("torch")),
}


@pytest.mark.parametrize("source", SOURCES)
def test_trainer_runs(source, tmp_path):
    model = make_pair("dense").ours
    packing = AdaptiveSequencePacking(model, row_tokens=60)
    size = 4 if source == "samples" else 1
    data = SOURCES[source](packing, as_dataset())
    found = run_trainer(model, data, packing, tmp_path, per_device_train_batch_size=size)
    assert len(found) == 3 and all(0 < loss < 50 for loss in found) and found[0] != found[1]
    assert packing.statistics.samples > 3


def test_trainer_s_first_loss_is_that_of_the_samples_alone(tmp_path):
    model = make_pair("dense").ours
    expected, _ = loss_alone(model, SAMPLES[: len(LAYOUTS)])
    packing = AdaptiveSequencePacking(model)
    stream = packing.stream(SAMPLES[: len(LAYOUTS)])
    assert run_trainer(model, stream, packing, tmp_path, max_steps=1)[0] == pytest.approx(expected, abs=1e-4)


def test_readable_without_a_model():
    """A plain object with the model's configuration is enough, as in a worker."""
    assert AdaptiveSequencePacking(SimpleNamespace(config=CONFIG)).config is CONFIG
