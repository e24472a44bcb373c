"""A checkpoint of another noise process than its family's is refused, whatever reads it; its declaration is quoted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest

from library.checkpoints.files import read_header
from library.checkpoints.header import CheckpointError, Header
from library.families.registry import detect, load_model
from library.options.mistakes import Mistakes
from library.options.parse import parse
from library.training.plan.base_model import decide_base_model
from tests import tiny
from tools import convert_checkpoint, merge_models

# Stability-AI/generative-models and the folders of runwayml and stabilityai
PUBLISHED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def with_scheduler(header: Header, scheduler: dict[str, Any]) -> Header:
    return replace(header, configs={**header.configs, "scheduler": scheduler})


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "LCMScheduler",
        "TCDScheduler",
    ],
)  # fmt: skip
def test_all_schedulers_of_the_published_process_are_understood(files: dict[str, Path], name: str) -> None:
    """As diffusers writes them, with every default."""
    scheduler = dict(getattr(diffusers, name)(**PUBLISHED).config) | {"_class_name": name}
    header = with_scheduler(read_header(files["sdxl folder"]), json.loads(json.dumps(scheduler, default=list)))
    detect(header).sizes(header)


@pytest.mark.parametrize(
    ("scheduler", "quote"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "_class_name = FlowMatchEulerDiscreteScheduler"),
        (diffusers.UniPCMultistepScheduler(**PUBLISHED, prediction_type="flow_prediction", use_flow_sigmas=True),
         "prediction_type = flow_prediction"),
        (diffusers.DDIMScheduler(**PUBLISHED, prediction_type="sample"), "prediction_type = sample"),
        (diffusers.DDIMScheduler(), "beta_schedule = linear"),
        (diffusers.DDPMScheduler(**PUBLISHED | {"beta_schedule": "squaredcos_cap_v2"}), "squaredcos_cap_v2"),
        (diffusers.DDIMScheduler(**PUBLISHED | {"beta_end": 0.02}), "beta_end = 0.02"),
        (diffusers.DDIMScheduler(**PUBLISHED | {"num_train_timesteps": 4000}), "num_train_timesteps = 4000"),
        (diffusers.DDIMScheduler(**PUBLISHED, trained_betas=[0.1] * 1000), "trained_betas"),
    ],
)  # fmt: skip
def test_another_process_is_refused_in_the_plan_and_by_loading(
    files: dict[str, Path], scheduler: Any, quote: str
) -> None:
    config = dict(scheduler.config) | {"_class_name": type(scheduler).__name__}
    header = with_scheduler(read_header(files["sdxl folder"]), config)
    for refuse in (detect(header).sizes, load_model):
        with pytest.raises(CheckpointError, match=f"{quote}.*scheduler_config.json.*--prediction_type"):
            refuse(header)


def flow_file(path: Path, seed: int = 0) -> Path:
    return tiny.write_single_file(path, "sd1", seed, metadata={"modelspec.prediction_type": "flow"})


def test_a_flow_model_is_a_mistake_of_the_run_whatever_the_flags(tmp_path: Path) -> None:
    model = flow_file(tmp_path / "flow.safetensors")
    for flags in ([], ["--v_parameterization"]):
        mistakes = Mistakes()
        options = parse(["--pretrained_model_name_or_path", str(model), *flags]).options
        assert decide_base_model(options, mistakes, []) is None
        (mistake,) = mistakes
        assert "modelspec.prediction_type = flow" in mistake.what


def test_a_file_that_says_it_wrongly_is_corrected_by_converting_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The remedy of the message: the new file is no flow model any more, in either form."""
    folder = tiny.write_diffusers(tmp_path / "flow", "sd1")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}), encoding="utf-8")
    for target in ("v.safetensors", "v"):
        assert convert_checkpoint.main([str(folder), str(tmp_path / target)]) == 2
        assert convert_checkpoint.main([str(folder), str(tmp_path / target), "--prediction_type", "v"]) == 0
        assert load_model(read_header(tmp_path / target)).prediction == "v"
    assert "Traceback" not in capsys.readouterr().err
    made = json.loads((tmp_path / "v" / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    assert made.items() >= PUBLISHED.items() and made["prediction_type"] == "v_prediction"


def test_a_corrected_schedule_is_told_and_zero_terminal_snr_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.write_diffusers(tmp_path / "other betas", "sd1")
    path = folder / "scheduler" / "scheduler_config.json"
    said = {"_class_name": "DDIMScheduler", **PUBLISHED, "beta_schedule": "linear"}
    path.write_text(
        json.dumps(said | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}), encoding="utf-8"
    )
    assert convert_checkpoint.main([str(folder), "--dry_run"]) == 0
    assert "prediction: not supported: beta_schedule = linear" in capsys.readouterr().out
    assert convert_checkpoint.main([str(folder), str(tmp_path / "v")]) == 2
    assert f'convert_checkpoint.py "{folder}" TARGET' in capsys.readouterr().err  # the path has a space
    assert convert_checkpoint.main([str(folder), str(tmp_path / "v"), "--prediction_type", "v"]) == 0
    assert "declares beta_schedule = linear (its scheduler_config.json); written as v" in capsys.readouterr().out
    made = json.loads((tmp_path / "v" / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    assert made.items() >= (PUBLISHED | {"rescale_betas_zero_snr": True}).items()


def test_flow_models_are_merged_with_each_other_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sums of weights ask for no noise process; a model of another one is in another space."""
    flow, more = flow_file(tmp_path / "a.safetensors"), flow_file(tmp_path / "b.safetensors", 1)
    other = tiny.write_single_file(tmp_path / "v.safetensors", "sd1", 1, metadata={"modelspec.prediction_type": "v"})
    target = tmp_path / "sum.safetensors"
    assert merge_models.main(["--models", str(flow), str(other), "--output", str(target)]) == 2
    assert "modelspec.prediction_type = flow" in capsys.readouterr().err
    assert merge_models.main(["--models", str(flow), str(more), "--output", str(target)]) == 0
    assert read_header(target).metadata["modelspec.prediction_type"] == "flow"
