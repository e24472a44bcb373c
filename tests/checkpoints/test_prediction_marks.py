"""A checkpoint's own word on prediction and zero terminal SNR: keys, metadata, a scheduler; and written back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.checkpoints.files import read_header
from library.checkpoints.header import Header, TensorInfo
from library.checkpoints.prediction_marks import DeclaredPrediction, declared_prediction, marks
from library.checkpoints.writer import write_ckpt, write_safetensors

EMPTY = TensorInfo("F32", (0,))


def a_file(keys: tuple[str, ...] = (), metadata: dict[str, str] | None = None) -> Header:
    return Header(Path("a.safetensors"), "safetensors", dict.fromkeys(keys, EMPTY), metadata or {})


def a_folder(**scheduler: Any) -> Header:
    return Header(Path("a"), "diffusers", {}, {}, {"scheduler": scheduler} if scheduler else {})


@pytest.mark.parametrize(
    ("header", "prediction", "zero", "where"),
    [
        (a_file(), None, None, ""),
        (a_file(("v_pred",)), "v", None, "its key v_pred"),
        (a_file(("v_pred", "ztsnr")), "v", True, "its keys v_pred and ztsnr"),
        (a_file(("ztsnr",)), None, True, "its key ztsnr"),
        (a_file((), {"modelspec.prediction_type": "v"}), "v", None, "modelspec.prediction_type in its metadata"),
        (a_file((), {"modelspec.prediction_type": "epsilon"}), "epsilon", None,
         "modelspec.prediction_type in its metadata"),
        (a_file(("ztsnr",), {"modelspec.prediction_type": "v"}), "v", True,
         "its key ztsnr and modelspec.prediction_type in its metadata"),
        # programs that draw look at the key alone
        (a_file(("v_pred",), {"modelspec.prediction_type": "epsilon"}), "v", None, "its key v_pred"),
        (a_file((), {"modelspec.prediction_type": "v_prediction"}), "v", None,
         "modelspec.prediction_type in its metadata"),
        (a_file((), {"modelspec.prediction_type": "V-Prediction"}), "v", None,
         "modelspec.prediction_type in its metadata"),
        (a_file((), {"modelspec.prediction_type": "None"}), None, None, ""),
        (a_file((), {"modelspec.prediction_type": ""}), None, None, ""),
        (a_folder(), None, None, ""),
        (a_folder(prediction_type="epsilon"), "epsilon", None, "its scheduler_config.json"),
        (a_folder(prediction_type="v_prediction", rescale_betas_zero_snr=True), "v", True, "its scheduler_config.json"),
        (a_folder(prediction_type="epsilon", rescale_betas_zero_snr=False), "epsilon", False,
         "its scheduler_config.json"),
        (a_folder(prediction_type=None, rescale_betas_zero_snr=None), None, None, ""),
    ],
)  # fmt: skip
def test_what_a_checkpoint_says(header: Header, prediction: str | None, zero: bool | None, where: str) -> None:
    assert declared_prediction(header) == DeclaredPrediction(prediction, zero, where)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("header", "where", "quotes"),
    [
        (a_file((), {"modelspec.prediction_type": "flow"}), "its metadata", ("modelspec.prediction_type = flow",)),
        (a_folder(prediction_type="sample"), "its scheduler_config.json", ("prediction_type = sample",)),
        (a_folder(_class_name="FlowMatchEulerDiscreteScheduler", shift=3.0), "its scheduler_config.json",
         ("_class_name = FlowMatchEulerDiscreteScheduler",)),
        (a_folder(_class_name="UniPCMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True),
         "its scheduler_config.json", ("prediction_type = flow_prediction", "use_flow_sigmas = true")),
        (a_folder(prediction_type=["v"], rescale_betas_zero_snr="yes"), "its scheduler_config.json",
         ('prediction_type = ["v"]', "rescale_betas_zero_snr = yes")),
    ],
)  # fmt: skip
def test_what_is_said_and_not_understood_is_quoted(header: Header, where: str, quotes: tuple[str, ...]) -> None:
    assert declared_prediction(header) == DeclaredPrediction(None, None, where, quotes)


@pytest.mark.parametrize(
    ("line", "prediction", "quotes"),
    [
        ('    parameterization: "v"', "v", ()),  # Stability-AI/stablediffusion, v2-inference-v.yaml
        ("    parameterization: eps", "epsilon", ()),
        ("    parameterization: x0", None, ("parameterization = x0",)),
        ("    linear_start: 0.00085", None, ()),
    ],
)
def test_the_yaml_beside_a_file_speaks_where_the_file_does_not(
    tmp_path: Path, line: str, prediction: str | None, quotes: tuple[str, ...]
) -> None:
    (tmp_path / "768.yaml").write_text(f"model:\n  params:\n{line}\n", encoding="utf-8")
    said = declared_prediction(Header(tmp_path / "768.ckpt", "ckpt", {}))
    assert (said.prediction, said.unknown) == (prediction, quotes)
    marked = Header(tmp_path / "768.ckpt", "ckpt", {"v_pred": EMPTY})
    assert declared_prediction(marked) == DeclaredPrediction("v", None, "its key v_pred")


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_marks_are_written_and_read(tmp_path: Path, ending: str, prediction: str, zero: bool) -> None:
    path = tmp_path / f"a.{ending}"
    tensors = {"model.diffusion_model.out.2.bias": torch.ones(4), **marks(prediction, zero_terminal_snr=zero)}
    if ending == "safetensors":
        write_safetensors(path, tensors)
    else:
        write_ckpt(path, tensors)
    content = load_file(path) if ending == "safetensors" else torch.load(path, weights_only=True)["state_dict"]
    expected = {name for name, meant in (("v_pred", prediction == "v"), ("ztsnr", zero)) if meant}
    assert {name for name, tensor in content.items() if not tensor.numel()} == expected
    said = declared_prediction(read_header(path))
    assert (said.prediction == "v", bool(said.zero_terminal_snr)) == (prediction == "v", zero)


def test_no_torch_is_imported() -> None:
    program = (
        "import sys; from library.checkpoints.prediction_marks import marks; marks('v', zero_terminal_snr=True); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
