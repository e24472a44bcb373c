"""Names, moments and removals of a run's files: the table that users' tools know (epoch and step names, step
ranges)."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.options.groups.saving import SavingOptions
from library.options.mistakes import Mistakes
from library.training.saving.outputs import Outputs, count_peak_files, decide_outputs


def outputs(source: str = "safetensors", epochs: int = 10, **flags: object) -> Outputs:
    return decide_outputs(SavingOptions(output_dir=Path("out"), **flags), source, epochs, Mistakes())  # type: ignore[arg-type]


def names(files: Outputs, steps: int, epochs: int, per_epoch: int) -> list[str]:
    return [files.stem(event) + files.extension for event in files.events(steps, epochs, per_epoch)]


@pytest.mark.parametrize(
    ("name", "final", "epoch", "step", "state"),
    [
        ("dog", "dog.safetensors", "dog-000003", "dog-step00000040", "dog-state"),
        (None, "last.safetensors", "epoch-000003", "at-step00000040", "last-state"),
    ],
)
def test_names(name: str | None, final: str, epoch: str, step: str, state: str) -> None:
    files = outputs(output_name=name, save_model_as="safetensors")
    assert files.models(files.final_stem()) == [Path("out") / final]
    assert files.final_state_folder() == Path("out") / state
    assert (files.epoch_stem(3), files.step_stem(40)) == (epoch, step)


@pytest.mark.parametrize(
    ("source", "flags", "save_as", "extension"),
    [
        ("safetensors", {}, "ckpt", ".ckpt"),
        ("ckpt", {"use_safetensors": True}, "safetensors", ".safetensors"),
        ("diffusers", {}, "diffusers", ""),
        ("diffusers", {"use_safetensors": True}, "diffusers_safetensors", ""),
        ("diffusers", {"save_model_as": "safetensors"}, "safetensors", ".safetensors"),
    ],
)
def test_the_format_follows_the_base_model(source: str, flags: dict[str, object], save_as: str, extension: str) -> None:
    files = outputs(source, **flags)
    assert (files.save_as, files.extension) == (save_as, extension)


def test_the_last_epoch_has_only_the_final_file() -> None:
    files = outputs(output_name="n", use_safetensors=True, save_every_n_epochs=2)
    assert names(files, steps=60, epochs=6, per_epoch=10) == ["n-000002.safetensors", "n-000004.safetensors"]


def test_step_saves_include_the_final_step() -> None:
    files = outputs(output_name="n", use_safetensors=True, save_every_n_steps=20)
    assert names(files, steps=40, epochs=4, per_epoch=10) == [
        "n-step00000020.safetensors",
        "n-step00000040.safetensors",
    ]


def test_epoch_ratio() -> None:
    assert outputs(epochs=10, save_n_epoch_ratio=3).every_epochs == 3
    assert outputs(epochs=2, save_n_epoch_ratio=5).every_epochs == 1


def test_save_last_n_steps_is_a_range_of_steps() -> None:
    files = outputs(output_name="n", save_every_n_steps=10, save_last_n_steps=30)
    expired = {step: event.expired_model for step in range(10, 80, 10) if (event := files.at_step(step)) is not None}
    # r = s - k - 1, rounded down to a multiple of 10: 50 - 31 = 19 -> 10
    assert expired == {
        10: None,
        20: None,
        30: None,
        40: None,
        50: "n-step00000010",
        60: "n-step00000020",
        70: "n-step00000030",
    }


def test_save_last_n_epochs_removes_one_older_file_and_states_may_differ() -> None:
    files = outputs(
        output_name="n", save_every_n_epochs=2, save_last_n_epochs=2, save_last_n_epochs_state=1, save_state=True
    )
    event = files.at_epoch_end(6, 10, 60)
    assert event is not None
    assert (event.expired_model, event.expired_state) == ("n-000002", "n-000004")


def test_peak_files_count_the_overlap() -> None:
    files = outputs(output_name="n", save_every_n_epochs=1, save_last_n_epochs=2, save_state=True)
    # epochs 1..9 are saved; while a third lies beside the two that are kept; at the end two and the final one
    assert count_peak_files(files, steps=100, epochs=10, steps_per_epoch=10) == (3, 3)
    assert count_peak_files(outputs(), 100, 10, 10) == (1, 0)
    assert count_peak_files(outputs(save_every_n_steps=25), 100, 10, 10) == (5, 0)
