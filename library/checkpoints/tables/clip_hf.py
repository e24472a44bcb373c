"""CLIP text encoder as transformers 4 names it, which is also how SD1 files name it (behind
`cond_stage_model.transformer.`).

n is the layer. transformers 5 leaves out the `text_model.` level; the names used here have it.
"""

from __future__ import annotations

from library.checkpoints.keymap import Row

_LAYER = (
    "layer_norm1", "layer_norm2", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
    "mlp.fc1", "mlp.fc2",
)  # fmt: skip

ROWS: tuple[Row, ...] = (
    Row("text_model.embeddings.token_embedding.weight", "text_model.embeddings.token_embedding.weight", "parameter"),
    Row(
        "text_model.embeddings.position_embedding.weight",
        "text_model.embeddings.position_embedding.weight",
        "parameter",
    ),
    *(Row(f"text_model.encoder.layers.{{n}}.{name}", f"text_model.encoder.layers.{{n}}.{name}") for name in _LAYER),
    Row("text_model.final_layer_norm", "text_model.final_layer_norm"),
)
