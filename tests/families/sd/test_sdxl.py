"""SDXL and its refiner read texts and sizes as published: diffusers' pipelines and a plain OpenCLIP say the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from library.data.batch import TextInput
from library.families.family import AS_TRAINED, Family, Model, TextSettings
from library.families.registry import FAMILIES

KOHYA = TextSettings(kohya_projection=True)
BOS, EOS, DOG = 49406, 49407, 1929
PROMPTS = ["a photo of sks dog!", "", "dog " * 90]
TE2 = {"sdxl": "conditioner.embedders.1.model.", "refiner": "conditioner.embedders.0.model."}


@pytest.fixture(scope="module", params=["sdxl", "refiner"])
def model(request: pytest.FixtureRequest) -> Model:
    found: Model = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def bigg(model: Model, files) -> dict[str, Tensor]:
    """The tensors of the larger text encoder as the original file has them."""
    prefix = TE2[model.family.name]
    tensors = load_file(files[model.family.name])
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def open_clip(tensors: dict[str, Tensor], ids: Tensor) -> tuple[Tensor, Tensor]:
    """The states before the last layer and the pooled vectors of rows of ids (N, 77), as open_clip calculates them
    (open_clip/transformer.py, TextTransformer; generative-models' FrozenOpenCLIPEmbedder2, layer "penultimate")."""
    x = tensors["token_embedding.weight"][ids] + tensors["positional_embedding"]
    rows, length, width = x.shape
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("transformer."))
    states = x
    for layer in range(layers):
        states = x
        own = {name: tensors[f"transformer.resblocks.{layer}.{name}"] for name in (
            "ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "attn.in_proj_weight", "attn.in_proj_bias",
            "attn.out_proj.weight", "attn.out_proj.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight",
            "mlp.c_proj.bias")}  # fmt: skip
        y = functional.layer_norm(x, (width,), own["ln_1.weight"], own["ln_1.bias"])
        q, k, v = (
            part.reshape(rows, length, width // 64, 64).transpose(1, 2)
            for part in functional.linear(y, own["attn.in_proj_weight"], own["attn.in_proj_bias"]).chunk(3, -1)
        )
        seen = (q @ k.transpose(-1, -2) / 8).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        y = (seen.softmax(-1) @ v).transpose(1, 2).reshape(rows, length, width)
        x = x + functional.linear(y, own["attn.out_proj.weight"], own["attn.out_proj.bias"])
        y = functional.layer_norm(x, (width,), own["ln_2.weight"], own["ln_2.bias"])
        y = functional.gelu(functional.linear(y, own["mlp.c_fc.weight"], own["mlp.c_fc.bias"]))
        x = x + functional.linear(y, own["mlp.c_proj.weight"], own["mlp.c_proj.bias"])
    last = functional.layer_norm(x, (width,), tensors["ln_final.weight"], tensors["ln_final.bias"])
    return states, torch.stack([last[row, ids[row].tolist().index(EOS)] for row in range(rows)])


def ids_of(model: Model, texts: list[str], chunks: int = 1) -> Tensor:
    """Of the larger text encoder alone: (B, n, 77)."""
    return model.tokenizer.by_encoder["text_encoder_2"].tensor(texts, chunks)


def encode(model: Model, texts: list[str], chunks: int = 1, settings: TextSettings = AS_TRAINED) -> dict[str, Tensor]:
    text_inputs = model.tokenizer.configured(max_tokens=75 * chunks)(texts)
    with torch.no_grad():
        return model.family.encode_text(model.text_encoders, text_inputs, settings)


def close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-5, atol=2e-5)


# --- text -----------------------------------------------------------------------------------------------------------


def pipeline_of(files, name: str) -> Any:
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

    kind = StableDiffusionXLPipeline if name == "sdxl" else StableDiffusionXLImg2ImgPipeline
    pipeline = kind.from_pretrained(files[f"{name} folder"], local_files_only=True)
    for part in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.unet):
        for parameter in part.parameters() if part is not None else ():
            parameter.data = parameter.data.clone()  # out of the mapped file, where kernels add up in another order
    return pipeline


@pytest.fixture(scope="module")
def pipeline(model: Model, files) -> Any:
    return pipeline_of(files, model.family.name)


def test_states_and_pooled_are_those_of_diffusers_pipeline(model: Model, pipeline: Any) -> None:
    with torch.no_grad():
        states, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    ours = encode(model, PROMPTS)
    assert torch.equal(ours["states"], states) and torch.equal(ours["pooled"], pooled)
    assert len({row.tobytes() for row in pooled.numpy()}) == len(PROMPTS)  # they depend on the words


def test_the_larger_encoder_is_open_clip_with_the_files_own_matrix(model: Model, bigg: dict[str, Tensor]) -> None:
    """pooled = x @ text_projection   (open_clip/transformer.py). kohya's reading: x @ its transpose."""
    ids, matrix = ids_of(model, PROMPTS), bigg["text_projection"]
    states, at_end = open_clip(bigg, ids[:, 0])
    ours = encode(model, PROMPTS)
    assert close(ours["states"][..., -states.shape[-1] :], states)
    assert close(ours["pooled"], at_end @ matrix)
    theirs = encode(model, PROMPTS, settings=KOHYA)
    assert torch.equal(theirs["states"], ours["states"])
    assert close(theirs["pooled"], at_end @ matrix.T) and not close(ours["pooled"], theirs["pooled"])


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize("settings", [AS_TRAINED, KOHYA], ids=["ours", "kohya"])
def test_chunks_are_read_one_by_one_and_the_first_is_pooled(model: Model, bigg, chunks: int, settings) -> None:
    texts = ["a dog", "dog " * 80 + "cat", "cat " * 400]
    ids = ids_of(model, texts, chunks)
    ours = encode(model, texts, chunks, settings)
    width = sum(encoder.config.hidden_size for encoder in model.text_encoders.values())
    assert ours["states"].shape == (3, 75 * chunks + 2, width)
    for row in range(len(texts)):
        states, at_end = open_clip(bigg, ids[row])
        joined = torch.cat([states[0, :1], *(chunk[1:76] for chunk in states), states[-1, 76:]])
        assert close(ours["states"][row, :, -joined.shape[-1] :], joined)
        matrix = bigg["text_projection"].T if settings is KOHYA else bigg["text_projection"]
        assert close(ours["pooled"][row], at_end[0] @ matrix)


def test_the_first_encoder_gives_its_states_before_the_last_layer(sdxl: Model) -> None:
    """It is as it was afterwards: also transformers' own list of its states, whose hooks the first call hangs up."""
    encoder = sdxl.text_encoders["text_encoder"]
    ids = sdxl.tokenizer.configured(max_tokens=150)(PROMPTS)["text_encoder"].ids
    narrow = encode(sdxl, PROMPTS, 2)["states"][..., :64]
    with torch.no_grad():
        for row in range(len(PROMPTS)):
            one, two = encoder(ids[row], output_hidden_states=True).hidden_states[-2]
            assert close(narrow[row], torch.cat([one[:76], two[1:]]))
            assert len(encoder(ids[row], output_hidden_states=True).hidden_states) == 4
    assert len(encoder.encoder.layers) == 3 and isinstance(encoder.final_layer_norm, torch.nn.LayerNorm)


@pytest.mark.parametrize("settings", [AS_TRAINED, KOHYA], ids=["ours", "kohya"])
@pytest.mark.parametrize("body", [[DOG, EOS], [49408, DOG, EOS], [DOG, EOS, 49409], [49409, EOS, DOG, EOS, 49408]])
def test_the_first_end_is_pooled_whatever_ids_a_textual_inversion_adds(refiner: Model, files, body, settings) -> None:
    """transformers takes the highest id for the end where a config says eos_token_id 2, as published ones do."""
    encoder = copy.deepcopy(refiner.text_encoders["text_encoder_2"])
    added = torch.randn(2, 128, generator=torch.Generator().manual_seed(0)) * 0.1
    table = torch.cat([encoder.get_input_embeddings().weight.detach(), added])
    encoder.set_input_embeddings(torch.nn.Embedding.from_pretrained(table))
    ids = torch.tensor([[[BOS, *body] + [0] * (76 - len(body))]])
    with torch.no_grad():
        text_inputs = {"text_encoder_2": TextInput(ids)}
        pooled = refiner.family.encode_text({"text_encoder_2": encoder}, text_inputs, settings)["pooled"]
    tensors = load_file(files["refiner"])
    bigg = {name.removeprefix(TE2["refiner"]): t for name, t in tensors.items() if name.startswith(TE2["refiner"])}
    _, at_end = open_clip(bigg | {"token_embedding.weight": table}, ids[:, 0])
    matrix = bigg["text_projection"]
    assert close(pooled, at_end @ (matrix.T if settings is KOHYA else matrix))


@pytest.mark.parametrize("settings", [AS_TRAINED, KOHYA], ids=["ours", "kohya"])
def test_training_the_larger_encoder_reaches_its_projection(model: Model, settings: TextSettings) -> None:
    encoders = {name: copy.deepcopy(encoder).train() for name, encoder in model.text_encoders.items()}
    given = model.family.encode_text(encoders, model.tokenizer(["a dog"]), settings)
    given["pooled"].square().sum().backward()
    larger = encoders["text_encoder_2"]
    assert larger.text_projection.weight.grad.any()
    assert all(p.grad is not None and p.grad.any() for p in larger.text_model.encoder.layers[-1].mlp.parameters())
    assert all(p.grad is None for p in encoders.get("text_encoder", torch.nn.Identity()).parameters())


def test_gradient_checkpointing_changes_no_gradient(sdxl: Model) -> None:
    gradients = []
    for checkpointing in (False, True):
        encoders = {name: copy.deepcopy(encoder).train() for name, encoder in sdxl.text_encoders.items()}
        for encoder in encoders.values() if checkpointing else ():
            encoder.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        given = sdxl.family.encode_text(encoders, sdxl.tokenizer.configured(max_tokens=150)(["a dog", ""]))
        (given["states"].square().sum() + given["pooled"].square().sum()).backward()
        gradients.append([p.grad for encoder in encoders.values() for p in encoder.parameters()])
    assert sum(g is not None for g in gradients[0]) > 80
    for plain, checkpointed in zip(*gradients, strict=True):
        assert (plain is None) == (checkpointed is None)
        assert plain is None or torch.allclose(plain, checkpointed, rtol=1e-4, atol=1e-4)


def test_what_is_not_pooled_gives_the_last_layer_no_gradient(sdxl: Model) -> None:
    """As diffusers' and kohya's trainers: the states come from before it, in either encoder."""
    encoders = {name: copy.deepcopy(encoder) for name, encoder in sdxl.text_encoders.items()}
    sdxl.family.encode_text(encoders, sdxl.tokenizer(["a"]))["states"].sum().backward()
    for layers in (encoders["text_encoder"].encoder.layers, encoders["text_encoder_2"].text_model.encoder.layers):
        reached = [layer.mlp.fc1.weight.grad is not None and bool(layer.mlp.fc1.weight.grad.any()) for layer in layers]
        assert reached == [True, True, False]


@pytest.mark.parametrize("chunks", [1, 2])
def test_weights_of_words_are_multiplied_onto_the_states_of_either_encoder(model: Model, chunks: int) -> None:
    captions = ["a (dog:1.5) [cat]!", "dog " * 74 + "(cat cat:0.5)"]
    text_inputs = model.tokenizer.configured(max_tokens=75 * chunks, weighted=True)(captions)
    unweighted = {name: TextInput(one.ids) for name, one in text_inputs.items()}
    with torch.no_grad():
        plain = model.family.encode_text(model.text_encoders, unweighted)
        ours = model.family.encode_text(model.text_encoders, text_inputs)
    assert torch.equal(ours["pooled"], plain["pooled"])
    factor = torch.ones(ours["states"].shape)
    begin = 0
    for name, module in model.text_encoders.items():
        width = module.config.hidden_size
        own = text_inputs[name].weights
        factor[:, 1:-1, begin : begin + width] = own[:, :, 1:76].reshape(2, -1, 1)
        begin += width
    assert torch.equal(ours["states"], plain["states"] * factor) and not torch.equal(factor, torch.ones_like(factor))


# --- sizes ----------------------------------------------------------------------------------------------------------


def conditions(model: Model, height: float = 1025.0, score: float = 6.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    width = sum(encoder.config.hidden_size for encoder in model.text_encoders.values())
    return {
        "states": torch.randn(1, 77, width, generator=generator),
        "pooled": torch.randn(1, 128, generator=generator),
        "sizes": torch.tensor([[height, 683.0, 13.0, 40.0, 1216.0, 832.0]]),
        "score": torch.tensor([score]),
    }


def noisy() -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def predicted(model: Model, given: dict[str, Tensor]) -> Tensor:
    return model.family.predict(model.backbone, noisy(), torch.tensor([321]), given)


def test_the_unet_is_told_what_diffusers_pipeline_tells_it(model: Model, pipeline: Any) -> None:
    """An odd size and a crop; five numbers for the refiner, of which the last is the score."""
    given = conditions(model)
    size, crop, target = (1025, 683), (13, 40), (1216, 832)
    if model.family.name == "sdxl":
        ids = pipeline._get_add_time_ids(size, crop, target, torch.float32, text_encoder_projection_dim=128)
    else:
        ids, _ = pipeline._get_add_time_ids(
            size, crop, target, 6.0, 2.5, size, crop, target, torch.float32, text_encoder_projection_dim=128
        )
        assert ids.tolist() == [[1025, 683, 13, 40, 6]]
    told = {"text_embeds": given["pooled"], "time_ids": ids}
    with torch.no_grad():
        theirs = pipeline.unet(noisy(), 321, encoder_hidden_states=given["states"], added_cond_kwargs=told).sample
    assert torch.equal(predicted(model, given), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["autocast", "bf16 weights"])
def test_sizes_that_bfloat16_cannot_tell_apart_are_told_apart(model: Model, dtype: torch.dtype) -> None:
    """In bfloat16 1023 and 1025 are both 1024, which an odd image's size must not become."""
    assert torch.tensor(1023.0).bfloat16() == torch.tensor(1025.0).bfloat16()
    unet = model.backbone if dtype == torch.float32 else copy.deepcopy(model.backbone).to(dtype)
    found = []
    for height in (1023.0, 1025.0):
        given = conditions(model, height)
        given |= {name: given[name].to(dtype) for name in ("states", "pooled")}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            found.append(model.family.predict(unet, noisy().to(dtype), torch.tensor([321]), given))
    assert not torch.equal(*found)


def test_numbers_are_embedded_by_the_published_sinusoids(model: Model) -> None:
    """256 values each: cos(x w_k), then sin(x w_k), w_k = 10000^(-k/128)   (arXiv 1706.03762, section 3.5, as
    generative-models' ConcatTimestepEmbedderND has them). Half a dozen of them by hand, for 1024.
    """
    seen: list[Tensor] = []
    hook = model.backbone.add_time_proj.register_forward_hook(lambda _module, args, out: seen.extend((args[0], out)))
    wide: list[Tensor] = []
    other = model.backbone.add_embedding.register_forward_hook(lambda _module, args, _out: wide.append(args[0]))
    given = conditions(model, 1024.0, 7.0)
    predicted(model, given)
    hook.remove()
    other.remove()
    ids = [1024, 683, 13, 40, *([1216, 832] if model.family.name == "sdxl" else [7])]
    assert seen[0].tolist() == ids and seen[0].dtype == torch.float32
    waves = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angles = torch.tensor(ids, dtype=torch.float64)[:, None] * waves
    expected = torch.cat([angles.cos(), angles.sin()], 1)
    assert torch.allclose(seen[1].double(), expected, atol=1e-4)
    by_hand = torch.tensor([0.98735, -0.53762, 0.99395, -0.15853, -0.84319, 0.10982])
    assert torch.allclose(seen[1][0, [0, 1, 127, 128, 129, 255]], by_hand, atol=1e-4)
    assert torch.equal(wide[0], torch.cat([given["pooled"], seen[1].reshape(1, -1)], 1))
    assert wide[0].shape == (1, 128 + 256 * len(ids))


def test_only_the_refiner_hears_of_the_score_and_only_the_base_of_the_target(model: Model) -> None:
    base = model.family.name == "sdxl"
    plain, scored = predicted(model, conditions(model)), predicted(model, conditions(model, score=2.5))
    assert torch.equal(plain, scored) == base
    elsewhere = conditions(model)
    elsewhere["sizes"][0, 4:] = 640
    assert torch.equal(plain, predicted(model, elsewhere)) != base


# --- what they are --------------------------------------------------------------------------------------------------


def test_what_the_families_offer() -> None:
    known: dict[str, Family] = {family.name: family for family in FAMILIES}
    base, second = known["sdxl"], known["refiner"]
    assert base.text_encoders == ("text_encoder", "text_encoder_2") and second.text_encoders == ("text_encoder_2",)
    assert second.refines and not any(family.refines for family in FAMILIES if family is not second)
    for family in (base, second):
        assert family.latent.scale == 0.13025 and not family.latent.fp16 and family.latent.cache_suffix == "_sdxl.npz"
    assert base.blocks == 23 and base.block_of is not None
    # as kohya's --block_lr counts them: embeddings, 9 input blocks, 3 in the middle, 9 output blocks, what comes out
    places = {"conv_in.weight": 1, "time_embedding.linear_1.bias": 0, "add_embedding.linear_2.weight": 0,
              "down_blocks.1.attentions.0.proj_in.weight": 5, "mid_block.attentions.0.norm.weight": 11,
              "up_blocks.0.resnets.0.conv1.weight": 13, "up_blocks.2.resnets.2.conv2.bias": 21,
              "conv_out.weight": 22}  # fmt: skip
    assert {name: base.block_of(name) for name in places} == places
