"""A tiny configuration of each of the most used architectures of transformers: half of every group goes.

    python benchmarks/zoo_transformers.py [names…] [--modes exact,all] [--results FILE] [--failed]

Nothing is downloaded: models are made from configurations, with random weights. Sizes are small, and differ from each
other, so that none can be taken for another.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.zoo.runner import main

WIDTH, HEADS, LAYERS, HIDDEN, WORDS, PLACES = 48, 4, 2, 80, 101, 70

#: Hugging Face's usual names of sizes.
PLAIN = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
}
TEXT = dict(PLAIN, vocab_size=WORDS, max_position_embeddings=PLACES)
GROUPED = dict(TEXT, num_key_value_heads=2)
#: Those of encoder-decoder models in the way of BART.
SEQ2SEQ = {
    "vocab_size": WORDS,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": HIDDEN,
    "decoder_ffn_dim": HIDDEN + 8,
    "max_position_embeddings": PLACES,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
IMAGE = dict(PLAIN, image_size=32, patch_size=8)
AUDIO = dict(
    PLAIN,
    vocab_size=WORDS,
    conv_dim=(24, 24, 32),
    conv_kernel=(10, 3, 3),
    conv_stride=(5, 2, 2),
    num_feat_extract_layers=3,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
)


def _tokens(torch: Any, length: int = 16) -> dict[str, Any]:
    ids = torch.randint(3, WORDS, (1, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _two_texts(torch: Any) -> dict[str, Any]:
    ids = torch.randint(3, WORDS, (1, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "decoder_input_ids": ids[:, :9].clone()}


def _image(torch: Any, size: int = 32) -> dict[str, Any]:
    return {"pixel_values": torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))}


def _image64(torch: Any) -> dict[str, Any]:
    return _image(torch, 64)


def _text_and_image(torch: Any) -> dict[str, Any]:
    return _tokens(torch) | _image(torch)


def _sound(torch: Any) -> dict[str, Any]:
    return {"input_values": torch.randn(1, 1600, generator=torch.Generator().manual_seed(0))}


def _spectrogram(torch: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 16, 60, generator=generator)
    return {"input_features": features, "decoder_input_ids": torch.randint(3, WORDS, (1, 7), generator=generator)}


def _long_spectrogram(torch: Any) -> dict[str, Any]:
    return {"input_values": torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0))}


def _detection(torch: Any) -> dict[str, Any]:
    return _image(torch, 64)


Inputs = Callable[[Any], dict[str, Any]]

#: Name -> (configuration class, model class, sizes, inputs).
MODELS: dict[str, tuple[str, str, dict[str, Any], Inputs]] = {
    # encoders
    "bert": ("BertConfig", "BertForSequenceClassification", TEXT, _tokens),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", TEXT, _tokens),
    "xlm_roberta": ("XLMRobertaConfig", "XLMRobertaForTokenClassification", TEXT, _tokens),
    "camembert": ("CamembertConfig", "CamembertModel", TEXT, _tokens),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {
            "vocab_size": WORDS,
            "dim": WIDTH,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "hidden_dim": HIDDEN,
            "max_position_embeddings": PLACES,
        },
        _tokens,
    ),
    "albert": ("AlbertConfig", "AlbertForSequenceClassification", dict(TEXT, embedding_size=24), _tokens),
    "electra": ("ElectraConfig", "ElectraForSequenceClassification", dict(TEXT, embedding_size=24), _tokens),
    "deberta": (
        "DebertaConfig",
        "DebertaForSequenceClassification",
        dict(TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=16),
        _tokens,
    ),
    "deberta_v2": (
        "DebertaV2Config",
        "DebertaV2ForSequenceClassification",
        dict(
            TEXT,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            position_buckets=8,
            share_att_key=True,
            norm_rel_ebd="layer_norm",
        ),
        _tokens,
    ),
    "mpnet": ("MPNetConfig", "MPNetForSequenceClassification", TEXT, _tokens),
    "convbert": ("ConvBertConfig", "ConvBertForSequenceClassification", dict(TEXT, embedding_size=24), _tokens),
    "squeezebert": (
        "SqueezeBertConfig",
        "SqueezeBertForSequenceClassification",
        dict(TEXT, embedding_size=WIDTH),
        _tokens,
    ),
    "mobilebert": (
        "MobileBertConfig",
        "MobileBertForSequenceClassification",
        dict(TEXT, embedding_size=24, intra_bottleneck_size=32, true_hidden_size=32),
        _tokens,
    ),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        dict(TEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
        _tokens,
    ),
    "longformer": ("LongformerConfig", "LongformerForSequenceClassification", dict(TEXT, attention_window=8), _tokens),
    "big_bird": (
        "BigBirdConfig",
        "BigBirdForSequenceClassification",
        dict(TEXT, attention_type="original_full"),
        _tokens,
    ),
    "xlnet": (
        "XLNetConfig",
        "XLNetForSequenceClassification",
        {"vocab_size": WORDS, "d_model": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "d_inner": HIDDEN},
        _tokens,
    ),
    # decoders
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": WORDS, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": PLACES},
        _tokens,
    ),
    "gpt_neo": (
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {
            "vocab_size": WORDS,
            "hidden_size": WIDTH,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "intermediate_size": HIDDEN,
            "max_position_embeddings": PLACES,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
        },
        _tokens,
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", TEXT, _tokens),
    "gptj": (
        "GPTJConfig",
        "GPTJForCausalLM",
        {
            "vocab_size": WORDS,
            "n_embd": WIDTH,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": PLACES,
            "rotary_dim": 8,
        },
        _tokens,
    ),
    "gpt_bigcode": (
        "GPTBigCodeConfig",
        "GPTBigCodeForCausalLM",
        {"vocab_size": WORDS, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": PLACES},
        _tokens,
    ),
    "codegen": (
        "CodeGenConfig",
        "CodeGenForCausalLM",
        {
            "vocab_size": WORDS,
            "n_embd": WIDTH,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": PLACES,
            "rotary_dim": 8,
        },
        _tokens,
    ),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            "vocab_size": WORDS,
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "ffn_dim": HIDDEN,
            "max_position_embeddings": PLACES,
            "word_embed_proj_dim": 24,
        },
        _tokens,
    ),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        {"vocab_size": WORDS, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS},
        _tokens,
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED, _tokens),
    "mistral": ("MistralConfig", "MistralForCausalLM", dict(GROUPED, sliding_window=8), _tokens),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        dict(GROUPED, num_local_experts=3, num_experts_per_tok=2),
        _tokens,
    ),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GROUPED, _tokens),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        dict(
            GROUPED, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=40, shared_expert_intermediate_size=56
        ),
        _tokens,
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", dict(GROUPED, head_dim=16), _tokens),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        dict(GROUPED, head_dim=16, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=40),
        _tokens,
    ),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", dict(GROUPED, head_dim=16), _tokens),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", dict(GROUPED, head_dim=16, sliding_window=8), _tokens),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", dict(GROUPED, head_dim=16, sliding_window=8), _tokens),
    "phi": ("PhiConfig", "PhiForCausalLM", TEXT, _tokens),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", dict(GROUPED, pad_token_id=0, bos_token_id=1, eos_token_id=2), _tokens),
    "falcon": (
        "FalconConfig",
        "FalconForCausalLM",
        {
            "vocab_size": WORDS,
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "max_position_embeddings": PLACES,
        },
        _tokens,
    ),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", dict(GROUPED, partial_rotary_factor=0.5), _tokens),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", dict(GROUPED, pad_token_id=0, eos_token_id=2), _tokens),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", dict(GROUPED, pad_token_id=0, eos_token_id=2), _tokens),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", dict(GROUPED, bos_token_id=1, eos_token_id=2), _tokens),
    "cohere": ("CohereConfig", "CohereForCausalLM", dict(GROUPED, bos_token_id=1, eos_token_id=2), _tokens),
    "mamba": (
        "MambaConfig",
        "MambaForCausalLM",
        {"vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 6, "time_step_rank": 5},
        _tokens,
    ),
    # encoder-decoders
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": WORDS,
            "d_model": WIDTH,
            "d_kv": 12,
            "d_ff": HIDDEN,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "decoder_start_token_id": 0,
        },
        _two_texts,
    ),
    "mt5": (
        "MT5Config",
        "MT5ForConditionalGeneration",
        {
            "vocab_size": WORDS,
            "d_model": WIDTH,
            "d_kv": 10,
            "d_ff": HIDDEN,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "decoder_start_token_id": 0,
        },
        _two_texts,
    ),
    "bart": ("BartConfig", "BartForConditionalGeneration", SEQ2SEQ, _two_texts),
    "mbart": ("MBartConfig", "MBartForConditionalGeneration", SEQ2SEQ, _two_texts),
    "pegasus": ("PegasusConfig", "PegasusForConditionalGeneration", SEQ2SEQ, _two_texts),
    "m2m_100": ("M2M100Config", "M2M100ForConditionalGeneration", SEQ2SEQ, _two_texts),
    "marian": ("MarianConfig", "MarianMTModel", SEQ2SEQ, _two_texts),
    "led": (
        "LEDConfig",
        "LEDForConditionalGeneration",
        dict(
            {k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"},
            max_encoder_position_embeddings=PLACES,
            max_decoder_position_embeddings=PLACES,
            attention_window=8,
        ),
        _two_texts,
    ),
    # vision
    "vit": ("ViTConfig", "ViTForImageClassification", IMAGE, _image),
    "deit": ("DeiTConfig", "DeiTForImageClassification", IMAGE, _image),
    "beit": ("BeitConfig", "BeitForImageClassification", IMAGE, _image),
    "swin": (
        "SwinConfig",
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4},
        _image,
    ),
    "swinv2": (
        "Swinv2Config",
        "Swinv2ForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4},
        _image,
    ),
    "convnext": (
        "ConvNextConfig",
        "ConvNextForImageClassification",
        {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]},
        _image64,
    ),
    "convnextv2": (
        "ConvNextV2Config",
        "ConvNextV2ForImageClassification",
        {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]},
        _image64,
    ),
    "segformer": (
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        {
            "hidden_sizes": [16, 24, 32, 48],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 4, 4],
            "sr_ratios": [4, 2, 2, 1],
            "decoder_hidden_size": 36,
        },
        _image64,
    ),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", IMAGE, _image),
    "resnet": (
        "ResNetConfig",
        "ResNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [24, 32, 40, 48], "depths": [1, 1, 2, 1]},
        _image64,
    ),
    "mobilevit": (
        "MobileViTConfig",
        "MobileViTForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [24, 32, 40],
            "neck_hidden_sizes": [8, 12, 16, 24, 32, 40, 48],
            "num_attention_heads": 4,
        },
        _image64,
    ),
    "vit_mae": (
        "ViTMAEConfig",
        "ViTMAEForPreTraining",
        dict(
            IMAGE,
            decoder_hidden_size=32,
            decoder_num_hidden_layers=2,
            decoder_num_attention_heads=4,
            decoder_intermediate_size=56,
        ),
        _image,
    ),
    "detr": (
        "DetrConfig",
        "DetrForObjectDetection",
        {
            "d_model": WIDTH,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS,
            "encoder_ffn_dim": HIDDEN,
            "decoder_ffn_dim": HIDDEN,
            "num_queries": 6,
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone_config": (
                "ResNetConfig",
                {
                    "embedding_size": 16,
                    "hidden_sizes": [24, 32, 40, 48],
                    "depths": [1, 1, 1, 1],
                    "out_features": ["stage4"],
                },
            ),
        },
        _detection,
    ),
    # vision and text
    "clip": (
        "CLIPConfig",
        "CLIPModel",
        {
            "text_config": dict(TEXT, eos_token_id=2, projection_dim=40),
            "vision_config": dict(IMAGE, projection_dim=40),
            "projection_dim": 40,
        },
        _text_and_image,
    ),
    "siglip": (
        "SiglipConfig",
        "SiglipModel",
        {"text_config": dict(TEXT, projection_size=WIDTH), "vision_config": dict(IMAGE)},
        _text_and_image,
    ),
    "blip": (
        "BlipConfig",
        "BlipForConditionalGeneration",
        {
            "text_config": dict(
                TEXT, encoder_hidden_size=WIDTH, bos_token_id=1, eos_token_id=2, pad_token_id=0, sep_token_id=2
            ),
            "vision_config": dict(IMAGE),
            "projection_dim": 40,
        },
        _text_and_image,
    ),
    # audio
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        dict(
            {k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"},
            num_mel_bins=16,
            max_source_positions=30,
            max_target_positions=40,
        ),
        _spectrogram,
    ),
    "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2ForCTC", AUDIO, _sound),
    "hubert": ("HubertConfig", "HubertForCTC", AUDIO, _sound),
    "wavlm": ("WavLMConfig", "WavLMForCTC", AUDIO, _sound),
    "audio_spectrogram_transformer": (
        "ASTConfig",
        "ASTForAudioClassification",
        dict(PLAIN, patch_size=8, frequency_stride=8, time_stride=8, max_length=64, num_mel_bins=32),
        _long_spectrogram,
    ),
}


def names() -> list[str]:
    """Return the names of all models."""
    return list(MODELS)


def build(name: str) -> tuple[Any, Any]:
    """Return a model and an input for it."""
    import torch
    import transformers

    config_class, model_class, sizes, inputs = MODELS[name]
    nested = {
        key: getattr(transformers, value[0])(**value[1])
        for key, value in sizes.items()
        if isinstance(value, tuple) and isinstance(value[0], str)
    }
    config = getattr(transformers, config_class)(**{**sizes, **nested})
    return getattr(transformers, model_class)(config).eval(), inputs(torch)


if __name__ == "__main__":
    import transformers.modeling_utils  # noqa: F401  (before the fork)

    main("transformers", names, build)
