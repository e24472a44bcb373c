"""Makes a miniature of Stable Diffusion 1 with random weights, to train on without a download of gigabytes.

    python -m examples.first_run.make_tiny_model output/first_run/miniature.safetensors

The architecture, the vocabulary and the names in the file are the real ones, the widths are small (32 MB): all that
a run does is done, but its pictures stay noise.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

UNET: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64, 64, 64),
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
VAE: dict[str, Any] = {
    "block_out_channels": (32, 32, 64, 64),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 1,
    "num_hidden_layers": 3,
    "projection_dim": 64,
}

# What makes a folder a diffusers model: the class of each part.
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "text_encoder": ["transformers", "CLIPTextModel"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_diffusers(folder: Path, seed: int) -> None:
    """Write U-Net, VAE and text encoder with random weights of `seed` as a diffusers folder."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a kernel that nothing here asks it for
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(seed)
    UNet2DConditionModel(**UNET).save_pretrained(folder / "unet")
    AutoencoderKL(**VAE).save_pretrained(folder / "vae")
    CLIPTextModel(CLIPTextConfig(**TEXT)).save_pretrained(folder / "text_encoder")
    (folder / "model_index.json").write_text(json.dumps(INDEX), encoding="utf-8")


def make(path: Path, seed: int = 0) -> None:
    """Write the miniature to `path` in the layout of the original single files (.safetensors)."""
    from library.checkpoints.files import read_header
    from library.families.registry import load_model, save_model

    with tempfile.TemporaryDirectory() as folder:
        write_diffusers(Path(folder), seed)
        model = load_model(read_header(Path(folder)))
        path.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, path, save_as="safetensors")


def main() -> None:
    """Read the command line and write the file."""
    parser = argparse.ArgumentParser(description="Make a miniature of Stable Diffusion 1 with random weights.")
    parser.add_argument("path", type=Path, help="the .safetensors file to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make(args.path, args.seed)


if __name__ == "__main__":
    main()
