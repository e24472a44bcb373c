"""Shared by the programs that draw images: check options, load the model, draw, write. No torch at module level."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from library.families.family import Family, Model, TextSettings
from library.families.registry import CheckpointError, Header, declared_prediction, find_model, open_model
from library.messages import counted
from library.options.flag import Capability
from library.options.mistakes import Mistake, Mistakes, UserError
from library.runtime.device import describe_machine
from library.runtime.imports import quiet_libraries
from library.runtime.progress import ProgressBar
from library.sampling.adapters import AdapterMerger, import_modules, with_adapters
from library.sampling.init_images import InitImage, encode_init_image
from library.sampling.options import DrawingOptions, defaults
from library.sampling.prompts import DEFAULTS, ImageRequest, parse_line, read_prompts
from library.sampling.samplers import check_sampler
from library.whole_files import remove_leftovers

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.objective.process import Prediction


ReadPrompts = Callable[[ImageRequest], Sequence[ImageRequest]]
"""From the settings of prompts that leave them out to the prompts. Raises UserError."""


@dataclass(frozen=True)
class Drawing:
    """Decided before weights are loaded: the checkpoint, the prompts with their settings, the device."""

    header: Header
    family: Family
    vae: Path | None
    prediction: Prediction
    prompts: Sequence[ImageRequest]
    device: str

    def vae_in_full(self, options: DrawingOptions) -> bool:
        """Whether the VAE decodes in fp32, whatever the precision of the backbone."""
        return options.no_half_vae or (options.fp16 and not self.family.latent.fp16)

    @property
    def notes(self) -> list[str]:
        """Messages about the prompts and their adapters, each once."""
        adapters = [f"with {', '.join(map(str, prompt.adapters))}" for prompt in self.prompts if prompt.adapters]
        return list(dict.fromkeys([*adapters, *(note for prompt in self.prompts for note in prompt.notes)]))


def decide(options: DrawingOptions, init: InitImage | None = None, read: ReadPrompts | None = None) -> Drawing:
    """Read the prompts and the checkpoint's header; `init`: the image to start from; `read`: gives the prompts in place
    of --prompt and --from_file. Raises UserError with every mistake."""
    mistakes = Mistakes()
    header, family, vae, shapes = None, None, None, None
    try:
        header, family = open_model(options.ckpt or "")
        vae = find_model(options.vae) if options.vae else None
        shapes = family.sizes(header, vae).shapes
    except CheckpointError as error:
        mistakes.add(str(error))
    if family is not None:
        _check_model(options, family, mistakes)
        if family.refines and init is None:
            what = f"{options.ckpt} is {family.title}, which only refines images"
            mistakes.add(what, "use gen_img.py with --image_path, or give a base model")
    declared = None if header is None else declared_prediction(header).prediction
    prediction: Prediction = "v" if options.v_parameterization else declared or "epsilon"
    size = (DEFAULTS.width, DEFAULTS.height) if family is None else family.preview[prediction]
    given = defaults(options, size if init is None else init.size)
    prompts = _prompts(read or partial(_read, options), given, mistakes)
    prompts = with_adapters(options, family, shapes, prompts, mistakes)
    device = _device(options, mistakes)
    if header is None or family is None or mistakes:
        raise UserError(mistakes)
    return Drawing(header, family, vae, prediction, prompts, device)


def _check_model(options: DrawingOptions, family: Family, mistakes: Mistakes) -> None:
    """Add mistakes for flags that do not fit the model's family."""
    is_it = f"{options.ckpt} is {family.title}"
    claims: tuple[tuple[str, bool, Capability], ...]
    claims = (("v2", options.v2, "v2"), ("sdxl", options.sdxl, "size_conditioning"))
    for claim, is_set, capability in claims:
        if is_set and capability not in family.capabilities:
            mistakes.add(f"--{claim}, but {is_it}", f"remove --{claim}, or give another model")
    if options.clip_skip not in (None, 1, 2) and "clip_skip" not in family.capabilities:
        mistakes.add(f"--clip_skip {options.clip_skip}, but {is_it}, which uses a fixed layer", "remove it")


def _read(options: DrawingOptions, given: ImageRequest) -> Sequence[ImageRequest]:
    """The prompts of --from_file or --prompt."""
    return read_prompts(options.from_file, given) if options.from_file else [parse_line(options.prompt or "", given)]


def _prompts(read: ReadPrompts, given: ImageRequest, mistakes: Mistakes) -> Sequence[ImageRequest]:
    try:
        prompts = read(given)
    except UserError as error:
        mistakes.extend(error.mistakes)
        return []
    for prompt in prompts:
        if (wrong := check_sampler(prompt.sampler)) is not None:
            mistakes.extend([wrong])
    return prompts


def _device(options: DrawingOptions, mistakes: Mistakes) -> str:
    found = describe_machine().kind
    device = options.device or found
    if device not in ("cpu", found):
        mistakes.add(f"--device {device} is not available", f"remove it to use {found}")
    if options.fp16 and device == "cpu":
        mistakes.add("--fp16 does not work on a CPU", "remove it, or use --bf16")
    return device


def make_folder(folder: Path) -> None:
    """Create the folder of --outdir if missing. Raises UserError if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        what = f"--outdir {folder} cannot be written ({error.strerror or error})"
        raise UserError([Mistake(what, "choose another folder")]) from error
    remove_leftovers(folder)


def load(options: DrawingOptions, drawing: Drawing) -> Model:
    """Load the model to its device in the chosen precision. Raises UserError."""
    quiet_libraries()
    import torch

    import_modules(drawing.prompts)
    dtype = torch.float16 if options.fp16 else torch.bfloat16 if options.bf16 else torch.float32
    try:
        model = drawing.family.load(
            drawing.header,
            vae=drawing.vae,
            dtype=dtype,
            device=drawing.device,
            prediction=drawing.prediction,
            tokenizer_cache_dir=options.tokenizer_cache_dir,
        )
    except CheckpointError as error:
        raise UserError([Mistake(str(error))]) from error
    if drawing.vae_in_full(options):
        model.vae.to(torch.float32)
    if options.clip_skip is not None and "clip_skip" in drawing.family.capabilities:
        layers = min(len(encoder.encoder.layers) for encoder in model.text_encoders.values())
        if options.clip_skip > layers:
            what = f"--clip_skip {options.clip_skip}, but the text encoder has {counted(layers, 'layer')}"
            raise UserError([Mistake(what, f"use {layers} or less")])
    return model


def open_bar(model: Model, requests: Sequence[ImageRequest], init: InitImage | None = None) -> ProgressBar:
    """The progress bar of drawing these requests, in steps of images. Raises UserError: too few steps for `init`."""
    from library.sampling.images import count_steps

    strength = None if init is None else init.strength_for(model.family)
    return ProgressBar("drawing", count_steps(model, requests, strength), unit="step")


def draw(
    options: DrawingOptions,
    model: Model,
    requests: Sequence[ImageRequest],
    init: InitImage | None = None,
    *,
    bar: ProgressBar,
) -> Iterator[Image]:
    """Draw requests that have seeds, in order, --batch_size at once, from noise or from `init`. Raises UserError."""
    import torch

    from library.sampling.images import sample_batch

    settings = TextSettings(clip_skip=options.clip_skip)

    def say(line: str) -> None:
        with bar.making_room():
            print(line, flush=True)

    merger = AdapterMerger(model, say, restores=len({request.adapters for request in requests}) > 1)
    for batch in _batches(requests, options.batch_size):
        merger.use(batch[0].adapters)
        seeds = [request.seed or 0 for request in batch]
        try:
            yield from sample_batch(
                model,
                batch,
                seeds,
                init_latents=None if init is None else encode_init_image(model, init, batch),
                strength=1.0 if init is None else init.strength_for(model.family),
                settings=settings,
                max_chunks=options.max_embeddings_multiples,
                progress=bar.update,
            )
        except (MemoryError, torch.OutOfMemoryError) as error:
            remedy = "draw smaller images (--W, --H) or fewer at once (--batch_size), or use --fp16 or --bf16"
            raise UserError([Mistake("out of memory", remedy)]) from error


def _batches(requests: Sequence[ImageRequest], size: int) -> Iterator[list[ImageRequest]]:
    """The requests in order, up to `size` at once, with the same adapters."""
    for _, same in groupby(requests, lambda request: request.adapters):
        group = list(same)
        for place in range(0, len(group), size):
            yield group[place : place + size]
