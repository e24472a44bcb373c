"""Which weights are quantised, and what is refused before any is read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from library.options.mistakes import UserError
from library.options.parse import ADAPTERS, DREAMBOOTH, Parsed, parse
from library.runtime.device import Machine
from library.training.plan.plan import Plan, decide
from library.training.plan.text import describe
from library.training.quantised import plan as quantised_plan
from tests import tiny
from tests.training.running import World, make_world

LORA = {"network_module": "networks.lora", "network_dim": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_world(tmp_path_factory.mktemp("world"))
    tiny.write_single_file(made.root / "sdxl.safetensors", "sdxl")
    return made


def parsed(world: World, **flags: object) -> Parsed:
    return parse(world.arguments(world.root / "out", **LORA, **flags), ADAPTERS)


def planned(world: World, **flags: object) -> Plan:
    return decide(parsed(world, **flags))


def refusals(world: World, **flags: object) -> str:
    with pytest.raises(UserError) as caught:
        planned(world, **flags)
    return "\n".join(f"{mistake.what} {mistake.remedy}" for mistake in caught.value.mistakes)


def formats(plan: Plan) -> dict[str, str]:
    found = plan.facts.quantisation
    return {} if found is None else {name: module.format.title for name, module in found.modules.items()}


def test_norms_first_and_last_layers_and_timesteps_are_left_alone(world: World) -> None:
    plan = planned(world, base_model_precision="int8", text_encoder_1_precision="nf4")
    assert plan.facts.quantisation is not None
    unet, text = (plan.facts.quantisation.modules[name] for name in ("unet", "text_encoder"))
    shapes = plan.facts.base_model.sizes.shapes
    left = {name for name in shapes["unet"] if name.endswith(".weight")} - set(unet.weights)
    assert {name.split(".")[0] for name in left if "norm" not in name} == {"conv_in", "conv_out", "time_embedding"}
    assert not any(re.search(r"norm|bias", name) for name in unet.weights)
    assert {"attn1", "attn2", "ff", "resnets", "proj_in"} <= {part for name in unet.weights for part in name.split(".")}
    assert {name.split(".")[-2] for name in text.weights} == {*("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")}


def test_what_the_plan_says_is_saved_and_left(world: World) -> None:
    """int8: a byte per value and four per row, instead of four bytes per value."""
    full, small = planned(world), planned(world, base_model_precision="int8")
    assert full.facts.quantisation is None and small.facts.quantisation is not None
    weights = small.facts.quantisation.modules["unet"].weights
    values = sum(shape[0] * shape[1] * (shape[2] * shape[3] if len(shape) > 2 else 1) for shape in weights.values())
    saved = 3 * values - 4 * sum(shape[0] for shape in weights.values())
    assert full.costs.weights - small.costs.weights == saved
    half = planned(world, base_precision="fp16")
    both = planned(world, base_precision="fp16", base_model_precision="int8")
    assert half.costs.weights - both.costs.weights == saved - 2 * values
    text = describe(small)
    assert re.search(
        r"U-Net quantised to int8 \(optimum-quanto\): \d+ weights in .* instead of .* left as they are", text
    )
    assert "quantised" not in describe(full)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, {}),
        ({"base_model_precision": "no_change", "text_encoder_1_precision": "no_change"}, {}),
        ({"base_model_precision": "nf4-bnb"}, {"unet": "nf4 (bitsandbytes)"}),
        ({"text_encoder_1_precision": "int8-torchao"}, {"text_encoder": "int8 (torchao)"}),
        ({"fp8_base": True}, {"unet": "fp8 (optimum-quanto)", "text_encoder": "fp8 (optimum-quanto)"}),
        ({"fp8_base": True, "fp8_base_unet": True}, {"unet": "fp8 (optimum-quanto)"}),
        ({"fp8_base_unet": True, "text_encoder_1_precision": "int8"},
         {"unet": "fp8 (optimum-quanto)", "text_encoder": "int8 (optimum-quanto)"}),
        ({"fp8_base": True, "text_encoder_1_precision": "no_change"}, {"unet": "fp8 (optimum-quanto)"}),
    ],
)  # fmt: skip
def test_flags_of_both_programs_name_formats(world: World, flags: dict[str, object], expected: dict[str, str]) -> None:
    assert formats(planned(world, **flags)) == expected


def test_the_second_text_encoder_of_sdxl(world: World) -> None:
    sdxl = {"pretrained_model_name_or_path": world.root / "sdxl.safetensors"}
    assert formats(planned(world, **sdxl, text_encoder_2_precision="int8")) == {
        "text_encoder_2": "int8 (optimum-quanto)"
    }
    assert "has 2 text encoders" in refusals(world, **sdxl, text_encoder_3_precision="int8")


def test_what_cannot_be_is_refused_with_a_way_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusals(world, base_model_precision="int4", fp8_base=True, text_encoder_2_precision="int8")
    assert "--text_encoder_2_precision int8: Stable Diffusion 1.x has 1 text encoder" in said
    assert "fp8_base" in said and 'base_model_precision = "int4"' in said
    with monkeypatch.context() as patch:
        patch.setattr(quantised_plan, "installed_version", lambda package: None)
        said = refusals(world, base_model_precision="int8", text_encoder_1_precision="fp8-torchao")
    assert "the format int8 needs the package optimum-quanto" in said and "install optimum-quanto==0.2.7" in said
    assert "the format fp8-torchao needs the package torchao" in said and "install torchao==0.18.0" in said
    with monkeypatch.context() as patch:
        patch.setattr("library.training.plan.facts.describe_machine", lambda: Machine("mps", "Apple GPU"))
        said = refusals(world, base_model_precision="fp8")
    assert "fp8 cannot be used on this machine (Apple GPU) use int8" in said


def test_all_weights_are_never_trained_over_a_quantised_base(world: World, tmp_path: Path) -> None:
    flags = {"base_model_precision": "int8", "text_encoder_1_precision": "int8", "fp8_base": True}
    said = "\n".join(mistake.what for mistake in parse(world.arguments(tmp_path, **flags), DREAMBOOTH).mistakes)
    assert "train_db.py trains all weights of the model" in said and all(name in said for name in flags)
