"""--vram: which options are chosen, by a stand-in for the prediction that knows what each of them saves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from library.options.mistakes import UserError
from library.options.parse import ADAPTERS, DREAMBOOTH, Parsed, Program, parse
from library.options.train_options import values_of
from library.runtime.device import Machine
from library.runtime.torch_build import TorchBuild
from library.training.plan.memory.fit import choose_for_card
from library.training.plan.memory.prediction import Moment, Prediction

GB = 2**30
CARD = Machine("cuda", "card", compute_capability=(8, 6))
SAVES = {
    "gradient_checkpointing": 8, "fused_backward_pass": 4, "full_bf16": 6, "offload_optimizer": 2, "optimizer_type": 3,
}  # fmt: skip
REQUIRED = (
    "--pretrained_model_name_or_path=m.safetensors", "--train_data_dir=train", "--resolution=64", "--output_dir=out",
)  # fmt: skip


def predict(parsed: Parsed) -> Prediction:
    values = values_of(parsed.options)
    saved = sum(size for name, size in SAVES.items() if values[name])
    return Prediction((Moment("a step", {"weights": (30 - saved) * GB}),), context=0, spare=0.0)


def chosen(*words: str, machine: Machine = CARD, program: Program = DREAMBOOTH) -> Parsed:
    return choose_for_card(parse([*REQUIRED, *words], program), machine, predict)


def flags_of(parsed: Parsed) -> set[str]:
    return {name for name, origin in parsed.origins.items() if origin.startswith("--vram")}


def test_only_what_costs_nothing_where_the_card_is_large() -> None:
    """And no captions are cached: the text encoder is trained."""
    assert flags_of(chosen("--vram=32")) == {"mixed_precision", "cache_latents"}


def test_captions_are_cached_where_no_text_encoder_is_trained() -> None:
    words = ("--vram=32", "--network_module=networks.lora", "--network_train_unet_only")
    assert "cache_text_encoder_outputs" in flags_of(chosen(*words, program=ADAPTERS))


def test_what_is_not_needed_is_taken_back() -> None:
    """With checkpointing alone it fits; the 8-bit optimizer that was tried first is not needed."""
    parsed = chosen("--vram=22")
    assert flags_of(parsed) == {"mixed_precision", "cache_latents", "gradient_checkpointing"}
    assert parsed.options.memory.gradient_checkpointing
    assert parsed.origins["gradient_checkpointing"] == "--vram 22"
    assert any("--vram 22 sets --gradient_checkpointing: a step takes 30 % longer" in note for note in parsed.notes)


def test_what_the_user_set_stays_and_is_named() -> None:
    parsed = chosen("--vram=22", "--optimizer_type=Lion", "--mixed_precision=fp16")
    assert (parsed.options.optimizer.optimizer_type, parsed.options.memory.mixed_precision) == ("Lion", "fp16")
    with pytest.raises(UserError) as caught:
        chosen("--vram=8", "--mixed_precision=no")
    assert "does not fit" in str(caught.value)
    assert "--mixed_precision (command line)" in str(caught.value)


def test_everything_is_chosen_before_a_run_is_refused() -> None:
    assert {"fused_backward_pass", "full_bf16", "offload_optimizer"} <= flags_of(chosen("--vram=8"))
    with pytest.raises(UserError, match=r"needs 7\.0 GiB"):
        chosen("--vram=6")


def test_a_card_without_bf16_gets_fp16() -> None:
    old = replace(CARD, compute_capability=(7, 5))
    amd = Machine("cuda", "AMD GPU", architecture="gfx1030", torch=TorchBuild(hip="7.2"))  # no bf16, abilities.py
    for card, precision in ((old, "fp16"), (amd, "fp16"), (replace(amd, architecture="gfx1100"), "bf16")):
        assert chosen("--vram=32", machine=card).options.memory.mixed_precision == precision


def test_nothing_is_chosen_without_a_card() -> None:
    parsed = chosen("--vram=8", machine=Machine("cpu", "CPU"))
    assert not flags_of(parsed)
    assert any("no graphics card" in note for note in parsed.notes)
