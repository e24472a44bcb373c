"""The tensors that a module of Stable Diffusion has by its configuration, with their shapes: of diffusers'
UNet2DConditionModel and AutoencoderKL, and of transformers' CLIPTextModel. No torch: the plan refuses what a module
could not be filled with, before one is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Shape = tuple[int, ...]
Tensors = Iterator[tuple[str, Shape]]


def unet_tensors(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Tensors of a U-Net; its attention has as many transformer blocks as its level, up and down."""
    return dict(_unet(config))


def vae_tensors(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Tensors of a VAE."""
    return dict(_vae(config))


def text_tensors(config: Mapping[str, Any], *, projects: bool) -> dict[str, Shape]:
    """Tensors of a text encoder, with the names in files; `projects`: with a projection of the pooled state."""
    return dict(_text(config, projects=projects))


def _unet(config: Mapping[str, Any]) -> Tensors:
    widths: list[int] = config["block_out_channels"]
    layers, first, time = config["layers_per_block"], widths[0], 4 * widths[0]
    depths = config["transformer_layers_per_block"]
    depths = [depths] * len(widths) if isinstance(depths, int) else list(depths)
    last = len(widths) - 1

    def level(path: str, inputs: list[int], index: int, *, attends: bool) -> Tensors:
        for place, width in enumerate(inputs):
            yield from _resnet(f"{path}.resnets.{place}", width, widths[index], time)
            if attends:
                yield from _attention(f"{path}.attentions.{place}", widths[index], depths[index], config)

    yield from _conv("conv_in", first, config["in_channels"], 3)
    yield from _linear("time_embedding.linear_1", time, first)
    yield from _linear("time_embedding.linear_2", time, time)
    if config.get("addition_embed_type"):
        yield from _linear("add_embedding.linear_1", time, config["projection_class_embeddings_input_dim"])
        yield from _linear("add_embedding.linear_2", time, time)
    for index, kind in enumerate(config["down_block_types"]):
        path, before = f"down_blocks.{index}", widths[max(index - 1, 0)]
        yield from level(path, [before, *[widths[index]] * (layers - 1)], index, attends=kind.startswith("CrossAttn"))
        if index < last:
            yield from _conv(f"{path}.downsamplers.0.conv", widths[index], widths[index], 3)
    yield from _resnet("mid_block.resnets.0", widths[-1], widths[-1], time)
    yield from _attention("mid_block.attentions.0", widths[-1], depths[-1], config)
    yield from _resnet("mid_block.resnets.1", widths[-1], widths[-1], time)
    for place, kind in enumerate(config["up_block_types"]):
        path, index = f"up_blocks.{place}", last - place
        # each residual block also gets the output of its counterpart on the way down
        inputs = [widths[min(index + 1, last)], *[widths[index]] * layers]
        skips = [*[widths[index]] * layers, widths[max(index - 1, 0)]]
        sums = [own + skip for own, skip in zip(inputs, skips, strict=True)]
        yield from level(path, sums, index, attends=kind.startswith("CrossAttn"))
        if place < last:
            yield from _conv(f"{path}.upsamplers.0.conv", widths[index], widths[index], 3)
    yield from _norm("conv_norm_out", first)
    yield from _conv("conv_out", config["out_channels"], first, 3)


def _attention(path: str, width: int, depth: int, config: Mapping[str, Any]) -> Tensors:
    """A Transformer2DModel; its projections are 1x1 convolutions or Linear."""
    text = config["cross_attention_dim"]
    project = _linear if config["use_linear_projection"] else _pointwise
    yield from _norm(f"{path}.norm", width)
    yield from project(f"{path}.proj_in", width, width)
    for place in range(depth):
        block = f"{path}.transformer_blocks.{place}"
        for norm in ("norm1", "norm2", "norm3"):
            yield from _norm(f"{block}.{norm}", width)
        for name, states in (("attn1", width), ("attn2", text)):
            yield f"{block}.{name}.to_q.weight", (width, width)
            yield f"{block}.{name}.to_k.weight", (width, states)
            yield f"{block}.{name}.to_v.weight", (width, states)
            yield from _linear(f"{block}.{name}.to_out.0", width, width)
        yield from _linear(f"{block}.ff.net.0.proj", 8 * width, width)
        yield from _linear(f"{block}.ff.net.2", width, 4 * width)
    yield from project(f"{path}.proj_out", width, width)


def _resnet(path: str, inner: int, outer: int, time: int | None) -> Tensors:
    yield from _norm(f"{path}.norm1", inner)
    yield from _conv(f"{path}.conv1", outer, inner, 3)
    if time is not None:
        yield from _linear(f"{path}.time_emb_proj", outer, time)
    yield from _norm(f"{path}.norm2", outer)
    yield from _conv(f"{path}.conv2", outer, outer, 3)
    if inner != outer:
        yield from _pointwise(f"{path}.conv_shortcut", outer, inner)


def _vae(config: Mapping[str, Any]) -> Tensors:
    widths: list[int] = config["block_out_channels"]
    layers, latent, last = config["layers_per_block"], config["latent_channels"], len(widths) - 1

    def middle(side: str) -> Tensors:
        yield from _resnet(f"{side}.mid_block.resnets.0", widths[-1], widths[-1], None)
        yield from _norm(f"{side}.mid_block.attentions.0.group_norm", widths[-1])
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            yield from _linear(f"{side}.mid_block.attentions.0.{name}", widths[-1], widths[-1])
        yield from _resnet(f"{side}.mid_block.resnets.1", widths[-1], widths[-1], None)

    yield from _conv("encoder.conv_in", widths[0], config["in_channels"], 3)
    for index, width in enumerate(widths):
        for place in range(layers):
            before = width if place else widths[max(index - 1, 0)]
            yield from _resnet(f"encoder.down_blocks.{index}.resnets.{place}", before, width, None)
        if index < last:
            yield from _conv(f"encoder.down_blocks.{index}.downsamplers.0.conv", width, width, 3)
    yield from middle("encoder")
    yield from _norm("encoder.conv_norm_out", widths[-1])
    yield from _conv("encoder.conv_out", 2 * latent, widths[-1], 3)
    yield from _pointwise("quant_conv", 2 * latent, 2 * latent)
    yield from _pointwise("post_quant_conv", latent, latent)
    yield from _conv("decoder.conv_in", widths[-1], latent, 3)
    yield from middle("decoder")
    for index, width in enumerate(reversed(widths)):
        for place in range(layers + 1):
            before = width if place else widths[min(last - index + 1, last)]
            yield from _resnet(f"decoder.up_blocks.{index}.resnets.{place}", before, width, None)
        if index < last:
            yield from _conv(f"decoder.up_blocks.{index}.upsamplers.0.conv", width, width, 3)
    yield from _norm("decoder.conv_norm_out", widths[0])
    yield from _conv("decoder.conv_out", config["out_channels"], widths[0], 3)


def _text(config: Mapping[str, Any], *, projects: bool) -> Tensors:
    width, inner = config["hidden_size"], config["intermediate_size"]
    yield "text_model.embeddings.token_embedding.weight", (config["vocab_size"], width)
    yield "text_model.embeddings.position_embedding.weight", (config["max_position_embeddings"], width)
    for index in range(config["num_hidden_layers"]):
        layer = f"text_model.encoder.layers.{index}"
        yield from _norm(f"{layer}.layer_norm1", width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{layer}.self_attn.{name}", width, width)
        yield from _norm(f"{layer}.layer_norm2", width)
        yield from _linear(f"{layer}.mlp.fc1", inner, width)
        yield from _linear(f"{layer}.mlp.fc2", width, inner)
    yield from _norm("text_model.final_layer_norm", width)
    if projects:
        yield "text_projection.weight", (config["projection_dim"], width)


def _linear(path: str, outer: int, inner: int) -> Tensors:
    yield f"{path}.weight", (outer, inner)
    yield f"{path}.bias", (outer,)


def _conv(path: str, outer: int, inner: int, size: int) -> Tensors:
    yield f"{path}.weight", (outer, inner, size, size)
    yield f"{path}.bias", (outer,)


def _pointwise(path: str, outer: int, inner: int) -> Tensors:
    return _conv(path, outer, inner, 1)


def _norm(path: str, width: int) -> Tensors:
    yield f"{path}.weight", (width,)
    yield f"{path}.bias", (width,)
