"""Draw the images of gen_img.py. No torch at module level."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from library.messages import counted
from library.options.mistakes import Mistake, UserError
from library.sampling.draw_command import decide, draw, load, make_folder, open_bar
from library.sampling.init_images import read_init_image
from library.sampling.options import GenerateOptions
from library.sampling.prompts import ImageRequest
from library.sampling.write_image import write_image

LARGEST_DRAWN_SEED = 2**32 - 1


def draw_prompts(options: GenerateOptions) -> None:
    """Read the prompts, load the model and write each image as soon as it is drawn. Raises UserError."""
    if options.strength is not None and options.image_path is None:
        raise UserError([Mistake("--strength requires --image_path", "add --image_path, or remove --strength")])
    init = None
    if options.image_path is not None:
        init = read_init_image(options.image_path, options.strength, options.max_image_memory)
    drawing = decide(options, init)
    if options.zero_terminal_snr and drawing.prediction != "v":
        what = "--zero_terminal_snr, but the model predicts noise"
        raise UserError([Mistake(what, "remove it, or add --v_parameterization if the model uses v-prediction")])
    make_folder(options.outdir)
    for note in drawing.notes:
        print(note)
    images = with_seeds(drawing.prompts, options)
    model = load(options, drawing)
    model.zero_terminal_snr |= options.zero_terminal_snr
    with open_bar(model, images, init) as bar:
        for index, image in enumerate(draw(options, model, images, init, bar=bar)):
            path = options.outdir / file_name(datetime.now(), index, images[index].seed or 0)
            write_image(path, images[index], image)
            with bar.making_room():
                print(f"[{index + 1}/{len(images)}] {path}", flush=True)
    print(f"{counted(len(images), 'image')} in {options.outdir}")


def with_seeds(prompts: Sequence[ImageRequest], options: GenerateOptions) -> list[ImageRequest]:
    """Return a request with a seed for each image. A prompt's own seed (--d) or --seed counts up per image."""
    images: list[ImageRequest] = []
    for prompt in prompts:
        for copy in range(options.images_per_prompt):
            if prompt.seed is not None:
                seed = prompt.seed + copy
            elif options.seed is not None:
                seed = options.seed + len(images)
            else:
                seed = random_seed()
            images.append(replace(prompt, seed=seed))
    return images


def random_seed() -> int:
    """Return a random seed from the operating system."""
    return random.SystemRandom().randint(0, LARGEST_DRAWN_SEED)


def file_name(time: datetime, index: int, seed: int) -> str:
    """`im_20260131235959_000_42.png`: time, number of the image in this run, seed."""
    return f"im_{time:%Y%m%d%H%M%S}_{index:03d}_{seed}.png"
