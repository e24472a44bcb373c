"""What CLIP's text encoder leaves in memory: the forward pass of transformers' CLIPTextModel over shapes. No torch."""

from __future__ import annotations

from functools import partial

from library.families.sd.shapes import count_blocks
from library.footprint.module import Module
from library.footprint.tape import Tensor

_HEAD = 64


def text_encoder(
    module: Module, ids: Tensor, *, activation: str, skipped: int = 0, normalised: bool = True, projects: bool = False
) -> Tensor:
    """The hidden states (n, L, width) of ids (n, L). `skipped`: last layers that are left out; `normalised`: with the
    final norm. With `projects` all layers run for the pooled vector, which is joined to the states' gradient."""
    level = "text_model." if module.has("text_model.final_layer_norm.weight") else ""
    x = module.embedded(f"{level}embeddings.token_embedding", ids)
    embeddings = x = module.added(x, _positions(module, f"{level}embeddings.position_embedding", ids))
    depth = count_blocks(module.tensors, f"{level}encoder.layers.")
    states = [embeddings]  # held to the end, as transformers does
    for place in range(depth - (0 if projects else skipped)):
        path = f"{level}encoder.layers.{place}"
        x = module.repeated(path, partial(_layer, module, path, activation), x)
        if projects:  # transformers collects them all (output_hidden_states)
            states.append(x)
    if not projects:
        return module.norm(f"{level}final_layer_norm", x) if normalised else x
    last = module.norm(f"{level}final_layer_norm", x)
    pooled = module.linear("text_projection", module.tape.op([last], (last.shape[0], last.shape[2]), last.width))
    chosen = states[depth - skipped]
    return module.tape.op([chosen, pooled], chosen.shape, chosen.width, shares=True, view=True)


def _positions(module: Module, path: str, ids: Tensor) -> Tensor:
    """The embedding of the positions, the same for all texts."""
    one = Tensor((1, ids.shape[1]), ids.width, ids.block)
    return module.embedded(path, one)


def _layer(module: Module, path: str, activation: str, x: Tensor) -> Tensor:
    """CLIPEncoderLayer."""
    hidden = module.norm(f"{path}.layer_norm1", x)
    hidden = _attention(module, f"{path}.self_attn", hidden)
    x = module.added(x, hidden)
    hidden = module.norm(f"{path}.layer_norm2", x)
    hidden = module.linear(f"{path}.mlp.fc1", hidden)
    hidden = module.quick_gelu(hidden) if activation == "quick_gelu" else module.activation(hidden)
    hidden = module.linear(f"{path}.mlp.fc2", hidden)
    return module.added(x, hidden)


def _attention(module: Module, path: str, x: Tensor) -> Tensor:
    query = module.linear(f"{path}.q_proj", x)
    key = module.linear(f"{path}.k_proj", x)
    value = module.linear(f"{path}.v_proj", x)
    found = module.attention(query, key, value, x.shape[-1] // _HEAD)
    return module.linear(f"{path}.out_proj", found)
