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
        (a_file((), {"modelspec.prediction_type": "flow"}), None, None, ""),
        (a_folder(), None, None, ""),
        (a_folder(prediction_type="epsilon"), "epsilon", None, "its scheduler_config.json"),
        (a_folder(prediction_type="v_prediction", rescale_betas_zero_snr=True), "v", True, "its scheduler_config.json"),
        (a_folder(prediction_type="epsilon", rescale_betas_zero_snr=False), "epsilon", False,
         "its scheduler_config.json"),
        (a_folder(prediction_type=["v"], rescale_betas_zero_snr="yes"), None, None, ""),
    ],
)  # fmt: skip
def test_what_a_checkpoint_says(header: Header, prediction: str | None, zero: bool | None, where: str) -> None:
    assert declared_prediction(header) == DeclaredPrediction(prediction, zero, where)  # type: ignore[arg-type]


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
