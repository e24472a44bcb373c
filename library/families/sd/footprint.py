"""What the modules of Stable Diffusion leave in memory: the forward passes of diffusers' UNet2DConditionModel and
AutoencoderKL, operation by operation, over shapes. No torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from library.families.sd.shapes import count_blocks
from library.footprint.module import Module
from library.footprint.tape import FULL, Tensor

_GROUPS = 32


def unet(
    module: Module,
    noisy: Tensor,
    states: Tensor,
    *,
    pooled: Tensor | None = None,
    ids: int = 0,
    heads: int | None = None,
    head_size: int | None = None,
) -> Tensor:
    """The output (n, 4, h, w) of a U-Net for noisy latents and hidden states (n, L, width); `ids`: sizes and scores it
    is conditioned on, with the `pooled` text. Heads as in Variant."""

    def attend(path: str, x: Tensor) -> Tensor:
        return _transformer(module, path, x, states, heads or x.shape[1] // (head_size or x.shape[1]))

    time = _time(module, noisy.shape[0], pooled, ids)
    x = module.conv("conv_in", noisy)
    skips = [x]
    for level in range(count_blocks(module.tensors, "down_blocks.")):
        x = _down(module, f"down_blocks.{level}", x, time, attend, skips)
    x = _residual(module, "mid_block.resnets.0", x, time)
    x = attend("mid_block.attentions.0", x)
    x = _again(module, _residual, "mid_block.resnets.1", x, time)
    for level in range(count_blocks(module.tensors, "up_blocks.")):
        path = f"up_blocks.{level}"
        own = skips[-count_blocks(module.tensors, f"{path}.resnets.") :]
        del skips[-len(own) :]
        x = _up(module, path, x, time, attend, own)
    x = module.norm("conv_norm_out", x, _GROUPS)
    x = module.activation(x)
    return module.conv("conv_out", x)


# Blocks are functions, as in diffusers: whoever calls them still holds their input.


def _down(
    module: Module, path: str, x: Tensor, time: Tensor, attend: Callable[[str, Tensor], Tensor], skips: list[Tensor]
) -> Tensor:
    """DownBlock2D and CrossAttnDownBlock2D, whose outputs are added to `skips`."""
    for place in range(count_blocks(module.tensors, f"{path}.resnets.")):
        x = _again(module, _residual, f"{path}.resnets.{place}", x, time)
        if module.has(f"{path}.attentions.{place}.proj_in.weight"):
            x = attend(f"{path}.attentions.{place}", x)
        skips.append(x)
    if module.has(f"{path}.downsamplers.0.conv.weight"):
        x = module.conv(f"{path}.downsamplers.0.conv", x, 2)
        skips.append(x)
    return x


def _up(
    module: Module, path: str, x: Tensor, time: Tensor, attend: Callable[[str, Tensor], Tensor], skips: list[Tensor]
) -> Tensor:
    """UpBlock2D and CrossAttnUpBlock2D."""
    for place, skip in enumerate(reversed(skips)):
        x = _joined(module, x, skip)
        x = _again(module, _residual, f"{path}.resnets.{place}", x, time)
        if module.has(f"{path}.attentions.{place}.proj_in.weight"):
            x = attend(f"{path}.attentions.{place}", x)
    if module.has(f"{path}.upsamplers.0.conv.weight"):
        x = module.conv(f"{path}.upsamplers.0.conv", module.upsampled(x))
    return x


def _again(module: Module, block: Callable[..., Tensor], path: str, *inputs: Tensor) -> Tensor:
    """A block that gradient checkpointing may compute again."""
    return module.repeated(path, partial(block, module, path), *inputs)


def _time(module: Module, batch: int, pooled: Tensor | None, ids: int) -> Tensor:
    """The embedding of the timestep, with that of the sizes and the pooled text."""
    x = module.tape.new((batch, module.tensors["time_embedding.linear_1.weight"][1]), FULL)
    x = module.linear("time_embedding.linear_1", x)
    x = module.linear("time_embedding.linear_2", module.activation(x))
    if pooled is not None:
        width = module.tensors["add_embedding.linear_1.weight"][1]
        sizes = module.tape.new((batch, width - pooled.shape[-1]), FULL)
        more = module.tape.join([pooled, sizes], (batch, width))
        more = module.linear("add_embedding.linear_1", more)
        more = module.linear("add_embedding.linear_2", module.activation(more))
        x = module.added(x, more)
    return x


def _joined(module: Module, x: Tensor, skip: Tensor) -> Tensor:
    return module.tape.join([x, skip], (x.shape[0], x.shape[1] + skip.shape[1], *x.shape[2:]))


def _residual(module: Module, path: str, x: Tensor, time: Tensor | None = None) -> Tensor:
    """ResnetBlock2D."""
    hidden = module.norm(f"{path}.norm1", x, _GROUPS)
    hidden = module.activation(hidden)
    hidden = module.conv(f"{path}.conv1", hidden)
    if time is not None:
        at_time = module.linear(f"{path}.time_emb_proj", module.activation(time))
        hidden = module.added(hidden, at_time)
    hidden = module.norm(f"{path}.norm2", hidden, _GROUPS)
    hidden = module.activation(hidden)
    hidden = module.conv(f"{path}.conv2", hidden)
    if module.has(f"{path}.conv_shortcut.weight"):
        x = module.conv(f"{path}.conv_shortcut", x)
    return module.scaled(module.added(x, hidden))


def _transformer(module: Module, path: str, x: Tensor, states: Tensor, heads: int) -> Tensor:
    """Transformer2DModel; its projections are Linear layers or 1x1 convolutions."""
    batch, width, height, wide = x.shape
    flat, image = (batch, height * wide, width), x.shape
    is_linear = len(module.tensors[f"{path}.proj_in.weight"]) == 2
    hidden = module.norm(f"{path}.norm", x, _GROUPS)
    if is_linear:
        hidden = module.linear(f"{path}.proj_in", module.copied(hidden, flat))
    else:
        hidden = module.copied(module.conv(f"{path}.proj_in", hidden), flat)
    for place in range(count_blocks(module.tensors, f"{path}.transformer_blocks.")):
        block = f"{path}.transformer_blocks.{place}"
        hidden = module.repeated(block, partial(_transformer_block, module, block, heads), hidden, states)
    if is_linear:
        hidden = module.copied(module.linear(f"{path}.proj_out", hidden), image)
    else:
        hidden = module.conv(f"{path}.proj_out", module.copied(hidden, image))
    return module.added(hidden, x)


def _transformer_block(module: Module, path: str, heads: int, x: Tensor, states: Tensor) -> Tensor:
    """BasicTransformerBlock."""
    normal = module.norm(f"{path}.norm1", x)
    x = module.added(_attention(module, f"{path}.attn1", normal, None, heads), x)
    normal = module.norm(f"{path}.norm2", x)
    x = module.added(_attention(module, f"{path}.attn2", normal, states, heads), x)
    normal = module.norm(f"{path}.norm3", x)
    forward = module.gated_gelu(f"{path}.ff.net.0.proj", normal)
    forward = module.linear(f"{path}.ff.net.2", forward)
    return module.added(forward, x)


def _attention(module: Module, path: str, x: Tensor, states: Tensor | None, heads: int) -> Tensor:
    """Attention with AttnProcessor2_0, to `states` or to itself."""
    states = x if states is None else states
    query = module.linear(f"{path}.to_q", x)
    key = module.linear(f"{path}.to_k", states)
    value = module.linear(f"{path}.to_v", states)
    x = module.attention(query, key, value, heads)
    x = module.linear(f"{path}.to_out.0", x)
    return module.scaled(x)


def encode(module: Module, pixels: Tensor) -> Tensor:
    """The moments (n, 8, h, w) of pixels (n, 3, H, W) by a VAE's encoder."""
    x = module.conv("encoder.conv_in", pixels)
    for level in range(count_blocks(module.tensors, "encoder.down_blocks.")):
        x = _level(module, f"encoder.down_blocks.{level}", x)
    x = _middle(module, "encoder.mid_block", x)
    x = module.norm("encoder.conv_norm_out", x, _GROUPS)
    x = module.activation(x)
    x = module.conv("encoder.conv_out", x)
    return module.conv("quant_conv", x)


def decode(module: Module, latents: Tensor) -> Tensor:
    """The pixels (n, 3, H, W) of latents (n, 4, h, w) by a VAE's decoder."""
    latents = module.conv("post_quant_conv", latents)
    x = module.conv("decoder.conv_in", latents)
    x = _middle(module, "decoder.mid_block", x)
    for level in range(count_blocks(module.tensors, "decoder.up_blocks.")):
        x = _level(module, f"decoder.up_blocks.{level}", x)
    x = module.norm("decoder.conv_norm_out", x, _GROUPS)
    x = module.activation(x)
    return module.conv("decoder.conv_out", x)


def _level(module: Module, path: str, x: Tensor) -> Tensor:
    """DownEncoderBlock2D and UpDecoderBlock2D."""
    for place in range(count_blocks(module.tensors, f"{path}.resnets.")):
        x = _residual(module, f"{path}.resnets.{place}", x)
    if module.has(f"{path}.downsamplers.0.conv.weight"):
        return module.conv(f"{path}.downsamplers.0.conv", _padded(module, x), 2)
    if module.has(f"{path}.upsamplers.0.conv.weight"):
        return module.conv(f"{path}.upsamplers.0.conv", module.upsampled(x))
    return x


def _padded(module: Module, x: Tensor) -> Tensor:
    """One row and one column more; the convolution behind it has no padding of its own."""
    padded = module.tape.op([x], (*x.shape[:2], x.shape[2] + 1, x.shape[3] + 1), x.width)
    padded.shape = x.shape  # so that the convolution halves it
    return padded


def _middle(module: Module, path: str, x: Tensor) -> Tensor:
    """UNetMidBlock2D with one attention of one head over all positions."""
    x = _residual(module, f"{path}.resnets.0", x)
    batch, width, height, wide = x.shape
    flat = (batch, height * wide, width)
    hidden = module.norm(f"{path}.attentions.0.group_norm", x, _GROUPS)
    hidden = _attention(module, f"{path}.attentions.0", _viewed(hidden, flat), None, 1)
    hidden = _viewed(hidden, x.shape)
    x = module.scaled(module.added(hidden, x))
    return _residual(module, f"{path}.resnets.1", x)


def _viewed(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    view = Tensor(shape, x.width, x.block, needs=x.needs)
    view.node, view.slot = x.node, x.slot
    return view
