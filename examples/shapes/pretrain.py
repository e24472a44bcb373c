"""Pretrains the miniature Stable Diffusion of this example from nothing, on images of the world.

    python -m examples.shapes.pretrain output/shapes/pretraining examples/shapes/shapes.safetensors

Nobody has to: the result ships. An hour and a half on two processor cores: first the VAE, then the U-Net and the text
encoder together, on 24,000 images whose captions are made anew each time. Stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.shapes import autoencoder
from examples.shapes.muon import Optimizers
from examples.shapes.world import Scene, caption, draw_scene, render
from library.checkpoints.files import read_header
from library.families.family import Conditioning, Model
from library.families.registry import load_model, save_model
from library.objective.objective import Objective
from library.objective.weighting import Weighting

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (96, 64, 64, 64),
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 1,
    "num_hidden_layers": 2,
    "projection_dim": 64,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "text_encoder": ["transformers", "CLIPTextModel"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
IMAGES = 24_000
BATCH = 64
EMPTY_CAPTIONS = 0.1  # the share that guidance needs
EMA_DECAY = 0.999
SAVE_EVERY = 250


def new_model(vae: Any, folder: Path, seed: int) -> Model:
    """The model with a trained VAE and random weights for the rest."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    UNet2DConditionModel(**UNET).save_pretrained(folder / "unet")
    CLIPTextModel(CLIPTextConfig(**TEXT)).save_pretrained(folder / "text_encoder")
    autoencoder.save(vae, folder / "vae")
    (folder / "model_index.json").write_text(json.dumps(INDEX), encoding="utf-8")
    return load_model(read_header(folder))


@dataclass(frozen=True)
class Images:
    """Scenes and their latents' mean and standard deviation, each (N, 4, 8, 8) float32, scaled for the U-Net."""

    scenes: Sequence[Scene]
    mean: Tensor
    deviation: Tensor


@torch.inference_mode()
def encode_images(vae: Any, count: int, rng: random.Random) -> Images:
    """`count` scenes by chance, rendered and encoded."""
    scenes = [draw_scene(rng) for _ in range(count)]
    means, deviations = [], []
    for start in range(0, count, 64):
        pixels = autoencoder.to_pixels([render(scene) for scene in scenes[start : start + 64]])
        posterior = vae.encode(pixels).latent_dist
        means.append(posterior.mean * autoencoder.SCALING_FACTOR)
        deviations.append(posterior.std * autoencoder.SCALING_FACTOR)
    return Images(scenes, torch.cat(means), torch.cat(deviations))


class Pretraining:
    """U-Net and text encoder in training, with the average of their weights that is saved."""

    def __init__(self, model: Model, steps: int, seed: int) -> None:
        self.model, self.steps, self.seed = model, steps, seed
        self.trained = nn.ModuleList([model.backbone.train(), model.text_encoders["text_encoder"].train()])
        self.average = copy.deepcopy(self.trained).requires_grad_(requires_grad=False).eval()
        self.optimizers = Optimizers(self.trained, muon_rate=0.01, adam_rate=2e-3, steps=steps)
        process = model.family.process
        weightings = (Weighting("min_snr", 5.0),)
        self.objective: Objective[Conditioning] = Objective(
            process, "epsilon", 0, process.timesteps, weightings=weightings
        )

    def step(self, images: Images) -> float:
        """One optimiser step on a batch that the seed and the step's number decide; its loss."""
        rng = random.Random(f"{self.seed} {self.optimizers.done}")
        rows = rng.sample(range(len(images.scenes)), BATCH)
        generators = [torch.Generator().manual_seed(rng.getrandbits(62)) for _ in rows]
        draws = self.objective.draw((BATCH, *images.mean.shape[1:]), generators)
        noise = torch.stack([torch.randn(images.mean.shape[1:], generator=each) for each in generators])
        latents = images.mean[rows] + images.deviation[rows] * noise
        texts = ["" if rng.random() < EMPTY_CAPTIONS else caption(images.scenes[row], rng) for row in rows]
        given = self.model.family.encode_text(self.model.text_encoders, self.model.tokenizer(texts))

        def predict(noisy: Tensor, timesteps: Tensor, given: Conditioning) -> Tensor:
            return self.model.family.predict(self.model.backbone, noisy, timesteps, given)

        loss = self.objective.loss(predict, latents, given, draws).mean()
        loss.backward()
        self.optimizers.step()
        self._follow()
        return loss.item()

    @torch.no_grad()
    def _follow(self) -> None:
        decay = min(EMA_DECAY, self.optimizers.done / (self.optimizers.done + 10))
        averages, values = list(self.average.parameters()), list(self.trained.parameters())
        torch._foreach_lerp_(averages, values, 1 - decay)

    def averaged(self) -> Model:
        """The model with the averaged weights."""
        unet, text_encoder = self.average
        model = copy.copy(self.model)
        model.backbone, model.text_encoders = unet, {"text_encoder": text_encoder}
        return model

    def state(self) -> dict[str, Any]:
        """All that going on needs."""
        return {
            "trained": self.trained.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": self.optimizers.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.trained.load_state_dict(state["trained"])
        self.average.load_state_dict(state["average"])
        self.optimizers.restore(state["optimizers"])


def pretrain(model: Model, images: Images, steps: int, seed: int, state_file: Path) -> Model:
    """The model after `steps` steps in all, counting those that a state file holds."""
    training = Pretraining(model, steps, seed)
    if state_file.exists():
        training.restore(torch.load(state_file, weights_only=True))
    start, losses = time.perf_counter(), []
    while training.optimizers.done < steps:
        losses.append(training.step(images))
        done = training.optimizers.done
        if done % 50 == 0:
            print(f"{done:5d}  loss {sum(losses) / len(losses):.4f}  {time.perf_counter() - start:.0f} s", flush=True)
            losses.clear()
        if done % SAVE_EVERY == 0 or done == steps:
            partial = state_file.with_suffix(".partial")
            torch.save(training.state(), partial)
            partial.replace(state_file)
            save_model(training.averaged(), state_file.with_suffix(".safetensors"), save_as="safetensors")
    return training.averaged()


def main() -> None:
    """The whole of it, stage by stage; what is done already is not done again."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a kernel that nothing here asks it for
    parser = argparse.ArgumentParser(description="Pretrain the miniature of the world of shapes.")
    parser.add_argument("folder", type=Path, help="folder for what lies between")
    parser.add_argument("path", type=Path, help="the .safetensors file to write")
    parser.add_argument("--vae_steps", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    vae_folder = options.folder / "vae"
    if not vae_folder.exists():
        autoencoder.save(autoencoder.train(options.vae_steps, seed=options.seed), vae_folder)
    vae = autoencoder.load(vae_folder)
    images = encode_images(vae, IMAGES, random.Random(options.seed))
    with tempfile.TemporaryDirectory() as folder:
        model = new_model(vae, Path(folder), options.seed)
    model = pretrain(model, images, options.steps, options.seed, options.folder / "state.pt")
    save_model(model, options.path, save_as="safetensors", dtype=torch.float16)


if __name__ == "__main__":
    main()
