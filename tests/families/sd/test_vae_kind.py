"""A VAE of another family than the model's has the same shapes and another scale of latents: it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from library.checkpoints.files import read_header, sha256
from library.checkpoints.header import CheckpointError
from library.families.registry import detect
from library.families.sd import vae_kind
from library.options.mistakes import Mistakes
from library.options.parse import parse
from library.training.plan.base_model import decide_base_model
from tests import tiny

# runwayml/stable-diffusion-v1-5 and stabilityai/stable-diffusion-xl-base-1.0, vae/config.json: scaling_factor
SCALES = {"sd1": "0.18215", "sdxl": "0.13025"}


def refused(files: dict[str, Path], family: str, vae: Path) -> str:
    """The message about a VAE in the plan of a run; it is about --vae and says both scales."""
    mistakes = Mistakes()
    options = parse(["--pretrained_model_name_or_path", str(files[family]), "--vae", str(vae)]).options
    assert decide_base_model(options, mistakes, []) is None
    (mistake,) = mistakes
    assert mistake.what.startswith(f"--vae: {vae}")
    return mistake.what


def accepted(files: dict[str, Path], family: str, vae: Path) -> bool:
    header = read_header(files[family])
    return bool(detect(header).sizes(header, vae))


@pytest.mark.parametrize(("family", "other"), [("sd1", "sdxl"), ("sd2", "sdxl"), ("sdxl", "sd1"), ("refiner", "sd1")])
@pytest.mark.parametrize("form", ["", " folder"])
def test_the_vae_of_a_whole_model_of_another_family(files: dict[str, Path], family: str, other: str, form: str) -> None:
    said = refused(files, family, files[other + form])
    assert SCALES["sd1"] in said and SCALES["sdxl"] in said


@pytest.mark.parametrize(("family", "same"), [("sd1", "sd2"), ("sd2", "sd1"), ("sdxl", "refiner"), ("refiner", "sdxl")])
@pytest.mark.parametrize("form", ["", " folder"])
def test_families_that_share_a_scale_share_their_vaes(
    files: dict[str, Path], family: str, same: str, form: str
) -> None:
    assert accepted(files, family, files[same + form])


@pytest.mark.parametrize(
    ("architecture", "family"),
    [
        ("stable-diffusion-xl-v1-base/vae", "sdxl"),
        ("stable-diffusion-v1/vae", "sd1"),
        ("stable-diffusion-v2-512", "sd2"),
    ],
)
def test_metadata_tell_the_family(files: dict[str, Path], tmp_path: Path, architecture: str, family: str) -> None:
    bare = load_file(tiny.write_vae_file(tmp_path / "bare.safetensors"))
    save_file(bare, tmp_path / "vae.safetensors", {"modelspec.architecture": architecture})
    assert accepted(files, family, tmp_path / "vae.safetensors")
    assert "modelspec.architecture" in refused(
        files, "sd1" if family == "sdxl" else "sdxl", tmp_path / "vae.safetensors"
    )


def test_published_files_are_known_by_their_hash(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.write_vae_file(tmp_path / "vae.safetensors")
    assert accepted(files, "sd1", path) and accepted(files, "sdxl", path)  # nothing is known of it
    monkeypatch.setattr(vae_kind, "SMALLEST", 1)
    monkeypatch.setattr(vae_kind, "VAES", {sha256(path): "sdxl"})
    assert "SHA-256" in refused(files, "sd1", path)
    assert accepted(files, "sdxl", path)


def test_a_file_is_hashed_once_in_a_run(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan and loading both ask for the hash; a file that has changed is hashed again."""
    path = tiny.write_vae_file(tmp_path / "vae.safetensors")
    hashed: list[Path] = []
    monkeypatch.setattr(vae_kind, "SMALLEST", 1)
    monkeypatch.setattr(vae_kind, "sha256", lambda file: hashed.append(file) or "0" * 64)
    header = read_header(files["sd1"])
    detect(header).sizes(header, path)
    detect(header).load(header, vae=path)
    assert hashed == [path]
    save_file(load_file(path), path, {"a": "longer header"})
    detect(header).sizes(header, path)
    assert hashed == [path, path]


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("scaling_factor", 0.13025),
        ("shift_factor", 0.1),
        ("latents_mean", [1.0] * 4),
        ("norm_eps", 0.1),
        ("act_fn", "gelu"),
    ],
)
def test_the_config_of_a_folder_is_compared_like_the_models_own(
    files: dict[str, Path], tmp_path: Path, entry: str, value: object
) -> None:
    folder = tiny.write_diffusers(tmp_path / "whole", "sd1") / "vae"
    assert accepted(files, "sd1", folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | {entry: value}), encoding="utf-8")
    assert entry in refused(files, "sd1", folder)
    with pytest.raises(CheckpointError, match=entry):
        detect(read_header(files["sd1"])).load(read_header(files["sd1"]), vae=folder)
