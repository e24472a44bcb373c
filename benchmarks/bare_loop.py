"""A minimal training loop in plain PyTorch, as the baseline for the trainer.

    python benchmarks/bare_loop.py model.safetensors [--rank 8] [--bf16] [--steps 100] [--size 256] [--count]

The arithmetic is the trainer's at batch 1 on the CPU: text encoder, U-Net, mean squared error, backward, gradient
clipping to a norm of 1, fused AdamW, in float32, from given latents. It prints a line for each finished step. There is
no dataset, logging, schedule, accumulation or any other option. The library only reads the file, and tells the C
library to keep freed memory, which matters most.

--rank trains a LoRA of this rank instead of the weights: two matrices for each attention layer of U-Net and text
encoder (arXiv 2106.09685). --bf16: autocast, the weights in bf16, channels last.

--count prints the bytes of weights, gradients, optimizer state and saved tensors (those that autograd keeps for the
backward pass, counted by hooks, without the weights) instead of training.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from library.checkpoints.files import read_header  # noqa: E402
from library.families.registry import load_model  # noqa: E402
from library.runtime.allocator import keep_freed_memory  # noqa: E402


def loss_of(unet: Any, text_encoder: Any, latents: torch.Tensor, ids: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The error of the predicted noise; `kept` is alpha-bar of each timestep."""
    context = text_encoder(ids).last_hidden_state
    timestep = torch.randint(0, 1000, (1,))
    noise = torch.randn_like(latents)
    noisy = kept[timestep].sqrt() * latents + (1 - kept[timestep]).sqrt() * noise
    return F.mse_loss(unet(noisy, timestep, encoder_hidden_states=context, return_dict=False)[0], noise)


def clip(parameters: list[torch.nn.Parameter]) -> None:
    """Scale the gradients to a norm of at most 1: as the trainer does it, and the fastest way that was found.

    torch's norm of a whole tensor runs on one core; that of its rows runs on all.
    """
    rows = [parameter.grad.flatten(1) if parameter.dim() > 1 else parameter.grad for parameter in parameters]
    norm = torch.linalg.vector_norm(torch.cat([torch.linalg.vector_norm(row, dim=-1).flatten() for row in rows]))
    if norm + 1e-6 > 1:
        torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)


def count(unet: Any, text_encoder: Any, parameters: list[torch.nn.Parameter], *inputs: torch.Tensor) -> dict[str, int]:
    """The memory that a step needs, in bytes."""
    whole = [*unet.parameters(), *text_encoder.parameters()]
    weights = {parameter.untyped_storage().data_ptr() for parameter in whole}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(unet, text_encoder, *inputs)
    held = sum(parameter.nbytes for parameter in parameters)
    total = {
        "weights": sum(parameter.nbytes for parameter in whole),
        "gradients": held,
        "optimizer state": 2 * held,
        "saved tensors": sum(saved.values()),
    }
    del loss  # not earlier: another tensor could reuse a freed address
    return total


class Lora(torch.nn.Module):
    """A frozen Linear layer or 1x1 convolution with a LoRA."""

    def __init__(self, layer: Any, rank: int) -> None:
        super().__init__()
        self.layer = layer
        if isinstance(layer, torch.nn.Linear):
            self.down = torch.nn.Linear(layer.in_features, rank, bias=False)
            self.up = torch.nn.Linear(rank, layer.out_features, bias=False)
        else:
            self.down = torch.nn.Conv2d(layer.in_channels, rank, 1, bias=False)
            self.up = torch.nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        torch.nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output plus the LoRA's."""
        return self.layer(x) + self.up(self.down(x)) * 0.125


def add_lora(module: torch.nn.Module, classes: set[str], rank: int) -> list[torch.nn.Parameter]:
    """Freeze a module, add a LoRA to every Linear and 1x1 convolution in modules of these classes, and return the
    trainable parameters."""
    module.requires_grad_(requires_grad=False)
    places = {}
    for container in module.modules():
        for path, layer in container.named_modules() if type(container).__name__ in classes else ():
            is_point = isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (1, 1)
            if isinstance(layer, torch.nn.Linear) or is_point:
                parent, _, name = path.rpartition(".")
                places[layer] = (container.get_submodule(parent), name)
    for layer, (parent, name) in places.items():
        setattr(parent, name, Lora(layer, rank))
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--rank", type=int, default=0, help="rank of a LoRA; 0: train all weights")
    parser.add_argument("--bf16", action="store_true", help="autocast, frozen weights in bf16, channels last")
    options = parser.parse_args()

    keep_freed_memory()
    torch.manual_seed(1)
    model = load_model(read_header(options.file), dtype=torch.float32)
    unet, text_encoder = model.backbone.train(), model.text_encoders["text_encoder"].train()
    del model
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    if options.bf16:
        unet.to(torch.bfloat16, memory_format=torch.channels_last)
        text_encoder.to(torch.bfloat16)
    if options.rank:
        parameters = [
            *add_lora(unet, {"Transformer2DModel"}, options.rank),
            *add_lora(text_encoder, {"CLIPAttention", "CLIPMLP"}, options.rank),
        ]
    side = options.size // 8
    latents, ids = torch.randn(1, 4, side, side), torch.randint(0, 49406, (1, 77))
    kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    if options.count:
        print(json.dumps(count(unet, text_encoder, parameters, latents, ids, kept)))
        return
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    for step in range(1, options.steps + 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            loss = loss_of(unet, text_encoder, latents, ids, kept)
        loss.backward()
        clip(parameters)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(f"step {step}", flush=True)


if __name__ == "__main__":
    main()
