"""Encoders in miniature, made and saved by transformers itself: random weights, a few megabytes, no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from library.families.clip.tokenizer import shipped_tokenizer

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def processor(kind: str) -> Any:
    """transformers' image processor by PIL: of ViT, CLIP, or Bit (DINOv2's)."""
    if int(transformers.__version__.partition(".")[0]) >= 5:
        module = __import__(f"transformers.models.{kind.lower()}.image_processing_pil_{kind.lower()}", fromlist=["x"])
        return getattr(module, f"{kind}ImageProcessorPil")
    return getattr(transformers, f"{kind}ImageProcessor")


def write_dino(folder: Path, seed: int = 0) -> Path:
    """A ViT as DINO's folders hold it, without a pooler."""
    torch.manual_seed(seed)
    config = ViTConfig(**SMALL, intermediate_size=64, image_size=32, patch_size=8)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    processor("ViT")(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def write_dinov2(folder: Path, seed: int = 0) -> Path:
    """DINOv2, whose processor crops at the centre."""
    torch.manual_seed(seed)
    Dinov2Model(Dinov2Config(**SMALL, mlp_ratio=2, image_size=28, patch_size=14)).save_pretrained(folder)
    size, crop = {"shortest_edge": 32}, {"height": 28, "width": 28}
    processor("Bit")(size=size, crop_size=crop, resample=3).save_pretrained(folder)
    return folder


def write_clip(folder: Path, seed: int = 0) -> Path:
    """CLIP with its real tokenizer."""
    torch.manual_seed(seed)
    text = CLIPTextConfig(**SMALL, intermediate_size=64, vocab_size=49408, bos_token_id=49406, eos_token_id=49407)
    vision = CLIPVisionConfig(**SMALL, intermediate_size=64, image_size=32, patch_size=8)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    size, crop = {"shortest_edge": 32}, {"height": 32, "width": 32}
    processor("CLIP")(size=size, crop_size=crop).save_pretrained(folder)
    shipped_tokenizer(49407).save(folder)
    return folder
