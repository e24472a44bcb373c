"""Encode the images of a metadata file before fine-tuning, and write the size that each is trained at into the file.

python finetune/prepare_buckets_latents.py train_data meta_cap.json meta_lat.json model.safetensors

A training with the same sizes and --cache_latents_to_disk reads the latents. They are .npz files beside the images,
with the names and arrays of sd-scripts. Run it again to encode what is missing or out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script started by path sees only its own folder

from library.messages import counted
from library.options.flag import flag
from library.options.mistakes import Mistake, Mistakes, UserError
from library.options.tool_command import Tool, run_tool, tool_flags

if TYPE_CHECKING:
    from library.training.plan.images import Images

_UNUSED = "for sd-scripts compatibility: has no effect"


@dataclass(frozen=True)
class BucketsOptions:
    """Command-line options, named as in sd-scripts."""

    train_data_dir: Path = flag(None, "the folder of the images")
    in_json: Path = flag(None, "the metadata file that lists them")
    out_json: Path = flag(None, "the metadata file to write")
    model_name_or_path: str = flag(None, "the model whose VAE encodes the images")
    batch_size: int = flag(1, "images that are encoded together", at_least=1)
    max_resolution: str = flag("512,512", "the training's --resolution: width,height")
    min_bucket_reso: int = flag(256, "the training's --min_bucket_reso")
    max_bucket_reso: int = flag(1024, "the training's --max_bucket_reso")
    bucket_reso_steps: int = flag(64, "the training's --bucket_reso_steps")
    bucket_no_upscale: bool = flag(False, "never enlarge an image")
    mixed_precision: str = flag("no", "the training's --mixed_precision", choices=("no", "fp16", "bf16"))
    flip_aug: bool = flag(False, "encode the mirror images too")
    alpha_mask: str = flag("", "any text: transparency is the mask of the loss")
    full_path: bool = flag(False, f"{_UNUSED}, as keys of any kind are found and kept")
    recursive: bool = flag(False, f"{_UNUSED}, as the images are those of in_json")
    skip_existing: bool = flag(False, f"{_UNUSED}, as valid files are always kept")
    max_data_loader_n_workers: int | None = flag(None, _UNUSED)
    v2: bool = flag(False, f"{_UNUSED}, as the kind of model is read from its file")


# what the training calls otherwise: its flag -> the flag here
_NAMES = {
    "pretrained_model_name_or_path": "model_name_or_path",
    "vae_batch_size": "batch_size",
    "resolution": "max_resolution",
}
_SAME = ("train_data_dir", "in_json", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "mixed_precision")
_DEFAULTS = {"enable_bucket": True, "cache_format": "npz", "resolution": (512, 512)}  # in place of the training's


def check(options: BucketsOptions, mistakes: Mistakes) -> None:
    """Add what would be found only after the work."""
    if options.out_json is not None and options.out_json.is_dir():
        mistakes.add(f"out_json {options.out_json} is a folder", "name the file to write in it")


def training_flags(options: BucketsOptions) -> Iterator[str]:
    """The flags of the training that reads these latents, but for those at their defaults."""
    flags = tool_flags(BucketsOptions)
    for name in (*_NAMES, *_SAME):
        own = _NAMES.get(name, name)
        if getattr(options, own) != flags[own].default:
            yield f"--{name}={getattr(options, own)}"
    if options.bucket_no_upscale:
        yield "--bucket_no_upscale"
    if options.flip_aug:
        yield "--flip_aug"
    if options.alpha_mask.lower() not in ("", "0", "false"):
        yield "--alpha_mask"


def work(options: BucketsOptions) -> None:
    """Encode the images, then write their sizes. Raises UserError."""
    from library.runtime.imports import quiet_libraries
    from library.training.precache.command import plan_and_fill
    from tools.cache_latents import TOOL as LATENTS

    quiet_libraries()
    tool = replace(LATENTS, defaults=_DEFAULTS, names=_NAMES)
    try:
        plan = plan_and_fill(tool, list(training_flags(options)))
    except UserError as error:
        texts = ((tool.in_own_words(mistake.what), tool.in_own_words(mistake.remedy)) for mistake in error.mistakes)
        raise UserError(Mistake(*text) for text in texts) from error
    write_sizes(options, plan.facts.images)


def write_sizes(options: BucketsOptions, images: Images) -> None:
    """Write the metadata file with the bucket of each image as its train_resolution. Raises UserError."""
    from library.data.scan.listing import absolute
    from library.data.scan.metadata_entries import name_images, read_entries, write_entries

    entries = read_entries(options.in_json)
    paths = [absolute(record.folder / record.name) for record in images.records]
    keys = name_images(entries, paths, options.train_data_dir, full_path=True)
    for path, placement in zip(paths, images.table.placements, strict=True):
        entries[keys[path]]["train_resolution"] = placement.bucket
    write_entries(options.out_json, entries)
    print(f"written: {options.out_json} ({counted(len(paths), 'image')} with a train_resolution)")


TOOL = Tool(
    "Encode the images of a metadata file before fine-tuning. Run it again to encode what is missing.",
    "python finetune/prepare_buckets_latents.py TRAIN_DATA_DIR IN_JSON OUT_JSON MODEL [more flags]",
    BucketsOptions,
    work,
    required={
        "train_data_dir": "give the folder of the images first",
        "in_json": "give the metadata file to read second",
        "out_json": "give the metadata file to write third",
        "model_name_or_path": "give the model fourth",
    },
    check=check,
    interrupted="interrupted: the latents written so far are complete; the same command continues from there",
    positional=("train_data_dir", "in_json", "out_json", "model_name_or_path"),
)


def main(words: Sequence[str] | None = None) -> int:
    """Encode and write. Returns the exit code: 0 done, 2 user error, 130 interrupted."""
    return run_tool(TOOL, words)


if __name__ == "__main__":
    raise SystemExit(main())
