"""A network is planned as it is made: the same layers, the same tensors, from the shapes in a checkpoint's header."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.families.registry import open_model
from networks import network, shapes
from networks.planned import layers_of_file, plan_layers, rank_in_file, why_not_for
from networks.settings import read_settings
from tests import tiny
from tests.networks import models

BLOCKS = ",".join(["2"] * 12 + ["0"] + ["4"] * 12)
KINDS = {
    "lora": ("networks.lora", []),
    "locon": ("networks.lora", ["conv_dim=2"]),
    "dora": ("networks.lora", ["use_dora=True", "conv_dim=2"]),
    "dora by output": ("networks.lora", ["use_dora=True", "wd_on_output=True"]),
    "blocks": ("networks.lora", [f"block_dims={BLOCKS}"]),
    "rates": ("networks.lora", ["down_lr_weight=0,0,0,0,0,0,1,1,1,1,1,1"]),
    "lora_fa": ("networks.lora_fa", ["conv_dim=2"]),
    "dylora": ("networks.dylora", ["conv_dim=4", "unit=2"]),
    "oft": ("networks.oft", []),
    "oft all": ("networks.oft", ["enable_all_linear=True", "enable_conv=True"]),
    "loha": ("networks.loha", ["conv_dim=2"]),
    "loha tucker": ("networks.loha", ["conv_dim=2", "use_tucker=True"]),
    "lokr": ("networks.lokr", ["conv_dim=1", "factor=8"]),
    "lokr both": ("networks.lokr", ["conv_dim=1", "decompose_both=True", "factor=16"]),
    "lokr whole": ("networks.lokr", ["full_matrix=True", "unbalanced_factorization=True", "conv_dim=1"]),
    "lokr tucker": ("networks.lokr", ["use_tucker=True", "conv_dim=1"]),
    "ia3": ("networks.ia3", []),
    "ia3 all": ("networks.ia3", ["enable_all=True", "train_on_input=True"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_planned_as_it_is_made(kind: str, tmp_path: Path) -> None:
    header, family = open_model(str(tiny.write_single_file(tmp_path / "sd1.safetensors", "sd1")))
    module, arguments = KINDS[kind]
    settings, mistakes = read_settings(module, dim=4, alpha=1, arguments=arguments)
    assert not mistakes
    made = network.create(models.tiny(), models.PARTS["sd1"], settings)
    planned = plan_layers(family.adapters, family.sizes(header).shapes, settings, {"unet", "text_encoder"})
    tensors = {f"{one.layer.name}.{name}": shape for one in planned for name, shape in one.tensors.items()}
    assert tensors == {name: tuple(value.shape) for name, value in made.tensors().items()}
    trained = sum(parameter.numel() for parameter in made.parameters() if parameter.requires_grad)
    assert sum(one.trained(settings) for one in planned) == trained
    assert sum(one.saved for one in planned) == sum(value.numel() for value in made.tensors().values())


@pytest.mark.parametrize("convolutions", [False, True])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "refiner"])
def test_names_in_paths_select_the_layers_that_classes_do(family: str, convolutions: bool) -> None:
    """On the published sizes, whose numbers of layers docs/adapters.md lists."""
    model = models.full_size(family)
    parts = models.PARTS[family]
    settings, _ = read_settings("networks.lora", dim=4, arguments=["conv_dim=2"] if convolutions else [])
    shapes = {name: {key: tuple(value.shape) for key, value in module.state_dict().items()}
              for name, module in model.items()}  # fmt: skip
    planned = plan_layers(parts, shapes, settings, model.keys())
    counts = {"sd1": (264, 350), "sd2": (330, 416), "sdxl": (986, 1052), "refiner": (654, 740)}
    assert len(planned) == counts[family][convolutions]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("ia3")])
def test_the_size_of_a_weight_is_read_from_every_kind(kind: str, tmp_path: Path) -> None:
    """A file is for the model that it was made of, and for none of other sizes. (IA)³'s factors do not say which side
    of a weight they scale."""
    header, family = open_model(str(tiny.write_single_file(tmp_path / "sd1.safetensors", "sd1")))
    module, arguments = KINDS[kind]
    settings, _ = read_settings(module, dim=4, alpha=1, arguments=arguments)
    model = family.sizes(header).shapes
    planned = plan_layers(family.adapters, model, settings, {"unet", "text_encoder"})
    tensors = {f"{one.layer.name}.{name}": shape for one in planned for name, shape in one.tensors.items()}
    assert why_not_for(tensors, family.adapters, model, family.title) is None
    other = {name: {key: (shape[0] + 8, *shape[1:]) for key, shape in shapes.items() if shape}
             for name, shapes in model.items()}  # fmt: skip
    said = why_not_for(tensors, family.adapters, other, family.title)
    assert said is not None and f"is for a model of other sizes, in {len(planned)} layer" in said
    if kind.startswith("oft"):
        return  # rotates the outputs, whatever the inputs
    other = {name: {key: (shape[0], *(2 * length for length in shape[1:])) for key, shape in shapes.items() if shape}
             for name, shapes in model.items()}  # fmt: skip
    said = why_not_for(tensors, family.adapters, other, family.title)
    assert said is not None and f"in {len(planned)} layer" in said


@pytest.mark.parametrize(
    ("tensors", "size"),
    [  # the shapes of LyCORIS 3.4 and kohya for a 3x3 convolution of 32 -> 64 channels
        ({"lora_down.weight": (4, 32, 3, 3), "lora_up.weight": (64, 4, 1, 1)}, (64, 288)),
        ({"lora_down.weight": (4, 32, 1, 1), "lora_mid.weight": (4, 4, 3, 3), "lora_up.weight": (64, 4, 1, 1)},
         (64, 288)),
        ({"diff": (64, 32, 3, 3)}, (64, 288)),
        ({"oft_blocks": (3, 8, 8, 8)}, (64, None)),  # BOFT: three factors of eight blocks
        ({"lora_down.weight": (4, 32, 3, 3)}, (None, None)),
        ({"weight": (32,), "on_input": ()}, (None, None)),
    ],
)  # fmt: skip
def test_the_size_of_a_weight(tensors: dict[str, tuple[int, ...]], size: tuple[int | None, int | None]) -> None:
    assert shapes.weight_size(tensors) == size


def test_what_a_file_holds_is_read_from_its_header() -> None:
    tensors = {
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 1280, 1, 1),
        "unet.mid_block.attentions.0.proj_out.lora_A.weight": (8, 1280, 1, 1),
        "lora_unet_nowhere.lora_up.weight": (3, 2),
        "bundle_emb.dog.string_to_param.*": (2, 768),  # OneTrainer's, of no layer
    }
    found, unknown = layers_of_file(tensors, models.PARTS["sd1"])
    assert unknown == ["lora_unet_nowhere"]
    ranks = {name: rank_in_file(tensors) for name, (_, tensors) in found.items()}
    assert ranks == {
        "lora_unet_mid_block_attentions_0_proj_in": 4,
        "lora_unet_mid_block_attentions_0_proj_out": 8,
    }
