"""Original layout <-> diffusers: nothing left over, there and back is bit-equal, diffusers' converters agree."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints.files import CheckpointError, Header, TensorInfo, TensorReader, open_tensors, read_header
from library.checkpoints.sd_layout import SD1, SD2, to_diffusers, to_original
from library.checkpoints.writer import write_safetensors
from tests import tiny

pytestmark = pytest.mark.slow  # whole miniatures, each written and read

LAYOUTS = {"sd1": SD1, "sd2": SD2}
Tensors = dict[str, torch.Tensor]


def loaded(tensors: Mapping[str, Any]) -> Tensors:
    return {name: tensor.load() for name, tensor in tensors.items()}


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """All there is to a tensor: dtype, shape and every bit."""
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if bits(a[name]) != bits(b[name])]


def header_of(tensors: Mapping[str, Any]) -> Header:
    return Header(Path("meta"), "safetensors", {name: TensorInfo(t.dtype, t.shape) for name, t in tensors.items()})


# --- full size, on the meta device ----------------------------------------------------------------------------------


@cache
def full_size(family: str) -> dict[str, dict[str, torch.Tensor]]:
    """SD1.5 and SD2.1 as diffusers and transformers build them from the published configs, without weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    sd2 = family == "sd2"
    heads: dict[str, Any] = {"attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=1024 if sd2 else 768,
            **(heads if sd2 else {"attention_head_dim": 8}),
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        )
        width, layers = (1024, 23) if sd2 else (768, 12)
        config = CLIPTextConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64
        )
        text = CLIPTextModel(config).state_dict()
    # the names that transformers 4 and users' files have
    text = {name if name.startswith("text_model.") else f"text_model.{name}": tensor for name, tensor in text.items()}
    return {"unet": dict(unet.state_dict()), "vae": dict(vae.state_dict()), "text_encoder": text}


@pytest.mark.parametrize(("family", "text", "total"), [("sd1", 196, 1130), ("sd2", 294, 1228)])
def test_every_name_and_shape_of_the_real_models(family: str, text: int, total: int) -> None:
    parts = full_size(family)
    layout = LAYOUTS[family]
    joined = to_original(parts, {}, layout).tensors
    counts = [sum(name.startswith(part.prefix) for name in joined) for part in layout.parts]
    assert [*counts, len(joined)] == [686, 248, text, total]
    # a few names and shapes of the published files, by hand
    context, tokens = (1024, 49408) if family == "sd2" else (768, 49408)
    square = () if family == "sd2" else (1, 1)
    known = {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight": (1280, context),
        "model.diffusion_model.input_blocks.11.0.out_layers.3.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.middle_block.1.proj_in.weight": (1280, 1280, *square),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight": (2560, 320),
        "model.diffusion_model.out.2.bias": (4,),
        "first_stage_model.encoder.down.2.block.0.nin_shortcut.weight": (512, 256, 1, 1),
        "first_stage_model.encoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.0.block.2.conv2.weight": (128, 128, 3, 3),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
    }
    if family == "sd1":
        known["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"] = (tokens, 768)
        known["cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight"] = (3072, 768)
    else:
        known["cond_stage_model.model.positional_embedding"] = (77, 1024)
        known["cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight"] = (3072, 1024)
        known["cond_stage_model.model.transformer.resblocks.0.mlp.c_proj.weight"] = (1024, 4096)
        known["cond_stage_model.model.text_projection"] = (1024, 1024)
        known["cond_stage_model.model.logit_scale"] = ()
    assert {name: joined[name].shape for name in known} == known

    back = to_diffusers(TensorReader(header_of(joined)), layout)
    assert {part: {name: t.shape for name, t in tensors.items()} for part, tensors in back.parts.items()} == {
        part: {name: tuple(t.shape) for name, t in tensors.items()} for part, tensors in parts.items()
    }
    assert len(back.kept) == (14 if family == "sd2" else 0)
    assert back.notes == ()


def test_openclip_names_are_those_of_open_clip() -> None:
    # the text side of open_clip's CLIP.state_dict(), ViT-H-14 (open_clip/model.py, transformer.py)
    leaves = [
        "ln_1.weight", "ln_1.bias", "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight",
        "attn.out_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight",
        "mlp.c_proj.bias",
    ]  # fmt: skip
    theirs = {f"transformer.resblocks.{n}.{leaf}" for n in range(24) for leaf in leaves}
    theirs |= {"token_embedding.weight", "positional_embedding", "ln_final.weight", "ln_final.bias"}
    theirs |= {"text_projection", "logit_scale"}
    prefix = "cond_stage_model.model."
    joined = to_original(full_size("sd2"), {}, SD2).tensors
    assert {name.removeprefix(prefix) for name in joined if name.startswith(prefix)} == theirs


# --- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_there_and_back_is_bit_equal(tmp_path: Path, family: str, ending: str) -> None:
    buffers = {"betas": torch.rand(10, dtype=torch.float64), "alphas_cumprod": torch.rand(10), "odd_one": torch.ones(3)}
    path = tiny.write_single_file(tmp_path / f"a.{ending}", family, dtype=torch.float16, position_ids=True)
    reader = open_tensors(path)
    source = {name: reader.get(name) for name in reader.names()} | buffers
    save_file({name: tensor.contiguous() for name, tensor in source.items()}, tmp_path / "b.safetensors")
    reader = open_tensors(tmp_path / "b.safetensors")
    split = to_diffusers(reader, LAYOUTS[family])
    assert len(split.notes) == 1 and "odd_one" in split.notes[0] and "betas" not in split.notes[0]
    parts = {part: loaded(tensors) for part, tensors in split.parts.items()}
    joined = to_original(parts, loaded(split.kept), LAYOUTS[family], like=reader.header)
    assert joined.notes == ()
    assert_same(loaded(joined.tensors), source)


@pytest.mark.parametrize(("family", "square"), [("sd1", False), ("sd2", True)])
def test_the_source_files_conventions_are_kept(tmp_path: Path, family: str, square: bool) -> None:
    # the other shape of the projections than is usual, Linear attention in the VAE, and no text_model. level
    source = tiny.original_state_dict(family, text_model_level=False)
    for name in list(source):
        if name.endswith(("proj_in.weight", "proj_out.weight")) and name.startswith("model.diffusion_model."):
            flat = source[name].flatten(1)
            source[name] = flat[:, :, None, None].contiguous() if square else flat
        if ".mid.attn_1." in name and source[name].ndim == 4:
            source[name] = source[name].flatten(1)
    save_file(source, tmp_path / "a.safetensors")
    reader = open_tensors(tmp_path / "a.safetensors")
    split = to_diffusers(reader, LAYOUTS[family])
    projection = split.parts["unet"]["mid_block.attentions.0.proj_in.weight"]
    assert len(projection.shape) == (4 if square else 2)
    assert "text_model.final_layer_norm.weight" in split.parts["text_encoder"]
    joined = to_original(split.parts, split.kept, LAYOUTS[family], like=reader.header)
    assert_same(loaded(joined.tensors), source)
    # a model whose projections were built the other way round fits too
    unet = {
        name: t.reshape((*t.shape[:2],) if square else (*t.shape[:2], 1, 1)) if "attentions" in name and "proj_" in name
        and name.endswith(("proj_in.weight", "proj_out.weight")) else t
        for name, t in split.parts["unet"].items()
    }  # fmt: skip
    again = to_original({**split.parts, "unet": unet}, split.kept, LAYOUTS[family], like=reader.header)
    assert_same(loaded(again.tensors), source)


def test_sd2_from_a_diffusers_folder_gets_what_it_lacks(tmp_path: Path) -> None:
    reader = open_tensors(tiny.write_diffusers(tmp_path / "m", "sd2"))
    split = to_diffusers(reader, SD2)
    assert split.kept == {}
    joined = to_original(split.parts, split.kept, SD2, like=reader.header)
    text = {n: t for n, t in loaded(joined.tensors).items() if n.startswith("cond_stage_model.model.")}
    last, before = (
        "cond_stage_model.model.transformer.resblocks.2.",
        "cond_stage_model.model.transformer.resblocks.1.",
    )
    spare = {name.removeprefix(last): tensor for name, tensor in text.items() if name.startswith(last)}
    assert_same(spare, {n.removeprefix(before): t for n, t in text.items() if n.startswith(before)})
    assert len(spare) == 12
    assert text["cond_stage_model.model.text_projection"].equal(torch.ones(128, 128))
    assert text["cond_stage_model.model.logit_scale"].equal(torch.tensor(1.0))
    assert len(joined.notes) == 1 and joined.notes[0].startswith("added 14 tensors")
    # apart from those, it is the file that tests/tiny.py writes by the published layout
    expected = tiny.original_state_dict("sd2")
    made = {name for name in text if name.startswith(last) or name.endswith(("text_projection", "logit_scale"))}
    assert_same(
        {n: t for n, t in loaded(joined.tensors).items() if n not in made},
        {n: t for n, t in expected.items() if n not in made},
    )


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("level", [True, False])
def test_a_folder_and_a_file_of_one_model_are_the_same(tmp_path: Path, family: str, level: bool) -> None:
    folder = open_tensors(tiny.write_diffusers(tmp_path / "m", family, text_model_level=level))
    file = open_tensors(tiny.write_single_file(tmp_path / "m.safetensors", family))
    a, b = to_diffusers(folder, LAYOUTS[family]).parts, to_diffusers(file, LAYOUTS[family]).parts
    for part in a:
        assert_same(loaded(a[part]), loaded(b[part]))


def test_a_save_precision_casts_the_model_and_nothing_else(tmp_path: Path) -> None:
    path = tiny.write_single_file(tmp_path / "a.safetensors", "sd1", position_ids=True)
    source = load_file(path) | {"betas": torch.rand(10)}
    save_file(source, path)
    split = to_diffusers(open_tensors(path), SD1)
    joined = to_original(split.parts, split.kept, SD1, like=read_header(path), dtype="F16")
    untouched = {"betas", "cond_stage_model.transformer.text_model.embeddings.position_ids"}
    assert_same(loaded(joined.tensors), {n: t if n in untouched else t.half() for n, t in source.items()})


# --- variants and refusals ------------------------------------------------------------------------------------------


def test_ema_copies_and_vae_losses_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tiny.write_single_file(tmp_path / "a.safetensors", "sd1", ema=True)
    save_file(load_file(path) | {"first_stage_model.loss.logvar": torch.zeros(1)}, path)
    split = to_diffusers(open_tensors(path), SD1)
    assert split.kept == {}
    assert len(split.notes) == 1 and split.notes[0].startswith("left out: 4 tensors of EMA copies")


@pytest.mark.parametrize("level", ["model.", "state_dict."])
def test_a_wrapped_file_gives_the_same_model(tmp_path: Path, level: str) -> None:
    source = tiny.original_state_dict("sd1")
    save_file({level + name: tensor for name, tensor in source.items()}, tmp_path / "a.safetensors")
    reader = open_tensors(tmp_path / "a.safetensors")
    split = to_diffusers(reader, SD1)
    # and is written back as users' tools want it: without the level
    assert_same(loaded(to_original(split.parts, split.kept, SD1, like=reader.header).tensors), source)


@pytest.mark.parametrize(
    "name",
    ["model.diffusion_model.label_emb.0.0.weight", "first_stage_model.encoder.down.0.attn.0.q.weight",
     "cond_stage_model.transformer.vision_model.x.weight", "model.diffusion_model.out.2.scale"],
)  # fmt: skip
def test_a_key_without_a_rule_is_an_error_that_lists_it(tmp_path: Path, name: str) -> None:
    source = tiny.original_state_dict("sd1") | {name: torch.zeros(1)}
    save_file(source, tmp_path / "a.safetensors")
    inner = name.split(".", 2)[2] if "transformer" in name or "diffusion" in name else name.split(".", 1)[1]
    with pytest.raises(CheckpointError, match=rf"a\.safetensors.*1 unknown tensor: {inner}"):
        to_diffusers(open_tensors(tmp_path / "a.safetensors"), SD1)


def test_a_missing_part_is_named_unless_not_asked_for(tmp_path: Path) -> None:
    source = {n: t for n, t in tiny.original_state_dict("sd1").items() if not n.startswith("first_stage_model.")}
    save_file(source, tmp_path / "a.safetensors")
    reader = open_tensors(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="has no vae"):
        to_diffusers(reader, SD1)
    assert set(to_diffusers(reader, SD1, ("unet", "text_encoder")).parts) == {"unet", "text_encoder"}


def test_infinite_buffers_of_the_source_pass_through_a_save(tmp_path: Path) -> None:
    mask = torch.full((4, 4), float("-inf")).triu(1)
    source = tiny.original_state_dict("sd2") | {"cond_stage_model.model.attn_mask": mask}
    save_file(source, tmp_path / "a.safetensors")
    reader = open_tensors(tmp_path / "a.safetensors")
    split = to_diffusers(reader, SD2)
    write_safetensors(tmp_path / "b.safetensors", to_original(split.parts, split.kept, SD2, reader.header).tensors)
    assert_same(load_file(tmp_path / "b.safetensors"), source)


# --- other sizes, and diffusers' own converters as judges -----------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "one layer, two levels": {
        "block_out_channels": (32, 64), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "attention at every level": {
        "block_out_channels": (32, 64, 64), "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3, "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    },
    "two transformer blocks, linear": {
        "block_out_channels": (32, 64, 64), "layers_per_block": 2, "use_linear_projection": True,
        "transformer_layers_per_block": 2, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
}  # fmt: skip


def small_parts(shape: str, sd2: bool) -> tuple[dict[str, Any], dict[str, Tensors]]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    unet = UNet2DConditionModel(sample_size=8, cross_attention_dim=64, attention_head_dim=8, **SHAPES[shape])
    levels = len(SHAPES[shape]["block_out_channels"])
    vae = AutoencoderKL(
        block_out_channels=SHAPES[shape]["block_out_channels"],
        layers_per_block=SHAPES[shape]["layers_per_block"],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
    )
    config = CLIPTextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1, vocab_size=99
    )
    models = {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(config)}
    parts = {part: {n: t.clone() for n, t in model.state_dict().items()} for part, model in models.items()}
    for tensor in (tensor for part in parts.values() for tensor in part.values()):
        tensor.normal_()  # so that no two tensors are alike, biases and norms included
    return models, parts


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_diffusers_converters_read_our_files(shape: str, family: str) -> None:
    from diffusers.loaders.single_file_utils import (
        convert_ldm_clip_checkpoint,
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
        convert_open_clip_checkpoint,
    )

    models, parts = small_parts(shape, family == "sd2")
    layout = LAYOUTS[family]
    original = loaded(to_original(parts, {}, layout).tensors)
    unet = convert_ldm_unet_checkpoint(dict(original), dict(models["unet"].config))
    assert_same(unet, parts["unet"])
    vae = convert_ldm_vae_checkpoint(dict(original), dict(models["vae"].config))
    vae = {n: t.flatten(1) if "mid_block.attentions" in n and t.ndim == 4 else t for n, t in vae.items()}
    assert_same(vae, parts["vae"])
    if family == "sd1":
        text = convert_ldm_clip_checkpoint(original)
        assert_same({name.removeprefix("text_model."): t for name, t in text.items()}, parts["text_encoder"])
    else:
        text = convert_open_clip_checkpoint(models["text_encoder"], original)
        text = {
            n.removeprefix("text_model."): t for n, t in text.items() if "layers.2." not in n and "projection" not in n
        }
        assert_same(text, parts["text_encoder"])


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_our_reading_agrees_with_diffusers_converters(tmp_path: Path, family: str) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    path = tiny.write_single_file(tmp_path / "a.safetensors", family)
    parts = {part: loaded(t) for part, t in to_diffusers(open_tensors(path), LAYOUTS[family]).parts.items()}
    modules = tiny.diffusers_modules(family)
    assert_same(parts["unet"], convert_ldm_unet_checkpoint(load_file(path), dict(modules.unet.config)))
    vae = convert_ldm_vae_checkpoint(load_file(path), dict(modules.vae.config))
    assert_same(parts["vae"], {n: t.flatten(1) if "attentions" in n and t.ndim == 4 else t for n, t in vae.items()})
    assert_same(parts["vae"], modules.vae.state_dict())
    text = {name.removeprefix("text_model."): tensor for name, tensor in parts["text_encoder"].items()}
    assert_same(text, {n.removeprefix("text_model."): t for n, t in modules.text_encoder.state_dict().items()})
