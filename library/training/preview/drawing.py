"""Draw sample images with the modules that a run trains: encode prompts, move the VAE to the device, sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.families.family import AS_TRAINED, TextSettings
from library.options.mistakes import Mistake, UserError
from library.sampling.images import encode_prompts, sample_batch, texts_of, token_limit
from library.sampling.prompts import ImageRequest
from library.sampling.sampling_path import Estimates, HandOver
from library.training.memory import release_memory, visiting, working_copy
from library.training.preview.plan import PreviewPlan, read_requests

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.data.dataset import TrainingDataset
    from library.families.family import Family, Model, Tokenizer
    from library.options.train_options import TrainOptions
    from library.runtime.precision import FloatName
    from library.training.conditioning import Conditioner
    from library.training.evaluation.plan import EvaluationPlan
    from library.training.inputs import LatentEncoder
    from library.training.preview.preview import Draw
    from library.training.preview.so_far import GroupSoFar
    from library.training.run import Run

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass
class PromptEncoder:
    """Encodes prompts: see library.sampling.images.EncodePrompts.

    `text_encoders` are those that the run computes with. A run whose captions are cached may free them: `encode_ahead`
    keeps the hidden states of the prompts on the CPU, `drop_text_encoders` drops the references. `device`: where they
    compute; None: where they are.
    """

    family: Family
    tokenizer: Tokenizer
    text_encoders: Mapping[str, Any]
    settings: TextSettings = AS_TRAINED
    autocast: Autocast = nullcontext
    device: torch.device | None = None
    encoded: dict[tuple[str, int], dict[str, Tensor]] = field(default_factory=dict)

    def __call__(self, texts: Sequence[str], max_tokens: int) -> dict[str, Tensor]:
        """A row for each text. Raises UserError for a text that was not encoded before the encoders were dropped."""
        if self.text_encoders:
            return self._encode(texts, max_tokens)
        unknown = [text for text in texts if (text, max_tokens) not in self.encoded]
        if unknown:
            what = f'the prompt "{unknown[0]}" was added to the file after the text encoder was freed'
            raise UserError((Mistake(what, "start again, or remove --cache_text_encoder_outputs"),))
        rows = [self.encoded[text, max_tokens] for text in texts]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def encode_ahead(self, requests: Iterable[ImageRequest]) -> None:
        """Encode the texts of these requests, one at a time, and keep the results."""
        for request in requests:
            max_tokens = token_limit(self.tokenizer, request)
            for text in texts_of(request):
                if (text, max_tokens) not in self.encoded:
                    with torch.no_grad():
                        outputs = self._encode([text], max_tokens)
                    self.encoded[text, max_tokens] = {name: values.cpu() for name, values in outputs.items()}

    def drop_text_encoders(self) -> None:
        """Drop the references to the text encoders, so that they can be freed."""
        self.text_encoders = {}

    def rest(self, device: torch.device) -> None:
        """Keep the text encoders in main memory, but for the time in which prompts are encoded on the device."""
        self.device = device
        for encoder in self.text_encoders.values():
            encoder.to("cpu")

    def _encode(self, texts: Sequence[str], max_tokens: int) -> dict[str, Tensor]:
        encoders = () if self.device is None else self.text_encoders.values()
        with visiting(encoders, self.device or torch.device("cpu")), self.autocast():
            return encode_prompts(self.family, self.tokenizer, self.text_encoders, self.settings, texts, max_tokens)


def build_prompt_encoder(
    preview: PreviewPlan | None, evaluation: EvaluationPlan | None, conditioner: Conditioner, autocast: Autocast
) -> PromptEncoder:
    """The prompt encoder of a run. If captions are cached, the prompts of both that are known now are encoded at
    once, as the text encoders may be freed later."""
    prompts = PromptEncoder(
        family=conditioner.family,
        tokenizer=conditioner.tokenize,
        text_encoders=conditioner.text_encoders,
        settings=conditioner.settings,
        autocast=autocast,
    )
    if conditioner.store is not None:
        prompts.encode_ahead([] if preview is None else read_requests(preview))
        prompts.encode_ahead([] if evaluation is None else evaluation.requests)
    return prompts


@contextmanager
def open_drawer(  # noqa: PLR0913 - model and prompts, and by name how they compute
    model: Model,
    prompts: PromptEncoder,
    *,
    vae: Any,
    vae_format: FloatName,
    device: torch.device,
    starts: Callable[[int], Tensor] | None = None,
    strength: float = 1.0,
    autocast: Autocast = nullcontext,
    release: Callable[[], None] = lambda: None,
) -> Iterator[Draw]:
    """Yield a function that draws with the model's backbone; afterwards the VAE is moved back.

    `vae`: the one that the run computes with, or None if it needs none; then the model's own is moved to the device, in
    `vae_format`. `starts(place)`: the latents (C, h, w) that the prompt at this place refines with `strength`; None:
    images are drawn from noise. `release` frees cached device memory.
    """
    try:
        with decoder(model.vae, vae, vae_format, device) as decoding:
            drawn_with = replace(model, vae=decoding, text_encoders={})

            def draw(
                requests: Sequence[ImageRequest],
                seeds: Sequence[int],
                places: Sequence[int],
                hand_over: HandOver | None = None,
                so_far: GroupSoFar | None = None,
            ) -> list[Image]:
                shown = None if so_far is None else Estimates(so_far.every, partial(so_far.show, decoding))
                return sample_batch(
                    drawn_with,
                    requests,
                    seeds,
                    init_latents=None if starts is None else [starts(place) for place in places],
                    strength=strength,
                    hand_over=hand_over,
                    estimates=shown,
                    encode=prompts,
                    autocast=autocast,
                    dtype=torch.float32,  # of the latents, as in training
                )

            yield draw
    finally:
        release()


def build_drawer(
    options: TrainOptions,
    preview: PreviewPlan | None,
    model: Model,
    prompts: PromptEncoder,
    dataset: TrainingDataset,
    encoder: LatentEncoder,
    run: Run,
) -> Callable[[], AbstractContextManager[Draw]]:
    """`open_drawer` for a run, with the VAE that the run encodes images with, if it still needs one."""
    return partial(
        open_drawer,
        model,
        prompts,
        vae=encoder.vae,
        vae_format=encoder.vae_format,
        device=run.device,
        starts=start_latents(preview, dataset, encoder),
        strength=options.objective.refiner_training_strength,
        autocast=run.autocast_aside,
        release=partial(release_memory, options.memory),
    )


def start_latents(
    preview: PreviewPlan | None, dataset: TrainingDataset, encoder: LatentEncoder
) -> Callable[[int], Tensor] | None:
    """A function from a prompt's place to the latents (C, h, w), unscaled, that it refines; None if images are drawn
    from noise. Latents come from the cache, or are encoded on first use and kept (256 KiB per image of 1024x1024)."""
    if preview is None or not preview.refined:
        return None
    encoded: dict[int, Tensor] = {}

    def start(place: int) -> Tensor:
        number = preview.refined_image(place)
        if dataset.latents is not None:
            return dataset.latents.get(number, False).latents
        if number not in encoded:
            (image,) = encoder.encode_some(dataset.images, [number], progress=False)
            encoded[number] = image.latents
        return encoded[number]

    return start


@contextmanager
def decoder(original: Any, in_use: Any, dtype: FloatName, device: torch.device) -> Iterator[Any]:
    """A VAE on the device: `in_use` if the run has one there; else the original, moved while this is open, or a copy in
    half precision.

    On the CPU the original decodes in float32: half precision saves nothing there, a copy costs memory.
    """
    if in_use is not None:
        yield in_use
    elif original.device == device or device.type == "cpu":
        yield original
    elif dtype != "fp32":
        yield working_copy(original, dtype, device)
    else:
        home = original.device
        try:
            yield original.to(device)
        finally:
            original.to(home)
