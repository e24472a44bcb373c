"""A full-size SD1.5 checkpoint with random weights for the benchmarks: fp16, original layout, 2.1 GB.

`python benchmarks/full_size.py model.safetensors` writes one to keep, so that each of them need not make its own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def make_file(path: Path) -> Path:
    """Write SD1.5's 1130 tensors with random values, fp16, original layout; one tensor in memory at a time. Returns the
    path."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from library.checkpoints.header import TensorInfo
    from library.checkpoints.lazy import LazyTensor
    from library.checkpoints.sd_layout import SD1, to_original
    from library.checkpoints.writer import write_safetensors

    with torch.device("meta"):
        modules: dict[str, Any] = {
            "unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=4,
            ),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
            ),
        }

    def random_tensor(shape: tuple[int, ...]) -> LazyTensor:
        def load() -> torch.Tensor:
            return torch.randint(-2000, 2000, shape, dtype=torch.int16).to(torch.float16) / 65536

        return LazyTensor(TensorInfo("F16", shape), load)

    parts = {
        part: {name: random_tensor(tuple(tensor.shape)) for name, tensor in module.state_dict().items()}
        for part, module in modules.items()
    }
    write_safetensors(path, to_original(parts, {}, SD1).tensors)
    return path


if __name__ == "__main__":
    make_file(Path(sys.argv[1]))
