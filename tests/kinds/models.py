"""Tiny models of many architectures and heads, adapters of PEFT, and samples for each."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers

WORDS = 64
LENGTH = 8
SAMPLES = 24
_NUMBERS = torch.Generator().manual_seed(0)
TEXTS = torch.randint(5, WORDS - 1, (SAMPLES, LENGTH), generator=_NUMBERS)
IMAGES = torch.rand(SAMPLES, 3, 32, 32, generator=_NUMBERS)
SOUNDS = torch.randn(SAMPLES, 3200, generator=_NUMBERS)

Sample = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Args:
        make: returns a model.
        sample: returns a sample by its number.
    """

    make: Callable[[], Any]
    sample: Callable[[int], Sample]


class Samples(torch.utils.data.Dataset[Sample]):
    """Samples of a kind."""

    def __init__(self, sample: Callable[[int], Sample]) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, at: int) -> Sample:
        return self.sample(at)


# -- samples --------------------------------------------------------------------------------------------------------------


def _text(labels: Callable[[int], torch.Tensor], at: int) -> Sample:
    return {"input_ids": TEXTS[at], "attention_mask": torch.ones(LENGTH, dtype=torch.long), "labels": labels(at)}


words = partial(_text, lambda at: TEXTS[at].clone())
_classes = partial(_text, lambda at: torch.tensor(at % 3))
_tags = partial(_text, lambda at: TEXTS[at] % 5)
_score = partial(_text, lambda at: torch.tensor(float(at)))


def _answer(at: int) -> Sample:
    return {"input_ids": TEXTS[at], "start_positions": torch.tensor(at % 8), "end_positions": torch.tensor((at + 2) % 8)}


def _choice(at: int) -> Sample:
    return {"input_ids": torch.stack([TEXTS[at], TEXTS[(at + 1) % SAMPLES]]), "labels": torch.tensor(at % 2)}


def _image(at: int) -> Sample:
    return {"pixel_values": IMAGES[at], "labels": torch.tensor(at % 3)}


def _regions(at: int) -> Sample:
    return {"pixel_values": IMAGES[at], "labels": (IMAGES[at, 0] * 3).long()}


def _hidden_patches(at: int) -> Sample:
    return {"pixel_values": IMAGES[at], "bool_masked_pos": torch.arange(16) % 2 == at % 2}


def _speech(at: int) -> Sample:
    return {"input_values": SOUNDS[at], "labels": TEXTS[at][:3]}


def _sound(at: int) -> Sample:
    return {"input_values": SOUNDS[at], "labels": torch.tensor(at % 2)}


def _spectrum(at: int) -> Sample:
    return {"input_features": SOUNDS[at][:1600].view(80, 20), "labels": TEXTS[at]}


def _caption(at: int) -> Sample:
    return {"pixel_values": IMAGES[at], "labels": TEXTS[at]}


def _image_in_text(at: int) -> Sample:
    ids = TEXTS[at].clone()
    ids[:4] = WORDS - 1
    mask = torch.ones(LENGTH, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": IMAGES[at], "labels": TEXTS[at]}


# -- models ---------------------------------------------------------------------------------------------------------------

_SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_ENCODER = _SMALL | {"vocab_size": WORDS, "max_position_embeddings": 40, "pad_token_id": 0}
_DECODER = _ENCODER | {"num_key_value_heads": 2}
_VISION = _SMALL | {"image_size": 32, "patch_size": 8, "num_labels": 3}
_BOTH = {
    "vocab_size": WORDS,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
}
_WAVES = _SMALL | {
    "vocab_size": WORDS,
    "conv_dim": (8, 8),
    "conv_stride": (10, 10),
    "conv_kernel": (10, 10),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_length": 2,
    "mask_feature_length": 2,
    "pad_token_id": 0,
    "ctc_loss_reduction": "mean",
    "ctc_zero_infinity": True,
}
_EXPERTS = _DECODER | {"output_router_logits": True}


def _model(name: str, config: str, **settings: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**settings))


llama = _model("LlamaForCausalLM", "LlamaConfig", **_DECODER)


class WithLoss(transformers.CLIPModel):
    """Returns its loss without being asked for it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss, too."""
        return super().forward(*args, **kwargs | {"return_loss": True})


def _clip() -> Any:
    text = _ENCODER | {"eos_token_id": 2, "bos_token_id": 1}
    vision = _SMALL | {"image_size": 32, "patch_size": 8}
    return WithLoss(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def _captions() -> Any:
    vision = transformers.ViTConfig(**_VISION)
    text = transformers.BertConfig(is_decoder=True, add_cross_attention=True, **_ENCODER)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        vision, text, decoder_start_token_id=1, pad_token_id=0
    )
    return transformers.VisionEncoderDecoderModel(config=config)


def _llava() -> Any:
    vision = transformers.CLIPVisionConfig(**_SMALL, image_size=32, patch_size=16)
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**_DECODER),
        image_token_index=WORDS - 1,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def _frozen_embeddings() -> Any:
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    return model


KINDS: dict[str, Kind] = {
    "BERT, classes": Kind(_model("BertForSequenceClassification", "BertConfig", num_labels=3, **_ENCODER), _classes),
    "BERT, a score": Kind(_model("BertForSequenceClassification", "BertConfig", num_labels=1, **_ENCODER), _score),
    "BERT, answers": Kind(_model("BertForQuestionAnswering", "BertConfig", **_ENCODER), _answer),
    "BERT, choices": Kind(_model("BertForMultipleChoice", "BertConfig", **_ENCODER), _choice),
    "BERT, words": Kind(_model("BertForMaskedLM", "BertConfig", **_ENCODER), words),
    "BERT, tags": Kind(_model("BertForTokenClassification", "BertConfig", num_labels=5, **_ENCODER), _tags),
    "RoBERTa": Kind(_model("RobertaForSequenceClassification", "RobertaConfig", num_labels=3, **_ENCODER), _classes),
    "ALBERT": Kind(_model("AlbertForMaskedLM", "AlbertConfig", embedding_size=8, **_ENCODER), words),
    "ELECTRA": Kind(
        _model("ElectraForSequenceClassification", "ElectraConfig", num_labels=3, embedding_size=8, **_ENCODER), _classes
    ),
    "DeBERTa": Kind(
        _model(
            "DebertaV2ForSequenceClassification",
            "DebertaV2Config",
            num_labels=3,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            **_ENCODER,
        ),
        _classes,
    ),
    "XLNet": Kind(
        _model(
            "XLNetForSequenceClassification",
            "XLNetConfig",
            num_labels=3,
            vocab_size=WORDS,
            d_model=16,
            n_layer=2,
            n_head=2,
            d_inner=24,
        ),
        _classes,
    ),
    "T5": Kind(
        _model(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=WORDS,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        ),
        words,
    ),
    "BART": Kind(_model("BartForConditionalGeneration", "BartConfig", max_position_embeddings=40, **_BOTH), words),
    "Marian": Kind(_model("MarianMTModel", "MarianConfig", max_position_embeddings=40, **_BOTH), words),
    "GPT-NeoX": Kind(_model("GPTNeoXForCausalLM", "GPTNeoXConfig", **_ENCODER), words),
    "Llama": Kind(llama, words),
    "Llama, classes": Kind(_model("LlamaForSequenceClassification", "LlamaConfig", num_labels=3, **_DECODER), _classes),
    "Llama, bf16": Kind(lambda: llama().to(torch.bfloat16), words),
    "Llama, frozen embeddings": Kind(_frozen_embeddings, words),
    "Qwen 2, tied": Kind(_model("Qwen2ForCausalLM", "Qwen2Config", tie_word_embeddings=True, **_DECODER), words),
    "Gemma": Kind(_model("GemmaForCausalLM", "GemmaConfig", head_dim=8, **_DECODER), words),
    "Mixtral": Kind(_model("MixtralForCausalLM", "MixtralConfig", num_local_experts=4, **_EXPERTS), words),
    "Qwen 3, experts": Kind(
        _model(
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            head_dim=8,
            **_EXPERTS,
        ),
        words,
    ),
    "OPT": Kind(_model("OPTForCausalLM", "OPTConfig", ffn_dim=24, word_embed_proj_dim=16, **_ENCODER), words),
    "Bloom": Kind(_model("BloomForCausalLM", "BloomConfig", vocab_size=WORDS, hidden_size=16, n_layer=2, n_head=2), words),
    "Mamba": Kind(
        _model("MambaForCausalLM", "MambaConfig", vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, state_size=4), words
    ),
    "ViT": Kind(_model("ViTForImageClassification", "ViTConfig", **_VISION), _image),
    "ViT, hidden patches": Kind(_model("ViTForMaskedImageModeling", "ViTConfig", encoder_stride=8, **_VISION), _hidden_patches),
    "Swin": Kind(
        _model(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=32,
            patch_size=4,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[2, 2],
            window_size=4,
            num_labels=3,
        ),
        _image,
    ),
    "ConvNeXt": Kind(
        _model(
            "ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=3
        ),
        _image,
    ),
    "ResNet": Kind(
        _model(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            num_labels=3,
            layer_type="basic",
        ),
        _image,
    ),
    "MobileNet": Kind(
        _model("MobileNetV2ForImageClassification", "MobileNetV2Config", image_size=32, depth_multiplier=0.35, num_labels=3),
        _image,
    ),
    "SegFormer": Kind(
        _model(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            num_encoder_blocks=2,
            depths=[1, 1],
            hidden_sizes=[8, 16],
            num_attention_heads=[1, 2],
            sr_ratios=[2, 1],
            patch_sizes=[7, 3],
            strides=[4, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=16,
            num_labels=3,
        ),
        _regions,
    ),
    "CLIP": Kind(_clip, lambda at: {"input_ids": TEXTS[at], "pixel_values": IMAGES[at]}),
    "LLaVA": Kind(_llava, _image_in_text),
    "captions": Kind(_captions, _caption),
    "wav2vec 2": Kind(_model("Wav2Vec2ForCTC", "Wav2Vec2Config", **_WAVES), _speech),
    "WavLM": Kind(_model("WavLMForCTC", "WavLMConfig", **_WAVES), _speech),
    "HuBERT, classes": Kind(
        _model("HubertForSequenceClassification", "HubertConfig", num_labels=2, classifier_proj_size=8, **_WAVES), _sound
    ),
    "Whisper": Kind(
        _model(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            num_mel_bins=80,
            max_source_positions=10,
            max_target_positions=40,
            **_BOTH,
        ),
        _spectrum,
    ),
}

# -- adapters -------------------------------------------------------------------------------------------------------------

_QUERIES = ["q_proj", "v_proj"]
_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA, saved modules": ("LoraConfig", {"r": 2, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "LoRA, single tokens": ("LoraConfig", {"r": 2, "trainable_token_indices": [5, 6]}),
    "DoRA": ("LoraConfig", {"r": 2, "use_dora": True, "lora_dropout": 0.1}),
    "PiSSA": ("LoraConfig", {"r": 2, "init_lora_weights": "pissa"}),
    "prompt tuning": ("PromptTuningConfig", {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM", "target_modules": None}),
    "prefix tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM", "target_modules": None}),
    "p-tuning": (
        "PromptEncoderConfig",
        {"num_virtual_tokens": 3, "encoder_hidden_size": 8, "task_type": "CAUSAL_LM", "target_modules": None},
    ),
    "IA3": ("IA3Config", {"target_modules": [*_QUERIES, "down_proj"], "feedforward_modules": ["down_proj"]}),
    "VeRA": ("VeraConfig", {"r": 4}),
    "LoHa": ("LoHaConfig", {"r": 2, "module_dropout": 0.1}),
    "OFT": ("OFTConfig", {"r": 0, "oft_block_size": 4}),
    "RandLoRA": ("RandLoraConfig", {"r": 2}),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 10}),
    "layer norms": ("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
}


def _adapter(kind: str, settings: dict[str, Any]) -> Any:
    import peft

    given = {"target_modules": _QUERIES, **settings}
    return peft.get_peft_model(llama(), getattr(peft, kind)(**{name: one for name, one in given.items() if one is not None}))


def _two_adapters() -> Any:
    import peft

    model = _adapter("LoraConfig", {"r": 2})
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["o_proj"]))
    return model


def _adapter_of_the_model() -> Any:
    import peft

    model = llama()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=_QUERIES))
    return model


if importlib.util.find_spec("peft"):
    KINDS |= {name: Kind(partial(_adapter, kind, settings), words) for name, (kind, settings) in _SETTINGS.items()}
    KINDS |= {"two adapters": Kind(_two_adapters, words), "add_adapter()": Kind(_adapter_of_the_model, words)}
