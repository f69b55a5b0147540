"""Answers from a bundle, in any Python process: no Ray, no DeepSpeed.

from mmagent import Predictor
predictor = Predictor.load("demo")          # a bundle folder, or the name of a run
[answer] = predictor.predict([{"text": "what color is the shape?", "image": "shape.png"}])
print(answer.label, answer.confidence)
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mmagent import bundle as bundles
from mmagent import record as records
from mmagent import text
from mmagent.answer import Answer
from mmagent.assembly import Model, assemble, load_language, load_reading
from mmagent.batch import Inputs, PartError, Sample
from mmagent.calibration import Calibration
from mmagent.config import Config
from mmagent.encoded import EncodedMedia
from mmagent.flow import Flow, Text, flows
from mmagent.frozen import FrozenStates
from mmagent.media import Limits
from mmagent.record import Record
from mmagent.rows import parse
from mmagent.soft import SoftModel
from mmagent.targets import TaskInfo
from mmagent.tasks import Task, make_all
from mmagent.tasks.generate import Written
from mmagent.text import TextEncoder
from mmagent.writer import Hear, Line, Writer, Writing

Precision = Literal["fp32", "bf16"]
_MEDIA_BYTES = 64 << 20  # of towers' tokens that are kept
_STATES_MB = 256  # of texts' states that are kept
_PASS_VIEWS = 32  # of one forward pass; a record that is read in several views has as many rows


@dataclass(frozen=True, slots=True, eq=False)
class Underway:
    """A sample whose text is being written."""

    sample: Sample
    text: Text
    states: Mapping[str, np.ndarray]


class Predictor:
    """A loaded bundle. `prepare` may run in many threads; `answer` is one forward pass and wants one at a time."""

    def __init__(
        self,
        *,
        name: str,
        config: Config,
        tasks: Mapping[str, Task],
        task: str,
        model: Model,
        encoder: TextEncoder,
        tokenizer: Any,
        calibration: Mapping[str, Calibration] | None = None,
        manifest: Mapping[str, Any] | None = None,
        path: Path | None = None,
        device: str = "auto",
        cache_mb: int | None = None,
        precision: Precision = "fp32",
    ) -> None:
        place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.name, self.config = name, config
        self.tasks, self.task = dict(tasks), task
        self.manifest = dict(manifest or {})
        self.path = path  # of the bundle's folder
        self.tells_states = False  # whether answers come with `Answer.states`
        self.calibration = {name: (calibration or {}).get(name) or Calibration() for name in tasks}
        self.device, self.precision = torch.device(place), precision
        data = config.data if cache_mb is None else config.data.model_copy(update={"cache_mb": cache_mb})
        self.inputs = Inputs(config.model, data, tokenizer, self.tasks, encoder)
        self.model = model.eval().requires_grad_(False).to(self.device)
        self._media = EncodedMedia(_MEDIA_BYTES if cache_mb is None else cache_mb << 20)
        outside = model.backbone is None
        kept_mb = _STATES_MB if cache_mb is None else cache_mb
        self._states = FrozenStates(encoder, device=self.device, max_mb=kept_mb) if outside else None

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        *,
        device: str = "auto",
        threads: int | None = None,
        cache_mb: int | None = None,
        precision: Precision = "fp32",
    ) -> Predictor:
        """Loads a bundle folder, or the bundle of a run or search by its name.

        Args:
            device: ``cpu``, ``cuda``, or ``auto`` for the GPU where there is one.
            threads: CPU threads of this whole process, where given.
            cache_mb: of decoded media, of what towers made of them, and of texts' states, each; 0: nothing is kept.
            precision: of the forward pass's products. bf16 has three digits; it is fast where the hardware has it.

        Raises:
            BundleError: there is none, or it is damaged.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        found = bundles.load(bundle)
        model, encoder, tokenizer = bundles.load_model(found)
        return cls(
            name=found.name,
            config=found.config,
            tasks=model.tasks,
            task=found.task,
            model=model,
            encoder=encoder,
            tokenizer=tokenizer,
            calibration=found.calibration,
            manifest=found.manifest,
            path=found.path,
            device=device,
            cache_mb=cache_mb,
            precision=precision,
        )

    @classmethod
    def untrained(cls, config: Config, infos: Mapping[str, TaskInfo], task: str, *, device: str = "auto") -> Predictor:
        """The model before fine-tuning: the pretrained backbone, and towers, join and head as the seed made them."""
        tasks = make_all(infos)
        encoder, tokenizer = load_language(config.model, tasks), load_reading(config.model)
        torch.manual_seed(config.seed)
        model = assemble(config.model, tasks, encoder)
        return cls(
            name="untrained", config=config, tasks=tasks, task=task, model=model, encoder=encoder, tokenizer=tokenizer,
            device=device,
        )  # fmt: skip

    @property
    def limits(self) -> Limits:
        return self.config.data.media

    @property
    def labels(self) -> tuple[str, ...]:
        """Of the task that is meant where none is named."""
        return self.tasks[self.task].labels

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.inputs.modalities

    @property
    def offers_tools(self) -> bool:
        """Whether the model's chat template has a place for tools."""
        return "tools" in str(getattr(self.inputs.tokenizer, "chat_template", None) or "")

    def check(self, record: Record) -> None:
        """Reads the headers of a record's media, no more.

        Raises:
            PartError: the place, and what is wrong with it.
        """
        self.inputs.check(record)

    def prepare(self, record: Record) -> Sample:
        """Decodes and tokenises a record.

        Raises:
            PartError: the place, and what is wrong with it.
        """
        return self.inputs.sample(record)

    def answer(self, samples: Sequence[Sample]) -> list[Answer]:
        """One forward pass over all samples."""
        started = time.perf_counter()
        states: dict[int, Mapping[str, np.ndarray]] = {}
        raws = self.raws(samples, states if self.tells_states else None)
        timings = {"forward": round(1000 * (time.perf_counter() - started), 3)}
        return [
            self._answer(raw, sample, timings, states.get(index, {}))
            for index, (raw, sample) in enumerate(zip(raws, samples, strict=True))
        ]

    def predict(self, rows: Iterable[Mapping[str, Any] | Record], *, batch_size: int = 32) -> list[Answer]:
        """Answers rows (see `mmagent.rows.parse`: the short or the long form, media as paths, base64 or bytes).

        Raises:
            RecordError, PartError: the first row that cannot be used, by its number.
        """
        out: list[Answer] = []
        numbered = enumerate(rows)
        while group := [self._prepared(index, row) for index, row in islice(numbered, batch_size)]:
            out += self.answer(group)
        return out

    def attempt(self, records: Sequence[Record]) -> list[Answer | PartError]:
        """Each record's answer, or why it has none: one that is damaged costs the others nothing."""
        tried = [self._tried(record) for record in records]
        answers = iter([each for part in _passes(tried) for each in self.answer(part)])
        return [next(answers) if isinstance(each, Sample) else each for each in tried]

    def _tried(self, record: Record) -> Sample | PartError:
        try:
            return self.prepare(record)
        except PartError as error:
            return error

    def _computing(self) -> AbstractContextManager[Any]:
        """Where what is done is done in the wanted precision, and leaves no graph."""
        context = ExitStack()
        context.enter_context(torch.inference_mode())
        context.enter_context(torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"))
        return context

    def raws(self, samples: Sequence[Sample], states: dict[int, Mapping[str, np.ndarray]] | None = None) -> list[Any]:
        """What each sample's task makes of the model's output (`Task.raw`), before calibration.

        Args:
            states: takes `Answer.states` of each, by its place.
        """
        with self._computing():
            return self._raws(samples, states)

    def _raws(self, samples: Sequence[Sample], states: dict[int, Mapping[str, np.ndarray]] | None) -> list[Any]:
        written = [index for index, sample in enumerate(samples) if self.tasks[sample.task].generates]
        found = dict(zip(written, self._written([samples[index] for index in written]), strict=True))
        if states is not None and written:
            states |= zip(written, self.states([samples[index] for index in written]), strict=True)
        if others := [index for index in range(len(samples)) if index not in found]:
            batch = self._encoded([samples[index] for index in others])
            out = self.model(batch)
            if states is not None:
                states |= zip(others, self._states_of(batch, len(others)), strict=True)
            rows = batch["sample_row"].cpu().numpy()
            for place, index in enumerate(others):
                sample = samples[index]
                array = self.tasks[sample.task].outputs(out[sample.task], batch).float().cpu().numpy()
                found[index] = self.tasks[sample.task].raw(array[rows == place], sample.views)
        return [found[index] for index in range(len(samples))]

    # -- texts that are written together, though they begin and end at different times --------------------------------

    @property
    def stops(self) -> Sequence[int]:
        """The tokens that end a text."""
        assert self.model.backbone is not None
        return text.stop_ids(self.inputs.tokenizer, self.model.backbone.model)

    def flow(self) -> Flow | None:
        """A new flow of texts; none where this model's are written batch by batch (see `mmagent.flow.flows`)."""
        writer = self.model.backbone
        if not isinstance(self.model, SoftModel) or not isinstance(writer, Writer) or not flows(writer):
            return None
        return Flow(writer, self.stops)

    def begin(self, flow: Flow, samples: Sequence[Sample]) -> list[Underway]:
        """Reads samples whose tasks write; their texts are under way then."""
        assert isinstance(self.model, SoftModel)
        texts = []
        for sample in samples:
            hear = _Telling(self.inputs.tokenizer, self.stops, [sample]).hear
            tell = (lambda token, hear=hear: hear([token])) if hear is not None else None
            texts.append(Text(sample.writing or Writing(self.config.data.max_answer_tokens), tell))
        with self._computing():
            batch = self._encoded(samples)
            states = self._states_of(batch, len(samples)) if self.tells_states else [{}] * len(samples)
            flow.admit(self.model.embeds(batch), batch["mask"], texts)
        return [Underway(*each) for each in zip(samples, texts, states, strict=True)]

    def proceed(self, flow: Flow) -> list[Text]:
        """One token of each text that is under way; those that are done."""
        with self._computing():
            return flow.step()

    def finished(self, done: Underway) -> Answer:
        """The answer of a text that is done."""
        raw = self._told(done.text.line(self.stops), None)
        timings = {"forward": round(1000 * (time.perf_counter() - done.text.since_s), 3)}
        return self._answer(raw, done.sample, timings, done.states)

    def _told(self, line: Line, known: Written | None) -> Written:
        """
        Args:
            known: with how likely the right answer was, where it was given.
        """
        tokenizer = self.inputs.tokenizer
        return Written(
            text=tokenizer.decode(line.ids, skip_special_tokens=True).strip(),
            chance=float(sum(line.chances)),
            likelihood=known.likelihood if known is not None else None,
            tokens=tuple(zip((tokenizer.decode([id]) for id in line.ids), line.chances, strict=False)),
            stopped=line.stopped,
        )

    def _written(self, samples: Sequence[Sample]) -> list[Written]:
        """What is written for each sample; with how likely the right answer was, for those that know it. Those that
        are written in one way share a pass."""
        out: dict[int, Written] = {}
        ways: dict[Writing, list[int]] = {}
        for index, sample in enumerate(samples):
            ways.setdefault(sample.writing or Writing(self.config.data.max_answer_tokens), []).append(index)
        for how, indexes in ways.items():
            found = self._written_alike([samples[index] for index in indexes], how)
            out |= zip(indexes, found, strict=True)
        return [out[index] for index in range(len(samples))]

    def _written_alike(self, samples: Sequence[Sample], how: Writing) -> list[Written]:
        assert isinstance(self.model, SoftModel)
        batch, tokenizer = self._encoded(samples), self.inputs.tokenizer
        stops = self.stops
        telling = _Telling(tokenizer, stops, samples)
        said = self.model.write(batch, stops=stops, pad=tokenizer.pad_token_id, how=how, hear=telling.hear)
        known: dict[int, Written] = {}
        if any(sample.views[0].reply is not None for sample in samples):
            out = self.model(batch)
            for index, sample in enumerate(samples):
                if sample.views[0].reply is not None:
                    given = {key: value[index : index + 1] for key, value in batch.items() if "/" in key}
                    row = self.tasks[sample.task].outputs(out[sample.task][index : index + 1], given)
                    known[index] = self.tasks[sample.task].raw(row.float().cpu().numpy(), sample.views)
        return [self._told(line, known.get(index)) for index, line in enumerate(said)]

    def features(self, samples: Sequence[Sample]) -> np.ndarray:
        """Mean text states, image tokens and audio tokens of each sample, side by side: (samples, channels). What a
        linear probe sees of a model."""
        with self._computing():
            out: np.ndarray = torch.cat(self.model.features(self.tensors(samples)), dim=1).float().cpu().numpy()
        return out

    def states(self, samples: Sequence[Sample]) -> list[dict[str, np.ndarray]]:
        """What the encoders make of each sample, by kind of input that it has: the mean of its tokens' states,
        (channels,); of the words of a language model that reads media too, of its input embeddings."""
        with self._computing():
            return self._states_of(self._encoded(samples), len(samples))

    def _states_of(self, batch: Mapping[str, torch.Tensor], count: int) -> list[dict[str, np.ndarray]]:
        sample = batch["sample_row"]
        if "text_states" in batch:
            words, kept = batch["text_states"], batch["mask"].bool()
        else:
            assert self.model.backbone is not None
            kept = batch["mask"].bool() & (batch["ids"] >= 0)
            inner: Any = self.model.backbone.model
            embed = inner.get_input_embeddings()
            words = embed(batch["ids"].clamp(min=0))
        mask = kept[..., None].to(words.dtype)
        parts = {"text": ((words * mask).sum(1) / mask.sum(1).clamp(min=1), sample[batch["has_words"].bool()],
                          batch["has_words"].bool())}  # fmt: skip
        for kind in ("image", "audio"):
            if f"{kind}_tokens" in batch and f"{kind}_real" in batch:
                real = batch[f"{kind}_real"].bool()
                parts[kind] = (batch[f"{kind}_tokens"].mean(1), sample[batch[f"{kind}_row"][real]], real)
        out: list[dict[str, np.ndarray]] = [{} for _ in range(count)]
        for kind, (vectors, owners, real) in parts.items():
            arrays, mine = vectors[real].float().cpu().numpy(), owners.cpu().numpy()
            for index in np.unique(mine):
                out[index][kind] = arrays[mine == index].mean(0)
        return out

    def _encoded(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """`tensors`, with what the towers make of pictures and sounds: each different one is computed once."""
        batch = self.tensors(samples)
        media = [sample.media(view) for sample in samples for view in range(len(sample.views))]
        for side, kind in enumerate(("image", "audio")):
            tower = getattr(self.model, f"{kind}_tower", None)
            if tower is None:
                continue
            given = [batch["images"]] if kind == "image" else [batch["audios"], batch["audio_frames"]]
            shown = [each for pair in media for each in pair[side]]

            def encode(numbers: torch.Tensor, tower: Any = tower, given: Any = given) -> torch.Tensor:
                return tower(*(each[numbers.to(each.device)] for each in given))

            batch[f"{kind}_tokens"] = self._media.tokens(kind, shown, encode)
        return batch

    def tensors(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """What the model reads of samples: see `mmagent.batch.Inputs.batch`."""
        batch = self.inputs.batch(samples, stand_ins=False)
        if self._states is not None:
            batch["text_states"] = self._states(batch["ids"], batch["mask"])
        return {key: value.to(self.device) for key, value in batch.items()}

    def embed(self, samples: Sequence[Sample]) -> np.ndarray:
        """The mean state of each sample, of length 1: (samples, channels). Of words alone the language model's; with
        pictures and sounds those of the towers beside it."""
        with self._computing():
            parts = self.model.features(self.tensors(samples))
            if self._states is not None and not any(sample.images or sample.audios for sample in samples):
                parts = parts[:1]
            out: np.ndarray = torch.nn.functional.normalize(torch.cat(parts, dim=1).float(), dim=1).cpu().numpy()
        return out

    def parse(self, row: Mapping[str, Any], **options: Any) -> Record:
        """A user's row as a record of the task it names, or of the bundle's own (options: `mmagent.rows.parse`)."""
        return parse({**row, "task": row.get("task") or self.task}, **options)

    def _prepared(self, index: int, row: Mapping[str, Any] | Record) -> Sample:
        try:
            record = row if isinstance(row, Record) else self.parse(row, default_id=str(index))
            return self.prepare(record)
        except PartError as error:
            raise PartError(f"row {index}: {error}", error.field, too_large=error.too_large) from error
        except records.RecordError as error:
            raise records.RecordError(f"row {index}: {error}", error.field) from error

    def _answer(
        self, raw: Any, sample: Sample, timings_ms: Mapping[str, float], states: Mapping[str, np.ndarray]
    ) -> Answer:
        calibration = self.calibration[sample.task]
        said = self.tasks[sample.task].decide(raw, sample.record, calibration, modalities_of(sample))
        return Answer(
            task=sample.task,
            confidence=said.confidence,
            abstained=said.confidence < calibration.abstain_below,
            bundle=self.name,
            words=said.words,
            label=said.label,
            labels=said.labels,
            value=said.value,
            text=said.text,
            spans=said.spans,
            cut=sample.cut,
            likelihood=said.likelihood,
            placed=said.placed,
            probabilities=said.probabilities,
            tokens=said.tokens,
            stopped=said.stopped,
            novelty=said.novelty,
            timings_ms=timings_ms,
            states=states,
        )


class _Telling:
    """Tells those who listen what is written for them, piece by piece: the pieces of a text make it whole."""

    def __init__(self, tokenizer: Any, stops: Sequence[int], samples: Sequence[Sample]) -> None:
        self._tokenizer, self._stops = tokenizer, set(stops)
        self._rows = {row: sample.hear for row, sample in enumerate(samples) if sample.hear is not None}
        self._ids: dict[int, list[int]] = {row: [] for row in self._rows}
        self._told = dict.fromkeys(self._rows, 0)  # characters

    @property
    def hear(self) -> Hear:
        return self._hear if self._rows else None

    def _hear(self, tokens: list[int]) -> None:
        for row, tell in [*self._rows.items()]:
            if tokens[row] in self._stops:
                del self._rows[row]
                continue
            self._ids[row].append(tokens[row])
            words = self._tokenizer.decode(self._ids[row], skip_special_tokens=True).lstrip()
            # What may still change waits: half a character, and space that the end of a text would lose.
            sure = words.rstrip().rstrip("\ufffd")
            if len(sure) > self._told[row]:
                tell(sure[self._told[row] :])
                self._told[row] = len(sure)


def _passes(tried: Iterable[Sample | PartError]) -> Iterator[list[Sample]]:
    """The samples in parts of `_PASS_VIEWS` views; one of more views is a part by itself."""
    part: list[Sample] = []
    views = 0
    for sample in tried:
        if isinstance(sample, PartError):
            continue
        if part and views + len(sample.views) > _PASS_VIEWS:
            yield part
            part, views = [], 0
        part.append(sample)
        views += len(sample.views)
    if part:
        yield part


def modalities_of(sample: Sample) -> str:
    """As `Record.modalities`, of a decoded record."""
    parts = (("text", sample.has_words), ("image", bool(sample.images)), ("audio", bool(sample.audios)))
    return "+".join(name for name, present in parts if present) or "empty"
