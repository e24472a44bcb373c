"""Miniature transformers models with random weights, in the folders that their authors' repositories have."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegTextConfig,
    CLIPSegVisionConfig,
    OwlViTConfig,
    OwlViTForObjectDetection,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    YolosConfig,
    YolosForObjectDetection,
)

from library.families.clip.tokenizer import ClipTokenizer

CLASSES = {0: "person, individual", 1: "dog"}
_TEXT = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407,
}  # fmt: skip
_VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
_LARGE = 0.5  # of the weights of new models, whose outputs would otherwise hardly differ from place to place


def _image_processor(name: str, **settings: object) -> object:
    """The image processor that needs no torchvision, by its names in different releases of transformers."""
    found = getattr(transformers, f"{name}ImageProcessorPil", None) or getattr(transformers, f"{name}ImageProcessor")
    return found(**settings)


def _write(folder: Path, model: torch.nn.Module, *processors: object) -> Path:
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, _LARGE)
    for part in (model, *processors):
        part.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


def clipseg(folder: Path) -> Path:
    """CLIPSeg, with the whole vocabulary of CLIP."""
    config = CLIPSegConfig(
        text_config=CLIPSegTextConfig(**_TEXT).to_dict(),
        vision_config=CLIPSegVisionConfig(**_VISION).to_dict(),
        projection_dim=16, extract_layers=[0, 1], reduce_dim=16, decoder_num_attention_heads=2,
        decoder_intermediate_size=16, conditional_layer=0,
    )  # fmt: skip
    ClipTokenizer(49407).save(folder)
    processor = _image_processor("ViT", size={"height": 32, "width": 32})
    return _write(folder, CLIPSegForImageSegmentation(config), processor)


def yolos(folder: Path) -> Path:
    """A detector of two classes."""
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[32, 32],
        patch_size=8, num_detection_tokens=6, id2label=CLASSES,
    )  # fmt: skip
    processor = _image_processor("Yolos", size={"shortest_edge": 32, "longest_edge": 64})
    return _write(folder, YolosForObjectDetection(config), processor)


def owlvit(folder: Path) -> Path:
    """A detector of words."""
    config = OwlViTConfig(text_config=_TEXT | {"max_position_embeddings": 16}, vision_config=_VISION, projection_dim=16)
    ClipTokenizer(49407).save(folder)
    processor = _image_processor("OwlViT", size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32})
    return _write(folder, OwlViTForObjectDetection(config), processor)


def segformer(folder: Path) -> Path:
    """A segmentation into two classes."""
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 8], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 1], mlp_ratios=[1, 1], decoder_hidden_size=8, id2label=CLASSES,
    )  # fmt: skip
    processor = _image_processor("Segformer", size={"height": 32, "width": 32})
    return _write(folder, SegformerForSemanticSegmentation(config), processor)
