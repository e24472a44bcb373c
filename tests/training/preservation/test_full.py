"""Training a whole model against a second set of its weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints.files import read_header
from library.families.registry import load_model
from library.options.mistakes import Mistakes
from library.options.train_options import TrainOptions
from library.runtime.device import Machine
from library.training.preservation import preservation
from library.training.preservation.base import Base, compute_from_main_memory
from library.training.preservation.base_plan import decide_base, fingerprint_of
from library.training.preservation.cached import CachedPredictions
from library.training.preservation.plan import Anchor, PreservationPlan
from tests import tiny
from tests.training.running import World, assert_equal_files, make_world, run

FLAGS = {
    "train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 3,
    "learning_rate": 1e-3,
    "preservation": ["reg_images", "base_prediction=0.5", "class_prompt@2-", "blank_prompt=0.1"],
}
GB = 10**9


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def test_a_resumed_run_compares_with_the_base_models_file(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """N + M steps are the uninterrupted run, text encoder included. The base predicts what the file does, before and
    after; another file in its place is refused."""
    bases: list[Base] = []
    load = preservation.loaded_base

    def kept(*given: Any) -> Base:
        bases.append(load(*given))
        return bases[-1]

    monkeypatch.setattr(preservation, "loaded_base", kept)
    flags = {**FLAGS, "reg_data_dir": world.root / "reg"}
    whole = run(world.arguments(tmp_path / "whole", **flags, save_every_n_steps=2, save_state=True), capsys)
    assert whole.code == 0 and "base model to compare with 27.2 MB" in whole.out, whole.err
    flags["resume"] = tmp_path / "whole" / "dog-step00000002-state"
    rest = run(world.arguments(tmp_path / "rest", **flags), capsys)
    assert rest.losses == {3: whole.losses[3]}, rest.err
    assert_equal_files(tmp_path / "whole" / "dog.safetensors", tmp_path / "rest" / "dog.safetensors")

    file = load_model(read_header(world.model))
    assert len(bases) == 2
    for base in bases:
        assert base.conditioner is not None
        for own, other in (
            (base.backbone, file.backbone),
            (base.conditioner.text_encoders["text_encoder"], file.text_encoders["text_encoder"]),
        ):
            state = other.state_dict()
            assert all(torch.equal(value, state[name]) for name, value in own.state_dict().items())

    # the model that the run wrote has the same size, layout and name
    other = tmp_path / "sd1.safetensors"
    shutil.copy(tmp_path / "whole" / "dog.safetensors", other)
    wrong = run(world.arguments(tmp_path / "x", **{**flags, "pretrained_model_name_or_path": other}), capsys)
    assert wrong.code == 2 and "the base model, to compare with, was" in wrong.err


def test_predictions_made_ahead_are_the_bases(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For whatever goes into the model, mirrored and coloured images too, with its text encoder as it was; a resumed
    run makes the same ones. The 3 regularisation images have 2 draws each, which are used again and again."""
    file = load_model(read_header(world.model))
    keys: list[int] = []
    call = CachedPredictions.__call__

    def compared(cached: CachedPredictions, batch: Any, inputs: Any, captions: list[str], rows: list[int]) -> Any:
        found = call(cached, batch, inputs, captions, rows)
        ids = batch.text_inputs["text_encoder"].ids[:, 0]
        states = file.text_encoders["text_encoder"](ids).last_hidden_state
        expected = file.backbone(inputs.noisy, inputs.timesteps, states).sample[rows]
        assert float((found - expected).detach().abs().max()) < 2e-3  # float16
        keys.extend(batch.sample_index[rows].tolist())
        return found

    flags = {
        **FLAGS, "reg_data_dir": world.root / "reg", "preservation": "base_prediction", "preservation_base": "cached",
        "preservation_draws": 2, "flip_aug": True, "color_aug": True,
    }  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(CachedPredictions, "__call__", compared)
        saving = {"save_every_n_steps": 2, "save_state": True}
        whole = run(world.arguments(tmp_path / "whole", **flags, **saving), capsys)
    assert whole.code == 0 and "predictions made before the first step, 3.1 kB in main memory" in whole.out, whole.err
    # 3 steps are one and a half epochs of 8 samples
    assert len(keys) > 8 and max(keys) < 0 and len(set(keys)) == 6
    assert "6 predictions, each used about 2.7 times" in whole.out  # 16 in two epochs
    state = tmp_path / "whole" / "dog-step00000002-state"
    rest = run(world.arguments(tmp_path / "rest", **flags, resume=state), capsys)
    assert rest.losses == {3: whole.losses[3]}, rest.err
    assert_equal_files(tmp_path / "whole" / "dog.safetensors", tmp_path / "rest" / "dog.safetensors")


@pytest.mark.parametrize("mixed", [torch.bfloat16, torch.float16])
def test_predictions_are_found_in_mixed_precision_too(mixed: torch.dtype) -> None:
    outputs = {-1 - key: torch.full((4, 2, 2), float(key), dtype=torch.float16) for key in range(3)}
    batch: Any = SimpleNamespace(sample_index=torch.tensor([7, -3, -1]))
    inputs: Any = SimpleNamespace(noisy=torch.zeros(3, 4, 2, 2))
    with torch.autocast("cpu", mixed):
        found = CachedPredictions(outputs)(batch, inputs, [], [1, 2])
    assert found.shape == (2, 4, 2, 2) and found.dtype == torch.float32
    assert found[:, 0, 0, 0].tolist() == [2.0, 0.0]


def test_only_predictions_for_regularisation_images_are_made_ahead(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {**FLAGS, "reg_data_dir": world.root / "reg", "preservation_base": "cached", "dry_run": True}
    rolled = {"scheduled_sampling_max_step_offset": 2, "scheduled_sampling_probability": 0.5}
    outcome = run(world.arguments(tmp_path, **flags, **rolled), capsys)
    assert outcome.code == 2 and "not for class_prompt and blank_prompt" in outcome.err
    assert "--preservation_base cached with --scheduled_sampling_max_step_offset" in outcome.err


def test_half_precision_is_that_of_the_run(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a text encoder that is not trained is the model's own."""
    bases: list[Base] = []
    load = preservation.loaded_base
    monkeypatch.setattr(preservation, "loaded_base", lambda *given: bases.append(load(*given)) or bases[-1])
    flags = {**FLAGS, "reg_data_dir": world.root / "reg", "max_train_steps": 1, "stop_text_encoder_training": -1}
    outcome = run(world.arguments(tmp_path, **flags, mixed_precision="bf16"), capsys)
    assert outcome.code == 0 and " in bf16 beside the model (auto:" in outcome.out, outcome.err
    (base,) = bases
    assert base.conditioner is None
    kinds = {(parameter.ndim > 1, parameter.dtype) for parameter in base.backbone.parameters()}
    assert kinds == {(True, torch.bfloat16), (False, torch.float32)}


def test_a_quantised_base_has_the_formats_of_a_quantised_model(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says nearly the same as one in float32."""
    pytest.importorskip("optimum.quanto")
    file, seen = load_model(read_header(world.model)), []
    call = Base.__call__

    def compared(base: Base, batch: Any, inputs: Any, captions: list[str], rows: list[int]) -> torch.Tensor:
        found = call(base, batch, inputs, captions, rows)
        with torch.no_grad():
            expected = replace(base, backbone=file.backbone, conditioner=None)
            seen.append(float((found - call(expected, batch, inputs, captions, rows)).abs().mean()))
        return found

    monkeypatch.setattr(Base, "__call__", compared)
    flags = {**FLAGS, "reg_data_dir": world.root / "reg", "max_train_steps": 1, "preservation_base": "int8"}
    outcome = run(world.arguments(tmp_path, **flags), capsys)
    assert outcome.code == 0 and " in int8 (optimum-quanto) beside the model" in outcome.out, outcome.err
    assert seen and 1e-5 < max(seen) < 0.05


def test_the_fingerprint_tells_weights_apart(tmp_path: Path) -> None:
    whole = tiny.write_single_file(tmp_path / "a" / "sd1.safetensors", "sd1")
    copy = tmp_path / "b" / "sd1.safetensors"
    copy.parent.mkdir()
    shutil.copy(whole, copy)
    assert fingerprint_of(read_header(whole)) == fingerprint_of(read_header(copy))
    save_file({name: value + 1 for name, value in load_file(whole).items()}, copy)
    assert fingerprint_of(read_header(whole)) != fingerprint_of(read_header(copy))
    folder = tiny.write_diffusers(tmp_path / "folder", "sd1")
    assert len(fingerprint_of(read_header(folder))) == 16


def test_weights_in_main_memory_compute_the_same(tmp_path: Path) -> None:
    """Between passes the module has none; on a CPU they are copied to where they were."""
    file = tiny.write_single_file(tmp_path / "sd1.safetensors", "sd1")
    model, other = load_model(read_header(file)), load_model(read_header(file))
    noisy, states = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 64)
    given = (noisy, torch.tensor([5, 900]), states)
    with torch.no_grad():
        expected = model.backbone(*given).sample
        compute_from_main_memory(other.backbone, torch.device("cpu"))
        assert {parameter.device.type for parameter in other.backbone.parameters()} == {"meta"}
        for _ in range(2):
            assert torch.equal(other.backbone(*given).sample, expected)
        assert {parameter.device.type for parameter in other.backbone.parameters()} == {"meta"}


# 4 GB in fp32; memory of the card, main memory, mixed precision, --preservation_base -> place, format, on the card
PLACES = {
    "room for everything": (24, 64, "no", "auto", "accelerator", "fp32", 4),
    "the model computes in half precision": (24, 64, "bf16", "auto", "half", "bf16", 2),
    "room for a half": (10, 64, "no", "auto", "half", "fp16", 2),
    "no room": (8, 64, "no", "auto", "cpu", "fp32", 0),
    "unknown memory": (None, 64, "no", "auto", "accelerator", "fp32", 4),
    "asked for": (8, 64, "fp16", "accelerator", "accelerator", "fp32", 4),
    "asked for a half": (24, 64, "fp16", "half", "half", "fp16", 2),
    "asked for main memory": (24, 64, "fp16", "cpu", "cpu", "fp32", 0),
    "a CPU": (0, 64, "no", "auto", "accelerator", "fp32", 4),
    "a CPU with little memory": (0, 8, "no", "auto", "half", "fp16", 2),
    "a CPU computes in main memory anyway": (0, 64, "no", "cpu", "accelerator", "fp32", 4),
}


@pytest.mark.parametrize("case", PLACES)
def test_where_it_is_kept(case: str, tmp_path: Path) -> None:
    card, main, mixed, asked, place, number_format, size = PLACES[case]
    file = tiny.write_single_file(tmp_path / "sd1.safetensors", "sd1")
    options = TrainOptions()
    options = replace(options, preservation=replace(options.preservation, preservation_base=asked))
    machine = Machine("cpu" if card == 0 else "cuda", "it", card * GB if card else None, system_memory_bytes=main * GB)
    facts: Any = SimpleNamespace(
        preservation=PreservationPlan((Anchor("blank_prompt"),)),
        options=options,
        machine=machine,
        precision=SimpleNamespace(mixed_precision=mixed),
        base_model=SimpleNamespace(
            family=SimpleNamespace(module_titles={"unet": "U-Net", "text_encoder": "text encoder"}),
            sizes=SimpleNamespace(total=lambda names: GB if names == {"unet"} else 0),
            header=read_header(file),
        ),
    )
    costs: Any = SimpleNamespace(training=5 * GB)
    plan = decide_base(facts, frozenset({"unet"}), costs, Mistakes())
    assert plan is not None and plan.modules == ("U-Net",)
    assert (plan.place, plan.format, plan.on_accelerator) == (place, number_format, size * GB)
    assert ("(auto: " in str(plan)) is (asked == "auto")
    facts.preservation = PreservationPlan((Anchor("reg_images"),))
    assert decide_base(facts, frozenset({"unet"}), costs, Mistakes()) is None
