"""Files of full-size models that hold no weights: names and shapes in the header, and a hole in place of the values.
They take no room on the disk, and plans can be made of them.

    python benchmarks/sparse_files.py sd1 sd2 sdxl --folder DIR
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# https://huggingface.co/stabilityai/stable-diffusion-2-1-base, config.json of each part: what differs from SD1's
_SD2_UNET = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
_SD2_TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
_SD1_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
NAMES = ("sd1", "sd2", "sdxl", "refiner")


def write(folder: Path, family: str) -> Path:
    """Write the file of a family in fp16, and return its path."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in _original_shapes(family).items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path = folder / f"{family}.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def _original_shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the original layout."""
    from benchmarks import full_size_xl
    from library.checkpoints import sd_layout
    from library.checkpoints.header import TensorInfo
    from library.checkpoints.lazy import LazyTensor

    def empty(shape: tuple[int, ...]) -> LazyTensor:
        import torch

        return LazyTensor(TensorInfo("F16", shape), lambda: torch.zeros(shape, dtype=torch.float16))

    layouts = {"sd1": sd_layout.SD1, "sd2": sd_layout.SD2, "sdxl": sd_layout.SDXL, "refiner": sd_layout.REFINER}
    modules = full_size_xl.modules(family) if family in full_size_xl.UNETS else _sd_modules(family)
    parts = {
        part: {name: empty(shape) for name, shape in full_size_xl.shapes(part, module).items()}
        for part, module in modules.items()
    }
    tensors = sd_layout.to_original(parts, {}, layouts[family]).tensors
    return {name: tuple(tensor.info.shape) for name, tensor in tensors.items() if isinstance(tensor, LazyTensor)}


def _sd_modules(family: str) -> dict[str, Any]:
    """The modules of Stable Diffusion 1.5 or 2.1, without weights."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from benchmarks.full_size_xl import VAE

    unet = _SD2_UNET if family == "sd2" else {"cross_attention_dim": 768, "attention_head_dim": 8}
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel(sample_size=64, **unet),
            "vae": AutoencoderKL(**VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**(_SD2_TEXT if family == "sd2" else _SD1_TEXT))),
        }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="+", choices=NAMES)
    parser.add_argument("--folder", type=Path, default=Path())
    options = parser.parse_args()
    for family in options.families:
        print(write(options.folder, family))


if __name__ == "__main__":
    main()
