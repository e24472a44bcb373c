"""A full-size SD1.5 checkpoint with random weights for the benchmarks: fp16, original layout, 2.1 GB.

`python benchmarks/full_size.py model.safetensors` writes one to keep, so that each of them need not make its own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from library.checkpoints.lazy import LazyTensor


def modules() -> dict[str, Any]:
    """The published model's modules by the names of a diffusers folder, without weights."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=4,
            ),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**text)),
        }


def original_tensors() -> dict[str, LazyTensor]:
    """The file's 1130 tensors, fp16, original layout, with random values that are made on access."""
    import torch

    from library.checkpoints.header import TensorInfo
    from library.checkpoints.lazy import LazyTensor
    from library.checkpoints.sd_layout import SD1, to_original

    def random_tensor(shape: tuple[int, ...]) -> LazyTensor:
        def load() -> torch.Tensor:
            return torch.randint(-2000, 2000, shape, dtype=torch.int16).to(torch.float16) / 65536

        return LazyTensor(TensorInfo("F16", shape), load)

    parts = {
        part: {name: random_tensor(tuple(tensor.shape)) for name, tensor in module.state_dict().items()}
        for part, module in modules().items()
    }
    return to_original(parts, {}, SD1).tensors


def make_file(path: Path) -> Path:
    """Write the file; one tensor in memory at a time. Returns the path."""
    from library.checkpoints.writer import write_safetensors

    write_safetensors(path, original_tensors())
    return path


if __name__ == "__main__":
    make_file(Path(sys.argv[1]))
