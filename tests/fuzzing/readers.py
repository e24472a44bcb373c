"""Every reader of files, as a function of a folder for its files and of what is read."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

from library.checkpoints.files import read_header, read_part_header
from library.checkpoints.header import CheckpointError
from library.data.captions import longest_texts, process
from library.data.image_files import BadImage
from library.options.datasets import CaptionSettings, SubsetSpec
from library.options.mistakes import Mistakes, UserError
from networks.adapter import AdapterError

TOLD = (UserError, CheckpointError, AdapterError, BadImage)
"""What a user reads as a sentence."""


def _file(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def header(folder: Path, content: bytes) -> None:
    """A model file."""
    read_header(_file(folder, "x.safetensors", content))


def state_pickle(folder: Path, content: bytes) -> None:
    """A pickle of a training state, then as torch reads it."""
    import torch

    from library.checkpoints.pickles import check_pickle

    path = _file(folder, "optimizer.bin", content)
    check_pickle(path)
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - load_state tells each of them
        pass


def state(folder: Path, content: bytes) -> None:
    """train_state.json."""
    from library.training.saving.state import read_state

    _file(folder, "train_state.json", content)
    read_state(folder)


def dataset(folder: Path, name: str, content: bytes) -> None:
    """A dataset file of kohya's or SimpleTuner's dialect."""
    from library.data.scan.dataset_specs import describe
    from library.options.parse import DREAMBOOTH, parse

    path = _file(folder, name, content)
    flags = ("dataset_config", "data_backend_config") if name.endswith(".json") else ("dataset_config",)
    for flag in flags:
        describe(parse([f"--{flag}={path}"], DREAMBOOTH).options)


def config(folder: Path, name: str, content: bytes) -> None:
    """A --config_file: TOML, or SimpleTuner's JSON."""
    from library.options.parse import ADAPTERS, DREAMBOOTH, parse

    path = _file(folder, name, content)
    for program in (DREAMBOOTH, ADAPTERS):
        parse([f"--config_file={path}"], program)


def prompts(folder: Path, name: str, content: bytes) -> None:
    """A prompt file, with A1111's tags."""
    from library.sampling.lora_tags import split_tags
    from library.sampling.prompts import read_prompts

    for request in read_prompts(_file(folder, name, content)):
        try:
            split_tags(request.prompt)
        except ValueError:
            pass  # the documented error, which its caller tells


def metadata(folder: Path, name: str, content: bytes) -> None:
    """A metadata file, and the images that it names."""
    from library.data.scan.listing import Directories
    from library.data.scan.metadata_files import Locator, read_metadata

    read = read_metadata(_file(folder, name, content), CaptionSettings())
    locator = Locator.of(Directories([".png"]), folder, [".png"])
    for key in read.captions:
        found = locator.find(key)
        assert isinstance(found, str) or found.directory.path.startswith(str(folder)), (key, found)


def caption(folder: Path, text: str, chosen: CaptionSettings) -> None:
    """A caption, processed, with its weights."""
    from library.families.clip.prompt_weights import parse

    for found in (process(text, chosen, random.Random(0), 1), *longest_texts(text, chosen)):
        assert all(abs(weight) <= 1000 for _, weight in parse(found))


def caption_file(folder: Path, content: bytes) -> None:
    """The bytes of a caption file."""
    from library.data.scan.caption_files import read_caption

    read_caption(_file(folder, "x.txt", content), all_lines=True)


def folder_names(folder: Path, names: list[str]) -> None:
    """Names of training folders."""
    from library.data.scan import folders
    from library.data.scan.dataset_specs import from_flags
    from library.options.parse import DREAMBOOTH, parse

    base = folder / "train"
    base.mkdir(exist_ok=True)
    for name in names:
        try:
            (base / name).mkdir(exist_ok=True)
        except (OSError, ValueError):  # no name on this system
            continue
    options = parse([], DREAMBOOTH).options
    template = from_flags(options.dataset, options.caption, options.mask, options.validation)
    folders.folder_datasets(base, None, template)
    for child in base.iterdir():
        child.rmdir()


def image(folder: Path, content: bytes) -> None:
    """An image or mask."""
    from library.data import decoding
    from library.data.scan import image_headers

    path = _file(folder, "x.png", content)
    for read in (
        lambda: image_headers.read_header(path, 0.01),
        lambda: decoding.read(path, decoding.to_rgb, 0.01),
        lambda: decoding.read(path, decoding.luminance, 0.01),
    ):
        try:
            read()
        except TOLD:
            continue


def latents(folder: Path, name: str, content: bytes) -> None:
    """A latent cache: whatever it is, it is read or made again."""
    from library.data.cache import latent_files

    path = _file(folder, name, content)
    latent_files.read(str(path))
    latent_files.shapes(str(path))


def model_folder(folder: Path, index: bytes, part: bytes, shards: bytes) -> None:
    """A diffusers folder."""
    for name, content in (("model_index.json", index), ("unet/config.json", part),
                          ("unet/diffusion_pytorch_model.safetensors.index.json", shards)):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    read_part_header(folder / "unet")
    read_header(folder)


def peft(folder: Path, content: bytes) -> None:
    """PEFT's configuration of an adapter."""
    from library.checkpoints.folders import read_json
    from networks.formats.peft_config import read_alphas

    read_alphas(read_json(_file(folder, "adapter_config.json", content))).of(["mid_block.attentions.0.to_q"], 4)


def webhooks(folder: Path, content: bytes) -> None:
    """A webhook file."""
    from library.training.events.webhook_config import decide_webhooks

    decide_webhooks(_file(folder, "hooks.json", content), Mistakes())


def boxes(folder: Path, content: bytes) -> None:
    """A file of boxes for masks."""
    from library.mask_making.boxes import read_boxes

    read_boxes(_file(folder, "boxes.json", content), Mistakes())


def adapter(folder: Path, content: dict[str, Any]) -> None:
    """Names and shapes of an adapter, as a tool reads them."""
    import torch
    from safetensors.torch import save_file

    from networks import adapter_files
    from networks.loading import by_layer
    from networks.registry import detect_kind

    tensors = {name: torch.zeros(shape) for name, shape in content.items()}
    save_file(tensors, folder / "x.safetensors")
    read = adapter_files.read(folder / "x.safetensors")
    for roles in by_layer(read.tensors).values():
        detect_kind([f"layer.{role}" for role in roles])


def shards(folder: Path, content: bytes) -> None:
    """A tar shard."""
    from library.data.shards.archive import Skipped, files_in

    path = str(_file(folder, "x.tar", content))
    list(files_in(path, [".png"], [".txt", ".json"], Skipped()))


def shard_pattern(folder: Path, text: str) -> None:
    """The text that names shards."""
    from library.data.shards.places import locate

    locate(text)


def shard_table(folder: Path, content: bytes) -> None:
    """A table of shards, and its records."""
    from library.data.scan.shard_images import open_images
    from library.data.shards.places import Places

    table = _file(folder, "x.sqlite", content)
    (folder / "a.tar").write_bytes(bytes(512))
    subset = SubsetSpec(folder, "a test", mask_dir=folder)
    images = open_images(subset, 0, 0, Places(str(folder), str(table)), folder)
    for number, row in itertools.islice(images.rows(), 5):
        record = images.record(number, row)
        for member in (record.member, record.mask_member):
            assert member is None or (str(member) and member.cache_name)
