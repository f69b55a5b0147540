"""Everything a run can be told: one frozen model per concern, documented on the field, checked before work begins.

A recipe is a YAML file of `Config`; the command line overrides it with ``key.path=value``; a search samples the same
dotted keys. The resolved config travels in every checkpoint and bundle.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mmagent.media import Limits
from mmagent.share import Share

Count = Annotated[int, Field(gt=0)]
LONGEST = 4  # a picture's longer side to its shorter


class ConfigError(ValueError):
    """A recipe or an override that cannot be used; the message names the key and the nearest right one."""


def _auto_is_zero(value: Any) -> Any:
    return 0 if value == "auto" else value


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(_Section):
    name: str = Field(description="the data set: a folder of this name under data/ in the storage root")
    share: float = Field(1.0, gt=0, le=1, description="share of the training split that is used, by whole row groups")
    labels_per_class: Count | tuple[Count, ...] | None = Field(
        None, description="rows drawn of the training split by the seed, this many of each class (multilabel, tag: "
        "that hold each label; tasks without labels: in all); none: every row; a list [5,10,50]: a learning curve",
    )  # fmt: skip
    max_text_tokens: int = Field(128, gt=0, description="tokens kept of a record's text; the newest are kept")
    max_answer_tokens: int = Field(64, gt=0, description="generate: tokens of an answer; a longer one is cut there")
    window_rows: int = Field(4096, gt=0, description="rows shuffled together; a window is what one read task holds")
    bucket_by_length: bool = Field(
        False, description="make each step of texts of about one length, out of the shuffle window: less padding for a "
        "language model whose texts cannot be packed. Else a step is a random draw, its micro-batches of one length",
    )  # fmt: skip
    max_bad_share: float = Field(0.01, ge=0, le=1, description="share of rows that may be set aside before a stop")
    media: Limits = Field(default_factory=lambda: Limits(), description="limits of one picture or sound")
    cache_mb: int = Field(256, ge=0, description="decoded media kept in memory by each worker")
    memory_rows: int = Field(
        128, ge=0, description="rows of training that go into the bundle, 16 MB at most, for jobs.refine to show again "
        "where the data is gone; 0: none, for data that may not travel with a model",
    )  # fmt: skip

    @model_validator(mode="after")
    def _drawn_once(self) -> DataConfig:
        if self.share < 1 and self.labels_per_class is not None:
            raise ValueError("data.share and data.labels_per_class both draw rows: give one of them")
        if self.labels_per_class == ():
            raise ValueError("data.labels_per_class=[] draws nothing: numbers are wanted, such as [5,10,50]")
        return self


class AugmentConfig(_Section):
    """What training changes in its samples; a function of (seed, epoch, sample), never of timing; nothing by default,
    and nothing in validation. What keeps a label true differs by the data: each field says what to look for."""

    word_drop: float = Field(
        0.0, ge=0, lt=1,
        description="share of words that the language model sees masked; not where one word decides (a negation, a "
        "name that is asked for). A frozen language model computes each changed text anew",
    )  # fmt: skip
    text_drop: float = Field(
        0.0, ge=0, lt=1,
        description="share of samples that lose their words, where a picture or sound is left; not where the words are "
        "the question or the answer stands in them",
    )  # fmt: skip
    audio_drop: float = Field(
        0.0, ge=0, lt=1, description="share of samples that lose their sounds, where words or a picture are left; not "
        "where the question is spoken",
    )  # fmt: skip
    image_drop: float = Field(
        0.0, ge=0, lt=1, description="share of samples that lose their pictures, where words or a sound are left; the "
        "label becomes a guess, so a small share: it teaches that a picture may be missing",
    )  # fmt: skip
    audio_tempo: float = Field(
        0.0, ge=0, lt=1, description="largest change of speed, 0.1 is +-10 %; keeps words, not a label of speed itself"
    )
    audio_pitch: float = Field(
        0.0, ge=0, lt=1, description="largest shift along the mel axis, as a share of the bins; keeps words, not the "
        "speaker, the key or a tone language's tones",
    )  # fmt: skip
    audio_noise: float = Field(
        0.0, ge=0, description="largest noise, standard deviation on the normalised log-mel; keeps what is louder"
    )
    audio_masks: int = Field(
        0, ge=0, description="SpecAugment: masks in time and in frequency each (arXiv:1904.08779); keeps what lasts "
        "longer than a mask",
    )  # fmt: skip
    audio_mask_share: float = Field(0.1, gt=0, lt=1, description="largest width of a mask, as a share of its axis")
    image_crop: float = Field(
        0.0, ge=0, lt=1, description="largest share of a side that is cut away; not where what counts may stand at an "
        "edge, or things are counted",
    )  # fmt: skip
    image_flip: float = Field(
        0.0, ge=0, le=1, description="share of samples whose pictures are mirrored; not where the label or the words "
        "say left or right, or the picture holds writing",
    )  # fmt: skip
    image_colour: float = Field(
        0.0, ge=0, lt=1, description="largest change of brightness, contrast and saturation, 0.2 is +-20 %; not where "
        "a colour is asked for",
    )  # fmt: skip


class TowerConfig(_Section):
    """An encoder of pictures or sound: a pretrained checkpoint, or a small one trained from scratch."""

    checkpoint: str | None = Field(
        None, description="folder or hub id of a Transformers checkpoint; none: from scratch"
    )
    start: str | None = Field(
        None, description="folder that `jobs.pretrain` made of a tower (runs/NAME/towers/image): what it begins with"
    )
    dropout: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="in the tower's layers; none: as a checkpoint says, from scratch 0 and (audio) 0.1",
    )
    width: int = Field(128, gt=0, multiple_of=32, description="channels of a token; from scratch, of the layers too")
    layers: int = Field(2, ge=0, description="transformer layers after the convolutions, from scratch")
    tokens: int = Field(
        16,
        ge=1,
        description="tokens handed to the join for one picture or sound; a pretrained checkpoint's states are averaged "
        "down to them, and where it has fewer all are handed on",
    )


class ImageTowerConfig(TowerConfig):
    size: int = Field(64, ge=8, description="pixels of the shorter side of what a picture is scaled into, from scratch")
    aspect: Annotated[float, Field(ge=1 / LONGEST, le=LONGEST)] | Literal["auto"] = Field(
        1.0, description="width to height of what a picture is scaled into, from scratch; 1: a square. auto: the data "
        "set's middle one where its pictures are longer than 3 to 2, at most 4 to 1; else 1",
    )  # fmt: skip
    alone: float = Field(
        0.0, ge=0, description="weight of a second loss, of what the picture says without the text (arXiv:1905.12681)"
    )

    @model_validator(mode="after")
    def _tokens_make_a_square(self) -> ImageTowerConfig:
        if math.isqrt(self.tokens) ** 2 != self.tokens:
            raise ValueError(f"model.image.tokens={self.tokens} is no square number, such as 4, 9, 16, 49")
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels of what a tower from scratch sees."""
        wide = 1.0 if self.aspect == "auto" else self.aspect  # auto is settled where there is a data set
        long = round(self.size * max(wide, 1 / wide) / 8) * 8
        if wide == 1:
            return self.size, self.size
        return (self.size, long) if wide > 1 else (long, self.size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens of a tower from scratch: as near to its pictures' shape as they can be."""
        height, width = self.shape
        pairs = [(rows, self.tokens // rows) for rows in range(1, self.tokens + 1) if self.tokens % rows == 0]
        return min(pairs, key=lambda pair: abs(math.log(pair[1] / pair[0] / (width / height))))


class AudioTowerConfig(TowerConfig):
    sample_rate_hz: int = Field(16_000, gt=0, description="what sound is resampled to, from scratch")
    mels: int = Field(80, gt=0, description="bins of the log-mel spectrogram, from scratch")
    max_s: float = Field(30.0, gt=0, description="seconds of sound that are heard; the rest is cut off")
    align: float = Field(0.0, ge=0, description="weight of the loss that draws speech to the text states of its words")


class ModelConfig(_Section):
    backbone: str = Field(description="folder, hub id, or package:NAME/FOLDER of a Transformers language model")
    join: Literal["auto", "output", "input", "native"] = Field(
        "output",
        description="where pictures and sounds meet the language model: at its output, in fusion layers over its "
        "states (best where it is frozen), or at its input, as tokens among the words (what generate needs; the "
        "fusion layers' keys, image.alone and audio.align say nothing then). native: backbone is a multimodal model, "
        "with towers, a processor and a chat template of its own (such as Llava, Qwen-VL, Qwen-Audio). auto: by the "
        "data set: input where there are words alone and the language model learns, and where it writes; else output",
    )
    pooling: Literal["auto", "mean", "first", "last"] = Field(
        "auto",
        description="join at the input: which states of the language model answer; auto: the last of a decoder, the "
        "mean of others",
    )
    projector: Literal["linear", "mlp"] = Field(
        "mlp", description="join at the input: what makes the language model's tokens of a tower's"
    )
    match: Literal["auto", "cross", "dual"] = Field(
        "auto",
        description="the task match: each candidate is read beside what is asked (cross; the more exact where a row "
        "brings several), or both apart, as vectors to compare (dual; learns from the other candidates of a "
        "micro-batch, which are wrong ones: give train.micro_batch what memory holds). auto: by the data set: dual "
        "where training rows bring one candidate each",
    )
    width: int = Field(256, gt=0, description="channels of the fusion layers")
    layers: int = Field(2, ge=1, description="fusion layers")
    heads: int = Field(4, ge=1, description="attention heads of a fusion layer")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout in the fusion layers")
    head_dropout: float | None = Field(None, ge=0, lt=1, description="dropout before the head; none: dropout")
    backbone_dropout: float | None = Field(
        None, ge=0, lt=1, description="every dropout of the language model, where it trains; none: its own config's"
    )
    image: ImageTowerConfig | None = Field(None, description="image tower; none: the model sees no pictures")
    audio: AudioTowerConfig | None = Field(None, description="audio tower; none: the model hears no sound")

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.width % self.heads:
            raise ValueError(f"model.width={self.width} is not a multiple of model.heads={self.heads}")
        return self


class StartConfig(_Section):
    """An earlier bundle that a run goes on from, and what holds it near what that knew."""

    bundle: str | None = Field(
        None, description="bundle whose weights a run begins with (a folder, or the name of a run or search); the "
        "section model is then the bundle's, and labels that it does not know are added to its heads",
    )  # fmt: skip
    hold: Literal["none", "l2_sp", "ewc"] = Field(
        "none", description="a penalty on weights that leave where they began: each alike (l2_sp, arXiv:1802.01483), "
        "or by how much answers to validation rows hang on it (ewc, arXiv:1612.00796; weighed to a mean of 1)",
    )  # fmt: skip
    strength: float = Field(0.01, ge=0, description="of that penalty")
    distil: float = Field(
        0.0, ge=0, description="weight of a loss that draws answers to replayed rows (meta source=replay) to those "
        "that the bundle gave (arXiv:1606.09282), token by token where those are written",
    )  # fmt: skip
    temperature: float = Field(2.0, gt=0, description="of distil's probabilities")


class PretrainConfig(_Section):
    """What `jobs.pretrain` teaches without labels."""

    objective: Literal["auto", "masked", "next", "align"] = Field(
        "auto", description="masked: hidden words (arXiv:1810.04805). next: the next word. auto: masked for an "
        "encoder, next for a decoder. align: towers to the language model, by pairs of a picture or sound and its "
        "words (InfoNCE, arXiv:1807.03748, as in CLIP, arXiv:2103.00020)",
    )  # fmt: skip
    mask_share: float = Field(0.15, gt=0, lt=1, description="share of a text's tokens that are asked for (masked)")
    validation_share: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="share of the texts or pairs set aside to measure by, where there is no such split",
    )
    temperature: float = Field(0.07, gt=0, description="of the contrast between pairs, as it begins (align)")


class FreezeConfig(_Section):
    strategy: str = Field(
        "connector",
        pattern=r"^(auto|head|connector|top:[1-9]\d*|towers|image_tower|audio_tower|bias|lora:[1-9]\d*|all|gradual)$",
        description="what trains. head: the heads. connector: also projectors, fusion layers and towers from scratch. "
        "top:K: also the K last layers of the language model. towers: the towers stay as they are, all else trains. "
        "image_tower, audio_tower: connector and the whole of that tower. bias: connector and the language model's "
        "biases (arXiv:2106.10199). lora:R: connector and products of rank R beside the linear layers of the language "
        "model's blocks, merged into them at the end (arXiv:2106.09685). gradual: connector, then the language model "
        "from its last layer down (arXiv:1801.06146). all: everything. auto: by the data set and the language model's "
        "size: connector where towers learn to answer, else all, or lora:16 of a large one",
    )
    lora_parts: tuple[Literal["backbone", "image_tower", "audio_tower"], ...] = Field(
        ("backbone",), min_length=1, description="parts that lora:R adapts; a tower among them is a pretrained one"
    )
    lora_scale: float = Field(2.0, gt=0, description="factor of the product of rank R (alpha / R in the paper)")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the product of rank R")
    gradual_share: float = Field(
        0.5, gt=0, le=1, description="share of the run after which all of the language model trains (gradual)"
    )


class OptimConfig(_Section):
    name: Literal["adamw", "sgd"] = Field("adamw", description="both with decoupled weight decay (arXiv:1711.05101)")
    lr: float = Field(1e-3, gt=0, description="peak learning rate of heads and join")
    lr_towers: float | None = Field(
        None,
        gt=0,
        description="of the towers; none: lr, and lr / 10 for weights that have learned before (a checkpoint's, or "
        "those of jobs.pretrain)",
    )
    lr_backbone: float | None = Field(
        None,
        gt=0,
        description="of the language model; none: lr / 5, where whole matrices learn times (384 / width)² of one wider "
        "than 384 channels: with lr=1e-3 2e-4 for a MiniLM, 5e-5 for a BERT base",
    )
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="factor of the learning rate from each layer of the language model to the one "
        "below it; what lies below the first layer has the rate after one more",
    )  # fmt: skip
    weight_decay: float = Field(0.01, ge=0, description="on matrices only: neither biases nor norms")
    betas: tuple[float, float] = Field((0.9, 0.98), description="AdamW's")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="of the rate after it has risen")
    warmup_share: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the rate rises")
    final_share: float = Field(
        0.01, ge=0, le=1, description="the rate at the end, as a share of the peak (cosine, linear)"
    )
    clip_norm: float = Field(1.0, gt=0, description="gradients are scaled to this norm at most")


class TrainConfig(_Section):
    epochs: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        3.0,
        description="passes over the training split. auto: by its rows and what learns, between 3 and 6 where all "
        "that learns was pretrained, between 4 and 40 with towers from scratch",
    )
    max_steps: int | None = Field(None, gt=0, description="stop after this many optimizer steps")
    min_steps: int = Field(
        0, ge=0, description="at least this many optimizer steps, also where the epochs are fewer: few labels want "
        "many passes (arXiv:2006.04884)",
    )  # fmt: skip
    seeds: int = Field(
        3,
        gt=0,
        description="runs of each number of a learning curve (data.labels_per_class=[...]), from seed on",
    )
    micro_batch: Annotated[int, BeforeValidator(_auto_is_zero)] = Field(
        32, ge=0, description="samples of one forward pass on one worker; auto (or 0): the most that memory holds, "
        "found by trial; a step keeps its 32 x train.accumulation samples for each worker",
    )  # fmt: skip
    accumulation: int = Field(1, gt=0, description="forward passes before an optimizer step")
    global_batch: int | None = Field(
        None, gt=0, description="samples of an optimizer step over all workers; none: cluster.workers x micro_batch x "
        "accumulation. A run keeps it: with other workers or another micro_batch the passes of a worker follow from it",
    )  # fmt: skip
    micro_tokens: int | None = Field(
        None, gt=0, description="tokens of a text of one forward pass on one worker, padding with them: a worker's "
        "samples of an optimizer step are cut into as few passes as hold no more; none: micro_batch samples each",
    )  # fmt: skip
    eval_every_steps: int = Field(50, gt=0, description="optimizer steps between validations")
    eval_every_epochs: float | None = Field(
        None, gt=0, description="epochs between validations, where that is more than eval_every_steps"
    )
    eval_rows: int = Field(1024, gt=0, description="validation rows asked each time, the first by seeded order")
    patience: int = Field(
        0, ge=0, description="validations without a better score before training comes to its end; 0: none is"
    )
    cooldown: float = Field(
        0.25, ge=0, le=1, description="once patience is used up the learning rate falls to its end in so many more "
        "steps, as a share of those so far (arXiv:2405.18392); 0: training stops at once"
    )  # fmt: skip
    task_weights: dict[str, float] = Field({}, description="of a task's loss among several, by its name; 1 where none")
    min_gain: float = Field(0.0, ge=0, description="what a score must be above the last better one to count as better")
    gradient_checkpointing: bool = Field(
        False,
        description="compute the states of pretrained layers again in the backward pass, in place of keeping them",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the cross-entropy")
    class_balance: float = Field(
        0.0, ge=0, le=1, description="weight of a sample is its label's frequency to the power of minus this; 1: even"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU that has it, else fp32")
    cache: Literal["auto", "disk", "memory", "none"] = Field(
        "auto", description="what frozen parts compute of a sample in every epoch: computed once, before training, and "
        "kept under ROOT/features (disk: the language model, and pretrained towers whose input nothing augments), or "
        "kept by text while there is room (memory: the language model), or computed each time (none). auto: disk where "
        "it saves more than it takes, else memory",
    )  # fmt: skip
    cache_gb: float = Field(20.0, gt=0, description="of ROOT/features at most; what needs more is not kept on disk")
    keep_last: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_best: int = Field(1, ge=1, description="checkpoints kept beside them, those of the best validations")
    checkpoint_every_steps: int | None = Field(
        None, gt=0, description="optimizer steps between checkpoints, beside those of validations; none: only those"
    )
    checkpoint_every_minutes: float | None = Field(
        None, gt=0, description="minutes after which a checkpoint is due, at the next step; none: never by time"
    )
    on_bad_loss: Literal["stop", "skip"] = Field(
        "stop", description="what a loss does that is no number or jumps: stop the run, or leave the batch out; either "
        "way its rows are kept in runs/NAME/inspect",
    )  # fmt: skip
    max_loss_jump: float | None = Field(
        10.0, gt=0, description="deviations above its running mean that make a loss a jump, where one counts as a "
        "tenth of the mean of the first 20 steps at least; none: only what is no number is bad",
    )  # fmt: skip
    max_skips: int = Field(5, ge=1, description="batches left out in a row before the run stops (on_bad_loss=skip)")
    alarm_minutes: float | None = Field(
        10.0, gt=0, description="a step that takes longer raises an alarm: which rank stands where; none: never"
    )  # fmt: skip
    trace: bool = Field(False, description="write the sample ids and the loss of each step into runs/NAME/trace")


class ClusterConfig(_Section):
    workers: int = Field(1, gt=0, description="training workers; a run may go on with another number")
    min_workers: int | None = Field(
        None, gt=0, description="as few workers as a run starts with, or goes on with after a failure, where there is "
        "no room for all. none: it waits for all of them",
    )  # fmt: skip
    gpu: bool = Field(False, description="one GPU for each worker")
    gpu_share: float = Field(
        1.0, gt=0, le=1, description="of a GPU that a process takes which computes what is frozen (`train.cache`): "
        "several of them on one GPU, where towers are small",
    )  # fmt: skip
    accelerator: str | None = Field(
        None, description="the kind of GPU that workers want where a cluster has several, as Ray names it: A100, H100, "
        "L4, T4. none: any",
    )  # fmt: skip
    threads: int = Field(1, gt=0, description="CPU threads of one worker")
    max_failures: int = Field(
        1, ge=0, description="times failed workers are started again from the last checkpoint, after a pause of 1 s "
        "that doubles, up to 60 s, with each failure without a new checkpoint",
    )  # fmt: skip

    @model_validator(mode="after")
    def _fewest_first(self) -> ClusterConfig:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"cluster.min_workers={self.min_workers} is more than cluster.workers={self.workers}")
        return self


class ZeroConfig(_Section):
    engine: Literal["deepspeed", "torch"] = Field("deepspeed", description="torch: one plain process, for measurements")
    stage: Literal[0, 1, 2, 3] = Field(1, description="ZeRO stage; a run may go on with another")
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none",
        description="kept in the CPU's memory, where the optimizer then steps: its state and the fp32 weights "
        "(optimizer; stages 1 to 3), the weights that wait as well (parameters; stage 3)",
    )

    @model_validator(mode="after")
    def _offload_fits(self) -> ZeroConfig:
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.stage < least or (least and self.engine == "torch"):
            raise ValueError(
                f"zero.offload={self.offload} needs zero.engine=deepspeed and zero.stage={least} or more, got "
                f"{self.engine} and {self.stage}"
            )
        return self


class TrackConfig(_Section):
    """Where a run's figures are shown beside TensorBoard, whose files (runs/NAME/tb) are always written. What a server
    cannot take now is sent later: it never holds a training up (see `jobs.track`)."""

    mlflow: str | None = Field(
        None, description="MLflow: an address (http://HOST:5000; a name and password stand in "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD), a database (sqlite:////PATH/mlflow.db), or a folder, "
        "in which a SQLite database and the artefacts are made; none: not used",
    )  # fmt: skip
    wandb: str | None = Field(
        None, min_length=1, description="Weights & Biases: a project. WANDB_API_KEY, WANDB_BASE_URL and WANDB_MODE "
        "(offline: a folder under runs/NAME/track, for `wandb sync`) are read from the environment; none: not used",
    )  # fmt: skip
    experiment: str = Field(
        "mmagent", min_length=1, description="MLflow's experiment, and the group of runs at Weights & Biases"
    )

    @model_validator(mode="after")
    def _without_password(self) -> TrackConfig:
        scheme, _, rest = (self.mlflow or "").partition("://")
        if rest and scheme in ("http", "https") and "@" in rest.partition("/")[0]:
            raise ValueError(
                "track.mlflow holds a name and password, which would travel in every bundle: give them in "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        if self.mlflow == "" or (rest and scheme not in ("http", "https", "sqlite", "postgresql", "mysql")):
            raise ValueError(f"track.mlflow={self.mlflow!r}: http://HOST:PORT, sqlite:////PATH or a folder is wanted")
        return self


class Config(_Section):
    seed: int = Field(0, ge=0, description="of the order of samples, augmentation, initial weights and bootstrap")
    data: DataConfig
    model: ModelConfig
    start: StartConfig = StartConfig()
    augment: AugmentConfig = AugmentConfig()
    pretrain: PretrainConfig = PretrainConfig()
    freeze: FreezeConfig = FreezeConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    cluster: ClusterConfig = ClusterConfig()
    zero: ZeroConfig = ZeroConfig()
    track: TrackConfig = TrackConfig()

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step over all workers."""
        passed = self.train.micro_batch or TrainConfig.model_fields["micro_batch"].default  # auto keeps the step's size
        return self.train.global_batch or self.cluster.workers * passed * self.train.accumulation

    def share(self, world: int) -> Share:
        """What each of so many workers takes of a step."""
        return Share(self.global_batch, self.train.micro_batch, world)


def load(path: Path, overrides: Iterable[str] = ()) -> Config:
    """The config of a recipe file with ``key.path=value`` overrides.

    Raises:
        ConfigError: no such file, not YAML, an unknown key (with the nearest right one), or a value out of range.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"the recipe {path} is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"the recipe {path} holds {type(raw).__name__}, but a map of sections is wanted")
    return resolve(raw, dict(split(item) for item in overrides))


def resolve(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> Config:
    """The config of a nested map with dotted overrides (values as Python or YAML would write them)."""
    tree = {key: dict(value) if isinstance(value, Mapping) else value for key, value in raw.items()}
    for dotted, value in overrides.items():
        node = tree
        *parents, last = dotted.split(".")
        for depth, key in enumerate(parents):
            child = node.get(key)
            child = dict(child) if isinstance(child, Mapping) else {}
            if not _section(parents[: depth + 1]):
                raise ConfigError(unknown(dotted))
            node[key] = child
            node = child
        node[last] = value
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys(_explain(item) for item in _merged(error.errors())))) from error


def override(config: Config, sample: Mapping[str, Any]) -> Config:
    """`config` with dotted keys replaced: what a trial of a search runs."""
    return resolve(config.model_dump(mode="json"), sample)


def value(config: Config, dotted: str) -> Any:
    """What a config says of a dotted key."""
    found: Any = config
    for part in dotted.split("."):
        found = getattr(found, part)
    return found


def keys(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, str]:
    """Every dotted key with its description."""
    out: dict[str, str] = {}
    for name, info in model.model_fields.items():
        section = _model_of(info.annotation)
        if section is None:
            out[prefix + name] = info.description or ""
        else:
            out |= keys(section, f"{prefix}{name}.")
    return out


def split(item: str) -> tuple[str, Any]:
    """A dotted key and its value, of ``key.path=value``.

    Raises:
        ConfigError: it is no such thing.
    """
    key, equals, value = item.partition("=")
    if not equals:
        raise ConfigError(f"{item!r} is no override: key.path=value is wanted, e.g. optim.lr=0.0003")
    parsed = yaml.safe_load(value) if value else None
    if isinstance(parsed, str):  # YAML 1.1 reads 3e-4 as text
        try:
            parsed = float(parsed)
        except ValueError:
            pass
    return key.strip(), parsed


def _section(path: list[str]) -> type[BaseModel] | None:
    model: type[BaseModel] | None = Config
    for key in path:
        info = model.model_fields.get(key) if model else None
        model = _model_of(info.annotation) if info else None
    return model


def _model_of(annotation: Any) -> type[BaseModel] | None:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((item for item in options if isinstance(item, type) and issubclass(item, BaseModel)), None)


def unknown(dotted: str) -> str:
    """What is said of a key that is none: the nearest right one."""
    near = difflib.get_close_matches(dotted, keys(), n=1, cutoff=0.0)
    return f"unknown key {dotted!r}: did you mean {near[0]!r}? `python -m jobs.train --help` lists all keys"


def _merged(items: Iterable[Any]) -> list[dict[str, Any]]:
    """One complaint for each value: of a field that takes several kinds, pydantic gives one for each kind."""
    known = keys()
    out: dict[str, dict[str, Any]] = {}
    for item in items:
        dotted = ".".join(str(part) for part in item["loc"])
        if item["type"] != "extra_forbidden":  # behind the key stands which of its kinds was tried
            dotted = next((key for key in known if f"{dotted}.".startswith(f"{key}.")), dotted)
        if dotted in out:
            out[dotted]["msg"] += f"; or: {item['msg']}"
        else:
            out[dotted] = {**item, "dotted": dotted}
    return list(out.values())


def _explain(item: Any) -> str:
    dotted = item["dotted"]
    if item["type"] == "extra_forbidden":
        return unknown(dotted)
    if item["type"] == "missing":
        return f"{dotted} is missing: {keys().get(dotted, 'give the section')}"
    return f"{dotted or 'config'}: got {item['input']!r:.80}, but {item['msg']}"
