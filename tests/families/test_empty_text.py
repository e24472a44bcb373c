"""Texts without a word are zeros where that is asked for, as diffusers' pipelines draw without a negative prompt."""

from __future__ import annotations

import torch

from library.families.empty_text import zero_empty


def test_texts_without_a_word_are_zero_and_others_untouched() -> None:
    outputs = {"states": torch.randn(4, 77, 8), "pooled": torch.randn(4, 5)}
    before = {name: tensor.clone() for name, tensor in outputs.items()}
    zeroed = zero_empty(outputs, ["", "a dog", " \n\t", "!"])
    for name, tensor in zeroed.items():
        assert not tensor[[0, 2]].any()
        assert torch.equal(tensor[[1, 3]], before[name][[1, 3]])
        assert torch.equal(outputs[name], before[name])


def test_without_empty_texts_nothing_is_done() -> None:
    outputs = {"states": torch.randn(1, 77, 8)}
    assert zero_empty(outputs, ["a"])["states"] is outputs["states"]


def test_dtype_stays_and_gradients_reach_only_the_texts_with_words() -> None:
    states = torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    zeroed = zero_empty({"states": states}, ["", "a"])["states"]
    assert zeroed.dtype == torch.bfloat16
    zeroed.sum().backward()
    assert states.grad is not None and not states.grad[0].any() and states.grad[1].all()


def test_it_is_what_diffusers_draws_an_empty_negative_prompt_with(sdxl) -> None:
    text_inputs = sdxl.tokenizer(["a dog", ""])
    with torch.no_grad():
        ours = zero_empty(sdxl.family.encode_text(sdxl.text_encoders, text_inputs), ["a dog", ""])
    assert ours["states"].shape == (2, 77, 192) and ours["pooled"].shape == (2, 128)
    assert not ours["states"][1].any() and not ours["pooled"][1].any() and ours["states"][0].any()
