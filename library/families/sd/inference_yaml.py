"""Write the .yaml file that WebUIs need beside an SD2 single file, for its layout and prediction type.

The structure is that of Stability-AI/stablediffusion's v2-inference configurations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from library.checkpoints.writer import write_text
from library.families.family import Model

_TEMPLATE = """\
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  base_learning_rate: 1.0e-4
  params:
{parameterization}    linear_start: {first_beta}
    linear_end: {last_beta:.4f}
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: {timesteps}
    first_stage_key: jpg
    cond_stage_key: txt
    image_size: {image_size}
    channels: {channels}
    cond_stage_trainable: false
    conditioning_key: crossattn
    monitor: val/loss_simple_ema
    scale_factor: {scale}
    use_ema: false
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        use_checkpoint: true
        use_fp16: true
        image_size: 32
        in_channels: {channels}
        out_channels: {channels}
        model_channels: {width}
        attention_resolutions: {resolutions}
        num_res_blocks: {blocks}
        channel_mult: {multipliers}
        num_head_channels: 64
        use_spatial_transformer: true
        use_linear_in_transformer: true
        transformer_depth: {depth}
        context_dim: {context}
        legacy: false
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: {channels}
        monitor: val/rec_loss
        ddconfig:
          double_z: true
          z_channels: {channels}
          resolution: 256
          in_channels: 3
          out_ch: 3
          ch: {vae_width}
          ch_mult: {vae_multipliers}
          num_res_blocks: {vae_blocks}
          attn_resolutions: []
          dropout: 0.0
        lossconfig:
          target: torch.nn.Identity
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder
      params:
        freeze: true
        layer: penultimate
"""


def write_inference_yaml(model: Model, model_path: Path) -> Path | None:
    """Write `<model>.yaml` beside a single file of SD2 and return its path; None for families that need none.

    Raises CheckpointError if it cannot be written.
    """
    if "inference_yaml" not in model.family.capabilities:
        return None
    path = model_path.with_suffix(".yaml")
    write_text(path, inference_yaml(model))
    return path


def inference_yaml(model: Model) -> str:
    """Return the text of the configuration, with numbers read from the modules."""
    unet, vae = model.backbone.config, model.vae.config
    attends = [kind.startswith("CrossAttn") for kind in unet.down_block_types]
    process = model.family.process.scheduler_arguments()
    return _TEMPLATE.format(
        parameterization='    parameterization: "v"\n' if model.prediction == "v" else "",
        first_beta=process["beta_start"],
        last_beta=process["beta_end"],
        timesteps=process["num_train_timesteps"],
        image_size=64,
        channels=unet.in_channels,
        scale=vae.scaling_factor,
        width=unet.block_out_channels[0],
        resolutions=[2**level for level, attend in enumerate(attends) if attend][::-1],
        blocks=unet.layers_per_block,
        multipliers=_multipliers(unet.block_out_channels),
        depth=unet.transformer_layers_per_block,
        context=unet.cross_attention_dim,
        vae_width=vae.block_out_channels[0],
        vae_multipliers=_multipliers(vae.block_out_channels),
        vae_blocks=vae.layers_per_block,
    )


def _multipliers(widths: Any) -> list[float]:
    return [width // widths[0] if width % widths[0] == 0 else width / widths[0] for width in widths]
