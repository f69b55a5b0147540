"""Multimodal checkpoints of several families, tiny and untrained, with the processor's files as those models publish
them: folders that `model.join=native` reads; and what trains one of them and asks it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers.processors import TemplateProcessing

from jobs import supervised
from mmagent import bundle, freeze, lora
from mmagent.assembly import load_language, load_reading
from mmagent.batch import Inputs
from mmagent.config import Config, resolve
from mmagent.predictor import Predictor
from mmagent.record import Record
from mmagent.targets import TaskInfo
from mmagent.tasks import make_all
from tests.test_backbones import write_tokenizer

PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}<{{ c['type'] }}>{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_QWEN_VL = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You help.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_QWEN_AUDIO = (
    "{% set sounds = namespace(value=0) %}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'audio' %}"
    "{% set sounds.value = sounds.value + 1 %}Audio {{ sounds.value }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}<start_of_image>"
    "{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_IDEFICS = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}{% for line in message['content'] %}"
    "{% if line['type'] == 'text' %}{{ line['text'] }}{% elif line['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 64, "max_position_embeddings": 160, "tie_word_embeddings": True, "initializer_range": 0.3,
    "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_PIXELS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def write(family: str, folder: Path) -> Path:
    """A checkpoint of a family (see `FAMILIES`)."""
    torch.manual_seed(0)
    FAMILIES[family](folder)
    return folder


def _words(folder: Path, *signs: str, frame: str = "", **named: str) -> Any:
    """A tokenizer of bytes with more signs of its own, some of which it knows by a name; `frame`: what it puts around
    each text ($A)."""
    write_tokenizer(folder, pad="<pad>")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, extra_special_tokens=named)
    tokenizer.add_special_tokens({"additional_special_tokens": [*signs, *named.values()]})
    if frame:
        ends = [("<s>", 0), ("</s>", 2)]
        pair = frame.replace("$A", "$A </s> $B" if "</s>" in frame else "$A $B")
        tokenizer._tokenizer.post_processor = TemplateProcessing(single=frame, pair=pair, special_tokens=ends)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _publish(folder: Path, template: str | None = None, **files: dict[str, Any]) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    if template:
        (folder / "chat_template.jinja").write_text(template)


def _llava(folder: Path) -> None:
    """CLIP's vision, a projector, a Llama."""
    tokenizer = _words(folder, "<image>", "<audio>")
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=16,
    )  # fmt: skip
    words = transformers.LlamaConfig(**SIZES, vocab_size=len(tokenizer))
    sign = tokenizer.convert_tokens_to_ids("<image>")
    settings: dict[str, Any] = {"image_token_id": sign, "image_seq_length": 4}
    config = transformers.LlavaConfig(text_config=words, vision_config=vision, **settings)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.LlavaProcessor(
        image_processor=pictures, tokenizer=tokenizer, patch_size=16, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1, chat_template=PLAIN,
    ).save_pretrained(folder)  # fmt: skip


def _qwen2_audio(folder: Path) -> None:
    """An encoder like Whisper's, a projector, a Qwen2."""
    tokenizer = _words(folder, "<|im_start|>", "<|im_end|>", "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
    audio = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    config = transformers.Qwen2AudioConfig(
        audio_config={**audio, "num_mel_bins": 40, "max_source_positions": 100},
        text_config={**SIZES, "vocab_size": len(tokenizer), "model_type": "qwen2"},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    transformers.Qwen2AudioForConditionalGeneration(config).save_pretrained(folder)
    sound = {
        "chunk_length": 2, "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 40, "hop_length": 160,
        "n_fft": 400, "sampling_rate": 16000, "return_attention_mask": True, "processor_class": "Qwen2AudioProcessor",
    }  # fmt: skip
    _publish(folder, _QWEN_AUDIO, preprocessor_config=sound)


def _qwen_vl(folder: Path, *, three: bool = False) -> None:
    """A vision model of any picture size, a Qwen with places of three axes; its processor has a part for videos."""
    signs = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = _words(folder, *signs)
    places = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
    ids = dict(zip(signs, tokenizer.convert_tokens_to_ids(list(signs)), strict=True))
    words = {**SIZES, "max_position_embeddings": 400, "vocab_size": len(tokenizer), "rope_parameters": places}
    vision: dict[str, Any] = {
        "depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "hidden_size": 32, "initializer_range": 0.3,
    }  # fmt: skip
    settings: dict[str, Any] = {
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"], "tie_word_embeddings": True,
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
    }  # fmt: skip
    name = "Qwen3VL" if three else "Qwen2VL"
    if three:
        vision |= {"out_hidden_size": 32, "intermediate_size": 64, "deepstack_visual_indexes": [0]}
        vision |= {"num_position_embeddings": 16}
        words |= {"head_dim": 16, "rope_parameters": {**places, "mrope_interleaved": True}}
    else:
        vision |= {"embed_dim": 32, "mlp_ratio": 2}
    config = getattr(transformers, f"{name}Config")(text_config=words, vision_config=vision, **settings)
    getattr(transformers, f"{name}ForConditionalGeneration")(config).save_pretrained(folder)
    pictures = {
        **_PIXELS, "min_pixels": 256, "max_pixels": 2304, "patch_size": 8, "temporal_patch_size": 2, "merge_size": 2,
        "image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": f"{name}Processor",
    }  # fmt: skip
    videos = {**pictures, "video_processor_type": f"{name}VideoProcessor"}
    _publish(folder, _QWEN_VL, preprocessor_config=pictures, video_preprocessor_config=videos)


def _gemma3(folder: Path) -> None:
    """SigLIP's vision, a Gemma whose tokens of one picture see each other."""
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = _words(folder, "<start_of_turn>", "<end_of_turn>", frame="<s> $A", **named)
    ids = {name: tokenizer.convert_tokens_to_ids(sign) for name, sign in named.items()}
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
        "patch_size": 8, "vision_use_head": False,
    }  # fmt: skip
    words = {
        **SIZES, "max_position_embeddings": 400, "vocab_size": len(tokenizer), "head_dim": 16, "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=words, vision_config=vision, mm_tokens_per_image=4, image_token_index=ids["image_token"],
        boi_token_index=ids["boi_token"], eoi_token_index=ids["eoi_token"],
    )  # fmt: skip
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    pictures = {
        **_PIXELS, "image_processor_type": "Gemma3ImageProcessor", "image_seq_length": 4, "do_pan_and_scan": None,
        "size": {"height": 32, "width": 32}, "processor_class": "Gemma3Processor",
    }  # fmt: skip
    whole = {"image_seq_length": 4, "processor_class": "Gemma3Processor"}
    _publish(folder, _GEMMA, preprocessor_config=pictures, processor_config=whole)


def _idefics3(folder: Path) -> None:
    """SmolVLM's kin: a picture as a row of tiles and a whole, each between signs of its own."""
    signs = ("<|im_start|>", "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
    tiles = (f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6))
    tokenizer = _words(folder, *signs, *tiles)
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.save_pretrained(folder)
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
        "patch_size": 8,
    }  # fmt: skip
    config = transformers.Idefics3Config(
        text_config={**SIZES, "model_type": "llama", "max_position_embeddings": 400, "vocab_size": len(tokenizer)},
        vision_config=vision, scale_factor=2, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    config.pad_token_id = 1
    transformers.Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    pictures = {
        **_PIXELS, "image_processor_type": "Idefics3ImageProcessor", "do_image_splitting": True,
        "size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}, "processor_class": "Idefics3Processor",
    }  # fmt: skip
    whole = {"image_seq_len": 4, "processor_class": "Idefics3Processor"}
    _publish(folder, _IDEFICS, preprocessor_config=pictures, processor_config=whole)


def _florence2(folder: Path) -> None:
    """DaViT's vision before a BART: an encoder-decoder. It has no chat template, and takes one picture a text."""
    tokenizer = _words(folder, frame="<s> $A </s>", image_token="<image>")
    text = {
        "vocab_size": len(tokenizer), "d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "bos_token_id": 0,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "max_position_embeddings": 160, "decoder_start_token_id": 2, "pad_token_id": 1, "eos_token_id": 2,
        "model_type": "bart", "init_std": 0.2, "forced_eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "num_heads": [2, 2],
        "patch_prenorm": [False, True], "embed_dim": [16, 32], "num_groups": [2, 2], "window_size": 2,
        "projection_dim": 32, "drop_path_rate": 0.0,
    }  # fmt: skip
    sign = tokenizer.convert_tokens_to_ids("<image>")
    config = transformers.Florence2Config(text_config=text, vision_config=vision, image_token_id=sign)
    transformers.Florence2ForConditionalGeneration(config).save_pretrained(folder)
    pictures = {
        **_PIXELS, "image_processor_type": "CLIPImageProcessor", "image_seq_length": 5, "do_center_crop": False,
        "size": {"height": 16, "width": 16}, "processor_class": "Florence2Processor",
    }  # fmt: skip
    _publish(folder, preprocessor_config=pictures, processor_config={"processor_class": "Florence2Processor"})


FAMILIES: dict[str, Callable[[Path], None]] = {
    "llava": _llava,
    "qwen2_audio": _qwen2_audio,
    "qwen2_vl": _qwen_vl,
    "qwen3_vl": lambda folder: _qwen_vl(folder, three=True),
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "florence2": _florence2,
}


def configured(folder: Path, **overrides: Any) -> Config:
    recipe: dict[str, Any] = {
        "data": {"name": "tiny", "max_text_tokens": 96, "max_answer_tokens": 12},
        "model": {
            "backbone": str(folder), "join": "native", "dropout": 0.0, "head_dropout": 0.0, "image": None,
            "audio": None,
        },
        "optim": {"lr": 5e-3, "lr_backbone": 5e-3, "lr_towers": 5e-3},
        "train": {"micro_batch": 4},
        "freeze": {"strategy": "top:2"},
    }  # fmt: skip
    return resolve(recipe, overrides)


class Made:
    """A native model, and what feeds it."""

    def __init__(self, config: Config, infos: dict[str, TaskInfo]) -> None:
        self.config, self.infos, self.tasks = config, infos, make_all(infos)
        self.encoder = load_language(config.model, self.tasks)
        self.before = {name: value.clone() for name, value in self.encoder.state_dict().items()}
        self.processor = load_reading(config.model)
        self.module = supervised.build(config, self.tasks, self.encoder)
        self.inputs = Inputs(config.model, config.data, self.processor, self.tasks, self.encoder)

    def batch(self, records: list[Record]) -> dict[str, torch.Tensor]:
        return self.inputs.batch([self.inputs.sample(record) for record in records])

    def fit(self, records: list[Record], steps: int = 30) -> list[float]:
        batch, losses = self.batch(records), []
        optimizer = torch.optim.AdamW(freeze.groups(self.module, self.config))
        for _ in range(steps):
            loss = supervised.loss_of(self.module(batch), batch, self.tasks, self.config)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def predictor(self) -> Predictor:
        return Predictor(
            name="b", config=self.config, tasks=self.tasks, task=next(iter(self.infos)), model=self.module,
            encoder=self.encoder, tokenizer=self.processor, device="cpu",
        )  # fmt: skip

    def bundled(self, folder: Path) -> Predictor:
        weights = lora.merged(self.module, self.module.state_dict())
        encoder = load_language(self.config.model, self.infos, weights=False)
        encoder.load({k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")})
        bundle.save(
            folder, name="b", config=self.config, tasks=self.infos, task=next(iter(self.infos)),
            state={key: value for key, value in weights.items() if not key.startswith("backbone.")}, backbone=encoder,
            tokenizer=self.processor, calibration={}, origin={},
        )  # fmt: skip
        return Predictor.load(folder, device="cpu")
