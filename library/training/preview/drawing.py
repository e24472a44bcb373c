"""What a run draws its images with: the trained modules in place, the VAE fetched, prompts encoded or kept."""

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
from library.training.inputs import encode_latents
from library.training.memory import release_memory, working_copy
from library.training.preview.plan import PreviewPlan, read_requests

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.data.cache.latent_cache import LatentStore
    from library.data.dataset import TrainingDataset
    from library.data.reading import ImageReader
    from library.families.family import Family, Model, Tokenizer
    from library.runtime.precision import FloatName
    from library.training.conditioning import Conditioner
    from library.training.plan.facts import RunFacts
    from library.training.preview.preview import Draw
    from library.training.run import Run

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass
class PromptStates:
    """Called with texts and how many tokens of them are read, gives what text encoders give for them: see
    library.sampling.images.EncodePrompts.

    `text_encoders` are those that the run computes with. Where its captions are encoded beforehand they may be needed
    no more: `keep` what they give for the prompts and `forget` them.
    """

    family: Family
    tokenizer: Tokenizer
    text_encoders: Mapping[str, Any]
    settings: TextSettings = AS_TRAINED
    autocast: Autocast = nullcontext
    kept: dict[tuple[str, int], dict[str, Tensor]] = field(default_factory=dict)

    def __call__(self, texts: Sequence[str], max_tokens: int) -> dict[str, Tensor]:
        """A row for each text. Raises UserError for a text that is unknown when the encoders are gone."""
        if self.text_encoders:
            return self._encode(texts, max_tokens)
        unknown = [text for text in texts if (text, max_tokens) not in self.kept]
        if unknown:
            what = f'"{unknown[0]}" came to the prompt file after the text encoder had done its work'
            raise UserError((Mistake(what, "start again, or without --cache_text_encoder_outputs"),))
        rows = [self.kept[text, max_tokens] for text in texts]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def keep(self, requests: Iterable[ImageRequest]) -> None:
        """Encode what these requests will need, each text by itself."""
        for request in requests:
            max_tokens = token_limit(self.tokenizer, request)
            for text in texts_of(request):
                if (text, max_tokens) not in self.kept:
                    with torch.no_grad():
                        outputs = self._encode([text], max_tokens)
                    self.kept[text, max_tokens] = {name: values.cpu() for name, values in outputs.items()}

    def forget(self) -> None:
        """Let go of the text encoders."""
        self.text_encoders = {}

    def _encode(self, texts: Sequence[str], max_tokens: int) -> dict[str, Tensor]:
        with self.autocast():
            return encode_prompts(self.family, self.tokenizer, self.text_encoders, self.settings, texts, max_tokens)


def prompt_states(preview: PreviewPlan | None, conditioner: Conditioner, autocast: Autocast) -> PromptStates:
    """What encodes the prompts of sample images; those known by now are encoded at once where captions are, as the text
    encoders may be gone later."""
    states = PromptStates(
        family=conditioner.family,
        tokenizer=conditioner.tokenize,
        text_encoders=conditioner.text_encoders,
        settings=conditioner.settings,
        autocast=autocast,
    )
    if conditioner.store is not None and preview is not None:
        states.keep(read_requests(preview))
    return states


@contextmanager
def drawing(  # noqa: PLR0913 - being redrawn
    model: Model,
    states: PromptStates,
    *,
    vae: Any,
    vae_format: FloatName,
    device: torch.device,
    starts: Callable[[int], Tensor] | None = None,
    strength: float = 1.0,
    autocast: Autocast = nullcontext,
    release: Callable[[], None] = lambda: None,
) -> Iterator[Draw]:
    """Make ready what draws with the model's own U-Net, and put it away again.

    `vae`: the one that the run computes with, or None where it needs none; then the model's own is fetched to the
    device, in the format of the computation. `starts`: the latents that the prompt at a place refines with `strength`;
    None: images are drawn from noise. `release` gives memory back.
    """
    try:
        with decoder(model.vae, vae, vae_format, device) as decoding:
            shown = replace(model, vae=decoding, text_encoders={})

            def draw(requests: Sequence[ImageRequest], seeds: Sequence[int], places: Sequence[int]) -> list[Image]:
                return sample_batch(
                    shown,
                    requests,
                    seeds,
                    init_latents=None if starts is None else [starts(place) for place in places],
                    strength=strength,
                    encode=states,
                    autocast=autocast,
                    dtype=torch.float32,  # as in training: weights of fewer bits meet them, also under autocast
                )

            yield draw
    finally:
        release()


def drawing_of(
    facts: RunFacts,
    preview: PreviewPlan | None,
    model: Model,
    prompts: PromptStates,
    vae: Any,
    dataset: TrainingDataset,
    run: Run,
) -> Callable[[], AbstractContextManager[Draw]]:
    """`drawing` with the parts of a run; `vae` is the one that computes."""
    return partial(
        drawing,
        model,
        prompts,
        vae=vae,
        vae_format=facts.precision.vae,
        device=run.device,
        starts=starts_of(facts, preview, model, vae, dataset.images, dataset.latents),
        strength=facts.options.objective.refiner_training_strength,
        autocast=run.accelerator.autocast,
        release=partial(release_memory, facts.options.memory),
    )


def starts_of(
    facts: RunFacts, preview: PreviewPlan | None, model: Model, vae: Any, reader: ImageReader, store: LatentStore | None
) -> Callable[[int], Tensor] | None:
    """The latents (C, h, w), not scaled, that the prompt at a place refines, or None where images are drawn: those of
    the cache, or else the same ones, encoded when they are asked for and kept (256 KiB an image of 1024x1024). `vae`
    is the one that computes."""
    if preview is None or not preview.refined:
        return None
    kept: dict[int, Tensor] = {}

    def start(place: int) -> Tensor:
        number = preview.refined_by(place)
        if store is not None:
            return store.get(number, False).latents
        if number not in kept:
            record = replace(reader.records[number], held_out=True)  # without a mirror image
            alone = replace(reader, records=[record], placements=[reader.placements[number]])
            kept[number] = encode_latents(facts, model, vae, alone, progress=False).store.get(0, False).latents
        return kept[number]

    return start


@contextmanager
def decoder(original: Any, computing: Any, dtype: FloatName, device: torch.device) -> Iterator[Any]:
    """A VAE on the device: the one that computes already; else the original, for a while, or a copy of it.

    In main memory the original decodes as it is: no copy is worth its memory there.
    """
    if computing is not None:
        yield computing
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
