"""Full-size files of Stable Diffusion XL and of its refiner with random weights: fp16, original layout, 6.9 and 6.1 GB.

    python benchmarks/full_size_xl.py sdxl base.safetensors
    python benchmarks/full_size_xl.py refiner refiner.safetensors

Sizes are those of the published models, whose configurations are written out here; names are by the program's own
tables, which benchmarks/proof.py lets diffusers judge. Weights are drawn so that activations stay about as large as
they are: no tensor of them is alike another, nor is any zero.
"""

from __future__ import annotations

import argparse
import math
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    import torch

    from library.checkpoints.lazy import LazyTensor

# https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0 and stable-diffusion-xl-refiner-1.0, config.json of
# each part: what differs from the defaults of the classes
_UNET = {
    "sample_size": 128,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
}
UNETS: dict[str, dict[str, Any]] = {
    "sdxl": _UNET
    | {
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "projection_class_embeddings_input_dim": 1280 + 6 * 256,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "refiner": _UNET
    | {
        "block_out_channels": (384, 768, 1536, 1536),
        "attention_head_dim": (6, 12, 24, 24),
        "transformer_layers_per_block": 4,
        "cross_attention_dim": 1280,
        "projection_class_embeddings_input_dim": 1280 + 5 * 256,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
TEXTS: dict[str, dict[str, Any]] = {
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
    },
    "text_encoder_2": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
}


def modules(family: str) -> dict[str, Any]:
    """The published model's modules by the names of a diffusers folder, without weights."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        made: dict[str, Any] = {"unet": UNet2DConditionModel(**UNETS[family]), "vae": AutoencoderKL(**VAE)}
        if family == "sdxl":
            made["text_encoder"] = CLIPTextModel(CLIPTextConfig(**TEXTS["text_encoder"]))
        made["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**TEXTS["text_encoder_2"]))
    return made


def shapes(part: str, module: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of a module's tensors by the names that files give them: `text_model.` first in any text encoder."""
    level = "text_model." if part == "text_encoder" else ""
    return {level + name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def make_file(path: Path, family: str, seed: int = 1) -> None:
    """Write all tensors of the "sdxl" or "refiner" with random values; one tensor in memory at a time."""
    from library.checkpoints.writer import write_safetensors

    write_safetensors(path, original_tensors(family, seed))


def original_tensors(family: str, seed: int = 1) -> dict[str, LazyTensor]:
    """The file's tensors, generated on access; a tensor's values depend only on its name and the seed."""
    import torch

    from library.checkpoints import sd_layout
    from library.checkpoints.lazy import LazyTensor

    layout = {"sdxl": sd_layout.SDXL, "refiner": sd_layout.REFINER}[family]
    parts = {
        part: {name: random_tensor(shape, f"{seed} {part}/{name}") for name, shape in shapes(part, module).items()}
        for part, module in modules(family).items()
    }
    first, second = "conditioner.embedders.0.", "conditioner.embedders.1."
    kept = {f"{second if family == 'sdxl' else first}model.logit_scale": LazyTensor.of(torch.tensor(4.6052).half())}
    if family == "sdxl":
        kept[f"{first}transformer.text_model.embeddings.position_ids"] = LazyTensor.of(torch.arange(77)[None])
    return sd_layout.to_original(parts, kept, layout).tensors


def random_tensor(shape: tuple[int, ...], name: str) -> LazyTensor:
    """Normal values in fp16. Matrices and kernels keep the variance of what they are multiplied with; scales of norms
    are near one."""
    from library.checkpoints.header import TensorInfo
    from library.checkpoints.lazy import LazyTensor

    deviation, mean = 0.02, 0.0
    if len(shape) > 1 and "embeddings." not in name:
        deviation = 1 / math.sqrt(math.prod(shape[1:]))
    elif len(shape) == 1 and name.endswith(".weight"):
        deviation, mean = 0.1, 1.0

    def load() -> torch.Tensor:
        import torch

        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.randn(shape, generator=generator).mul_(deviation).add_(mean).half()

    return LazyTensor(TensorInfo("F16", shape), load)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=sorted(UNETS))
    parser.add_argument("path", type=Path)
    options = parser.parse_args()
    make_file(options.path, options.family)


if __name__ == "__main__":
    main()
