"""Attention, checkpointed activations, formats and fp16 gradients: same results, less memory, loud failures."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel

from examples.shapes.autoencoder import images
from library.families.registry import load_model, open_model
from library.options.groups.memory import MemoryOptions
from library.runtime.device import Machine
from library.runtime.precision import resolve
from library.training import memory
from library.training.blocks.checkpoints import checkpoint_activations
from library.training.memory import (
    MemoryEfficientAttention,
    compute_module,
    encoding_vae,
    fp16_gradients,
    loading_device,
    prepare,
    release_memory,
    set_attention,
    tile_vae,
    visiting,
    working_copy,
)
from library.training.trainable import Part, Trainable
from tests import tiny

CPU = Machine("cpu", "a processor")


def text_encoder() -> Any:
    torch.manual_seed(1)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=100,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=1,
            max_position_embeddings=77,
        )
    )


def vae() -> Any:
    torch.manual_seed(2)
    return AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 100, (2, 77), generator=generator)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([10, 700]), ids


def loss(backbone: Any, encoder: Any) -> torch.Tensor:
    noisy, steps, ids = inputs()
    states = encoder(ids).last_hidden_state
    return backbone(noisy, steps, encoder_hidden_states=states, return_dict=False)[0].float().square().mean()


def gradients(*modules: Any) -> dict[str, torch.Tensor]:
    return {
        f"{index}.{name}": parameter.grad
        for index, module in enumerate(modules)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def count_recomputed_blocks(module: Any, name: str) -> list[int]:
    """Count how often the blocks of a class run."""
    calls = [0]
    for block in module.modules():
        if type(block).__name__ == name:
            block.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    return calls


def test_checkpointed_activations_give_the_same_gradients_in_both_models() -> None:
    plain = (tiny.small_unet().train(), text_encoder().train())
    loss(*plain).backward()
    saving = (tiny.small_unet().train(), text_encoder().train())
    resnets = count_recomputed_blocks(saving[0], "ResnetBlock2D")
    layers = count_recomputed_blocks(saving[1], "CLIPMLP")
    for module in saving:
        checkpoint_activations(module)
    value = loss(*saving)
    once = (resnets[0], layers[0])
    value.backward()
    assert resnets[0] > once[0] and layers[0] > once[1], "nothing was recomputed"
    expected, found = gradients(*plain), gradients(*saving)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_a_text_encoder_behind_frozen_embeddings_still_learns() -> None:
    encoder = text_encoder().train()
    encoder.get_input_embeddings().weight.requires_grad_(False)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_("embeddings" not in name)
    checkpoint_activations(encoder)
    loss(tiny.small_unet().requires_grad_(False), encoder).backward()
    assert all(p.grad is not None for name, p in encoder.named_parameters() if "embeddings" not in name)


def test_a_module_without_checkpointing_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear"):
        checkpoint_activations(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("attention", ["sdpa", "mem_eff"])
def test_every_attention_gives_the_same_answer_and_gradients(attention: Any) -> None:
    plain, changed, encoder = tiny.small_unet(), tiny.small_unet(), text_encoder().requires_grad_(False)
    set_attention(changed, attention)
    first, second = loss(plain, encoder), loss(changed, encoder)
    torch.testing.assert_close(first, second)
    first.backward()
    second.backward()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(changed)[name], gradient, atol=1e-6, rtol=1e-4)


def test_memory_efficient_attention_is_set_everywhere_and_fits_the_vae() -> None:
    coder, plain = vae(), vae()
    set_attention(coder, "mem_eff")
    processors = [*unet_with_mem_eff().attn_processors.values(), *coder.attn_processors.values()]
    assert processors and all(isinstance(each, MemoryEfficientAttention) for each in processors)
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        torch.testing.assert_close(coder.encode(pixels).latent_dist.mean, plain.encode(pixels).latent_dist.mean)


def unet_with_mem_eff() -> Any:
    module = tiny.small_unet()
    set_attention(module, "mem_eff")
    return module


def world(options: MemoryOptions, train_text_encoder: bool = True) -> tuple[Any, Trainable]:
    model: Any = SimpleNamespace(backbone=tiny.small_unet(), vae=vae(), text_encoder=text_encoder())
    model.modules = lambda: {"unet": model.backbone, "vae": model.vae, "text_encoder": model.text_encoder}
    parts = [Part("unet", model.backbone, 1e-4)]
    active = {"unet"}
    if train_text_encoder:
        parts.append(Part("text_encoder1", model.text_encoder, 1e-5))
        active.add("text_encoder")
    trained = Trainable(tuple(parts), frozenset(active), write=lambda path, step, epoch: None)
    prepare(model, trained, resolve(options, CPU), options)
    return model, trained


def formats(module: torch.nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in module.parameters()}


def test_trained_parts_learn_in_fp32_and_the_rest_is_frozen() -> None:
    model, _ = world(MemoryOptions(mixed_precision="bf16"), train_text_encoder=False)
    assert formats(model.backbone) == {torch.float32} and model.backbone.training
    assert all(parameter.requires_grad for parameter in model.backbone.parameters())
    for frozen in (model.text_encoder, model.vae):
        assert not frozen.training
        assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_frozen_modules_compute_in_a_copy_and_keep_their_exact_weights() -> None:
    """A saved model must hold the text encoder and VAE it was loaded with, not their half-precision rounding."""
    options = MemoryOptions(mixed_precision="bf16")
    model, trained = world(options, train_text_encoder=False)
    precision, device = resolve(options, CPU), torch.device("cpu")
    before = {name: tensor.clone() for name, tensor in model.text_encoder.state_dict().items()}
    copied = compute_module(model.text_encoder, trained, precision, device, active=False)
    assert formats(copied) == {torch.bfloat16}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.text_encoder.state_dict().items())
    assert compute_module(model.backbone, trained, precision, device, active=True) is model.backbone
    assert formats(working_copy(model.vae, "fp16", device)) == {torch.float16}
    assert formats(model.vae) == {torch.float32}


@pytest.mark.parametrize("mixed", ["no", "bf16"])
def test_the_layout_of_the_image_encoder_changes_rounding_only(mixed: Any) -> None:
    options = MemoryOptions(mixed_precision=mixed)
    model, _ = world(options, train_text_encoder=False)
    before = {name: tensor.clone() for name, tensor in model.vae.state_dict().items()}
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = model.vae.encode(pixels).latent_dist.mean
        encoder = encoding_vae(model.vae, resolve(options, CPU), torch.device("cpu"))
        encoded = encoder.encode(pixels.to(encoder.dtype)).latent_dist.mean.float()
    assert encoder.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    tolerance = 1e-5 if mixed == "no" else 0.05
    assert (encoded - expected).abs().max() <= tolerance * expected.abs().max()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.vae.state_dict().items())


def test_full_bf16_trains_under_autocast() -> None:
    model, _ = world(MemoryOptions(mixed_precision="bf16", full_bf16=True, gradient_checkpointing=True))
    assert formats(model.backbone) == formats(model.text_encoder) == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(model.backbone, model.text_encoder)
    value.backward()
    found = gradients(model.backbone, model.text_encoder)
    assert value.isfinite() and {gradient.dtype for gradient in found.values()} == {torch.bfloat16}
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_checkpointing_is_switched_on_for_what_is_trained_only() -> None:
    one, _ = world(MemoryOptions(gradient_checkpointing=True), train_text_encoder=False)
    assert one.backbone.is_gradient_checkpointing and not one.text_encoder.is_activation_checkpointing
    both, _ = world(MemoryOptions(gradient_checkpointing=True))
    assert both.backbone.is_gradient_checkpointing and both.text_encoder.is_activation_checkpointing


def test_lowram_loads_straight_to_the_device() -> None:
    device = torch.device("cuda")
    assert loading_device(MemoryOptions(), device) == torch.device("cpu")
    assert loading_device(MemoryOptions(lowram=True), device) == device


def test_cached_memory_is_released_unless_highvram(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[None] = []
    monkeypatch.setattr(memory, "release_cached", lambda: emptied.append(None))
    release_memory(MemoryOptions(highvram=True))
    assert not emptied
    release_memory(MemoryOptions())
    assert len(emptied) == 1


# full_fp16


def scaled_step(scaler: Any, gradient: float, clip: float | None = None) -> torch.Tensor:
    """One fp16 weight of 1 with a loss of `gradient` x weight, stepped by SGD at rate 1 under the scaler."""
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.scale((weight.float() * gradient).sum()).backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float16
    if clip is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([weight], clip)
    scaler.step(optimizer)
    scaler.update()
    return weight.detach()


def scaler() -> Any:
    return torch.amp.GradScaler("cpu", init_scale=1024.0)


def test_torchs_scaler_refuses_fp16_gradients() -> None:
    """The reason for fp16_gradients; should torch ever accept them, it can go."""
    with pytest.raises(ValueError, match="FP16"):
        scaled_step(scaler(), 0.5)


def test_fp16_gradients_are_unscaled_clipped_and_stepped() -> None:
    patched = scaler()
    with fp16_gradients(patched):
        assert scaled_step(patched, 0.5).tolist() == [0.5] * 3
        # three gradients of 4 have the norm 6.93; clipped to 1 each is 0.577
        clipped = scaled_step(patched, 4.0, clip=1.0)
        assert clipped.tolist() == pytest.approx([1 - 3**-0.5] * 3, abs=1e-3)


def test_an_overflow_still_skips_the_step_and_lowers_the_scale() -> None:
    patched = scaler()
    with fp16_gradients(patched):
        assert scaled_step(patched, 1000.0).tolist() == [1.0] * 3, "1024 x 1000 is beyond fp16"
    assert patched.get_scale() == 512.0


def test_the_scaler_is_as_before_afterwards() -> None:
    patched = scaler()
    with pytest.raises(KeyError), fp16_gradients(patched):
        raise KeyError
    with pytest.raises(ValueError, match="FP16"):
        scaled_step(patched, 0.5)
    with fp16_gradients(None):
        pass


def test_a_torch_with_another_method_is_refused() -> None:
    class Changed:
        def _unscale_grads_(self, optimizer: Any, inv_scale: Any, found_inf: Any) -> None: ...

    class Gone: ...

    for each in (Changed(), Gone()):
        with pytest.raises(RuntimeError, match="full_fp16"), fp16_gradients(each):
            pass


@pytest.mark.parametrize(("name", "args"), [("AdamW", ("eps=1e-4",)), ("AdamW8bit", ()), ("Adafactor", ())])
def test_optimizers_that_full_fp16_allows_train_finitely_under_the_scaler(name: str, args: tuple[str, ...]) -> None:
    """Gradients of 1e-4 and 0, which make torch's AdamW with its usual eps infinite."""
    from library.options.groups.optimizer import OptimizerOptions
    from library.training.optim.optimizers import choose_optimizer, make_optimizer

    choice = choose_optimizer(OptimizerOptions(optimizer_type=name, optimizer_args=args), full_fp16=True)
    assert not choice.mistakes
    weight = torch.nn.Parameter(torch.ones(64, 128, dtype=torch.float16))
    optimizer = make_optimizer(choice, [{"params": [weight], "lr": 1e-2}], uses_scaler=True)
    patched = scaler()
    factors = torch.full((64, 128), 1e-4)
    factors[0] = 0.0
    with fp16_gradients(patched):
        for _ in range(3):
            optimizer.zero_grad()
            patched.scale((weight.float() * factors).sum()).backward()
            patched.step(optimizer)
            patched.update()
    assert weight.isfinite().all() and (weight[1:] < 1).all()


def test_each_tile_of_a_large_image_is_encoded_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 32 pixels here: where none overlap, latents are those of the tile alone, and small images are the
    same."""
    monkeypatch.setattr(memory, "TILE", 32)
    whole, tiled = vae(), vae()
    tile_vae(tiled, stride=1)
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(4)) * 2 - 1
    with torch.no_grad():
        small = image[..., :32]
        assert torch.equal(tiled.encode(small).latent_dist.mean, whole.encode(small).latent_dist.mean)
        means = tiled.encode(image).latent_dist.mean
        expected = whole.encode(image).latent_dist.mean
        alone = 32 - 32 // 4
        assert torch.equal(means[..., :alone, :alone], whole.encode(small).latent_dist.mean[..., :alone, :alone])
        assert means.shape == expected.shape and not torch.equal(means, expected)
        latents = torch.randn(1, 4, 32, 48, generator=torch.Generator().manual_seed(5))
        assert tiled.decode(latents).sample.shape == whole.decode(latents).sample.shape


def test_latents_of_tiles_are_close_to_those_of_the_whole_image() -> None:
    """The tolerance that docs/memory_and_precision.md states, with a trained VAE: that of the example world."""
    header, _ = open_model("examples/shapes/shapes.safetensors")
    model = load_model(header)
    columns, rows = 10, 8
    scenes = images(columns * rows, random.Random(1)).view(rows, columns, 3, 64, 64)
    mosaic = scenes.permute(2, 0, 3, 1, 4).reshape(1, 3, 64 * rows, 64 * columns)
    with torch.no_grad():
        whole = model.vae.encode(mosaic).latent_dist.mean
        tile_vae(model.vae, model.family.latent.stride)
        tiled = model.vae.encode(mosaic).latent_dist.mean
    assert 0 < (tiled - whole).square().mean().sqrt() < 0.06 * whole.std()


@dataclass
class Module:
    device: torch.device
    been: list[str] = field(default_factory=list)

    def to(self, device: torch.device) -> None:
        self.device = torch.device(device)
        self.been.append(self.device.type)


def test_modules_visit_the_device_and_go_home_after_an_error_too() -> None:
    resting, there = Module(torch.device("cpu")), Module(torch.device("meta"))
    with pytest.raises(ZeroDivisionError), visiting([resting, there], torch.device("meta")):
        raise ZeroDivisionError
    assert resting.been == ["meta", "cpu"] and there.been == []
