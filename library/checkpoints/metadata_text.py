"""The metadata of a file as text for people: in groups, with folders and tags as tables. No torch.

Names are those of sd-scripts (ss_*), its hashes (sshs_*) and Stability-AI/ModelSpec 1.0.1 (modelspec.*).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any
from unicodedata import category

from library.bounded import json_of
from library.checkpoints.header import Header
from library.checkpoints.metadata import read_modelspec
from library.messages import counted

_NOT_SET = "None"
_EMPTY = ("{}", "[]", "null")  # tables of nothing: no regularisation images, no buckets
_LONGEST = 2000  # characters of one value
_INDENT = "  "
_STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's categories
_HARMLESS = "\u200c\u200d"  # joiners of letters and emoji

# Heading -> keys without ss_, in the order in which they are shown. What stands nowhere here is shown last.
_GROUPS: Mapping[str, tuple[str, ...]] = {
    "Training": (
        "output_name", "training_comment", "training_started_at", "training_finished_at", "steps", "max_train_steps",
        "epoch", "num_epochs", "num_batches_per_epoch", "seed", "session_id", "mixed_precision", "full_fp16",
        "fp8_base", "fp8_base_unet", "gradient_checkpointing", "gradient_accumulation_steps", "lowram", "cache_latents",
        "sd_scripts_commit_hash",
    ),
    "Optimiser": (
        "optimizer", "learning_rate", "unet_lr", "text_encoder_lr", "lr_scheduler", "lr_warmup_steps", "max_grad_norm",
    ),
    "Average of the weights": (
        "ema_of", "ema_decay", "ema_update_interval", "ema_warmup_steps", "ema_steps", "ema_left_out",
        "posthoc_ema_sigma_rel", "posthoc_ema_steps", "posthoc_ema_error",
    ),
    "Network": (
        "network_module", "network_dim", "network_alpha", "network_dropout", "network_args", "scale_weight_norms",
    ),
    "Model": (
        "sd_model_name", "base_model_version", "v2", "clip_skip", "max_token_length", "vae_name",
    ),
    "Noise and loss": (
        "loss_type", "huber_schedule", "huber_c", "huber_scale", "prior_loss_weight", "min_snr_gamma",
        "debiased_estimation", "zero_terminal_snr", "noise_offset", "noise_offset_random_strength",
        "adaptive_noise_scale", "multires_noise_iterations", "multires_noise_discount", "ip_noise_gamma",
        "ip_noise_gamma_random_strength",
    ),
    "Validation": (
        "num_validation_images", "validation_split", "validation_seed", "validate_every_n_steps",
        "validate_every_n_epochs", "max_validation_steps",
    ),
    "Images and captions": (
        "num_train_images", "num_reg_images", "batch_size_per_device", "total_batch_size", "resolution",
        "enable_bucket", "bucket_no_upscale", "min_bucket_reso", "max_bucket_reso", "resize_interpolation",
        "color_aug", "flip_aug", "random_crop", "face_crop_aug_range", "shuffle_caption", "keep_tokens",
        "caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate",
    ),
}  # fmt: skip
_SPEC = ("title", "architecture", "prediction_type", "resolution", "date", "author", "license", "description", "tags")
_TIMES = ("training_started_at", "training_finished_at")
_HASHES = ("sd_model_hash", "new_sd_model_hash", "vae_hash", "new_vae_hash")


def describe_metadata(header: Header, tags: int = 20) -> str:
    """All that the metadata says, but for what is not set. `tags`: the most frequent ones of each folder; 0 = all."""
    kinds = ", ".join(sorted({info.dtype for info in header.tensors.values()}))
    lines = [str(header.path), f"{counted(len(header.tensors), 'tensor')}, {kinds}"]
    if not header.metadata:
        return "\n".join([*lines, "no metadata"])
    left = dict(header.metadata)
    spec = read_modelspec(left)
    ordered = {name: spec[name] for name in (*_SPEC, *sorted(spec)) if name in spec}
    lines += _section("Title and kind", _texts(_take_all(left, ordered, "modelspec.")))
    for heading, names in _GROUPS.items():
        found = _take_all(left, {name: left[f"ss_{name}"] for name in names if f"ss_{name}" in left}, "ss_")
        lines += _section(heading, _texts(found))
    for heading, key, table in _tables(tags):
        shown = [] if left.get(key, "{}") in _EMPTY else table(decoded(left[key]))
        if shown is not None:
            left.pop(key, None)
            lines += _section(heading, shown)
    hashes = {name: left.pop(f"ss_{name}") for name in _HASHES if f"ss_{name}" in left}
    hashes |= {name: left.pop(name) for name in sorted(left) if name.startswith("sshs_")}
    lines += _section("Hashes", _texts(hashes))
    lines += _section("Other", _texts(dict(sorted(left.items()))))
    return "\n".join(lines)


def decoded(value: str) -> Any:
    """A value that is JSON of an object or a list, as Python's; any other as it stands."""
    if not value.startswith(("{", "[")):
        return value
    try:
        return json_of(value)
    except ValueError:
        return value


def _take_all(left: dict[str, str], found: dict[str, str], prefix: str) -> dict[str, str]:
    for name in found:
        del left[prefix + name]
    return found


def _section(heading: str, lines: list[str]) -> list[str]:
    return ["", heading, *(_INDENT + _printable(line) for line in lines)] if lines else []


def _texts(values: Mapping[str, str]) -> list[str]:
    """One line for each value that is set, in two columns; further lines of a value below it."""
    known = {name: _text(name, value) for name, value in values.items() if value != _NOT_SET}
    width = max((len(name) for name in known), default=0)
    lines = []
    for name, text in known.items():
        first, *others = text.split("\n")
        lines += [
            f"{name.ljust(width)}  {first}".rstrip(),
            *(" " * (width + 2) + other for other in others),
        ]
    return lines


def _text(name: str, value: str) -> str:
    content = decoded(value)
    if isinstance(content, dict) and content and not any(isinstance(each, dict | list) for each in content.values()):
        content = ", ".join(f"{key}={each}" for key, each in content.items())
    elif not isinstance(content, str):
        content = value
    if content.startswith("data:"):
        return f"{content.partition(',')[0][:80]}, {len(content)} characters"
    if name in _TIMES:
        content = _time(content)
    if len(content) > _LONGEST:
        content = f"{content[:_LONGEST]}... ({len(content)} characters)"
    return content


def _time(value: str) -> str:
    try:
        return datetime.fromtimestamp(float(value)).isoformat(" ", "seconds")
    except (ValueError, OverflowError, OSError):
        return value


def _printable(text: str) -> str:
    """Without what would steer the terminal or the direction of writing: the file may come from anyone."""
    return "".join(
        ascii(sign)[1:-1] if category(sign) in _STEERING and sign not in _HARMLESS else sign for sign in text
    )


def _tables(tags: int) -> Iterator[tuple[str, str, Callable[[Any], list[str] | None]]]:
    """Heading, key, and what makes the lines of a table; it gives None for content of another shape."""
    yield "Folders", "ss_dataset_dirs", _folders
    yield "Folders of regularisation images", "ss_reg_dataset_dirs", _folders
    yield "Datasets", "ss_datasets", _datasets
    yield "Buckets", "ss_bucket_info", _buckets
    yield "Tags", "ss_tag_frequency", lambda content: _tags(content, tags)


def _folders(content: Any) -> list[str] | None:
    try:
        return [
            f"{name}: {counted(facts['img_count'], 'image')} x {facts['n_repeats']}" for name, facts in content.items()
        ]
    except (AttributeError, KeyError, TypeError):
        return None


def _buckets(content: Any) -> list[str] | None:
    try:
        return [
            *(
                f"{bucket['resolution'][0]}x{bucket['resolution'][1]}: {bucket['count']}"
                for bucket in content["buckets"].values()
            ),
            f"mean error of the aspect ratio: {float(content['mean_img_ar_error']):.4f}",
        ]
    except (AttributeError, KeyError, TypeError, IndexError, ValueError):
        return None


def _datasets(content: Any) -> list[str] | None:
    try:
        lines = []
        for dataset in content:
            width, height = dataset["resolution"]
            lines.append(f"{width}x{height}, batches of {dataset['batch_size_per_device']}")
            lines += [_INDENT + line for line in _buckets(dataset.get("bucket_info")) or []]
            for subset in dataset["subsets"]:
                name = subset.get("metadata_file") or subset.get("image_dir")
                lines.append(f"{_INDENT}{name}: {counted(subset['img_count'], 'image')} x {subset['num_repeats']}")
                told = {
                    key: each for key, each in subset.items() if key not in _TOLD and each not in (None, False, "", 0)
                }
                lines += [_INDENT * 2 + f"{key} {each}" for key, each in told.items()]
        return lines
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


_TOLD = ("img_count", "num_repeats", "image_dir", "metadata_file")


def _tags(content: Any, most: int) -> list[str] | None:
    """The tags of each folder, the most frequent ones first."""
    try:
        lines = []
        for folder, counts in content.items():
            ordered = sorted(((int(count), str(tag)) for tag, count in counts.items()), key=lambda each: -each[0])
            shown = ordered[: most or None]
            width = len(str(shown[0][0])) if shown else 0
            lines.append(f"{folder}: {len(ordered)} different")
            lines += [f"{_INDENT}{str(count).rjust(width)}  {tag}" for count, tag in shown]
            if len(shown) < len(ordered):
                lines.append(f"{_INDENT}and {len(ordered) - len(shown)} more")
        return lines
    except (AttributeError, TypeError, ValueError):
        return None
