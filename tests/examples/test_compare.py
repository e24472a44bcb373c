"""The compared methods: their settings are valid, and each is trained, merged and evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples.shapes import compare
from examples.shapes.images import open_model
from library.options.parse import ADAPTERS, DREAMBOOTH, parse


@pytest.mark.parametrize("name", list(compare.METHODS))
def test_settings_are_without_a_mistake(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(compare.ROOT)
    script, *words = compare.METHODS[name]
    parsed = parse(words, DREAMBOOTH if script == "train_db.py" else ADAPTERS)
    assert parsed.mistakes == () and parsed.notes == ()
    assert parsed.options.run.max_train_steps and parsed.options.dataset.reg_data_dir == Path("output/shapes/class")


def test_an_adapter_is_trained_and_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("--max_train_steps=1", "--lr_warmup_steps=0", "--reg_data_dir=", "--logging_dir=", "--log_with=")
    monkeypatch.setattr(compare, "OUTPUT", tmp_path)
    monkeypatch.setattr(compare, "METHODS", {"LoRA": (*compare.LORA, *few)})
    cost = compare.train("LoRA", seed=3)
    assert cost.seconds > 0 and cost.peak > 100e6 and cost.file.stat().st_size > 1e5
    before, after = (
        open_model(compare.BASE).backbone.state_dict(),
        compare.trained_model("LoRA", cost).backbone.state_dict(),
    )
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed and all("attentions" in name for name in changed)
