"""What gen_img.py does: decide what needs no weight, load the model, draw and write. No torch at module level."""

from __future__ import annotations

import errno
import logging
import os
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from library.families.family import Family, Model
from library.families.registry import CheckpointError, Header, find_model, noted_prediction, open_model
from library.options.mistakes import Mistake, Mistakes, UserError
from library.runtime.device import describe_machine
from library.sampling.command import GenerateOptions, defaults
from library.sampling.prompts import PictureRequest, parse_line, read_prompts
from library.sampling.samplers import check_sampler

if TYPE_CHECKING:
    from library.objective.process import Prediction

LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Job:
    """Everything decided: the checkpoint, the pictures in order (each with its seed), the device."""

    header: Header
    family: Family
    vae: Path | None
    prediction: Prediction
    pictures: Sequence[PictureRequest]
    device: str
    notes: Sequence[str] = ()


def decide(options: GenerateOptions) -> Job:
    """Read prompts and the checkpoint's header. Raises UserError with every mistake that can be found so."""
    mistakes = Mistakes()
    requests = _requests(options, mistakes)
    header, family, vae = None, None, None
    try:
        header, family = open_model(options.ckpt or "")
        vae = find_model(options.vae) if options.vae else None
        family.sizes(header, vae)
    except CheckpointError as error:
        mistakes.add(str(error))
    if family is not None and options.v2 and "v2" not in family.capabilities:
        mistakes.add(f"--v2, but {options.ckpt} is {family.title}", "leave --v2 out, or give the model you mean")
    device = _device(options, mistakes)
    if header is None or family is None or mistakes:
        raise UserError(mistakes)
    _make_outdir(options.outdir)
    return Job(
        header=header,
        family=family,
        vae=vae,
        prediction="v" if options.v_parameterization else noted_prediction(header) or "epsilon",
        pictures=_numbered(requests, options),
        device=device,
        notes=[note for request in requests for note in request.notes],
    )


def _requests(options: GenerateOptions, mistakes: Mistakes) -> list[PictureRequest]:
    try:
        if options.from_file is not None:
            requests = read_prompts(options.from_file, defaults(options))
        else:
            requests = [parse_line(options.prompt or "", defaults(options))]
    except UserError as error:
        mistakes.extend(error.mistakes)
        return []
    for request in requests:
        if (wrong := check_sampler(request.sampler)) is not None:
            mistakes.extend([wrong])
    return requests


def _numbered(requests: Sequence[PictureRequest], options: GenerateOptions) -> list[PictureRequest]:
    """Every picture with its seed. A prompt's own seed (--d) or --seed counts up from picture to picture."""
    pictures: list[PictureRequest] = []
    for request in requests:
        for copy in range(options.images_per_prompt):
            if request.seed is not None:
                seed = request.seed + copy
            elif options.seed is not None:
                seed = options.seed + len(pictures)
            else:
                seed = random.SystemRandom().randint(0, LARGEST_SEED)
            pictures.append(replace(request, seed=seed))
    return pictures


def _device(options: GenerateOptions, mistakes: Mistakes) -> str:
    found = describe_machine().kind
    device = options.device or found
    if device not in ("cpu", found):
        mistakes.add(f"--device {device}, but there is none here", f"leave it out; {found} is then used")
    if options.fp16 and device == "cpu":
        mistakes.add("--fp16 on a CPU", "leave it out, or use --bf16")
    return device


def _make_outdir(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        what = f"--outdir {folder} cannot be written ({error.strerror or error})"
        raise UserError([Mistake(what, "choose another folder")]) from error


def load(options: GenerateOptions, job: Job) -> Model:
    """The model on its device, in the precision asked for. Raises UserError."""
    _quiet_libraries()
    import torch

    dtype = torch.float16 if options.fp16 else torch.bfloat16 if options.bf16 else torch.float32
    try:
        model = job.family.load(
            job.header,
            vae=job.vae,
            dtype=dtype,
            device=job.device,
            prediction=job.prediction,
            tokenizer_cache_dir=options.tokenizer_cache_dir,
        )
    except CheckpointError as error:
        raise UserError([Mistake(str(error))]) from error
    if options.no_half_vae:
        model.vae.to(torch.float32)
    return model


def _quiet_libraries() -> None:
    """Remarks that no user can act on are not shown. Must run before the libraries are imported."""
    for variable in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")


def write_pictures(options: GenerateOptions, job: Job, model: Model) -> list[Path]:
    """Draw every picture of the job and write it at once; returns the paths. Raises UserError."""
    import torch

    try:
        return _write_pictures(options, job, model)
    except (MemoryError, torch.OutOfMemoryError) as error:
        remedy = "draw smaller pictures (--W, --H), or use --fp16 or --bf16"
        raise UserError([Mistake("the memory is exhausted", remedy)]) from error
    except OSError as error:
        what = f"{options.outdir}: a picture could not be written ({error.strerror or error})"
        raise UserError([Mistake(what, "make room or choose another --outdir")]) from error


def _write_pictures(options: GenerateOptions, job: Job, model: Model) -> list[Path]:
    from library.sampling.pictures import sample

    layers = len(model.text_encoder.encoder.layers)
    if options.clip_skip is not None and options.clip_skip > layers:
        raise UserError([Mistake(f"--clip_skip {options.clip_skip}, but the text encoder has {layers} layers")])
    paths = []
    for index, picture in enumerate(job.pictures):
        seed = picture.seed or 0
        image = sample(model, picture, seed, clip_skip=options.clip_skip, most_chunks=options.max_embeddings_multiples)
        path = options.outdir / file_name(datetime.now(), index, seed)
        image.save(path, pnginfo=_facts(picture))
        print(f"[{index + 1}/{len(job.pictures)}] {path}", flush=True)
        paths.append(path)
    return paths


def file_name(time: datetime, index: int, seed: int) -> str:
    """`im_20260131235959_000_42.png`: time, number of the picture in this run, seed."""
    return f"im_{time:%Y%m%d%H%M%S}_{index:03d}_{seed}.png"


def _facts(picture: PictureRequest) -> object:
    """What the picture was made of, as text in the PNG."""
    from PIL.PngImagePlugin import PngInfo

    facts = PngInfo()
    facts.add_itxt("prompt", picture.prompt)
    facts.add_itxt("negative-prompt", picture.negative_prompt)
    for key, value in (("seed", picture.seed), ("sampler", picture.sampler), ("steps", picture.steps)):
        facts.add_text(key, str(value))
    facts.add_text("scale", str(picture.scale))
    return facts
