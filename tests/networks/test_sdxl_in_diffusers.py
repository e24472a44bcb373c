"""What diffusers makes of our files for SDXL and its refiner: every key arrives, at the same scale, with one output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from networks.formats.read_write import read_lora, write_lora
from networks.network import Network
from tests import tiny
from tests.networks import models


@pytest.fixture(autouse=True)
def transformers_sees_peft() -> None:
    """A training in this process hides peft while it imports transformers, which remembers that."""
    from transformers.utils import is_peft_available

    is_peft_available.cache_clear()


IDS = {"sdxl": [45.0, 80, 3, 0, 64, 64], "refiner": [45.0, 80, 3, 0, 6]}


def output(family: str, modules: Any) -> list[Tensor]:
    """What the text encoders and the U-Net give; `modules` has them as attributes (a pipeline, a miniature)."""
    ids = (torch.arange(77) * 631 % 49000)[None]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        texts = [getattr(modules, name)(ids, output_hidden_states=True) for name in tiny.text_names(family)]
        states = torch.cat([text.hidden_states[-2] for text in texts], -1)
        told = {"text_embeds": texts[-1].text_embeds, "time_ids": torch.tensor([IDS[family]])}
        image = modules.unet(noise, torch.tensor([500]), states, added_cond_kwargs=told).sample
    return [states, texts[0][0], told["text_embeds"], image]


def miniature(family: str, *, small: bool) -> SimpleNamespace:
    """The modules; `small`: with one transformer block in each attention."""
    made = tiny.diffusers_modules(family)
    parts = {name: getattr(made, name) for name in ("vae", "unet", "text_encoder", "text_encoder_2")}
    return SimpleNamespace(**parts | (models.small(family) if small else {}))


def train(
    family: str, folder: Path, *arguments: str, small: bool = True, only: str = ""
) -> tuple[Path, Network, list[Tensor]]:
    """A file with adapters away from their start, the network, and what the model gives with it."""
    made = miniature(family, small=small)
    model = {name: getattr(made, name) for name in ("unet", *tiny.text_names(family))}
    network = models.create(model, *arguments, family=family, train={only} if only else None)
    models.trained(network, 0.02)
    path = folder / "собака.safetensors"
    network.write(path, None, {"ss_network_dim": "4"})
    network.attach()
    found = output(family, made)
    network.detach()
    return path, network, found


def pipeline(family: str, *, small: bool = True) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

    parts = vars(miniature(family, small=small)) | {"tokenizer": None, "tokenizer_2": None}
    if family == "sdxl":
        return StableDiffusionXLPipeline(**parts, scheduler=EulerDiscreteScheduler())
    return StableDiffusionXLImg2ImgPipeline(**parts, scheduler=EulerDiscreteScheduler(), requires_aesthetics_score=True)


def injected(pipe: Any) -> list[tuple[Tensor, Tensor, float]]:
    """Factors and scale of every layer that diffusers gave an adapter."""
    from peft.tuners.lora import LoraLayer

    found = []
    for module in (pipe.text_encoder, pipe.text_encoder_2, pipe.unet):
        for layer in module.modules() if module is not None else ():
            if isinstance(layer, LoraLayer):
                (key,) = layer.lora_A
                found.append((layer.lora_A[key].weight, layer.lora_B[key].weight, layer.scaling[key]))
    return found


def near(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float = 1e-5) -> bool:
    return all((a - b).abs().max() <= tolerance * b.abs().max() for a, b in zip(ours, theirs, strict=True))


def test_every_key_of_our_file_for_sdxl_is_used(tmp_path: Path, warnings: list[str]) -> None:
    path, network, expected = train("sdxl", tmp_path, "conv_dim=2", "conv_alpha=1", small=False)
    pipe = pipeline("sdxl", small=False)
    assert not near(output("sdxl", pipe), expected, 1e-3)
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    assert warnings == []
    tensors = load_file(path)
    used = injected(pipe)
    assert len(used) == len(network.layers) == len(tensors) / 3 == 36 + 788
    ours = sorted(float(tensor.abs().sum()) for key, tensor in tensors.items() if key.endswith("lora_down.weight"))
    assert sorted(float(down.detach().abs().sum()) for down, _, _ in used) == ours  # each layer's is another
    assert sum(scale == 0.5 for _, _, scale in used) == 38 and {scale for _, _, scale in used} == {0.5, 0.75}
    assert near(output("sdxl", pipe), expected)


@pytest.mark.parametrize("family", tiny.SDXL_FAMILIES)
def test_converted_files_load_too(family: str, tmp_path: Path, warnings: list[str]) -> None:
    """In diffusers' own format, where DoRA has a place, and where the refiner's text encoder has its own name."""
    path, network, expected = train(family, tmp_path, "conv_dim=2", "use_dora=True", "wd_on_output=True")
    lora, _ = read_lora(path, *models.PARTS.values())
    write_lora(tmp_path / "diffusers", lora, "diffusers")
    pipe = pipeline(family)
    pipe.load_lora_weights(tmp_path / "diffusers")
    told = [text for text in warnings if "NoneType" not in text]  # the refiner has no first text encoder
    assert told == [] and len(injected(pipe)) == len(lora.layers) == len(network.layers)
    assert near(output(family, pipe), expected)


def test_of_the_refiner_diffusers_reads_kohyas_names_of_attentions(tmp_path: Path, warnings: list[str]) -> None:
    """Its names are nobody's but ours; ComfyUI knows the text encoder's, diffusers the U-Net's."""
    path, network, expected = train("refiner", tmp_path, only="unet")
    pipe = pipeline("refiner")
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    assert [text for text in warnings if "NoneType" not in text and "text_encoder" not in text] == []
    assert len(injected(pipe)) == len(network.layers)
    assert near(output("refiner", pipe), expected)


def test_diffusers_takes_the_refiners_block_10_for_block_1(tmp_path: Path) -> None:
    """Why a file of the refiner with convolutions has to be converted for it. If this fails, diffusers has learned to
    count to ten: then the page can say so."""
    path, _, _ = train("refiner", tmp_path, "conv_dim=2", only="unet")
    with pytest.raises(KeyError, match="input_blocks_1"):
        pipeline("refiner").load_lora_weights(tmp_path, weight_name=path.name)
