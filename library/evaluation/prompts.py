"""The prompts of an evaluation: of the subject, and the same of its class. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from library.options.mistakes import Mistake, UserError
from library.sampling.prompts import ImageRequest, read_prompts

PLACE = "{subject}"
"""Where the words of the subject, or of its class, stand in a prompt."""

_SCENES = (
    "a {subject} in the jungle",
    "a {subject} in the snow",
    "a {subject} on the beach",
    "a {subject} on a cobblestone street",
    "a {subject} on top of pink fabric",
    "a {subject} on top of a wooden floor",
    "a {subject} with a city in the background",
    "a {subject} with a mountain in the background",
    "a {subject} with a blue house in the background",
    "a {subject} on top of a purple rug in a forest",
)
_PROPERTIES = (
    "a red {subject}",
    "a purple {subject}",
    "a shiny {subject}",
    "a wet {subject}",
    "a cube shaped {subject}",
)

PAPER: Mapping[str, Sequence[str]] = {
    "object": (
        *_SCENES,
        "a {subject} with a wheat field in the background",
        "a {subject} with a tree and autumn leaves in the background",
        "a {subject} with the Eiffel Tower in the background",
        "a {subject} floating on top of water",
        "a {subject} floating in an ocean of milk",
        "a {subject} on top of green grass with sunflowers around it",
        "a {subject} on top of a mirror",
        "a {subject} on top of the sidewalk in a crowded street",
        "a {subject} on top of a dirt road",
        "a {subject} on top of a white rug",
        *_PROPERTIES,
    ),
    "live": (
        *_SCENES,
        "a {subject} wearing a red hat",
        "a {subject} wearing a santa hat",
        "a {subject} wearing a rainbow scarf",
        "a {subject} wearing a black top hat and a monocle",
        "a {subject} in a chef outfit",
        "a {subject} in a firefighter outfit",
        "a {subject} in a police outfit",
        "a {subject} wearing pink glasses",
        "a {subject} wearing a yellow shirt",
        "a {subject} in a purple wizard outfit",
        *_PROPERTIES,
    ),
}
"""The 25 prompts of DreamBooth's evaluation for objects, and those for people and animals: Ruiz et al. 2022 (arXiv
2208.12242), section 4.1, in the authors' github.com/google/dreambooth, dataset/prompts_and_classes.txt."""


@dataclass(frozen=True)
class SubjectWords:
    """How prompts call the subject ("sks dog") and its class ("dog"). Without a class nothing is drawn of it."""

    subject: str
    of_class: str | None


@dataclass(frozen=True)
class SubjectPrompt:
    """An image of the subject to draw, and the same prompt with the words of the class: what CLIP-T compares with, as
    no encoder knows the rare token, and what images of the class are drawn from. None without words of the class, or
    where the prompt does not name the subject."""

    request: ImageRequest
    of_class: ImageRequest | None

    @property
    def name(self) -> str:
        """What the values of a prompt are called by: text and size, in which prompts of one text may differ."""
        return f"{self.request.prompt} {self.request.width}x{self.request.height}"

    @property
    def neutral_text(self) -> str:
        """The text that CLIP-T compares with."""
        return (self.of_class or self.request).prompt


def fill_in(request: ImageRequest, words: SubjectWords) -> SubjectPrompt:
    """A prompt with the words in its place. Where a prompt calls the subject by its words, without {subject}, these are
    replaced for the class."""
    text = request.prompt.replace(PLACE, words.subject)
    if words.of_class is None:
        return SubjectPrompt(replace(request, prompt=text), None)
    named = re.compile(rf"(?<!\w){re.escape(words.subject)}(?!\w)", re.IGNORECASE)
    neutral, times = named.subn(lambda _: words.of_class or "", text)
    of_class = replace(request, prompt=neutral) if times or PLACE in request.prompt else None
    return SubjectPrompt(replace(request, prompt=text), of_class)


def read_subject_prompts(
    chosen: str | Path, words: SubjectWords, given: ImageRequest, flag: str
) -> list[SubjectPrompt]:
    """The prompts of a list of the paper ("object", "live") or of a file. `given`: their settings where a prompt has
    none of its own. Raises UserError."""
    if str(chosen) in PAPER:
        requests: Sequence[ImageRequest] = [replace(given, prompt=text) for text in PAPER[str(chosen)]]
    else:
        requests = read_prompts(Path(chosen), given)
    prompts = [fill_in(request, words) for request in requests]
    if words.of_class is not None and all(prompt.of_class is None for prompt in prompts):
        what = f'{flag} {chosen}: no prompt has {PLACE} or the words of the subject, "{words.subject}"'
        raise UserError([Mistake(what, f"write {PLACE} where the words of the subject belong")])
    return prompts


def requests_of(
    prompts: Sequence[SubjectPrompt], per_prompt: int, seed: int, *, of_class: bool = False
) -> list[list[ImageRequest]]:
    """The images of each prompt, with seeds; of the class: with the prompts that have one, for the others none. A seed
    depends on the place of the prompt and of the image alone: every model and every step gets the same."""
    chosen = [prompt.of_class if of_class else prompt.request for prompt in prompts]
    return [
        [replace(request, seed=_seed(request, seed, place, copy)) for copy in range(per_prompt)] if request else []
        for place, request in enumerate(chosen)
    ]


def _seed(request: ImageRequest, seed: int, place: int, copy: int) -> int:
    return (seed + 1000 * place if request.seed is None else request.seed) + copy
