"""ComfyUI and A1111 make of our files what we make of them: every key is read, and their formulas give our merge.

The rules of both programs are written out in webui_rules.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from torch import nn

from networks import network
from networks.readers import readers
from networks.settings import NetworkSettings, read_settings
from tests import tiny
from tests.networks import models
from tests.networks.webui_rules import Array, Arrays, Program, held_by, read

KINDS: dict[str, tuple[str, ...]] = {  # module and arguments
    "lora": ("lora", "conv_dim=3"),
    "lora rslora": ("lora", "use_rslora=True", "conv_dim=3"),
    "lora pissa": ("lora", "init=pissa"),
    "lora dora": ("lora", "use_dora=True", "conv_dim=3"),
    "dylora": ("dylora", "unit=2", "conv_dim=4"),
    "loha": ("loha", "conv_dim=2"),
    "loha tucker": ("loha", "conv_dim=2", "use_tucker=True"),
    "loha dora": ("loha", "conv_dim=2", "use_dora=True"),
    "lokr": ("lokr", "conv_dim=2", "factor=4"),
    "lokr both, tucker": ("lokr", "conv_dim=1", "decompose_both=True", "use_tucker=True"),
    "lokr full": ("lokr", "full_matrix=True"),
    "lokr dora": ("lokr", "use_dora=True", "conv_dim=2"),
    "oft": ("oft", "enable_all_linear=True", "enable_conv=True"),
    "oft held": ("oft",),  # whose constraint is reached
    "ia3": ("ia3",),
}
PROGRAMS: tuple[Program, ...] = ("ComfyUI", "A1111")


def settings(kind: str, family: str) -> NetworkSettings:
    module, *arguments = KINDS[kind]
    blocks = max(part.blocks for part in models.PARTS[family])
    alpha = 1e-5 if kind == "oft held" else 3
    found, mistakes = read_settings(f"networks.{module}", dim=4, alpha=alpha, arguments=arguments, blocks=blocks)
    assert not mistakes
    return found


@cache
def base_model(family: str) -> tiny.TinyModules:
    """The family in miniature, in double precision. Not to be changed."""
    made = tiny.diffusers_modules(family)
    for module in (made.unet, *made.text_encoders.values()):
        module.double().requires_grad_(requires_grad=False)
    return made


def modules(base: tiny.TinyModules) -> dict[str, nn.Module]:
    return {"unet": base.unet, **base.text_encoders}


def trained(family: str, wanted: NetworkSettings) -> dict[str, torch.Tensor]:
    """The file of a network away from its start."""
    made = network.create(
        modules(base_model(family)), models.PARTS[family], wanted, generator=torch.Generator().manual_seed(1)
    )
    return models.trained(made, 0.1).tensors(torch.float32)


@cache
def copy_of_model(family: str) -> tiny.TinyModules:
    return copy.deepcopy(base_model(family))


def merged(program: Program, family: str, file: dict[str, torch.Tensor], ratio: float = 1.0) -> dict[str, Array]:
    """What we make of a file, under the program's names; until the next call."""
    twin = copy_of_model(family)  # whose weights alone a merge changes
    for name, module in modules(twin).items():
        module.load_state_dict(modules(base_model(family))[name].state_dict())
    network.from_tensors(modules(twin), models.PARTS[family], file).merge(ratio)
    return held_by(program, family, twin)


def layers_of(tensors: Iterable[str]) -> set[str]:
    return {key.partition(".")[0] for key in tensors}


def is_unknown(program: Program, family: str, weight: str) -> bool:
    """Weights that a program has no names for: in A1111 those of the refiner's text encoder."""
    return program == "A1111" and family == "refiner" and weight.startswith("0.")


def is_left(program: Program, kind: str, weight: str) -> bool:
    """Weights that a program leaves unchanged although it reads the file. (IA)³ changes only keys and values: A1111
    changes the attention of OpenCLIP's text encoders as a whole or not at all."""
    return program == "A1111" and kind == "ia3" and "attn.in_proj" in weight


def compare(before: Arrays, theirs: Arrays, ours: Arrays, left: Callable[[str], bool]) -> int:
    """Compares all weights that we changed; returns their number."""
    changes = {key: float(np.linalg.norm(ours[key] - value)) for key, value in before.items()}
    compared = {key: change for key, change in changes.items() if change and not left(key)}
    for key in before.keys() - compared.keys():
        assert np.array_equal(theirs[key], before[key]), key
    for key, change in compared.items():
        assert np.linalg.norm(theirs[key] - ours[key]) <= 1e-5 * change, key
    return len(compared)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_they_read_every_kind(program: Program, kind: str) -> None:
    wanted = settings(kind, "sd1")
    file, before = trained("sd1", wanted), held_by(program, "sd1", base_model("sd1"))
    reading = read(program, "sd1", before, file)
    if program not in readers(wanted):
        assert reading.unread == file.keys()
        return
    assert not reading.unread
    count = compare(before, reading.weights, merged(program, "sd1", file), lambda key: is_left(program, kind, key))
    assert count == len(layers_of(file))
    # as docs/adapters.md says of strengths
    half = read(program, "sd1", before, file, 0.5).weights
    ours = merged(program, "sd1", file, 0.25 if program == "ComfyUI" and kind.startswith("oft") else 0.5)
    compare(before, half, ours, lambda key: is_left(program, kind, key))


@pytest.mark.parametrize("family", [name for name in tiny.ALL if name != "sd1"])
def test_they_read_every_family(family: str) -> None:
    """One file with a kind on each layer, in turn."""
    kinds = [kind for kind in KINDS if kind != "ia3"]  # which has no place in attentions of OpenCLIP in A1111
    files = {kind: trained(family, settings(kind, family)) for kind in kinds}
    layers = sorted(layers_of(files["lora"]))
    chosen = {}
    for index, layer in enumerate(layers):
        turn = [kinds[(index + step) % len(kinds)] for step in range(len(kinds))]
        chosen[layer] = next(kind for kind in turn if layer in layers_of(files[kind]))
    file = {key: value for kind in kinds for key, value in files[kind].items() if chosen[key.partition(".")[0]] == kind}
    assert set(chosen.values()) == set(kinds) and layers_of(file) == set(layers)
    for program in PROGRAMS:
        before = held_by(program, family, base_model(family))
        reading = read(program, family, before, file)
        assert layers_of(reading.unread) == {
            layer for layer in layers if program == "A1111" and family == "refiner" and layer.startswith("lora_te_")
        }
        compare(before, reading.weights, merged(program, family, file), partial(is_unknown, program, family))


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_dora_per_output_is_read_otherwise(program: Program) -> None:
    """Why ours are per input, and what the plan says of wd_on_output."""
    wanted = replace(settings("lora dora", "sd1"), wd_on_output=True)
    file, before = trained("sd1", wanted), held_by(program, "sd1", base_model("sd1"))
    ours, theirs = merged(program, "sd1", file), read(program, "sd1", before, file)
    assert not theirs.unread and program not in readers(wanted)
    wrong = sum(float(np.linalg.norm(ours[key] - theirs.weights[key])) ** 2 for key in before)
    whole = sum(float(np.linalg.norm(ours[key] - before[key])) ** 2 for key in before)
    assert wrong > 0.1**2 * whole
