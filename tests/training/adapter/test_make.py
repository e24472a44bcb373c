"""train_network.py from its command line: training, resuming, initial weights, merging, files and logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import train_network
from library.training.adapter.make import learning_groups
from library.training.run import Run
from networks.adapter import AdapterError
from networks.parameter_groups import Group
from networks.third_party.network import RawState
from tests.training.running import Outcome, World, assert_equal_files, make_world, run

# 6 + 2 training samples in batches of 3: 4 batches (two folders, two captions), 2 steps of 2 an epoch
COMMON = {
    "network_module": "networks.lora",
    "network_dim": 2,
    "train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 4,
    "use_safetensors": None,
}

ONE_BATCH = {"max_train_steps": 1, "gradient_accumulation_steps": None}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def train(world: World, out: Path, capsys: pytest.CaptureFixture[str], **flags: object) -> Outcome:
    outcome = run(world.arguments(out, **{**COMMON, **flags}), capsys, train_network.RECIPE)
    assert outcome.code == 0, outcome.err
    return outcome


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "dog.safetensors")


# A window of one batch and 3 steps, but in the first case: what resumes of an adapter does not depend on them.
RESUMED = {
    "lora, dropouts": {
        "gradient_accumulation_steps": 2, "max_train_steps": 4, "network_dropout": 0.3,
        "network_args": ["rank_dropout=0.3", "module_dropout=0.3", "conv_dim=2"],
        "flip_aug": True, "random_crop": True,
    },
    "lora, checkpointing and dropouts": {"network_dropout": 0.3, "gradient_checkpointing": True},
    "dora, LoRA+, cosine": {
        "network_args": ["use_dora=True", "loraplus_lr_ratio=4"], "lr_scheduler": "cosine", "scale_weight_norms": 0.05,
    },
    "pissa": {"network_args": ["init=pissa"], "network_train_unet_only": True},
    "lora_fa": {"network_module": "networks.lora_fa"},
    "dylora": {"network_module": "networks.dylora", "network_dim": 4, "network_args": ["unit=2"]},
    "oft": {"network_module": "networks.oft", "network_alpha": 1e-3, "network_train_unet_only": True},
    "loha": {"network_module": "networks.loha", "optimizer_type": "AdamW8bit"},
    "lokr": {"network_module": "networks.lokr", "network_args": ["factor=4"], "mixed_precision": "bf16"},
    "ia3": {"network_module": "networks.ia3", "cache_latents": True},
    "lycoris lokr": {"network_module": "lycoris.kohya", "network_args": ["algo=lokr", "preset=attn-mlp"]},
    "half base": {"base_precision": "bf16", "network_train_unet_only": True},
}  # fmt: skip


@pytest.mark.parametrize("case", RESUMED)
def test_resumed_is_uninterrupted(case: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags: dict[str, Any] = {"gradient_accumulation_steps": None, "max_train_steps": 3, **RESUMED[case]}
    last = flags["max_train_steps"]
    whole = train(world, tmp_path / "whole", capsys, **flags, save_every_n_steps=last - 1, save_state=True)
    saved = tmp_path / "whole" / f"dog-step{last - 1:08d}"
    rest = train(world, tmp_path / "rest", capsys, **flags, resume=f"{saved}-state")
    assert sorted(whole.losses) == list(range(1, last + 1)) and rest.losses == {last: whole.losses[last]}
    assert_equal_files(tmp_path / "whole" / "dog.safetensors", tmp_path / "rest" / "dog.safetensors")
    before = load_file(f"{saved}.safetensors")
    changed = [key for key, value in tensors(tmp_path / "whole").items() if not torch.equal(value, before[key])]
    assert changed, "the last step trained something"


def test_which_parts_are_trained(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Switches and rates of 0 leave a part of the model out."""
    for name, given, prefixes in (
        ("both", {}, {"lora_te", "lora_unet"}),
        ("unet", {"network_train_unet_only": True}, {"lora_unet"}),
        ("unet by rates", {"text_encoder_lr": 0, "unet_lr": 1e-3}, {"lora_unet"}),
        ("text", {"network_train_text_encoder_only": True}, {"lora_te"}),
        ("text by rates", {"text_encoder_lr": [1e-3, 1e-3], "unet_lr": 0}, {"lora_te"}),
    ):
        train(world, tmp_path / name, capsys, **ONE_BATCH, **given)
        found = {key.partition("_text_model")[0].partition("_down")[0] for key in tensors(tmp_path / name)}
        assert {
            prefix for prefix in ("lora_te", "lora_unet") if any(key.startswith(prefix) for key in found)
        } == prefixes


def test_initial_weights_from_a_file(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A first step at a rate of nearly 0 from a file gives the file; of another rank only with dim_from_weights."""
    before = world.model.read_bytes()
    train(world, tmp_path / "first", capsys, learning_rate=1e-2, max_train_steps=2)
    assert world.model.read_bytes() == before
    assert all(key.rpartition(".lora_")[2] or key.endswith(".alpha") for key in tensors(tmp_path / "first"))
    file = tmp_path / "first" / "dog.safetensors"
    still = {**ONE_BATCH, "learning_rate": 1e-20, "network_weights": file}
    train(world, tmp_path / "same", capsys, **still)
    assert_equal_files(file, tmp_path / "same" / "dog.safetensors")
    train(world, tmp_path / "dims", capsys, **still, network_dim=None, dim_from_weights=True)
    assert_equal_files(file, tmp_path / "dims" / "dog.safetensors")
    wrong = run(
        world.arguments(tmp_path / "wrong", **{**COMMON, **still, "network_dim": 3}), capsys, train_network.RECIPE
    )
    assert wrong.code == 2 and "Traceback" not in wrong.err and "has rank 2, this run has 3" in wrong.err


@pytest.mark.parametrize("module", ["networks.oft", "networks.loha"])
def test_a_file_of_another_kind_is_named_by_what_it_holds(
    module: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """networks.lora with --dim_from_weights goes on with whatever kind the file is of."""
    train(world, tmp_path / "first", capsys, **ONE_BATCH, network_module=module)
    file = tmp_path / "first" / "dog.safetensors"
    more = {**ONE_BATCH, "network_weights": file, "dim_from_weights": True, "network_dim": None}
    train(world, tmp_path / "on", capsys, **more, network_module="networks.lora")
    with safe_open(tmp_path / "on" / "dog.safetensors", "pt") as opened:
        assert opened.metadata()["ss_network_module"] == module
        assert set(opened.keys()) == set(tensors(tmp_path / "first"))


def test_base_weights_are_merged_into_the_base_model(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first loss on a base with a merged adapter is that of a run which begins with the adapter."""
    train(world, tmp_path / "first", capsys, learning_rate=3e-2)
    file = tmp_path / "first" / "dog.safetensors"
    plain = train(world, tmp_path / "plain", capsys, **ONE_BATCH).losses[1]
    begun = train(world, tmp_path / "begun", capsys, **ONE_BATCH, network_weights=file).losses[1]
    merged = train(world, tmp_path / "merged", capsys, **ONE_BATCH, base_weights=[file, file],
                   base_weights_multiplier=[0.25, 0.75]).losses[1]  # fmt: skip
    none = train(world, tmp_path / "none", capsys, **ONE_BATCH, base_weights=[file],
                 base_weights_multiplier=[0]).losses[1]  # fmt: skip
    assert merged == pytest.approx(begun, rel=1e-5) and abs(begun - plain) > 1e-4
    assert none == plain


def test_captions_of_a_frozen_text_encoder_are_encoded_once(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without being asked, and to the same result as on the way but for the last bits."""
    from library.training.plan import ahead

    flags = {"network_train_unet_only": True, "gradient_accumulation_steps": None}
    once = train(world, tmp_path / "once", capsys, **flags)
    monkeypatch.setattr(ahead, "FEW_CAPTIONS", 0)
    each = train(world, tmp_path / "each", capsys, **flags)
    assert once.losses == pytest.approx(each.losses, rel=1e-5)


def test_a_run_of_less_than_an_epoch_is_extended(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """How captions are encoded must not depend on the length of the run, or the last bits of the longer one would."""
    from library.training import inputs

    encoded: list[tuple[str, ...]] = []
    encode = inputs.encode_captions
    monkeypatch.setattr(
        inputs,
        "encode_captions",
        lambda plan, texts, *more, **named: (encoded.append(tuple(texts)), encode(plan, texts, *more, **named))[1],
    )
    flags = {"network_train_unet_only": True, "gradient_accumulation_steps": None, "train_batch_size": 2}
    whole = train(world, tmp_path / "whole", capsys, **flags, max_train_steps=6)
    train(world, tmp_path / "short", capsys, **flags, max_train_steps=2, save_state_on_train_end=True)
    state = tmp_path / "short" / "dog-state"
    rest = train(world, tmp_path / "rest", capsys, **flags, max_train_steps=6, resume=state)
    assert len(encoded) == 3 and len(set(encoded)) == 1
    assert sorted(rest.losses) == [3, 4, 5, 6] and rest.losses == {step: whole.losses[step] for step in rest.losses}
    assert_equal_files(tmp_path / "whole" / "dog.safetensors", tmp_path / "rest" / "dog.safetensors")


def test_a_base_in_half_precision_computes_in_float32(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss differs by the rounding of the stored weights: 8 bits of bf16, 11 of fp16."""
    flags = {"max_train_steps": 2, "gradient_accumulation_steps": None}
    full = train(world, tmp_path / "full", capsys, **flags).losses
    fp16 = train(world, tmp_path / "fp16", capsys, **flags, base_precision="fp16").losses
    bf16 = train(world, tmp_path / "bf16", capsys, **flags, base_precision="bf16").losses
    assert fp16 == pytest.approx(full, rel=1e-3) and fp16 != full
    assert bf16 == pytest.approx(full, rel=2e-2) and bf16 != full


def test_precached_captions_are_used_by_training(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the format that the frozen text encoder has there: nothing is encoded a second time."""
    from library.training.precache.command import run_tool
    from tools.cache_text_encoder_outputs import TOOL

    for precision in ({"mixed_precision": "bf16"}, {"base_precision": "fp16"}):
        flags = {"network_train_unet_only": True, "cache_text_encoder_outputs_to_disk": True, **precision}
        flags["data_cache_dir"] = tmp_path / next(iter(precision))
        assert run_tool(TOOL, world.arguments(tmp_path / "out", **{**COMMON, **flags})) == 0
        assert "0 read, 3 encoded" in capsys.readouterr().out
        assert "3 read, 0 encoded" in train(world, tmp_path / "out", capsys, **flags, **ONE_BATCH).err


def test_log_names_are_those_of_sd_scripts(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[float]] = {}

    def log(self: Run, values: dict[str, float], step: int) -> None:
        for tag, value in values.items():
            seen.setdefault(tag, []).append(value)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log)
        from accelerate.state import AcceleratorState

        from library.training.command import run_recipe

        AcceleratorState._reset_state(True)
        flags = {**COMMON, "scale_weight_norms": 1, "network_args": ["loraplus_unet_lr_ratio=2"], "unet_lr": 2e-3}
        assert run_recipe(train_network.RECIPE, world.arguments(tmp_path, **flags)) == 0
        AcceleratorState._reset_state(True)
    capsys.readouterr()
    assert set(seen) == {
        "loss/current", "loss/average", "loss/epoch_average", "lr/textencoder", "lr/unet", "lr/unet plus",
        "max_norm/keys_scaled", "max_norm/max_key_norm", "norm/avg_key_norm",
    }  # fmt: skip
    assert seen["lr/unet"][0] == 2e-3 and seen["lr/unet plus"][0] == 4e-3 and seen["lr/textencoder"][0] == 1e-3
    losses = seen["loss/current"]
    # two steps an epoch: the mean over the last two, the older one replaced in place
    assert seen["loss/average"] == pytest.approx(
        [losses[0], sum(losses[:2]) / 2, sum(losses[1:3]) / 2, sum(losses[2:4]) / 2]
    )


@pytest.mark.parametrize(("kind", "precision"), [("safetensors", "fp16"), ("ckpt", "bf16"), ("pt", None)])
def test_files_of_every_format(
    kind: str, precision: str | None, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {**ONE_BATCH, "save_model_as": kind, "save_precision": precision, "save_every_n_epochs": 1}
    train(world, tmp_path, capsys, **flags)
    (file,) = tmp_path.glob(f"dog.{kind}")
    if kind == "safetensors":
        held = load_file(file)
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["ss_network_module"] == "networks.lora"
    else:
        held = torch.load(file, weights_only=True)
    assert {value.dtype for value in held.values()} == {getattr(torch, {"fp16": "float16", "bf16": "bfloat16"}.get(
        precision or "", "float32"))}  # fmt: skip


def test_initial_step_and_epoch(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """initial_step counts steps as done: with skip_until_initial_step to the step, else to the epoch it lies in."""
    still = {"learning_rate": 1e-20}
    exactly = train(world, tmp_path / "a", capsys, **still, initial_step=3, skip_until_initial_step=True)
    epoch = train(world, tmp_path / "b", capsys, **still, initial_step=3)
    same = train(world, tmp_path / "c", capsys, **still, initial_epoch=2)
    assert sorted(exactly.losses) == [4] and sorted(epoch.losses) == [3, 4] and same.losses == epoch.losses
    whole = train(world, tmp_path / "d", capsys, **still)
    assert exactly.losses == {4: whole.losses[4]}, "the same images, noise and timesteps"


MISTAKES = [
    ({"network_module": "networks.nothing"}, "networks.nothing"),
    ({"network_module": None}, "--network_module is not set"),
    ({"network_args": ["conv_dimm=4"]}, "conv_dim"),
    ({"network_args": ["conv_dim=4 oops"]}, '"oops" is not key=value'),
    ({"network_module": "lycoris.kohya", "network_args": ["algo=lorra"]}, "no such algo"),
    ({"network_module": "lycoris.kohya", "network_args": ["conv_dimm=4"]}, "did you mean conv_dim?"),
    ({"network_module": "lycoris.nowhere"}, "there is no such module"),
    ({"optimizer_args": ["weight_decay=-1"]}, "Invalid weight_decay value: -1"),
    ({"lr_scheduler_type": "MultiStepLR", "lr_scheduler_args": ["milestones=5"]}, "milestones"),
    ({"network_weights": "nowhere.safetensors"}, "nowhere.safetensors"),
    ({"network_train_unet_only": True, "network_train_text_encoder_only": True}, "nothing would be left to train"),
    ({"save_model_as": "diffusers"}, "an adapter is one file"),
    ({"learning_rate_te": 1e-5}, "train_db.py"),
    ({"initial_step": 4}, "4 of 4 steps would count as done"),
    ({"network_module": "networks.oft", "scale_weight_norms": 1}, "networks.oft does not support it"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES)
def test_mistakes_are_reported_before_weights_are_loaded(
    flags: dict[str, object], message: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run(world.arguments(tmp_path / "out", **{**COMMON, **flags}), capsys, train_network.RECIPE)
    assert outcome.code == 2 and message in outcome.err and "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("joint", [" ", ",", ", "])
def test_several_arguments_in_one_text(
    joint: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {
        "optimizer_type": "Adafactor",
        "optimizer_args": [joint.join(["scale_parameter=False", "relative_step=False", "warmup_init=False"])],
        "network_args": [joint.join(["conv_dim=4", "conv_alpha=1"])],
        "lr_scheduler": "cosine_with_min_lr",
        "lr_scheduler_args": [joint.join(["min_lr=1e-5"])],
        "dry_run": True,
    }
    plan = train(world, tmp_path, capsys, **flags).out
    assert "Adafactor (relative_step=False scale_parameter=False warmup_init=False)" in plan
    assert "(conv_dim=4 conv_alpha=1)" in plan and "Adafactor sets its own learning rate" not in plan


def test_parameters_of_a_third_party_network_go_by_name_in_its_order() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    asked: list[list[torch.nn.Parameter]] = [[network[1].weight, network[0].bias]]

    class Made:
        module = RawState(network)

        def groups(self, rates: dict[str, float]) -> list[Group]:
            return [Group("unet", "", parameters, rates["unet"]) for parameters in asked]

    (group,) = learning_groups(Made(), {"unet": 0.5})  # type: ignore[arg-type]
    assert (group.name, group.learning_rate) == ("unet", 0.5)
    assert group.parameters == ("network.1.weight", "network.0.bias")
    asked.append([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(AdapterError, match="not in the network"):
        learning_groups(Made(), {"unet": 0.5})  # type: ignore[arg-type]
