"""SDXL's and its refiner's original layout <-> diffusers, as test_sd_layout.py does it for SD1 and SD2.

What differs from SD1 and SD2: where text encoders lie, the projection that is transposed, label_emb, several depths.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints.files import CheckpointError, TensorReader, open_tensors, read_header
from library.checkpoints.sd_layout import REFINER, SD1, SDXL, to_diffusers, to_original
from library.checkpoints.writer import write_safetensors
from tests import tiny
from tests.checkpoints.test_sd_layout import Tensors, assert_same, header_of, loaded

pytestmark = pytest.mark.slow  # whole miniatures, each written and read

LAYOUTS = {"sdxl": SDXL, "refiner": REFINER}
TE2 = {"sdxl": "conditioner.embedders.1.model.", "refiner": "conditioner.embedders.0.model."}
TE1 = "conditioner.embedders.0.transformer.text_model."


@pytest.fixture(scope="module", params=["sdxl", "refiner"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def source(family: str) -> Tensors:
    """The miniature as a real file has it, with position_ids of SDXL's first text encoder, and marks.

    Names are mapped without a look at sizes, so a corner of each tensor does.
    """
    tensors = {name: corner(name, tensor) for name, tensor in tiny.original_state_dict(family).items()}
    if family == "sdxl":
        tensors[f"{TE1}embeddings.position_ids"] = torch.arange(77)[None]
    return tensors | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}


def corner(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """8 rows and columns at most; of stacked queries, keys and values 8 each."""
    rows = 24 if "in_proj" in name else 8
    return tensor[:rows, :8].clone() if tensor.ndim > 1 else tensor[:rows].clone() if tensor.ndim else tensor


def write(path: Path, tensors: Tensors) -> TensorReader:
    save_file(tensors, path)
    return open_tensors(path)


# --- full size, on the meta device ----------------------------------------------------------------------------------


@cache
def full_size(family: str) -> dict[str, Tensors]:
    """SDXL base 1.0 and refiner 1.0 as diffusers and transformers build them from the published configs."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    cross, plain = "CrossAttn", ""
    levels: dict[str, Any] = {
        "sdxl": {"block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "heads": (5, 10, 20),
                 "depth": [1, 2, 10], "down": (plain, cross, cross), "label": 2816},
        "refiner": {"block_out_channels": (384, 768, 1536, 1536), "cross_attention_dim": 1280,
                    "heads": (6, 12, 24, 24), "depth": 4, "down": (plain, cross, cross, plain), "label": 2560},
    }[family]  # fmt: skip

    def clip(width: int, layers: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
            projection_dim=width,
        )  # fmt: skip

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=levels["block_out_channels"],
            cross_attention_dim=levels["cross_attention_dim"],
            attention_head_dim=levels["heads"],
            transformer_layers_per_block=levels["depth"],
            down_block_types=tuple(f"{kind}DownBlock2D" for kind in levels["down"]),
            up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(levels["down"])),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=levels["label"],
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        )
        models: dict[str, Any] = {"unet": unet, "vae": vae}
        if family == "sdxl":
            models["text_encoder"] = CLIPTextModel(clip(768, 12))
        models["text_encoder_2"] = CLIPTextModelWithProjection(clip(1280, 32))
    return {
        part: {with_level(name) if part == "text_encoder" else name: t for name, t in model.state_dict().items()}
        for part, model in models.items()
    }


def with_level(name: str) -> str:
    """A text encoder's name as transformers 4 and users' files have it."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


# A few names and shapes of sd_xl_base_1.0.safetensors and sd_xl_refiner_1.0.safetensors, by hand from
# Stability-AI/generative-models (configs/inference/sd_xl_base.yaml, sd_xl_refiner.yaml, openaimodel.py) and open_clip.
UNET = "model.diffusion_model."
KNOWN: dict[str, dict[str, tuple[int, ...]]] = {
    "sdxl": {
        f"{UNET}label_emb.0.0.weight": (1280, 2816),
        f"{UNET}label_emb.0.2.bias": (1280,),
        f"{UNET}time_embed.0.weight": (1280, 320),
        f"{UNET}input_blocks.3.0.op.weight": (320, 320, 3, 3),
        f"{UNET}input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        f"{UNET}input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        f"{UNET}input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
        f"{UNET}middle_block.1.proj_in.weight": (1280, 1280),
        f"{UNET}output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        f"{UNET}output_blocks.5.2.conv.weight": (640, 640, 3, 3),
        f"{UNET}output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        f"{TE1}encoder.layers.11.mlp.fc1.weight": (3072, 768),
        "conditioner.embedders.1.model.positional_embedding": (77, 1280),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
    },
    "refiner": {
        f"{UNET}label_emb.0.0.weight": (1536, 2560),
        f"{UNET}input_blocks.4.1.transformer_blocks.3.attn2.to_k.weight": (768, 1280),
        f"{UNET}input_blocks.9.0.op.weight": (1536, 1536, 3, 3),
        f"{UNET}input_blocks.11.0.out_layers.3.weight": (1536, 1536, 3, 3),
        f"{UNET}middle_block.1.transformer_blocks.3.norm3.weight": (1536,),
        f"{UNET}output_blocks.2.1.conv.weight": (1536, 1536, 3, 3),
        f"{UNET}output_blocks.5.2.conv.weight": (1536, 1536, 3, 3),
        f"{UNET}output_blocks.8.2.conv.weight": (768, 768, 3, 3),
        f"{UNET}output_blocks.11.0.in_layers.2.weight": (384, 768, 3, 3),
        "conditioner.embedders.0.model.ln_final.weight": (1280,),
        "conditioner.embedders.0.model.text_projection": (1280, 1280),
    },
}


def test_every_name_and_shape_of_the_real_models(family: str) -> None:
    parts, layout = full_size(family), LAYOUTS[family]
    scale = {f"{TE2[family]}logit_scale": torch.empty((), device="meta")}  # no module has it, real files do
    joined = to_original(parts, scale, layout).tensors
    counts = [sum(name.startswith(part.prefix) for name in joined) for part in layout.parts]
    assert counts == ([1680, 248, 196, 390] if family == "sdxl" else [1220, 248, 390])
    assert len(joined) == sum(counts) and (family != "sdxl" or len(joined) == 2514)
    assert {name: joined[name].shape for name in KNOWN[family]} == KNOWN[family]

    back = to_diffusers(TensorReader(header_of(joined)), layout)
    assert {part: {name: t.shape for name, t in tensors.items()} for part, tensors in back.parts.items()} == {
        part: {name: tuple(t.shape) for name, t in tensors.items()} for part, tensors in parts.items()
    }
    assert (list(back.kept), back.notes) == (list(scale), ())


def test_openclip_names_are_those_of_open_clip(family: str) -> None:
    # the text side of open_clip's CLIP.state_dict(), ViT-bigG-14 (open_clip/model.py, transformer.py)
    leaves = [
        "ln_1.weight", "ln_1.bias", "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight",
        "attn.out_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight",
        "mlp.c_proj.bias",
    ]  # fmt: skip
    theirs = {f"transformer.resblocks.{n}.{leaf}" for n in range(32) for leaf in leaves}
    theirs |= {"token_embedding.weight", "positional_embedding", "ln_final.weight", "ln_final.bias", "text_projection"}
    joined = to_original(full_size(family), {}, LAYOUTS[family]).tensors
    prefix = TE2[family]
    assert {name.removeprefix(prefix) for name in joined if name.startswith(prefix)} == theirs


# --- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_there_and_back_is_bit_equal(tmp_path: Path, family: str, source: Tensors, ending: str) -> None:
    source = {
        name: tensor.half() if tensor.ndim and tensor.is_floating_point() else tensor for name, tensor in source.items()
    }
    source |= {"denoiser.sigmas": torch.rand(10), "edm_mean": torch.rand(4)}
    if ending == "ckpt":
        torch.save({"state_dict": source}, tmp_path / "a.ckpt")
        reader = open_tensors(tmp_path / "a.ckpt")
    else:
        reader = write(tmp_path / "a.safetensors", source)
    split = to_diffusers(reader, LAYOUTS[family])
    assert len(split.notes) == 1 and "1 tensor " in split.notes[0] and split.notes[0].endswith(": edm_mean")
    parts = {part: loaded(tensors) for part, tensors in split.parts.items()}
    assert all(tensor.is_contiguous() for tensors in parts.values() for tensor in tensors.values())
    joined = to_original(parts, loaded(split.kept), LAYOUTS[family], like=reader.header)
    assert joined.notes == ()
    assert_same(loaded(joined.tensors), source)


def test_the_pooled_projection_is_turned(family: str, source: Tensors, tmp_path: Path) -> None:
    """OpenCLIP: pooled @ text_projection (open_clip/model.py, encode_text). transformers: a Linear without bias."""
    matrix = source[f"{TE2[family]}text_projection"]
    weight = to_diffusers(write(tmp_path / "a.safetensors", source), LAYOUTS[family]).parts["text_encoder_2"]
    pooled = torch.randn(3, matrix.shape[0], dtype=torch.float64)
    linear = torch.nn.functional.linear(pooled, weight["text_projection.weight"].load().double())
    torch.testing.assert_close(linear, pooled @ matrix.double())
    assert not matrix.equal(matrix.T)


def test_a_projection_written_as_a_linears_weight_is_read_and_kept_so(
    family: str, source: Tensors, tmp_path: Path
) -> None:
    bare, linear = f"{TE2[family]}text_projection", f"{TE2[family]}text_projection.weight"
    named = {name: tensor for name, tensor in source.items() if name != bare} | {linear: source[bare].T.contiguous()}
    reader = write(tmp_path / "a.safetensors", named)
    usual = write(tmp_path / "b.safetensors", source)
    split = to_diffusers(reader, LAYOUTS[family])
    text = to_diffusers(usual, LAYOUTS[family]).parts["text_encoder_2"]
    assert_same(loaded(split.parts["text_encoder_2"]), loaded(text))
    for header, expected in ((reader.header, named), (usual.header, source), (None, source)):
        joined = to_original(split.parts, split.kept, LAYOUTS[family], like=header)
        assert_same(loaded(joined.tensors), expected)


def test_the_source_files_conventions_are_kept(family: str, source: Tensors, tmp_path: Path) -> None:
    """No `text_model.` level, ComfyUI's position_ids, 4-D projections in the U-Net and Linear ones in the VAE."""
    odd = {name.replace(".transformer.text_model.", ".transformer."): tensor for name, tensor in source.items()}
    odd[f"{TE2[family]}transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    for name, tensor in list(odd.items()):
        if name.startswith(UNET) and name.endswith(("proj_in.weight", "proj_out.weight")):
            odd[name] = tensor[:, :, None, None].contiguous()
        elif ".mid.attn_1." in name and tensor.ndim == 4:
            odd[name] = tensor.flatten(1)
    reader = write(tmp_path / "a.safetensors", odd)
    split = to_diffusers(reader, LAYOUTS[family])
    assert all(name.startswith(("text_model.", "text_projection")) for name in split.parts["text_encoder_2"])
    assert split.notes == ()
    assert_same(loaded(to_original(split.parts, split.kept, LAYOUTS[family], like=reader.header).tensors), odd)


def test_a_folder_and_a_file_of_one_model_are_the_same(tmp_path: Path, family: str) -> None:
    level = family == "refiner"  # of the first text encoder; the second has it in every version of transformers
    folder = open_tensors(tiny.write_diffusers(tmp_path / "m", family, text_model_level=level))
    split = to_diffusers(folder, LAYOUTS[family])
    joined = to_original(split.parts, split.kept, LAYOUTS[family], like=folder.header)
    assert joined.notes == ()
    expected = tiny.original_state_dict(family)
    del expected[f"{TE2[family]}logit_scale"]  # no module of transformers has it
    assert_same(loaded(joined.tensors), expected)


def test_marks_pass_a_save_precision_unchanged(tmp_path: Path, family: str, source: Tensors) -> None:
    path = tmp_path / "a.safetensors"
    reader = write(path, source)
    split = to_diffusers(reader, LAYOUTS[family])
    joined = to_original(split.parts, split.kept, LAYOUTS[family], reader.header, dtype="BF16")
    write_safetensors(tmp_path / "b.safetensors", joined.tensors)
    kept = {f"{TE2[family]}logit_scale", f"{TE1}embeddings.position_ids", "v_pred", "ztsnr"}
    expected = {name: t if name in kept else t.bfloat16() for name, t in source.items()}
    assert_same(load_file(tmp_path / "b.safetensors"), expected)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inner",
    ["model.diffusion_model.label_emb.0.4.weight", "conditioner.embedders.{n}.model.visual.proj",
     "model.diffusion_model.input_blocks.1.2.weight"],
)  # fmt: skip
def test_a_key_without_a_rule_is_an_error_that_lists_it(family: str, inner: str) -> None:
    joined = to_original(full_size(family), {}, LAYOUTS[family]).tensors
    name = inner.format(n=1 if family == "sdxl" else 0)
    header = header_of({**joined, name: joined[f"{UNET}out.2.bias"]})
    last = name.split("model.", 2)[-1] if "label" not in name and "input" not in name else name.removeprefix(UNET)
    with pytest.raises(CheckpointError, match=rf"1 unknown tensor: {last.removeprefix('model.')}"):
        to_diffusers(TensorReader(header), LAYOUTS[family])


def test_a_missing_text_encoder_is_named() -> None:
    joined = to_original(full_size("refiner"), {}, REFINER).tensors
    header = header_of(joined)
    with pytest.raises(CheckpointError, match=r"has no text_encoder .*conditioner\.embedders\.0\.transformer\."):
        to_diffusers(TensorReader(header), SDXL)
    with pytest.raises(CheckpointError, match="label_emb"):
        to_diffusers(TensorReader(header), SD1, ("unet",))


def test_a_projection_that_is_no_matrix_is_refused(tmp_path: Path) -> None:
    header = header_of(to_original(full_size("refiner"), {}, REFINER).tensors)
    name = f"{TE2['refiner']}text_projection"
    header = header_of({**header.tensors, name: header.tensors[f"{TE2['refiner']}ln_final.bias"]})
    with pytest.raises(CheckpointError, match=r"text_projection: not a matrix"):
        to_diffusers(TensorReader(header), REFINER)


# --- diffusers' own converters as judges ----------------------------------------------------------------------------


def test_diffusers_reads_the_same_from_a_file(tmp_path: Path, family: str, source: Tensors) -> None:
    from diffusers.loaders.single_file_utils import (
        convert_ldm_clip_checkpoint,
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
        convert_open_clip_checkpoint,
    )

    reader = write(tmp_path / "a.safetensors", source)
    parts = {part: loaded(tensors) for part, tensors in to_diffusers(reader, LAYOUTS[family]).parts.items()}
    config = {**tiny.unet_config(family), "class_embed_type": None, "num_class_embeds": None}
    assert_same(parts["unet"], convert_ldm_unet_checkpoint(dict(source), config))
    vae = convert_ldm_vae_checkpoint(dict(source), tiny.vae_config(family))
    assert_same(parts["vae"], {n: t.flatten(1) if "attentions" in n and t.ndim == 4 else t for n, t in vae.items()})

    second = convert_open_clip_checkpoint(None, dict(source), prefix=TE2[family])
    assert_same(parts["text_encoder_2"], second)
    if family == "sdxl":
        first = convert_ldm_clip_checkpoint(source)
        first = {with_level(name): t for name, t in first.items() if "position_ids" not in name}
        assert_same(parts["text_encoder"], first)


def test_headers_of_both_kinds_need_no_weights(tmp_path: Path, family: str, source: Tensors) -> None:
    """Names are mapped from the header alone: the plan and a dry run read no tensor but position_ids, to check them."""
    source = {name: tensor for name, tensor in source.items() if not name.endswith("position_ids")}
    save_file(source, tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").unlink()
    split = to_diffusers(TensorReader(header), LAYOUTS[family])
    assert sum(len(tensors) for tensors in split.parts.values()) + len(split.kept) > 1500
