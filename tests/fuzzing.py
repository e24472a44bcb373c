"""Random files for every reader: `python -m tests.fuzzing --examples 2000 --seed 1 --memory 8`.

The law: a sentence for the user, or success; never another error, a hang, or memory that the file does not have.
tests/test_fuzzing.py runs a few examples of each kind, the same in every run. Each crash that was found is a test.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import json
import pickle
import random
import signal
import struct
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from library.checkpoints.files import read_header, read_part_header
from library.checkpoints.header import CheckpointError
from library.data.captions import longest_texts, process
from library.data.image_files import BadImage
from library.options.datasets import CaptionSettings, SubsetSpec
from library.options.mistakes import Mistakes, UserError
from networks.adapter import AdapterError

TOLD = (UserError, CheckpointError, AdapterError, BadImage)
"""What a user reads as a sentence."""
SECONDS = 20  # that one example may take; a thousand times what it needs

# --- values -----------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8"), max_size=30) | st.sampled_from(
    [
        "",
        "../../x",
        "/etc/passwd",
        "C:\\x",
        "\\\\host\\share",
        "a" * 300,
        "true",
        "1e400",
        "nan",
        "{a|b}",
        "((a:2))",
        "\u202e",
    ]
)
NUMBERS = (
    st.integers()
    | st.floats()
    | st.sampled_from([0, -1, 1, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"), 0.5])
)
LEAVES = st.none() | st.booleans() | NUMBERS | TEXT
WORDS = """
    general datasets subsets image_dir metadata_file num_repeats resolution caption_extension class_tokens is_reg
    batch_size enable_bucket min_bucket_reso max_bucket_reso keep_tokens shuffle_caption caption_prefix
    pretrained_model_name_or_path learning_rate optimizer_args optimizer_type network_dim network_args
    max_train_steps train_batch_size seed lr_scheduler prompt subset width height sample_steps scale negative_prompt
    id instance_data_dir type dataset_type cache_dir_vae crop crop_style minimum_image_size repeats caption_strategy
    caption tags image_path aesthetic_score image_size train_resolution model_family data_backend_config rank
    webhook_type callback_url progress identity step epoch peft_type lora_alpha alpha_pattern r weight_map
    _class_name unet vae model_type
""".split()
KEYS = st.sampled_from(WORDS) | TEXT
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=25
)
TABLES = st.dictionaries(KEYS, TREES, max_size=6)


def _json(tree: object) -> bytes:
    return json.dumps(tree).encode()


def _toml(tree: Any) -> bytes:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items() if each is not None}
        return [plain(each) for each in value if each is not None] if isinstance(value, list) else value

    return tomli_w.dumps(plain(tree)).encode("utf-8", "replace")


def _damaged(made: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """The bytes, or with some of them cut out, put in, or replaced."""
    cuts = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 30), st.binary(max_size=20)), max_size=3)

    def damage(content: bytes, places: list[tuple[float, int, bytes]]) -> bytes:
        for share, length, new in places:
            place = int(share * len(content))
            content = content[:place] + new + content[place + length :]
        return content

    return made | st.builds(damage, made, cuts) | st.binary(max_size=200)


NESTS = st.sampled_from(
    [b"[" * 100_000, b'{"a":' * 50_000, b"a = " + b"[" * 50_000, b"a." * 500 + b"a = 1", b"a = " + b"9" * 9000]
)
JSONS = _damaged(TREES.map(_json)) | NESTS
TOMLS = _damaged(TABLES.map(_toml)) | NESTS
LINES = _damaged(st.lists(TREES.map(_json), max_size=5).map(b"\n".join)) | NESTS

_PIECES = st.sampled_from(
    ["(", ")", "[", "]", "{", "}", "{{", "}}", "|", ":", "\\", ":1.3)", ":-2)", ":99999999999)", ",", " ", "\n", "dog",
     "--w 64", "--n ", " --h ", "9" * 5000, "--s 10", "--d 5", "<lora:", "<lora:a:1>", ">", "ü", "犬", "--",
     "\u2014w 640", "||| "]
)  # fmt: skip
CAPTIONS = st.lists(_PIECES | TEXT, max_size=25).map("".join) | st.builds(
    lambda piece, count: piece * max(1, count // len(piece)), _PIECES, st.sampled_from([10, 1000, 20_000])
)
SETTINGS = st.builds(
    CaptionSettings,
    wildcard=st.booleans(),
    shuffle=st.booleans(),
    keep_tokens=st.integers(0, 5),
    keep_tokens_separator=st.sampled_from(["", "|||"]),
    secondary_separator=st.sampled_from(["", ";;"]),
    tag_dropout_rate=st.sampled_from([0.0, 0.5]),
    prefix=st.sampled_from(["", "a "]),
)


@functools.cache
def _weights() -> bytes:
    import torch
    from safetensors.torch import save

    return save({"a.weight": torch.ones(2, 3), "a.alpha": torch.ones(())}, {"ss_network_dim": "3"})


@st.composite
def safetensors(draw: st.DrawFn) -> bytes:
    """Files of the format, whole and not."""
    if draw(st.booleans()):
        return _weights()
    shapes = st.lists(st.integers(0, 9) | NUMBERS, max_size=4)
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "U8", "F4", ""]) | LEAVES,
            "shape": shapes | LEAVES,
            "data_offsets": st.lists(st.integers(0, 64) | NUMBERS, max_size=3) | LEAVES,
        }
    )
    table = draw(st.dictionaries(TEXT, entry | TREES, max_size=5))
    if draw(st.booleans()):
        table["__metadata__"] = draw(st.dictionaries(TEXT, TEXT | LEAVES, max_size=3) | LEAVES)
    head = draw(st.just(_json(table)) | JSONS)
    length = draw(st.just(len(head)) | st.integers(0, 2**64 - 1))
    return struct.pack("<Q", length) + head + draw(st.binary(max_size=64))


_OPCODES = st.sampled_from(
    [code for name, code in vars(pickle).items() if name.isupper() and isinstance(code, bytes) and len(code) == 1]
    + [b"2\x86", b"K\x01", b"X\x01\x00\x00\x00a", b"q\x00", b"h\x00", b"r\xff\xff\xff\x7f", b"ctorch\nFloatStorage\n"]
    + [b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"(", b")", b"}", b"Q", b"R", b"b", b"s"]
)


@functools.cache
def _archives() -> list[bytes]:
    import torch

    found = []
    for content in (
        {"state_dict": {"a": torch.ones(2, 3), "b": torch.ones(1, dtype=torch.int64)}, "epoch": 3},
        {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
    ):
        stream = io.BytesIO()
        torch.save(content, stream)
        found.append(stream.getvalue())
    return found


def _structures() -> list[bytes]:
    found = []
    for content in _archives():
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            found.append(archive.read("archive/data.pkl"))
    return found


@st.composite
def pickles(draw: st.DrawFn) -> bytes:
    """Torch's archives, whole, damaged and with any structure, and pickles that torch did not write."""
    if draw(st.booleans()):
        return draw(_damaged(st.sampled_from(_archives())))
    whole = _damaged(st.deferred(lambda: st.sampled_from(_structures())))
    made = (
        st.lists(_OPCODES | st.binary(max_size=4), max_size=40)
        .map(b"".join)
        .map(lambda code: b"\x80\x02" + code + b".")
    )
    structure = draw(whole | made)
    if draw(st.booleans()):
        return structure
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))) as archive:
        archive.writestr("archive/data.pkl", structure)
        for number in range(draw(st.integers(0, 3))):
            archive.writestr(f"archive/data/{number}", bytes(draw(st.sampled_from([0, 24, 64, 100_000]))))
    return draw(_damaged(st.just(stream.getvalue())))


@functools.cache
def _images() -> list[bytes]:
    from PIL import Image

    found = []
    for mode, kinds in {
        "RGB": ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"),
        "RGBA": ("PNG", "WEBP"),
        "L": ("PNG",),
        "I;16": ("PNG", "TIFF"),
        "P": ("PNG", "GIF"),
        "CMYK": ("JPEG", "TIFF"),
    }.items():
        for kind in kinds:
            stream = io.BytesIO()
            Image.new(mode, (9, 7)).save(stream, kind)
            found.append(stream.getvalue())
    return found


def _huge_png(width: int, height: int) -> bytes:
    import zlib

    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [head, b"IDAT" + zlib.compress(bytes(1000)), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


SIDES = st.integers(0, 2**31 - 1)
IMAGES = _damaged(st.deferred(lambda: st.sampled_from(_images()))) | st.builds(_huge_png, SIDES, SIDES)

# --- readers ----------------------------------------------------------------------------------------------------------


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


_LAYERS = st.sampled_from(
    ["lora_unet_mid_block_attentions_0_proj_in", "lora_te_text_model_encoder_layers_0_mlp_fc1", "a.b", ""]
)
_ROLES = st.sampled_from(
    "lora_down.weight lora_up.weight alpha dora_scale hada_w1_a hada_w1_b lokr_w1 lokr_w2_a oft_blocks lora_A.weight "
    "diff w_norm weight on_input a1.weight".split()
)
ADAPTERS = st.dictionaries(
    st.builds("{}.{}".format, _LAYERS, _ROLES) | TEXT.filter(bool),
    st.lists(st.integers(0, 5), max_size=5).map(tuple),
    max_size=6,
)

PROMPT_LINES = _damaged(st.lists(CAPTIONS, max_size=4).map("\n".join).map(lambda text: text.encode("utf-8", "replace")))
_WISHES = st.dictionaries(
    st.sampled_from(["prompt", "negative_prompt", "width", "height", "sample_steps", "scale", "seed", "enum"]),
    st.integers(1, 9999) | LEAVES | CAPTIONS,
    max_size=5,
)
PROMPTS_IN_JSON = _damaged(st.lists(_WISHES, max_size=4).map(_json)) | JSONS
PROMPTS_IN_TOML = (
    _damaged(
        st.builds(
            lambda shared, each: _toml({"prompt": {**shared, "subset": each}}), _WISHES, st.lists(_WISHES, max_size=3)
        )
    )
    | TOMLS
)


@st.composite
def state_heads(draw: st.DrawFn) -> bytes:
    """train_state.json with some values replaced."""
    from dataclasses import asdict

    from library.training.saving.state import Progress

    head: dict[str, Any] = {"progress": asdict(Progress(step=3, epoch=1, window=3)), "identity": {"seed": "1"}}
    for tree in (head["progress"], head):
        names = st.sampled_from([*tree]) | st.sampled_from(["files", "head_crc32", "options", "output_name", "world"])
        tree.update(draw(st.dictionaries(names, TREES, max_size=2)))
    return _json(head)


PATTERNS = st.lists(st.sampled_from(list("ab.*+?()|[]{}^$\\w\\d0,9-")) | TEXT, max_size=20).map("".join)
PEFT = _damaged(
    st.fixed_dictionaries(
        {
            "lora_alpha": LEAVES,
            "alpha_pattern": st.dictionaries(PATTERNS, LEAVES, max_size=3) | LEAVES,
            "use_rslora": LEAVES,
        }
    ).map(_json)
)
ARCHIVES = st.deferred(lambda: _damaged(st.sampled_from(_latents("x.npz"))))
OWN = st.deferred(lambda: _damaged(st.sampled_from(_latents("x.safetensors"))))


TARS = st.deferred(lambda: _damaged(st.sampled_from(_tars())))
SHARD_PATTERNS = st.lists(
    st.sampled_from(["{", "}", "..", "000", "9" * 18, ",", "a", ".tar", "::", "/", "s3://b/", "{0..99}", "../"]),
    max_size=12,
).map("".join)
TABLES_OF_SHARDS = st.deferred(lambda: _damaged(st.sampled_from(_tables())))


@functools.cache
def _tars() -> list[bytes]:
    import tarfile

    found = []
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        stream = io.BytesIO()
        with tarfile.TarFile(fileobj=stream, mode="w", format=kind) as tar:
            for name, data in (
                ("a.png", _images()[0]),
                ("a.txt", b"a dog"),
                ("ü" * 60 + "/b.json", b'{"caption": "b"}'),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        found.append(stream.getvalue())
    return found


@functools.cache
def _tables() -> list[bytes]:
    from library.data.scan.index import MaskValues
    from library.data.shards.table import Row, ShardEntry, write_table

    values = MaskValues(0.5, 0, 255)
    mask = ("m/a.png", 0, 9, 9, bytes(32), values)
    row = Row("a.png", 0, 0, 9, bytes(32), 64, 64, True, "", False, "a dog", 5.5, values, *mask)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row, row._replace(name="b.png", caption=None, mask=None, mask_shard=None)]
        write_table(Path(folder, "t.sqlite"), "dog", [ShardEntry(0, "a.tar", 512)], rows)
        return [Path(folder, "t.sqlite").read_bytes()]


@functools.cache
def _latents(name: str) -> list[bytes]:
    import numpy as np

    from library.data.cache import latent_files

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        made = {"latents": np.ones((4, 2, 2), "f4"), "size": np.array([16, 16])} if name.endswith(".npz") else {
            "latents": np.ones((4, 2, 2), "f4")}  # fmt: skip
        latent_files.write(str(path), made, "s", latent_files.FileHash("a", (1, 2, 3)), None)
        return [path.read_bytes()]


TARGETS: dict[str, tuple[Callable[..., None], tuple[st.SearchStrategy[Any], ...]]] = {
    "safetensors": (header, (_damaged(safetensors()),)),
    "pickles": (header, (pickles(),)),
    "pickles of states": (state_pickle, (pickles(),)),
    "train_state.json": (state, (_damaged(state_heads()) | JSONS,)),
    "datasets in TOML": (functools.partial(dataset, name="d.toml"), (TOMLS,)),
    "datasets in JSON": (functools.partial(dataset, name="d.json"), (JSONS,)),
    "options in TOML": (functools.partial(config, name="c.toml"), (TOMLS,)),
    "options in JSON": (functools.partial(config, name="c.json"), (JSONS,)),
    "prompts in text": (functools.partial(prompts, name="p.txt"), (PROMPT_LINES,)),
    "prompts in TOML": (functools.partial(prompts, name="p.toml"), (PROMPTS_IN_TOML,)),
    "prompts in JSON": (functools.partial(prompts, name="p.json"), (PROMPTS_IN_JSON,)),
    "metadata in JSON": (functools.partial(metadata, name="m.json"), (JSONS,)),
    "metadata in JSON lines": (functools.partial(metadata, name="m.jsonl"), (LINES,)),
    "captions": (caption, (CAPTIONS, SETTINGS)),
    "caption files": (caption_file, (_damaged(CAPTIONS.map(lambda text: text.encode("utf-16"))),)),
    "folder names": (folder_names, (st.lists(TEXT | st.from_regex(r"\d{1,40}_\w{0,9}", fullmatch=True), max_size=5),)),
    "images": (image, (IMAGES,)),
    "latents in npz": (functools.partial(latents, name="x.npz"), (ARCHIVES,)),
    "latents in our format": (functools.partial(latents, name="x.safetensors"), (OWN,)),
    "model folders": (model_folder, (JSONS, JSONS, JSONS)),
    "PEFT configurations": (peft, (PEFT,)),
    "adapters": (adapter, (ADAPTERS,)),
    "webhooks": (webhooks, (JSONS,)),
    "boxes": (boxes, (JSONS,)),
    "shards": (shards, (TARS,)),
    "patterns of shards": (shard_pattern, (SHARD_PATTERNS,)),
    "tables of shards": (shard_table, (TABLES_OF_SHARDS,)),
}

# --- runs -------------------------------------------------------------------------------------------------------------


class HangError(BaseException):
    """An example took too long. No Exception, as readers of pickles turn any of these into a sentence."""


@contextmanager
def _in_time() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise HangError(f"more than {SECONDS} s")

    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The errors that led to an error, which a sentence may hide. Each once: a chain of errors may be a ring."""
    passed: list[BaseException] = []
    while error is not None and not any(error is other for other in passed):
        passed.append(error)
        yield error
        error = error.__cause__ or error.__context__


def fuzz(name: str, examples: int, *, number: int | None = None) -> None:
    """Run one target. `number`: the seed; None: the same examples in every run. Raises what a reader must not raise."""
    function, strategies = TARGETS[name]
    said = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=number is None,
        phases=[Phase.generate] if number is None else [Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )

    with tempfile.TemporaryDirectory(prefix="fuzz ") as place:

        def check(arguments: tuple[Any, ...]) -> None:
            with _in_time():
                try:
                    if isinstance(function, functools.partial):
                        function(Path(place), content=arguments[0])
                    else:
                        function(Path(place), *arguments)
                except TOLD as error:
                    assert str(error).strip() and len(str(error)) < 100_000
                    assert not any(isinstance(each, MemoryError) for each in _causes(error)), "it took too much memory"

        run = said(given(st.tuples(*strategies))(check))
        (run if number is None else seed(number)(run))()


def main() -> int:
    """The long run. Returns the exit code: 1 if anything was found."""
    import resource  # not on Windows

    parser = argparse.ArgumentParser(description="random files for every reader")
    parser.add_argument("--examples", type=int, default=1000, help="of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--memory", type=float, default=8.0, help="GiB of addresses that the process may have")
    parser.add_argument("--only", nargs="*", default=list(TARGETS))
    chosen = parser.parse_args()
    most = int(chosen.memory * (1 << 30))
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    failed = 0
    for name in chosen.only:
        try:
            fuzz(name, chosen.examples, number=chosen.seed)
            print(f"{name}: {chosen.examples} examples", flush=True)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failed += 1
            print(f"{name}: FOUND {type(error).__name__}", flush=True)
            traceback.print_exc(limit=-6)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
