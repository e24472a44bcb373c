"""Memory of a step on the pretend device with and without what happens block by block: off, on, ratio.

    python -m tests.training.blocks.measure

A U-Net of Stable Diffusion 1.5 at half its width, random weights in float32, batch 1, latents of 32 x 32, with
something small that is trained in each transformer block. Bytes are counted, so nothing that runs beside changes them;
seconds are those of this process, where copies are copies in main memory.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from library.messages import readable_bytes
from library.training.blocks.checkpoints import build_checkpoints, checkpoint_activations
from library.training.blocks.place import place
from library.training.blocks.plan import BlocksPlan, block_sizes, choose_swapped
from tests.pretend_device.device import Device, available
from tests.training.blocks.test_swap import UNET_BLOCKS, adapted

ROWS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "blocks_to_swap 19": {"swap": 19},
    "blocks_to_swap 38": {"swap": 38},
    "gradient_checkpointing": {"policy": "all"},
    "policy attention": {"policy": "attention"},
    "policy half": {"policy": "half"},
    "cpu_offload_checkpointing": {"policy": "all", "to_host": True},
    "checkpointing, blocks_to_swap 38": {"policy": "all", "swap": 38},
    "all three": {"policy": "all", "to_host": True, "swap": 38},
}


def unet() -> Any:
    torch.manual_seed(0)
    make: Any = UNet2DConditionModel
    model = make(block_out_channels=(160, 320, 640, 640), cross_attention_dim=768, attention_head_dim=8)
    return model.requires_grad_(requires_grad=False)


def step(model: Any, there: torch.device) -> None:
    noisy, states = torch.randn(1, 4, 32, 32).to(there), torch.randn(1, 77, 768).to(there)
    output = model(noisy, torch.tensor([500]).to(there), encoder_hidden_states=states, return_dict=False)[0]
    output.square().mean().backward()


def measured(device: Device, swap: int = 0, policy: str = "", *, to_host: bool = False) -> tuple[int, float]:
    """Bytes at the peak of the second step, and its seconds."""
    there = torch.device("pretend")
    model = unet()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    sizes = block_sizes(shapes, UNET_BLOCKS)
    plan = BlocksPlan("U-Net", sizes, choose_swapped(sizes, swap), policy=policy, to_host=to_host)
    trained = adapted(model)
    if policy:
        checkpoint_activations(model.train(), build_checkpoints(plan, model, there))
    place(model, plan, there, print)
    for parameter in trained:
        parameter.data = parameter.data.to(there)
    for _ in range(2):
        gc.collect()
        device.reset_peak()
        began = time.perf_counter()
        step(model, there)
    return device.peak, time.perf_counter() - began


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("| | peak | of it | seconds, ratio |\n|---|---|---|---|")
    first: tuple[int, float] | None = None
    try:
        with available() as device:
            for name, chosen in ROWS.items():
                peak, seconds = measured(device, **chosen)
                first = first or (peak, seconds)
                print(
                    f"| {name} | {readable_bytes(peak)} | {peak / first[0]:.2f} | {seconds / first[1]:.2f} |",
                    flush=True,
                )
    except pytest.skip.Exception as reason:
        print(reason)


if __name__ == "__main__":
    main()
