"""The CLIP text encoder: its configuration from tensor shapes, its module, and encoding ids to hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from library.data.batch import TextInput
from library.families.clip.tokenizer import EOS_ID
from library.families.family import AS_TRAINED, TextSettings
from library.families.sd.shapes import Shapes, count_blocks
from library.families.sd.variant import TextKind

if TYPE_CHECKING:
    from torch import Tensor, nn

HEAD_SIZE = 64  # of every published CLIP text encoder; shapes do not show the number of heads


def text_config(shapes: Shapes, kind: TextKind) -> dict[str, Any]:
    """Return the configuration of a text encoder from its shapes under transformers' names. Raises KeyError for a
    missing tensor.

    The activation is not visible in shapes: "quick_gelu" in OpenAI's weights, "gelu" in OpenCLIP's.
    """
    level = "text_model." if kind.projects else ""
    vocabulary, width = shapes[f"{level}embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes[f"{level}encoder.layers.0.mlp.fc1.weight"][0],
        "num_attention_heads": width // HEAD_SIZE,
        "num_hidden_layers": count_blocks(shapes, f"{level}encoder.layers."),
        "max_position_embeddings": shapes[f"{level}embeddings.position_embedding.weight"][0],
        "hidden_act": kind.activation,
        "layer_norm_eps": 1e-5,
        "projection_dim": shapes["text_projection.weight"][0] if kind.projects else width,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        # 2 means "the highest id ends the text" in transformers, as in published files. With a projection, which reads
        # the state at the end, it must be the id itself: tokens of textual inversions are higher.
        "eos_token_id": EOS_ID if kind.projects else 2,
        "pad_token_id": 1,
    }


def make_text_encoder(config: Mapping[str, Any], *, projects: bool) -> nn.Module:
    """Make transformers' CLIPTextModel, or CLIPTextModelWithProjection if it `projects`.

    Its layers have the names of transformers 5.6 and later with any release, so that weights, adapted layers and
    training states have one set of names: see `without_text_model`.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    make = CLIPTextModelWithProjection if projects else CLIPTextModel
    module: nn.Module = make(CLIPTextConfig(**config))
    return module if projects else without_text_model(module)


def without_text_model(module: nn.Module) -> nn.Module:
    """Move the layers of a CLIPTextModel out of its `text_model`, where releases before 5.6 have them.

    `text_model` computes the same as the module around it, from its own children and attributes. So these are moved,
    and the module gets its `forward`. For the module's other methods, `text_model` is the module itself.
    """
    inner = module._modules.get("text_model")
    if inner is None:
        return module
    module._modules = inner._modules
    for name, value in vars(inner).items():
        vars(module).setdefault(name, value)
    old = type(module)
    methods = {"forward": type(inner).forward, "text_model": property(lambda self: self)}
    module.__class__ = type(old.__name__, (old,), methods)
    return module


def restore_buffers(text_encoder: Any) -> None:
    """Create the position ids of a text encoder made on the meta device; files need not contain them."""
    import torch

    embeddings = getattr(text_encoder, "text_model", text_encoder).embeddings
    count = embeddings.position_embedding.num_embeddings
    device = embeddings.position_embedding.weight.device
    embeddings.position_ids = torch.arange(count, device=device).expand((1, -1))


def encode_text(
    text_encoders: Mapping[str, Any],
    text_inputs: Mapping[str, TextInput],
    settings: TextSettings = AS_TRAINED,
) -> dict[str, Tensor]:
    """Encode ids to "states": (B, 75n + 2, width) from ids (B, n, 77), or (B, L, width) from (B, 1, L).

    clip_skip k uses the k-th last layer instead of the last (None is the same as 1), then the final norm. Chunks are
    joined as in sd-scripts: begin of the first, 75 states of each, end of the last. Weights: see `weight_states`.
    Raises ValueError if clip_skip is not in 1 .. number of layers.
    """
    text_encoder, text_input = text_encoders["text_encoder"], text_inputs["text_encoder"]
    with without_last_layers(text_encoder, (settings.clip_skip or 1) - 1):
        states: Tensor = text_encoder(text_input.ids.flatten(0, 1)).last_hidden_state
    return {"states": _joined(states, text_input)}


def penultimate(text_encoder: Any, text_input: TextInput) -> Tensor:
    """Return the states before the last layer, without the final norm: (B, 75n + 2, width) from ids (B, n, 77)."""
    with without_last_layers(text_encoder, 1, norm=False):
        states: Tensor = text_encoder(text_input.ids.flatten(0, 1)).last_hidden_state
    return _joined(states, text_input)


def penultimate_and_pooled(text_encoder: Any, text_input: TextInput, settings: TextSettings) -> tuple[Tensor, Tensor]:
    """Return the states of `penultimate` for a CLIPTextModelWithProjection, and the pooled vector (B, projected width):
    the last layer's state at the first end token, after the final norm and the projection; of the first chunk only.

    With settings.kohya_projection the projection matrix is transposed, as sd-scripts reads it from files.
    """
    from torch.nn import functional

    rows = text_input.ids.flatten(0, 1)
    outputs = text_encoder(rows, output_hidden_states=True)
    pooled = outputs.text_embeds
    if settings.kohya_projection:
        last = outputs.last_hidden_state
        ends = (rows == EOS_ID).int().argmax(-1)
        at_end = last[range(len(rows)), ends]
        matrix = getattr(text_encoder, "module", text_encoder).text_projection.weight
        pooled = functional.linear(at_end, matrix.T.to(at_end.dtype))
    pooled = pooled.unflatten(0, text_input.ids.shape[:2])[:, 0]
    return _joined(outputs.hidden_states[-2], text_input), pooled


def _joined(states: Tensor, text_input: TextInput) -> Tensor:
    """Join the states (B * n, 77, width) of all chunks to (B, 75n + 2, width), times the weights if there are any."""
    joined = join_chunks(states.reshape(*text_input.ids.shape[:2], *states.shape[1:]))
    return joined if text_input.weights is None else weight_states(joined, text_input.weights)


def weight_states(states: Tensor, weights: Tensor) -> Tensor:
    """Multiply states (B, 75n + 2 or L, width) by the weights (B, n, 77) or (B, 1, L) of their tokens.

    As sd-scripts does for --weighted_captions: the mean is not restored afterwards.
    """
    return (states * join_chunks(weights.to(states.device)[..., None])).to(states.dtype)


def join_chunks(states: Tensor) -> Tensor:
    """Join chunks (B, n, 77, width) to (B, 75n + 2, width)."""
    import torch

    batch, chunks, length, width = states.shape
    if chunks == 1:
        return states[:, 0]
    texts = states[:, :, 1:-1].reshape(batch, chunks * (length - 2), width)
    return torch.cat([states[:, 0, :1], texts, states[:, -1, -1:]], dim=1)


@contextmanager
def without_last_layers(text_encoder: Any, count: int, *, norm: bool = True) -> Iterator[None]:
    """Run a CLIPTextModel without its last `count` layers, and without the final norm if not `norm`.

    The module itself is called, as wrappers (autocast, processes) require, with a shorter list of layers meanwhile.
    hidden_states cannot be used: transformers collects them by hooks, which its first call attaches for good to the
    layers present then.
    """
    from torch import nn

    module = getattr(text_encoder, "module", text_encoder)
    encoder, final_norm = module.encoder, module.final_layer_norm
    layers = encoder.layers
    if not 0 <= count < len(layers):
        raise ValueError(f"clip_skip {count + 1} is not between 1 and the {len(layers)} layers of this text encoder")
    encoder.layers = layers[: len(layers) - count]
    if not norm:
        module.final_layer_norm = nn.Identity()
    try:
        yield
    finally:
        encoder.layers, module.final_layer_norm = layers, final_norm
