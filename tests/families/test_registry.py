"""A checkpoint's family is told from names and shapes; what is of no known family is named."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from library.checkpoints.files import read_header
from library.checkpoints.header import CheckpointError, Header, TensorInfo
from library.families.registry import FAMILIES, declared_prediction, detect, find_model, open_model
from tests import tiny


def header(*names: str, kind: str = "safetensors", configs=None, **shapes: tuple[int, ...]) -> Header:
    tensors = {name: TensorInfo("F16", (4, 4)) for name in names}
    tensors |= {name.replace("__", "."): TensorInfo("F16", shape) for name, shape in shapes.items()}
    return Header(Path("some file"), kind, tensors, configs=configs or {})


def index(kind: str) -> dict[str, dict[str, str]]:
    return {"model_index": {"_class_name": kind}}


@pytest.mark.parametrize("family", tiny.ALL)
def test_files_and_folders_are_recognised(files, family):
    assert detect(read_header(files[family])).name == family
    assert detect(read_header(files[f"{family} folder"])).name == family


def test_a_model_is_opened_by_its_name(files):
    opened, family = open_model(str(files["sd2"]))
    assert opened.path == files["sd2"] and family.name == "sd2"


def test_every_family_recognises_only_its_own(files):
    for family in FAMILIES:
        known = [name for name in files if family.recognise(read_header(files[name]))]
        assert known == [family.name, f"{family.name} folder"]


@pytest.mark.parametrize("kwargs", [{"text_model_level": False}, {"position_ids": True}, {"ema": True}])
def test_variants_in_the_wild_are_recognised(tmp_path, kwargs):
    path = tiny.write_single_file(tmp_path / "x.ckpt", "sd1", **kwargs)
    assert detect(read_header(path)).name == "sd1"


def without(source: Header, *prefixes: str) -> Header:
    tensors = {name: info for name, info in source.tensors.items() if not name.startswith(prefixes)}
    return Header(source.path, source.kind, tensors, configs=source.configs)


@pytest.mark.parametrize("family", tiny.ALL)
def test_a_file_without_its_vae_is_recognised(files, family):
    """--vae gives it one."""
    assert detect(without(read_header(files[family]), "first_stage_model.")).name == family


@pytest.mark.parametrize(
    ("family", "taken", "words"),
    [
        ("sd1", "cond_stage_model.", "U-Net without the text encoder"),
        ("sdxl", "conditioner.", "U-Net of Stable Diffusion XL or its refiner without text encoders"),
        ("sdxl", "conditioner.embedders.1.", "without its second text encoder"),
        ("refiner", "conditioner.", "U-Net of Stable Diffusion XL or its refiner without text encoders"),
        ("sdxl", ("model.", "first_stage_model."), "a text encoder alone"),
        ("sdxl folder", "text_encoder", "folder of Stable Diffusion XL with other text encoders"),
        ("sd2 folder", "text_encoder", "folder whose text encoder"),
    ],
)
def test_a_file_without_its_text_encoders_is_not_taken_for_another_family(files, family, taken, words):
    whole = read_header(files[family])
    index = {name: entry for name, entry in whole.configs.get("model_index", {}).items() if "text_encoder" not in name}
    part = without(whole, *([taken] if isinstance(taken, str) else taken))
    part = Header(part.path, part.kind, part.tensors, configs={"model_index": index})
    assert not [known.name for known in FAMILIES if known.recognise(part)]
    with pytest.raises(CheckpointError, match=f"{words}.*give the whole model"):
        detect(part)


UNET = "model.diffusion_model.input_blocks.0.0.weight"
LABEL = "model.diffusion_model.label_emb.0.0.weight"


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (header(UNET, LABEL, "cond_stage_model.model.ln_final.weight", "embedder.model.ln_final.weight"), "unCLIP"),
        (header(UNET, LABEL), "Stable Diffusion XL or its refiner"),
        (header("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"), "Stable Diffusion 3"),
        (header("model.diffusion_model.double_blocks.0.img_attn.qkv.weight"), "Flux"),
        (header("double_blocks.0.img_attn.qkv.weight"), "Flux"),
        (header("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"), "LoRA"),
        (header("lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a"), "adapter"),
        (header("encoder.conv_in.weight", "decoder.conv_in.weight"), "--vae"),
        (header("first_stage_model.encoder.conv_in.weight"), "--vae"),
        (header("down_blocks.0.resnets.0.conv1.weight"), "U-Net alone"),
        (header("text_model.embeddings.token_embedding.weight"), "text encoder alone"),
        (header("emb_params"), "textual inversion"),
        (header(UNET), "without the text encoder"),
        (header("unet/class_embedding.linear_1.weight", kind="diffusers"), "unCLIP"),
        (header("unet/conv_in.weight", kind="diffusers", configs=index("KolorsPipeline")), "Kolors"),
        (header("x", kind="diffusers", configs=index("FluxPipeline")), "Flux"),
        (header("lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha"), "LoRA"),
        (header("layer.weight"), "layer.weight"),
    ],
)
def test_what_is_of_no_known_family_is_named(found, words):
    with pytest.raises(CheckpointError, match="some file.*" + words):
        detect(found)


def test_all_families_are_named_to_whoever_brings_another_model():
    with pytest.raises(CheckpointError) as told:
        detect(header("layer.weight"))
    assert all(family.title in str(told.value) for family in FAMILIES)


@pytest.mark.parametrize("family", ["sd1", "sdxl", "refiner", "sdxl folder"])
def test_an_inpainting_model_is_not_taken_for_a_plain_one(files, family):
    whole = read_header(files[family])
    tensors = dict(whole.tensors)
    name = "unet/conv_in.weight" if "folder" in family else UNET
    tensors[name] = TensorInfo("F16", (64, 9, 3, 3))
    with pytest.raises(CheckpointError, match="inpainting"):
        detect(Header(whole.path, whole.kind, tensors))


@pytest.mark.parametrize(("said", "meant"), [("epsilon", "epsilon"), ("v_prediction", "v"), (None, None)])
def test_a_folders_scheduler_tells_the_prediction(said, meant):
    folder = header(kind="diffusers", configs={"scheduler": {"prediction_type": said}})
    assert declared_prediction(folder).prediction == meant


def test_modelspec_metadata_tells_the_prediction():
    found = Header(Path("x"), "safetensors", {}, {"modelspec.prediction_type": "v"})
    assert declared_prediction(found).prediction == "v"


@pytest.mark.parametrize("family", tiny.ALL)
def test_sizes_are_counted_from_the_header(files, family):
    modules = tiny.diffusers_modules(family)
    for source in (files[family], files[f"{family} folder"]):
        found = read_header(source)
        sizes = detect(found).sizes(found)
        assert sizes.parameters == {
            part: sum(p.numel() for p in getattr(modules, part).parameters())
            for part in ("unet", "vae", *tiny.text_names(family))
        }
        assert sizes.total() == sum(sizes.parameters.values())
        assert sizes.total(("unet", "vae")) == sizes.parameters["unet"] + sizes.parameters["vae"]
    kept = sum(tensor.nbytes for tensor in modules.last_layer.values())
    assert detect(read_header(files[family])).sizes(read_header(files[family])).kept_bytes == kept


def test_a_path_is_taken_as_it_is(tmp_path):
    (tmp_path / "x").mkdir()
    assert find_model(str(tmp_path / "x")) == tmp_path / "x"


def test_a_hub_name_is_found_in_the_local_cache_only(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HUGGINGFACE_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="nothing is downloaded"):
        find_model("runwayml/stable-diffusion-v1-5")
    model = tmp_path / "hub" / "models--runwayml--stable-diffusion-v1-5"
    snapshot = model / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert find_model("runwayml/stable-diffusion-v1-5") == snapshot
    (model / "snapshots" / "def").mkdir()
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc", encoding="utf-8")
    assert find_model("runwayml/stable-diffusion-v1-5") == snapshot


def test_a_missing_file_is_said_to_be_missing():
    with pytest.raises(CheckpointError, match="no such file"):
        find_model("C:/models/gone.safetensors")


def test_detecting_and_counting_imports_no_torch(files):
    code = (
        "import sys; from library.checkpoints.files import read_header; from library.families import registry\n"
        "header = read_header(sys.argv[1]); family = registry.detect(header)\n"
        "family.sizes(header); family.tokenizer(header).count('a dog')\n"
        "sys.exit(', '.join(m for m in ('torch', 'numpy', 'diffusers', 'transformers') if m in sys.modules) or None)"
    )
    root = Path(__file__).parents[2]
    for family in ("sd2", "sdxl"):
        subprocess.run([sys.executable, "-c", code, files[family]], cwd=root, check=True)


@pytest.mark.parametrize("marks", [("edm_mean", "edm_std"), ("edm_vpred.sigma_max", "edm_vpred.sigma_min")])
def test_a_model_of_sdxls_layers_with_another_noise_is_refused(files: dict[str, Path], marks: tuple[str, ...]) -> None:
    """Playground v2.5 and CosXL have SDXL's tensors and say by such keys that their noise is EDM's (ComfyUI reads them
    so): trained with SDXL's noise they would be spoilt."""
    header = read_header(files["sdxl"])
    named = {**header.tensors, **dict.fromkeys(marks, TensorInfo("F32", (1,)))}
    with pytest.raises(CheckpointError, match="EDM"):
        detect(replace(header, tensors=named))


def test_a_folder_with_a_scheduler_of_edm_is_refused(files: dict[str, Path]) -> None:
    header = read_header(files["sdxl folder"])
    configs = {**header.configs, "scheduler": {"_class_name": "EDMDPMSolverMultistepScheduler"}}
    with pytest.raises(CheckpointError, match="EDM"):
        detect(replace(header, configs=configs))
