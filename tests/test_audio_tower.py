"""Pretrained audio towers: every family hears sounds as its own extractor and model do, each alone; a bundle holds it.

The checkpoints are tiny, of random weights, made as Transformers saves them."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers
from torch import nn

from mmagent import bundle, sounds, text
from mmagent.calibration import Calibration
from mmagent.config import AudioTowerConfig, resolve
from mmagent.media import Limits
from mmagent.model import MultimodalModel
from mmagent.predictor import Predictor
from mmagent.pretrained import BackboneError
from mmagent.record import Record
from mmagent.towers import PretrainedAudioTower, audio_tower
from mmagent.towers.audio import TimeNorm, pool
from tests.conftest import classify

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
WAVES = {**SMALL, "conv_dim": (16,) * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
WAVE = ("Wav2Vec2FeatureExtractor", {"do_normalize": True, "return_attention_mask": False})
MEL = {"sampling_rate": 16_000, "padding_value": 0.0}
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, dict[str, Any]]]] = {
    "whisper": (
        "Whisper",
        {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 16,
         "max_source_positions": 100, "vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
         "decoder_start_token_id": 1},
        ("WhisperFeatureExtractor", {**MEL, "feature_size": 16, "chunk_length": 2, "hop_length": 160, "n_fft": 400}),
    ),
    "wav2vec2": ("Wav2Vec2", WAVES, WAVE),  # the base models': a group norm over time
    "wav2vec2 large": ("Wav2Vec2", {**WAVES, "feat_extract_norm": "layer", "do_stable_layer_norm": True}, WAVE),
    "hubert": ("Hubert", WAVES, WAVE),
    "wavlm": ("WavLM", WAVES, WAVE),
    "ast": (
        "AST", {**SMALL, "patch_size": 8, "frequency_stride": 6, "time_stride": 6, "max_length": 128,
                "num_mel_bins": 32},
        ("ASTFeatureExtractor", {**MEL, "max_length": 128, "num_mel_bins": 32}),
    ),
    # Its position layer is a stack of convolutions that no mask reaches: it is given one length.
    "data2vec": ("Data2VecAudio", {**WAVES, "num_conv_pos_embeddings": 3}, WAVE),
    # Frames in any number, with a mask.
    "wav2vec2-bert": (
        "Wav2Vec2Bert", {**SMALL, "feature_projection_input_dim": 32},
        ("SeamlessM4TFeatureExtractor", {**MEL, "feature_size": 16, "num_mel_bins": 16, "stride": 2}),
    ),
}  # fmt: skip
PADS = {"whisper": 200, "ast": 128}  # frames of every sound


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``checkpoint("whisper")``: a folder with config, weights and extractor config."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            name, settings, (extractor, features) = FAMILIES[family]
            torch.manual_seed(0)
            model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings))
            made[family] = tmp_path_factory.mktemp("towers") / family
            model.save_pretrained(made[family])
            document = {"feature_extractor_type": extractor, "sampling_rate": 16_000, **features}
            (made[family] / "preprocessor_config.json").write_text(json.dumps(document))
        return made[family]

    return make


def config_of(checkpoint: Path, **settings: Any) -> AudioTowerConfig:
    return AudioTowerConfig(**{"checkpoint": str(checkpoint), "width": 32, "tokens": 4, "max_s": 2.0, **settings})


def wave(seconds: float, seed: int = 0, rate_hz: int = 16_000) -> np.ndarray:
    """Tones that come and go, (samples,) float32."""
    time_s, rng = np.arange(int(seconds * rate_hz)) / rate_hz, np.random.default_rng(seed)
    tones = [np.sin(2 * np.pi * (hz * time_s + rng.random())) for hz in rng.uniform(100, 2000, 5)]
    return (0.1 * sum(tones) * (1 + np.sin(2 * np.pi * 3 * time_s))).astype(np.float32)


def encoded(samples: np.ndarray, rate_hz: int = 16_000) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate_hz, format="WAV", subtype="FLOAT")
    return out.getvalue()


def heard(config: AudioTowerConfig, *waves: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    made = sounds.of(config)
    stack = made.stack([made.frames(encoded(samples), Limits()) for samples in waves])
    return stack["audios"], stack["audio_frames"]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("ast", "data2vec")])
def test_a_sound_is_heard_as_by_the_checkpoints_own_extractor_and_model(
    checkpoint: Callable[[str], Path], family: str
) -> None:
    config = config_of(checkpoint(family))
    tower = audio_tower(config).eval()
    assert isinstance(tower, PretrainedAudioTower)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(checkpoint(family))
    whole = transformers.AutoModel.from_pretrained(checkpoint(family)).eval()
    inputs = extractor(wave(0.8), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        if family == "whisper":
            states = whole.get_encoder()(inputs["input_features"]).last_hidden_state[
                :, :41
            ]  # 0.8 s and the window's end
        else:
            states = whole(**inputs).last_hidden_state
        wanted = tower.project(nn.functional.adaptive_avg_pool1d(states.mT, 4).mT, None)
        torch.testing.assert_close(tower(*heard(config, wave(0.8))), wanted, atol=2e-3, rtol=2e-3)


def test_the_extractors_frames_are_whole_again_in_a_batch(checkpoint: Callable[[str], Path]) -> None:
    """Only what sounds is kept of thirty seconds; the padding that is put back is the extractor's own, not zero."""
    config = config_of(checkpoint("whisper"))
    made = sounds.of(config)
    frames = made.frames(encoded(wave(0.5)), Limits())
    assert 50 <= len(frames) <= 54
    stack = made.stack([frames])["audios"]
    extractor = transformers.AutoFeatureExtractor.from_pretrained(checkpoint("whisper"))
    wanted = extractor(wave(0.5), sampling_rate=16_000, return_tensors="pt")["input_features"].mT
    torch.testing.assert_close(stack, wanted, atol=1e-3, rtol=1e-3)
    assert stack[0, -1].abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_each_sound_is_heard_alone(checkpoint: Callable[[str], Path], family: str) -> None:
    config = config_of(checkpoint(family), dropout=0.0)
    tower = audio_tower(config).train()  # in training too: nothing is masked or skipped at random
    waves = [wave(seconds, seed) for seed, seconds in enumerate((0.03, 0.4, 1.3, 5.0))]
    with torch.no_grad():
        together = tower(*heard(config, *waves))
        assert together.shape == (4, 4, 32)
        for index, samples in enumerate(waves):
            alone = tower(*heard(config, samples))
            torch.testing.assert_close(alone[0], together[index], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(together[1], together[2], atol=1e-2)
    assert heard(config, waves[0])[0].shape[1] == PADS.get(family, heard(config, waves[0])[0].shape[1])
    assert bool(tower.padded) == (family == "data2vec")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_that_trains_gets_a_gradient(checkpoint: Callable[[str], Path], family: str) -> None:
    config = config_of(checkpoint(family))
    tower = audio_tower(config).train()
    assert isinstance(tower, PretrainedAudioTower)
    out = tower(*heard(config, wave(0.4), wave(1.1, 1)))
    (out * torch.randn_like(out)).sum().backward()
    assert [name for name, p in tower.named_parameters() if p.grad is None] == []
    assert len([p for p in tower.model.parameters() if p.grad is not None and p.grad.any()]) > 10
    assert "embed_positions.weight" not in dict(tower.model.named_parameters())  # Whisper's sinusoids stand still


@pytest.mark.parametrize("family", ["whisper", "wav2vec2"])
@pytest.mark.parametrize("rate_hz", [8_000, 48_000])
def test_sound_is_resampled_to_what_the_tower_wants(
    checkpoint: Callable[[str], Path], family: str, rate_hz: int
) -> None:
    config = config_of(checkpoint(family))
    tower, made = audio_tower(config).eval(), sounds.of(config)
    with torch.no_grad():
        wanted, tokens = (
            tower(*made.stack([made.frames(encoded(wave(1.0, rate_hz=hz), hz), Limits())]).values())
            for hz in (16_000, rate_hz)
        )
    assert (tokens - wanted).norm() < 0.05 * wanted.norm()


def test_when_something_sounds_is_heard(checkpoint: Callable[[str], Path]) -> None:
    for family in ("ast", "wav2vec2-bert"):
        config = config_of(checkpoint(family))
        tower = audio_tower(config).eval()
        early = np.concatenate([wave(0.3), np.zeros(12_800, np.float32), wave(0.1, 3)])
        late = np.concatenate([np.zeros(12_800, np.float32), wave(0.3), wave(0.1, 3)])
        tokens = tower(*heard(config, early, late))
        assert not torch.allclose(tokens[0], tokens[1], atol=1e-2)


def test_a_stand_in_gives_numbers(checkpoint: Callable[[str], Path]) -> None:
    for family in FAMILIES:
        config = config_of(checkpoint(family))
        assert audio_tower(config).eval()(*heard(config)).isfinite().all(), family


def test_more_tokens_than_a_model_of_one_length_has_gives_all_there_are(checkpoint: Callable[[str], Path]) -> None:
    config = config_of(checkpoint("ast"), tokens=1000)
    assert audio_tower(config)(*heard(config, wave(0.5))).shape == (1, 21, 32)
    config = config_of(checkpoint("hubert"), tokens=50)  # of any length: a short sound repeats some
    assert audio_tower(config)(*heard(config, wave(0.1))).shape == (1, 50, 32)


# ------------------------------------------------------------------------------------------------------- pooling


def test_pooling_is_adaptive_average_pooling_of_each_rows_own_length() -> None:
    states, lengths = torch.randn(4, 30, 8), torch.tensor([30, 17, 3, 1])
    for tokens in (1, 4, 7):
        pooled = pool(states, lengths, tokens)
        for row, length in enumerate(lengths):
            wanted = nn.functional.adaptive_avg_pool1d(states[row, :length].T, tokens).T
            torch.testing.assert_close(pooled[row], wanted)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_a_norm_over_time_counts_real_positions_only(groups: int) -> None:
    norm, x = nn.GroupNorm(groups, 6), torch.randn(2, 6, 20)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    masked = TimeNorm(norm, [(3, 2, 0, 1)])
    torch.testing.assert_close(masked(x), norm(x))
    masked.lengths = torch.tensor([41, 16])  # of the input; behind the convolution 20 and 7
    torch.testing.assert_close(masked(x)[0], norm(x)[0])
    torch.testing.assert_close(masked(x)[1, :, :7], norm(x[1:, :, :7])[0])


# ------------------------------------------------------------------------------------------------------- bundle


@pytest.mark.parametrize("family", ["whisper", "wav2vec2"])
def test_a_bundle_answers_as_before_without_the_checkpoint(
    checkpoint: Callable[[str], Path],
    family: str,
    tmp_path: Path,
    tiny_recipe: dict[str, Any],
    make_records: Callable[..., list[Record]],
) -> None:
    own = tmp_path / "tower"
    shutil.copytree(checkpoint(family), own)
    config = resolve(tiny_recipe, {"model.audio.checkpoint": str(own)})
    encoder, tokenizer = text.load_encoder(config.model.backbone), text.load_tokenizer(config.model.backbone)
    torch.manual_seed(0)
    tasks = classify(("a", "b", "c", "d"))
    model = MultimodalModel(config.model, tasks, encoder.width, None)
    with torch.no_grad():
        for parameter in model.parameters():  # as if it had been trained
            parameter.add_(torch.randn_like(parameter) * 0.01)
    parts: dict[str, Any] = {"name": "b", "config": config, "task": "classify", "tokenizer": tokenizer}
    bundle.save(
        tmp_path / "b", tasks={name: task.info for name, task in tasks.items()}, state=model.state_dict(),
        backbone=encoder, calibration={"classify": Calibration()}, origin={}, **parts,
    )  # fmt: skip
    before = Predictor(**parts, tasks=tasks, model=model, encoder=encoder, device="cpu")
    records = make_records(8)
    wanted = before.raws([before.prepare(record) for record in records])
    shutil.rmtree(own)
    after = Predictor.load((tmp_path / "b").rename(tmp_path / "elsewhere"), device="cpu")
    np.testing.assert_array_equal(after.raws([after.prepare(record) for record in records]), wanted)


# ------------------------------------------------------------------------------------------------------- errors


def write(folder: Path, **document: Any) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("break_", "words"),
    [
        (lambda own: (own / "preprocessor_config.json").unlink(), "has no feature extractor: preprocessor_config.json"),
        (lambda own: (own / "model.safetensors").unlink(), "has no weights: *.safetensors"),
        (
            lambda own: write(own, feature_extractor_type="NoSuchFeatureExtractor"),
            "cannot be loaded (model.audio.checkpoint)",
        ),
        (
            lambda own: write(own, feature_extractor_type="WhisperFeatureExtractor", feature_size=16),
            "makes input_features, which its model does not take",
        ),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_told(
    checkpoint: Callable[[str], Path], tmp_path: Path, break_: Callable[[Path], Any], words: str
) -> None:
    own = Path(shutil.copytree(checkpoint("wav2vec2"), tmp_path / "own"))
    break_(own)
    with pytest.raises(BackboneError) as error:
        audio_tower(config_of(own))
    assert words in str(error.value)
    assert str(own) in str(error.value)


def test_a_language_model_is_no_audio_tower(
    tiny_backbone: Path, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    own = Path(shutil.copytree(tiny_backbone, tmp_path / "own"))
    shutil.copy(checkpoint("hubert") / "preprocessor_config.json", own)
    with pytest.raises(BackboneError, match="is no audio model: BertModel takes") as error:
        audio_tower(config_of(own))
    assert "but input_features or input_values is wanted" in str(error.value)


def test_a_hub_id_out_of_reach_is_told_with_its_key(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match="cannot be fetched") as error:
        audio_tower(AudioTowerConfig(checkpoint="nobody/no-such-tower", tokens=4))
    assert "model.audio.checkpoint=/path/to/folder" in str(error.value)
