"""OpenCLIP text encoder of SD2 files (behind `cond_stage_model.model.`) and of SDXL's (behind
`conditioner.embedders.1.model.`, the refiner's behind `.0.model.`): transformers' names | OpenCLIP's names.

n is the layer. OpenCLIP keeps query, key and value of a layer stacked in one tensor (torch.nn.MultiheadAttention), and
multiplies the pooled state by its projection from the right: `x @ text_projection` (open_clip/transformer.py), which is
the transpose of a Linear's weight.
"""

from __future__ import annotations

from library.checkpoints.keymap import Row, within

_LAYER = (
    Row("layer_norm1", "ln_1"),
    Row("layer_norm2", "ln_2"),
    Row("self_attn.{q,k,v}_proj.weight", "attn.in_proj_weight", "stacked"),
    Row("self_attn.{q,k,v}_proj.bias", "attn.in_proj_bias", "stacked"),
    Row("self_attn.out_proj", "attn.out_proj"),
    Row("mlp.fc1", "mlp.c_fc"),
    Row("mlp.fc2", "mlp.c_proj"),
)

ROWS: tuple[Row, ...] = (
    Row("text_model.embeddings.token_embedding.weight", "token_embedding.weight", "parameter"),
    Row("text_model.embeddings.position_embedding.weight", "positional_embedding", "parameter"),
    *within("text_model.encoder.layers.{n}", "transformer.resblocks.{n}", _LAYER),
    Row("text_model.final_layer_norm", "ln_final"),
)

PROJECTED_ROWS: tuple[Row, ...] = (*ROWS, Row("text_projection.weight", "text_projection", "transposed"))
# Files written from transformers' module (Playground v2) have the projection as that Linear's weight.
LINEAR_PROJECTION: tuple[Row, ...] = (Row("text_projection.weight", "text_projection.weight", "parameter"),)
