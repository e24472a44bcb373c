"""The CLIP text encoder: its configuration read from shapes, its module, and captions' ids to states for the U-Net."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from library.families.shapes import Shapes, count_blocks

if TYPE_CHECKING:
    from torch import Tensor, nn

HEAD_SIZE = 64  # of every published CLIP text encoder; the head count is not to be seen in the tensors


def text_config(shapes: Shapes, activation: str) -> dict[str, Any]:
    """CLIPTextConfig's arguments from the shapes of a text encoder under transformers' names (no `text_model.` level).

    `activation`: "quick_gelu" (OpenAI's weights: SD1) or "gelu" (OpenCLIP's: SD2). KeyError for a missing tensor.
    """
    vocabulary, width = shapes["embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_attention_heads": width // HEAD_SIZE,
        "num_hidden_layers": count_blocks(shapes, "encoder.layers."),
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
        "projection_dim": width,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 2,  # transformers' mark for "the highest id ends the text", which all these encoders have
        "pad_token_id": 1,
    }


def make_text_encoder(config: Mapping[str, Any]) -> nn.Module:
    """transformers' CLIPTextModel, without weights if made on the meta device."""
    from transformers import CLIPTextConfig, CLIPTextModel

    module: nn.Module = CLIPTextModel(CLIPTextConfig(**config))
    return module


def restore_buffers(text_encoder: Any) -> None:
    """Give a text encoder that was made on the meta device the one buffer that no file needs to hold."""
    import torch

    embeddings = text_encoder.embeddings
    count = embeddings.position_embedding.num_embeddings
    device = embeddings.position_embedding.weight.device
    embeddings.position_ids = torch.arange(count, device=device).expand((1, -1))


def encode_text(
    text_encoder: Any, input_ids: Tensor, clip_skip: int | None = None, weights: Tensor | None = None
) -> Tensor:
    """States for the U-Net: (B, 75n + 2, width) from ids (B, n, 77), or (B, L, width) from (B, 1, L).

    `clip_skip` k takes the k-th last layer instead of the last (None and 1 are equal), then the final norm. Chunks are
    joined as kohya's trainer joins them: the beginning of the first, 75 states of each, the end of the last.
    `weights`, of the ids' shape: see `weight_states`.
    Raises ValueError when clip_skip is not in 1 .. number of layers.
    """
    batch, chunks, length = input_ids.shape
    rows = input_ids.reshape(batch * chunks, length)
    with layers_left_out(text_encoder, (clip_skip or 1) - 1):
        states: Tensor = text_encoder(rows).last_hidden_state
    joined = join_chunks(states.reshape(batch, chunks, length, -1))
    return joined if weights is None else weight_states(joined, weights)


def weight_states(states: Tensor, weights: Tensor) -> Tensor:
    """States (B, 75n + 2 or L, width) times the weights (B, n, 77) or (B, 1, L) of their tokens, in the states' dtype.

    As kohya's trainer does for --weighted_captions: the mean is not brought back to what it was.
    """
    return (states * join_chunks(weights.to(states.device)[..., None])).to(states.dtype)


def join_chunks(states: Tensor) -> Tensor:
    """(B, n, 77, width) to (B, 75n + 2, width)."""
    import torch

    batch, chunks, length, width = states.shape
    if chunks == 1:
        return states[:, 0]
    texts = states[:, :, 1:-1].reshape(batch, chunks * (length - 2), width)
    return torch.cat([states[:, 0, :1], texts, states[:, -1, -1:]], dim=1)


@contextmanager
def layers_left_out(text_encoder: Any, count: int) -> Iterator[None]:
    """Run a text encoder without its last `count` layers: their results would be thrown away.

    The module itself is called, as wrappers (autocast, processes) need it; its list of layers is shorter meanwhile.
    """
    encoder = getattr(text_encoder, "module", text_encoder).encoder
    layers = encoder.layers
    if not 0 <= count < len(layers):
        raise ValueError(f"clip_skip {count + 1} is not between 1 and the {len(layers)} layers of this text encoder")
    encoder.layers = layers[: len(layers) - count]
    try:
        yield
    finally:
        encoder.layers = layers
