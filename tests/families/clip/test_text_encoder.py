"""Text states are those of kohya's trainer and diffusers: last or k-th last layer, final norm, chunks joined."""

from __future__ import annotations

import pytest
import torch

from library.data.batch import TextInput
from library.families.clip.text_encoder import encode_text, join_chunks, without_text_model
from library.families.clip.tokenizer import ClipTokenizer
from library.families.family import TextSettings
from tests import tiny

CAPTIONS = ["a photo of sks dog", "dog " * 160]


def states_of(encoder, ids, clip_skip=None):
    return encode_text({"text_encoder": encoder}, {"text_encoder": TextInput(ids)}, TextSettings(clip_skip))["states"]


@pytest.fixture(scope="module")
def encoder():
    return tiny.diffusers_modules("sd1").text_encoder


@pytest.fixture(scope="module")
def tokenizer():
    return ClipTokenizer(49407)


@pytest.mark.parametrize("clip_skip", [None, 1, 2, 3])
def test_the_kth_last_layer_is_taken_before_the_final_norm(encoder, tokenizer, clip_skip):
    ids = tokenizer.tensor(CAPTIONS)
    with torch.no_grad():
        every = encoder(ids[:, 0], output_hidden_states=True).hidden_states
        expected = encoder.final_layer_norm(every[-(clip_skip or 1)])
        states = states_of(encoder, ids, clip_skip)
    assert torch.equal(states, expected)
    assert len(encoder.encoder.layers) == 3  # put back


@pytest.mark.parametrize("clip_skip", [4, -1])
def test_a_layer_that_is_not_there_is_refused(encoder, tokenizer, clip_skip):
    with pytest.raises(ValueError, match="clip_skip"):
        states_of(encoder, tokenizer.tensor(["a"]), clip_skip)
    assert len(encoder.encoder.layers) == 3


@pytest.mark.parametrize("chunks", [2, 3])
def test_chunks_are_joined_as_published(encoder, tokenizer, chunks):
    """First state of chunk 1, 75 states of every chunk, last state of the last chunk."""
    ids = tokenizer.tensor(CAPTIONS, chunks)
    with torch.no_grad():
        states = states_of(encoder, ids)
        for row in range(len(CAPTIONS)):
            alone = [encoder(ids[row, k][None]).last_hidden_state[0] for k in range(chunks)]
            expected = torch.cat([alone[0][:1], *(chunk[1:76] for chunk in alone), alone[-1][76:]])
            assert torch.allclose(states[row], expected, atol=1e-5)
    assert states.shape == (2, 75 * chunks + 2, 64)


def test_joining_moves_states_unchanged():
    states = torch.arange(2 * 3 * 77, dtype=torch.float32).reshape(2, 3, 77, 1)
    joined = join_chunks(states)[0, :, 0].tolist()
    assert joined == [0, *range(1, 76), *range(78, 153), *range(155, 230), 230]


def test_short_rows_work_and_give_the_states_of_full_ones(encoder, tokenizer):
    """CLIP's mask is causal: what fills a row up cannot reach the words before it."""
    short, full = tokenizer.tensor(["a dog"], padded=False), tokenizer.tensor(["a dog"])
    with torch.no_grad():
        states = states_of(encoder, short)
        assert states.shape == (1, 4, 64)
        assert torch.allclose(states, states_of(encoder, full)[:, :4], atol=1e-5)


def test_unused_layers_get_no_gradient(tokenizer):
    encoder = tiny.diffusers_modules("sd1").text_encoder
    states_of(encoder, tokenizer.tensor(["a"]), 2).sum().backward()
    used = [layer.mlp.fc1.weight.grad is not None for layer in encoder.encoder.layers]
    assert used == [True, True, False]


def test_the_layers_have_one_set_of_names_with_older_transformers(encoder, tokenizer):
    """Before 5.6 CLIPTextModel is a module around `text_model`, which computes the same."""
    current = type(encoder)

    class Older(current):
        def __init__(self, config):
            super().__init__(config)
            for name in list(self._modules):
                delattr(self, name)
            self.text_model = current(config)
            self.text_model.known_inside = True

        def forward(self, *values, **named):
            return self.text_model(*values, **named)

        def get_input_embeddings(self):
            return self.text_model.embeddings.token_embedding

    older = Older(encoder.config)
    assert all(name.startswith("text_model.") for name in older.state_dict())
    older = without_text_model(older)
    assert older.state_dict().keys() == encoder.state_dict().keys()
    assert older.known_inside
    older.load_state_dict(encoder.state_dict())
    ids = tokenizer.tensor(CAPTIONS)
    with torch.no_grad():
        assert torch.equal(states_of(older.eval(), ids, 2), states_of(encoder, ids, 2))
    older.activation_checkpointing_enable()
    assert older.device.type == "cpu" and older.get_input_embeddings() is older.embeddings.token_embedding
    assert without_text_model(encoder) is encoder
