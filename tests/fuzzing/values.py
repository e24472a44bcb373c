"""Random texts, trees, captions and settings, and what damages a file."""

from __future__ import annotations

import json
from typing import Any

import tomli_w
from hypothesis import strategies as st

from library.options.datasets import CaptionSettings

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


def json_bytes(tree: object) -> bytes:
    """A tree as JSON."""
    return json.dumps(tree).encode()


def toml_bytes(tree: Any) -> bytes:
    """A tree as TOML, which has no null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items() if each is not None}
        return [plain(each) for each in value if each is not None] if isinstance(value, list) else value

    return tomli_w.dumps(plain(tree)).encode("utf-8", "replace")


def damaged(made: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
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
JSONS = damaged(TREES.map(json_bytes)) | NESTS
TOMLS = damaged(TABLES.map(toml_bytes)) | NESTS
LINES = damaged(st.lists(TREES.map(json_bytes), max_size=5).map(b"\n".join)) | NESTS

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
