"""What diffusers makes of our files: every key arrives where ours works, at the same scale, and gives the same output.

Ours are written by networks/network.py; diffusers' StableDiffusionPipeline.load_lora_weights is the judge.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.families.sd.sd_adapters import SD_ADAPTERS
from networks.formats.read_write import read_lora, write_lora
from networks.network import Network, create
from networks.settings import read_settings
from tests import tiny


@pytest.fixture(autouse=True)
def transformers_sees_peft() -> None:
    """A training in this process hides peft while it imports transformers, which remembers that."""
    from transformers.utils import is_peft_available

    is_peft_available.cache_clear()


LINEAR = ()
CONV = ("conv_dim=2", "conv_alpha=1")


@dataclass
class Ours:
    """A file with adapters away from their start, and what the model gives with them."""

    path: Path
    model: dict[str, Any]
    network: Network
    output: tuple[Tensor, Tensor]


def output(text_encoder: Any, unet: Any) -> tuple[Tensor, Tensor]:
    ids = (torch.arange(77) * 631 % 49000)[None]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        states = text_encoder(ids)[0]
        return states, unet(noise, torch.tensor([500]), states).sample


def train(family: str, folder: Path, arguments: tuple[str, ...], dtype: torch.dtype | None = None) -> Ours:
    made = tiny.diffusers_modules(family)
    model = {"unet": made.unet, "text_encoder": made.text_encoder}
    settings, mistakes = read_settings("networks.lora", dim=4, alpha=3.0, arguments=arguments)
    assert not mistakes
    network = create(model, SD_ADAPTERS, settings, generator=torch.Generator().manual_seed(1))
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += torch.randn(parameter.shape, generator=draw) * 0.02
            parameter.copy_(parameter.to(dtype or torch.float32))  # what the file can hold
    path = folder / "собака.safetensors"
    network.write(path, dtype, {"ss_network_dim": "4"})
    network.attach()
    found = output(model["text_encoder"], model["unet"])
    network.detach()
    return Ours(path, model, network, found)


def pipeline(family: str) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    made = tiny.diffusers_modules(family)
    return StableDiffusionPipeline(
        vae=made.vae,
        text_encoder=made.text_encoder,
        tokenizer=None,
        unet=made.unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def injected(pipe: Any) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Name in our files -> factors and scale of every layer that diffusers gave an adapter."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for prefix, module in (("lora_te_text_model_", pipe.text_encoder), ("lora_unet_", pipe.unet)):
        for path, layer in module.named_modules():
            if isinstance(layer, LoraLayer):
                name = prefix + path.replace(".", "_")
                (key,) = layer.lora_A
                found[name] = (layer.lora_A[key].weight, layer.lora_B[key].weight, layer.scaling[key])
    return found


def near(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], tolerance: float = 1e-5) -> bool:
    return all((a - b).abs().max() <= tolerance * b.abs().max() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("arguments", [LINEAR, CONV], ids=["linear", "conv"])
def test_every_key_of_our_file_is_used(
    family: str, arguments: tuple[str, ...], tmp_path: Path, warnings: list[str]
) -> None:
    ours = train(family, tmp_path, arguments)
    pipe = pipeline(family)
    assert not near(output(pipe.text_encoder, pipe.unet), ours.output, 1e-3)
    pipe.load_lora_weights(tmp_path, weight_name=ours.path.name)
    assert warnings == []
    tensors = load_file(ours.path)
    used = injected(pipe)
    unused = {key for key in tensors if key.partition(".")[0] not in used}
    assert not unused and len(used) == len(tensors) / 3
    for name, (down, up, scale) in used.items():
        assert torch.equal(down, tensors[f"{name}.lora_down.weight"])
        assert torch.equal(up, tensors[f"{name}.lora_up.weight"])
        assert scale == float(tensors[f"{name}.alpha"]) / len(down) != 1.0
    assert near(output(pipe.text_encoder, pipe.unet), ours.output)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_in_half_precision(dtype: torch.dtype, tmp_path: Path, warnings: list[str]) -> None:
    ours = train("sd1", tmp_path, CONV, dtype)
    assert {tensor.dtype for tensor in load_file(ours.path).values()} == {dtype}
    pipe = pipeline("sd1")
    pipe.load_lora_weights(tmp_path, weight_name=ours.path.name)
    assert warnings == []
    for module in (pipe.text_encoder, pipe.unet):
        torch.nn.Module.float(module)
    assert near(output(pipe.text_encoder, pipe.unet), ours.output)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("arguments", [CONV, (*CONV, "use_dora=True", "wd_on_output=True")], ids=["lora", "dora"])
def test_converted_files_load_too(family: str, arguments: tuple[str, ...], tmp_path: Path, warnings: list[str]) -> None:
    """In diffusers' own format, where DoRA has a place: of kohya's files diffusers leaves its lengths out."""
    ours = train(family, tmp_path, arguments)
    lora, _ = read_lora(ours.path, SD_ADAPTERS)
    write_lora(tmp_path / "diffusers", lora, "diffusers")
    pipe = pipeline(family)
    pipe.load_lora_weights(tmp_path / "diffusers")
    assert warnings == [] and len(injected(pipe)) == len(lora.layers) == len(ours.network.layers)
    assert near(output(pipe.text_encoder, pipe.unet), ours.output)


def test_diffusers_leaves_doras_lengths_out_of_kohyas_files_and_says_so(tmp_path: Path, warnings: list[str]) -> None:
    """Why DoRA has to be converted for it. If this fails, diffusers has learned it: then the page can say so."""
    ours = train("sd1", tmp_path, ("use_dora=True",))
    pipe = pipeline("sd1")
    pipe.load_lora_weights(tmp_path, weight_name=ours.path.name)
    assert any("DoRA checkpoint" in told for told in warnings)
    assert not near(output(pipe.text_encoder, pipe.unet), ours.output, 1e-3)


def test_blocks_with_alphas_of_their_own_need_diffusers_own_format(tmp_path: Path, warnings: list[str]) -> None:
    """Of kohya's files diffusers 0.42 reads the alphas of attentions only if they are all alike."""
    alphas = ",".join(str(1 + index % 3) for index in range(25))
    ours = train("sd1", tmp_path, (f"block_dims={','.join('4' * 25)}", f"block_alphas={alphas}"))
    lora, _ = read_lora(ours.path, SD_ADAPTERS)
    write_lora(tmp_path / "diffusers", lora, "diffusers")
    pipe = pipeline("sd1")
    pipe.load_lora_weights(tmp_path / "diffusers")
    scales = {name: scale for name, (_, _, scale) in injected(pipe).items()}
    assert scales == {layer.place.name: layer.alpha / layer.rank for layer in lora.layers}
    assert len(set(scales.values())) == 3 and warnings == []
    assert near(output(pipe.text_encoder, pipe.unet), ours.output, 1e-4)


def test_peft_reads_the_folders_and_its_own_come_back(tmp_path: Path) -> None:
    from peft import PeftModel

    ours = train("sd1", tmp_path, (*CONV, "use_dora=True", "wd_on_output=True"))
    lora, _ = read_lora(ours.path, SD_ADAPTERS)
    write_lora(tmp_path / "peft", lora, "peft")
    made = tiny.diffusers_modules("sd1")
    text_encoder = PeftModel.from_pretrained(made.text_encoder, str(tmp_path / "peft" / "text_encoder"))
    unet = PeftModel.from_pretrained(made.unet, str(tmp_path / "peft" / "unet"))
    assert near(output(text_encoder, unet), ours.output)

    text_encoder.save_pretrained(tmp_path / "again" / "text_encoder")
    unet.save_pretrained(tmp_path / "again" / "unet")
    again, found = read_lora(tmp_path / "again", SD_ADAPTERS)
    write_lora(tmp_path / "again.safetensors", again, "kohya")
    first, second = load_file(ours.path), load_file(tmp_path / "again.safetensors")
    assert found == "peft" and first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_what_diffusers_saves_is_read(tmp_path: Path) -> None:
    """A LoRA made and saved by diffusers itself, with alphas, comes out as diffusers computes it."""
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict

    from networks.network import from_tensors

    made = tiny.diffusers_modules("sd1")
    torch.manual_seed(0)
    made.unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_out.0", "conv1"]))
    made.text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=1, target_modules=["q_proj", "fc2"]))
    with torch.no_grad():
        for module in (made.unet, made.text_encoder):
            for name, parameter in module.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.02)
    modules = {"unet": made.unet, "text_encoder": made.text_encoder}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "saved",
        unet_lora_layers=get_peft_model_state_dict(made.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(made.text_encoder),
        **_collate_lora_metadata(modules),
    )
    lora, found = read_lora(tmp_path / "saved", SD_ADAPTERS)
    write_lora(tmp_path / "a.safetensors", lora, "kohya")
    plain = tiny.diffusers_modules("sd1")
    network = from_tensors(
        {"unet": plain.unet, "text_encoder": plain.text_encoder}, SD_ADAPTERS, load_file(tmp_path / "a.safetensors")
    )
    network.attach()
    assert found == "diffusers"
    assert near(output(plain.text_encoder, plain.unet), output(made.text_encoder, made.unet))
