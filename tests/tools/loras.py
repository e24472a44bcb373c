"""LoRA files for the miniature models, and their ΔW, for the tests of the tools."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny
from tests.networks.random_loras import delta

ROOT = Path(__file__).resolve().parents[2]
Tensors = dict[str, Tensor]
BASE = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0", "refiner": "sdxl_refiner_v1-0"}


@cache
def shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Some layers of the miniature by their names in files, each kind of layer there is, with their weights' shapes."""
    modules = tiny.diffusers_modules(family)
    block = "mid_block.attentions.0.transformer_blocks.0"
    unet = [f"{block}.attn1.to_q", f"{block}.attn2.to_v", f"{block}.ff.net.0.proj", "mid_block.attentions.0.proj_in"]
    unet += ["up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0", "down_blocks.0.resnets.0.conv1"]
    unet += ["up_blocks.2.upsamplers.0.conv", "down_blocks.1.resnets.0.conv_shortcut"]
    text = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc2"]
    found = {}
    for name in unet:
        found[f"lora_unet_{name}".replace(".", "_")] = tuple(modules.unet.get_submodule(name).weight.shape)
    for name in text:
        path = f"lora_te_text_model_{name}".replace(".", "_")
        found[path] = tuple(modules.text_encoder.get_submodule(name).weight.shape)
    return found


def tensors(
    family: str, rank: int, alpha: float, seed: int, *, kernels: bool = True, strength: float = 0.05
) -> Tensors:
    """A LoRA of these layers with random numbers."""
    draw = torch.Generator().manual_seed(seed)
    found: Tensors = {}
    for name, shape in shapes(family).items():
        if not kernels and "attentions" not in name and "_te_" not in name:
            continue
        ones = [1] * (len(shape) - 2)
        found[f"{name}.lora_down.weight"] = torch.randn(rank, *shape[1:], generator=draw) * strength
        found[f"{name}.lora_up.weight"] = torch.randn(shape[0], rank, *ones, generator=draw)
        found[f"{name}.alpha"] = torch.tensor(float(alpha))
    return found


def write(path: Path, content: Tensors, family: str = "sd1", **more: str) -> Path:
    """A .safetensors LoRA with the least metadata of kohya's, and `more`."""
    metadata = {"ss_base_model_version": BASE[family], "ss_v2": str(family == "sd2")}
    metadata |= {"ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "2.0"} | more
    save_file(content, path, metadata)
    return path


def read(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of a .safetensors file, by the safetensors library."""
    with safe_open(path, "pt") as file:
        return load_file(path), dict(file.metadata() or {})


def names(content: Mapping[str, Tensor]) -> list[str]:
    """The layers of a file."""
    return sorted({key.partition(".")[0] for key in content})


def deltas(content: Tensors) -> Tensors:
    """ΔW of each layer in float64."""
    return {name: delta(content, name) for name in names(content)}


def run(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    """networks/`script` as a user starts it, from another folder."""
    return subprocess.run(
        [sys.executable, str(ROOT / "networks" / script), *map(str, words)],
        cwd=ROOT.parent, capture_output=True, text=True, encoding="utf-8", check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip


def told(script_main: object, words: Sequence[object]) -> int:
    """A tool's main function with these words."""
    return script_main([str(word) for word in words])  # type: ignore[operator]
