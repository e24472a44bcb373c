"""The tensors expected of a module are those that diffusers' and transformers' own classes have, in full size."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from library.checkpoints.files import read_header
from library.checkpoints.header import CheckpointError, Header
from library.families.registry import FAMILIES, detect
from library.families.sd import expected_tensors
from tests import tiny
from tests.families.sd.test_configs import full_size


@pytest.mark.parametrize("family", tiny.ALL)
def test_they_are_the_modules_own(family: str) -> None:
    (known,) = (each for each in FAMILIES if each.name == family)
    modules = full_size(family)
    expected = {
        "unet": expected_tensors.unet_tensors(modules["unet"].config),
        "vae": expected_tensors.vae_tensors(modules["vae"].config),
    }
    for text in known.variant.texts:
        tensors = expected_tensors.text_tensors(modules[text.name].config.to_dict(), projects=text.projects)
        expected[text.name] = {text.module_name(name): shape for name, shape in tensors.items()}
    for part, module in modules.items():
        assert expected[part] == {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def without(header: Header, pattern: str) -> Header:
    tensors = {name: info for name, info in header.tensors.items() if not re.search(pattern, name)}
    assert len(tensors) < len(header.tensors)
    return replace(header, tensors=tensors)


# what Segmind left out of SDXL (huggingface.co/segmind/SSD-1B and Segmind-Vega, unet/config.json): blocks of the
# two levels with attention, the middle's attention, or the whole middle
@pytest.mark.parametrize(
    "left_out",
    [r"input_blocks\.[78]\.1\.transformer_blocks\.[4-9]\.", r"middle_block\.[12]\.", r"middle_block\."],
)
def test_a_distilled_model_is_named_before_it_is_loaded(files: dict[str, Path], left_out: str) -> None:
    header = without(read_header(files["sdxl"]), left_out)
    family = detect(header)
    assert family.name == "sdxl"
    with pytest.raises(CheckpointError, match="U-Net (lacks|has unexpected) tensors.*SSD-1B and Segmind Vega"):
        family.sizes(header)


@pytest.mark.parametrize("family", tiny.ALL)
@pytest.mark.parametrize("part", ["unet", "vae", "text"])
def test_a_single_tensor_is_missed_before_the_model_is_loaded(files: dict[str, Path], family: str, part: str) -> None:
    ending = {"unet": "out_layers.0.bias", "vae": "mid.block_2.norm1.bias", "text": "0.ln_1.bias|0.layer_norm1.bias"}
    header = read_header(files[family])
    name = next(name for name in reversed(header.tensors) if re.search(rf"(?:{ending[part]})$", name))
    with pytest.raises(CheckpointError, match=r"lacks tensors: \S+\. The file is incomplete or of another kind\.$"):
        detect(header).sizes(without(header, re.escape(name) + "$"))
