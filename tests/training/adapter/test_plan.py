"""What the plan of an adapter says before torch is loaded, and the mistakes that it finds in --network_weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import train_network
from library.options.mistakes import UserError
from library.options.parse import parse
from library.training.plan.plan import Plan, decide
from library.training.plan.text import describe
from networks import network
from networks.settings import read_settings
from tests.networks import models
from tests.tools import loras
from tests.training.running import World, make_world

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def words(world: World, out: Path, **flags: object) -> list[str]:
    given = {"network_module": "networks.lora", "network_dim": 8, "network_alpha": 4, "learning_rate": 1e-4,
             "max_train_steps": 4, "use_safetensors": None}  # fmt: skip
    return world.arguments(out, **{**given, **flags})


def plan_of(world: World, out: Path, **flags: object) -> Plan:
    return decide(parse(words(world, out, **flags), program=train_network.RECIPE.program))


def mistakes_of(world: World, out: Path, **flags: object) -> list[tuple[str, str]]:
    with pytest.raises(UserError) as raised:
        plan_of(world, out, **flags)
    return [(mistake.what, mistake.remedy) for mistake in raised.value.mistakes]


def file(path: Path, *arguments: str, module: str = "networks.lora", dim: int = 4, **more: object) -> Path:
    models.create(models.tiny(), *arguments, module=module, dim=dim, **more).write(path, None, {})  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, ["rank 8, alpha 4 (scale 0.5)", "U-Net: 192 layers", "text encoder: 18 layers"]),
        ({"network_args": ["conv_dim=2"]}, ["with rank 2, alpha 1 on 3x3 convolutions", "U-Net: 278 layers"]),
        ({"network_args": ["use_dora=True", "init=pissa", "use_rslora=True", "loraplus_lr_ratio=4"]},
         ["with DoRA (magnitudes per input), rsLoRA, PiSSA, LoRA+", "(scale 1.41)"]),
        ({"network_train_unet_only": True}, ["text encoder not trained"]),
        ({"network_module": "networks.oft", "network_dim": 4, "network_alpha": 1e-3},
         ["networks.oft, dim 4, alpha 0.001\n", "text encoder not trained: networks.oft does not"]),
        ({"network_module": "networks.ia3"},
         ["adapter: networks.ia3\n", "--network_dim 8 has no effect", "--network_alpha 4 has no effect"]),
        ({"network_module": "lycoris.kohya"},
         [" for the weights of the base model\n", "parameters and file size of the adapter are reported after it"]),
    ],
)  # fmt: skip
def test_the_plan_says_what_is_on_and_what_is_reached(
    flags: dict[str, object], said: list[str], world: World, tmp_path: Path
) -> None:
    text = describe(plan_of(world, tmp_path, **flags))
    assert all(part in text for part in said), text
    assert not any(word in text for word in ("DoRA", "rsLoRA", "PiSSA", "LoCon") if not any(word in s for s in said))


def test_memory_and_disk_are_those_of_the_network_that_is_made(world: World, tmp_path: Path) -> None:
    """AdamW keeps two numbers per parameter; alphas stand in the file, and are not trained."""
    plan = plan_of(world, tmp_path, save_precision="fp16", save_every_n_epochs=1, max_train_epochs=2, save_state=True)
    settings, _ = read_settings("networks.lora", dim=8, alpha=4)
    made = network.create(models.tiny(), models.PARTS["sd1"], settings)
    trained = sum(parameter.numel() for parameter in made.parameters())
    saved = sum(value.numel() for value in made.tensors().values())
    costs, base = plan.costs, plan.facts.base_model.sizes.total()
    assert costs.gradients == 4 * trained and costs.optimizer == 8 * trained
    assert costs.weights == 4 * (base + saved) and costs.model_file == 2 * saved
    assert costs.state_folder == 4 * saved + 8 * trained and (costs.files.models, costs.files.states) == (2, 2)
    assert "MB" in [line for line in describe(plan).splitlines() if "disk: up to" in line][0]


def test_what_is_not_known_of_a_third_party_module_is_not_given_as_0(world: World, tmp_path: Path) -> None:
    text = describe(plan_of(world, tmp_path, network_module="lycoris.kohya", use_ema=True))
    assert "gradients" not in text and "0.0 kB" not in text


def test_outputs_that_oft_cannot_divide_are_a_mistake_of_the_plan(world: World, tmp_path: Path) -> None:
    """The widths of the miniature's attention layers are 64 and 32: 3 divides neither."""
    ((what, remedy),) = mistakes_of(world, tmp_path, network_module="networks.oft", network_dim=3)
    assert what.startswith("--network_module networks.oft: lora_unet_") and "cannot be divided into 3 blocks" in what
    assert "--network_dim" in remedy and "such as 4 or 8" in remedy


def test_notes_name_no_argument_that_was_not_given(world: World, tmp_path: Path) -> None:
    """A DoRA of an earlier version is per output without being asked to."""
    start = file(tmp_path / "a.safetensors", "use_dora=True", "wd_on_output=True", dim=8)
    notes = plan_of(world, tmp_path, network_weights=start, network_args=["use_dora=True"]).notes
    assert any("DoRA with magnitudes per output" in note for note in notes)
    assert not any("--network_args wd_on_output" in note for note in notes)


def test_a_file_that_is_not_the_network_is_a_mistake_with_the_way_out(world: World, tmp_path: Path) -> None:
    plain = file(tmp_path / "plain.safetensors")
    kernels = file(tmp_path / "kernels.safetensors", "conv_dim=2")
    dora = file(tmp_path / "dora.safetensors", "use_dora=True")
    loha = file(tmp_path / "loha.safetensors", module="networks.loha")
    unet = file(tmp_path / "unet.safetensors", train={"unet"})
    sdxl, other = tmp_path / "sdxl.safetensors", tmp_path / "other.safetensors"
    save_file({"embedding": torch.zeros(2, 4)}, other)
    models.create(models.small("sdxl"), family="sdxl").write(sdxl, None, {})
    cases: list[tuple[dict[str, object], str, str]] = [
        ({"network_weights": plain}, "the file has rank 4, this run has 8", "--network_dim 4, or --dim_from_weights"),
        ({"network_weights": kernels, "network_dim": 4}, "adapters on 3x3 convolutions (rank 2)", "add conv_dim=2"),
        ({"network_weights": plain, "network_dim": 4, "network_args": ["conv_dim=2"]},
         "no adapters on 3x3 convolutions", "remove conv_dim"),
        ({"network_weights": kernels, "network_dim": 4, "network_args": ["conv_dim=3"]},
         "rank 2 on 3x3 convolutions, this run has 3", "conv_dim=2"),
        ({"network_weights": dora, "network_dim": 4}, "is a DoRA", "add use_dora=True"),
        ({"network_weights": plain, "network_dim": 4, "network_args": ["use_dora=True"]},
         "is no DoRA", "remove use_dora=True"),
        ({"network_weights": loha, "network_dim": 4}, "is LoHa", "--network_module networks.loha"),
        ({"network_weights": unet, "network_dim": 4}, "no adapters for the text encoder", "--network_train_unet_only"),
        ({"network_weights": plain, "network_dim": 4, "network_train_unet_only": True},
         "has adapters for the text encoder, which is not trained", "remove --network_train_unet_only"),
        ({"network_weights": world.model}, "is a whole model (Stable Diffusion 1.x), not an adapter",
         "pass it as --pretrained_model_name_or_path and remove --network_weights"),
        ({"network_weights": other}, "has no adapters for Stable Diffusion 1.x (its keys: embedding)",
         "give an adapter"),
        ({"network_weights": plain, "network_args": ["init=pissa"], "network_dim": 4},
         "init=pissa starts from the base model", "remove init=pissa"),
    ]  # fmt: skip
    for flags, what, remedy in cases:
        (found,) = mistakes_of(world, tmp_path, **flags)
        assert what in found[0] and remedy in found[1], found
    assert any("Stable Diffusion 1.x" in what for what, _ in mistakes_of(world, tmp_path, network_weights=sdxl))


def test_a_file_for_another_width_is_refused_before_weights_are_loaded(world: World, tmp_path: Path) -> None:
    """SD1 and SD2 have layers of the same names."""
    two = loras.write(tmp_path / "two.safetensors", loras.tensors("sd2", 8, 1.0, 1), "sd2")
    found = mistakes_of(world, tmp_path, network_weights=two)
    assert any("is for a model of other sizes" in what for what, _ in found), found
    found = mistakes_of(world, tmp_path, network_weights=two, network_dim=None, dim_from_weights=True)
    assert any("is for a model of other sizes" in what for what, _ in found), found


def test_a_file_brings_its_alphas(world: World, tmp_path: Path) -> None:
    """As in sd-scripts, where alpha is a buffer of the module, which loading the file sets."""
    start = file(tmp_path / "a.safetensors", "conv_dim=2", dim=8)
    plan = plan_of(world, tmp_path, network_weights=start, network_alpha=0.5, network_args=["conv_dim=2"])
    text = describe(plan)
    for said in ("lora, rank 8 (conv_dim=2)\n", "with rank 2 on 3x3 convolutions\n", "safetensors, with its alphas"):
        assert said in text, text
    assert "alpha 0.5" not in text and "scale" not in text


def test_files_that_are_merged_into_the_base_model_are_checked_by_their_headers(world: World, tmp_path: Path) -> None:
    fits = file(tmp_path / "oft.safetensors", module="networks.oft")
    two = loras.write(tmp_path / "two.safetensors", loras.tensors("sd2", 8, 1.0, 1), "sd2")
    found = mistakes_of(world, tmp_path, base_weights=[fits, two, world.model])
    assert all("oft.safetensors" not in what for what, _ in found)
    for said in (f"{two} is for a model of other sizes", f"{world.model} is a whole model"):
        assert any(f"--base_weights {said}" in what for what, _ in found), found


def test_a_kind_that_reaches_nothing_is_one_mistake(world: World, tmp_path: Path) -> None:
    """The rest is not the fault of a learning rate."""
    ((what, _),) = mistakes_of(world, tmp_path, network_module="networks.oft", network_train_text_encoder_only=True)
    assert "networks.oft finds no layer to adapt in what is trained (text encoder)" in what


def test_a_file_gives_its_own_layers(world: World, tmp_path: Path) -> None:
    unet = file(tmp_path / "unet.safetensors", "conv_dim=2", train={"unet"})
    plan = plan_of(world, tmp_path, network_weights=unet, dim_from_weights=True, network_dim=None)
    text = describe(plan)
    assert "U-Net: 278 layers" in text and "text encoder not trained: the file has no adapters for it" in text
    assert plan.adapter is not None and plan.adapter.trained_modules == {"unet"}
    made = models.create(models.tiny(), "conv_dim=2", train={"unet"})
    assert plan.adapter.trained_parameters == sum(parameter.numel() for parameter in made.parameters())


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        ({"network_dim": 16, "network_alpha": 1}, "scales the adapter by 0.0625"),
        ({"network_dim": 16, "network_alpha": 1, "network_args": ["use_rslora=True"]}, None),  # 1 / √16
        ({"network_dim": 8, "network_alpha": 1}, None),
        ({"network_dim": 64, "network_alpha": 0}, None),
        ({"network_module": "networks.oft", "network_dim": 4, "network_alpha": 1e-3}, None),
        ({"learning_rate": None}, "learning rate 2e-06 of the adapter (U-Net, text encoder)"),
        ({"learning_rate": None, "unet_lr": 1e-4}, "learning rate 2e-06 of the adapter (text encoder)"),
        ({"learning_rate": None, "unet_lr": 1e-4, "text_encoder_lr": 1e-5}, None),
    ],
)
def test_notes_on_alpha_and_learning_rate(
    flags: dict[str, object], note: str | None, world: World, tmp_path: Path
) -> None:
    notes = [
        each for each in plan_of(world, tmp_path, **flags).notes if "scales the" in each or "learning rate" in each
    ]
    assert len(notes) == (note is not None) and all(note in each for each in notes if note), notes


def test_the_plan_of_an_adapter_needs_no_torch(world: World, tmp_path: Path) -> None:
    given = words(world, tmp_path, network_weights=file(tmp_path / "a.safetensors", dim=8), dry_run=True)
    code = "import sys, train_network as t; c = t.run_recipe(t.RECIPE, sys.argv[1:]); print(c, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, *given], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.stdout.split()[-2:] == ["0", "False"], done.stderr
