"""The side of `make bench-train` that others would write: Transformers' Trainer on the same model and texts.

One process of two threads; the texts are tokenised before its clock starts and lie in memory as a data set of Hugging
Face `datasets`; batches are padded to their longest by `DataCollatorWithPadding`, which is the usual way.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
from torch import Tensor, nn

from mmagent import freeze, storage
from mmagent.config import Config
from mmagent.shards import Dataset
from mmagent.tasks import Task


class Classifier(nn.Module):
    """A model of `jobs.train` as a Trainer wants one: it takes what a collator makes, and gives its loss."""

    def __init__(self, config: Config, tasks: dict[str, Task], model: Any) -> None:
        super().__init__()
        self.recipe, self.tasks, self.model = config, tasks, model  # a Trainer takes `config` for Transformers' own

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        from jobs.supervised import loss_of

        [name] = self.tasks
        batch = {
            "ids": input_ids, "mask": attention_mask, "keep": attention_mask.bool(), f"{name}/label": labels,
            "has_words": torch.ones(len(labels), dtype=torch.bool), "weight": torch.ones(len(labels)),
            "sample_row": torch.arange(len(labels)),
        }  # fmt: skip
        return {"loss": loss_of(self.model(batch), batch, self.tasks, self.recipe)}

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        if mode:
            freeze.set_modes(self.model)  # what is frozen drops nothing out
        return self


def measure(config: Config, steps: int, warm_steps: int) -> float:
    """Samples a second.

    Args:
        config: of one process, the global batch in one pass.
        steps: all optimizer steps.
        warm_steps: those that do not count.
    """
    from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

    from jobs import supervised
    from mmagent import text
    from mmagent.tasks import make_all

    torch.set_num_threads(2)
    data = Dataset.open(storage.folder("data", config.data.name))
    tasks, tokenizer = make_all(data.tasks), text.load_tokenizer(config.model.backbone)
    encoder = text.load_encoder(config.model.backbone)
    encoder.packs = None  # a Trainer's model pads
    model = Classifier(config, tasks, supervised.build(config, tasks, encoder))
    began = 0.0

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            nonlocal began
            if state.global_step == warm_steps:
                began = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=config.global_batch, max_steps=steps,
            learning_rate=config.optim.lr, weight_decay=config.optim.weight_decay, use_cpu=True, seed=config.seed,
            logging_strategy="no", save_strategy="no", eval_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(
            model, settings, train_dataset=_rows(data, tasks, tokenizer, config.data.max_text_tokens),
            data_collator=DataCollatorWithPadding(tokenizer), callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
        return (steps - warm_steps) * config.global_batch / (time.perf_counter() - began)


def _rows(data: Dataset, tasks: dict[str, Task], tokenizer: Any, max_tokens: int) -> Any:
    import datasets

    from mmagent import text
    from mmagent.record import Record

    [task] = tasks.values()
    records = [Record.from_row(row) for table in data.read("train") for row in table.to_pylist()]
    ids = text.tokenize(tokenizer, [text.words(record) for record in records], max_tokens)
    labels = [task.index[record.target.label or ""] for record in records]
    columns = {"input_ids": [row.tolist() for row in ids], "attention_mask": [[1] * len(row) for row in ids]}
    return datasets.Dataset.from_dict(columns | {"labels": labels})
