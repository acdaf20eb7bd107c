"""`Trainer` as people use it: the steps of the stock model, a checkpoint, and training that goes on from it."""

import pytest
import torch
from helpers import make_inputs
from transformers import Trainer, TrainingArguments


pytest.importorskip("accelerate")

LAYOUT = ["text:3", "image:4x6", "text:6"]


class Samples(torch.utils.data.Dataset):
    """Six pictures with text, the same every time."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        sample = make_inputs(LAYOUT, seed=index)
        labels = torch.where(sample["mm_token_type_ids"] == 0, sample["input_ids"], -100)
        return {**sample, "labels": labels}


def join(samples):
    return {key: torch.cat([sample[key] for sample in samples]) for key in samples[0]}


def make_trainer(model, folder, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=3,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=Samples(), data_collator=join)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_steps_equal_stock_s(pair, tmp_path):
    runs = {}
    for name in ("stock", "ours"):
        trainer = make_trainer(getattr(pair, name), tmp_path / name, max_steps=4, save_strategy="no")
        trainer.train()
        runs[name] = losses(trainer)
    assert len(runs["ours"]) == 4
    assert runs["ours"] == pytest.approx(runs["stock"], abs=1e-4)
    assert runs["ours"][0] != runs["ours"][1]


def test_resumes_from_its_checkpoint(pair, tmp_path):
    whole = make_trainer(pair.ours, tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    again = type(pair.ours).from_pretrained(tmp_path / "checkpoint-2")
    resumed = make_trainer(again, tmp_path, max_steps=4, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-5)
    for name, weight in pair.ours.state_dict().items():
        assert torch.allclose(weight, again.state_dict()[name], atol=1e-5), name
