"""Read prompts with options, from a line of text or a prompt file, in the format of sd-scripts. No torch.

    a photo of sks dog --n blurry --w 512 --h 768 --s 30 --l 7.5 --d 42 --ss euler_a

Options: n negative prompt, w width, h height, d seed, s steps, l guidance scale, ss sampler; upper case works too.
What only looks like an option (--7, -w 640) stays in the text, with a note.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from library.bounded import json_of, toml_of
from library.limits import PROMPT_LENGTH, PROMPT_SIDE, PROMPT_STEPS
from library.messages import listed, shortened
from library.options.mistakes import Mistake, UserError
from library.options.text_files import PROMPTS, other_kind, read_text
from library.sampling.lora_tags import AdapterUse

STRIDE, SMALLEST_SIDE = 8, 64
LARGEST_SEED = 10**18  # as the 18 digits of --d; torch takes a little more


@dataclass(frozen=True)
class ImageRequest:
    """One image to draw. `seed` None: random. `adapters`: merged into the model for this image, in this order.
    `notes`: messages about options that have no effect."""

    prompt: str
    negative_prompt: str = ""
    width: int = 512
    height: int = 512
    seed: int | None = None
    steps: int = 30
    scale: float = 7.5
    sampler: str = "ddim"
    adapters: tuple[AdapterUse, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)


DEFAULTS = ImageRequest("")

# option -> (field, pattern of the value); options for other models of sd-scripts are ignored by name
_OPTIONS: Mapping[str, tuple[str, str]] = {
    "n": ("negative_prompt", r".*"),
    "w": ("width", r"\d{1,9}"),
    "h": ("height", r"\d{1,9}"),
    "d": ("seed", r"\d{1,18}"),
    "s": ("steps", r"\d{1,9}"),
    "l": ("scale", r"-?\d{1,9}(?:\.\d{0,99})?|-?\.\d{1,99}"),
    "ss": ("sampler", r"\S+"),
}
_OTHER_MODELS = ("g", "cn", "ctr", "rcfg", "fs")
_DASH = "[-\u2010-\u2015\u2212\ufe58\ufe63\uff0d]"  # word processors turn -- into one of these
_WITH_NUMBER, _WITH_TEXT = "(?:w|h|d|s|l|g|rcfg|fs)", "(?:n|ss|cn|ctr)"
_NUMBER = r"\s*[=:]?\s*\.?\d[\d.]*"
_LIKE_AN_OPTION = re.compile(
    rf"(?<!\S)--+[^\s-]\S*"  # --7, --w640, --w=640
    rf"|(?<!\S){_DASH}+\s?{_WITH_NUMBER}{_NUMBER}"  # -w 640, \u2014w 640, -- w 640
    rf"|(?<!\S){_DASH}+{_WITH_TEXT}(?=\s)\s+\S+"  # -n blurry
    rf"|(?<=[^\s-])(?:--+|[\u2013\u2014]){_WITH_NUMBER}{_NUMBER}",  # dog--w 640
    re.IGNORECASE,
)
# key of an object in a .toml or .json file -> field
_KEYS: Mapping[str, str] = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "width": "width",
    "height": "height",
    "seed": "seed",
    "sample_steps": "steps",
    "scale": "scale",
    "sample_sampler": "sampler",
}
_OTHER_KEYS = ("controlnet_image", "guidance_scale", "cfg_trunc_ratio", "renorm_cfg", "flow_shift", "enum", "subset")
_INTEGERS = ("width", "height", "seed", "steps")
_SIDES = ("width", "height")


def parse_line(line: str, defaults: ImageRequest = DEFAULTS) -> ImageRequest:
    """Parse a prompt with its options; `defaults` fills in the rest. Never raises: ignored options are noted, and so is
    text that looks like an option.

    Sides are rounded down to multiples of 8 and are at least 64; steps are clamped to 1 .. 1000.
    """
    text, *options = re.split(r"(?:^|\s)--(?=[A-Za-z]+(?:\s|$))", line.strip())
    values: dict[str, Any] = {"prompt": text.strip()}
    notes = []
    for option in options:
        letters, _, value = option.strip().partition(" ")
        name, pattern = _OPTIONS.get(letters.lower(), ("", ""))
        if not (name and re.fullmatch(pattern, value.strip(), re.ASCII)):
            why = "no effect on this model" if letters.lower() in _OTHER_MODELS else "not understood"
            notes.append(f"--{shortened(option.strip())} in a prompt is ignored: {why}")
        elif name in _SIDES and int(value) > PROMPT_SIDE:
            notes.append(f"--{option.strip()} in a prompt is ignored: a side has at most {PROMPT_SIDE} pixels")
        else:
            values[name] = _typed(name, value.strip())
    request = replace(defaults, **values)
    notes += _like_options(request, "options follow a space and two dashes, such as --w 640 or --n blurry")
    return _within_limits(replace(request, notes=tuple(notes)))


def _like_options(request: ImageRequest, remedy: str) -> Iterator[str]:
    """A note on the pieces of the texts that look like options, if there are any."""
    found = _LIKE_AN_OPTION.findall(request.prompt) + _LIKE_AN_OPTION.findall(request.negative_prompt)
    if found:
        pieces = listed((f'"{piece}"' for piece in found), 10)
        yield f"{pieces} in a prompt: kept as text; {remedy}"


def _typed(name: str, value: Any) -> Any:
    """Convert the value of a field; a negative seed means random. Raises ValueError, TypeError or OverflowError."""
    if name == "seed":
        seed = int(value)
        if seed > LARGEST_SEED:
            raise ValueError
        return seed if seed >= 0 else None
    if name in _INTEGERS:
        number = int(value)
        if name in _SIDES and number > PROMPT_SIDE:
            raise ValueError(f"at most {PROMPT_SIDE} pixels")
        return number
    if name == "sampler":
        return str(value).lower()
    if name == "scale" and not math.isfinite(float(value)):
        raise ValueError
    return float(value) if name == "scale" else str(value)


def _within_limits(request: ImageRequest) -> ImageRequest:
    def side(length: int) -> int:
        return max(SMALLEST_SIDE, length - length % STRIDE)

    return replace(
        request,
        width=side(request.width),
        height=side(request.height),
        steps=min(max(request.steps, 1), PROMPT_STEPS),
    )


def group_requests(requests: Sequence[ImageRequest], at_once: int | None = None) -> list[list[int]]:
    """Return the indices of requests that may share a batch: same size, sampler, steps and scale, at most `at_once`.

    Groups are in the order of their first requests.
    """
    groups: dict[Any, list[int]] = {}
    for place, request in enumerate(requests):
        settings = (request.width, request.height, request.sampler, request.steps, request.scale)
        groups.setdefault(settings, []).append(place)
    return [
        places[start : start + (at_once or len(places))]
        for places in groups.values()
        for start in range(0, len(places), at_once or len(places))
    ]


def read_prompts(path: Path, defaults: ImageRequest = DEFAULTS, *, may_be_empty: bool = False) -> list[ImageRequest]:
    """Read the prompts of a .txt, .toml or .json file, in UTF-8 with or without a BOM.

    .txt: one prompt per line; empty lines and lines that begin with # are skipped. .toml: a table `prompt` with shared
    values and a list `prompt.subset`, which overrides them. .json: a list of lines or objects.
    Raises UserError for a file that cannot be read, an invalid entry, or no prompt at all (unless `may_be_empty`).
    """
    readers = {".txt": _from_text, ".toml": _from_toml, ".json": _from_json}
    named, ending = f"prompt file {path}", path.suffix.lower()
    text = read_text(path, named)
    if isinstance(text, Mistake):
        raise UserError([text])
    if ending not in readers:
        raise UserError([Mistake(f"{named}: unknown extension", "use a .txt, .toml or .json file")])
    if ending != ".txt" and (other := other_kind(named, text, PROMPTS)) is not None:
        raise UserError([other])
    try:
        requests = list(readers[ending](text, defaults))
    except (ValueError, TypeError) as error:  # JSON and TOML errors are ValueErrors
        raise _wrong(path, f"is invalid: {error}", "correct the file") from error
    if not requests and not may_be_empty:
        raise _wrong(path, "contains no prompt", "write one prompt per line")
    return requests


def _wrong(path: Path, what: str, remedy: str) -> UserError:
    return UserError([Mistake(f"prompt file {path} {what}", remedy)])


def _from_text(text: str, defaults: ImageRequest) -> Iterator[ImageRequest]:
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            yield _line(line, defaults)


def _line(line: str, defaults: ImageRequest) -> ImageRequest:
    if len(line) > PROMPT_LENGTH:
        raise ValueError(f"the prompt {shortened(line)!r} has {len(line)} characters, more than {PROMPT_LENGTH}")
    return parse_line(line, defaults)


def _from_toml(text: str, defaults: ImageRequest) -> Iterator[ImageRequest]:
    table = toml_of(text).get("prompt", {})
    if not isinstance(table, Mapping):
        raise ValueError("the table [prompt] is missing")
    shared = {key: value for key, value in table.items() if key != "subset"}
    subsets: Sequence[Any] = table.get("subset", [{}] if "prompt" in table else [])
    for subset in subsets:
        yield _from_object({**shared, **subset}, defaults)


def _from_json(text: str, defaults: ImageRequest) -> Iterator[ImageRequest]:
    entries = json_of(text)
    if not isinstance(entries, list):
        raise ValueError("it must be a list")
    for entry in entries:
        yield _line(entry, defaults) if isinstance(entry, str) else _from_object(entry, defaults)


def _from_object(entry: Any, defaults: ImageRequest) -> ImageRequest:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("prompt"), str):
        raise ValueError(f'every entry needs a string "prompt", not {shortened(repr(entry), 200)}')
    values, notes = {}, []
    for key, value in entry.items():
        if isinstance(value, str) and len(value) > PROMPT_LENGTH:
            raise ValueError(f"{key} has {len(value)} characters, more than {PROMPT_LENGTH}")
        if key in _KEYS and value is not None:
            try:
                values[_KEYS[key]] = _typed(_KEYS[key], value)
            except (TypeError, ValueError, OverflowError):
                most = f" up to {PROMPT_SIDE}" if _KEYS[key] in _SIDES else ""
                raise ValueError(f"{key} = {shortened(repr(value))} is not a valid number{most}") from None
        elif key not in _KEYS:
            why = "no effect on this model" if key in _OTHER_KEYS else "not understood"
            notes.append(f"{key} in a prompt file is ignored: {why}")
    request = replace(defaults, **values)
    notes += _like_options(request, "here options are keys of their own, such as width or negative_prompt")
    return _within_limits(replace(request, notes=tuple(notes)))
