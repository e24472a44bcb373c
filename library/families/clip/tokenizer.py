"""CLIP's byte-pair tokenizer: captions to the token ids of SD1, SD2 and SDXL, from merges that ship with this program.

Source of the algorithm: CLIP (Radford et al. 2021, arXiv 2103.00020, section 2.4); the ids equal those of
transformers' CLIPTokenizer. Chunks of 77 are cut as kohya's trainer cuts them, so that captions longer than 75 tokens
mean the same here as in users' other tools. Imports no torch: the plan counts tokens before torch is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from library.checkpoints.header import CheckpointError
from library.families.clip import prompt_weights

if TYPE_CHECKING:
    import torch

    from library.families.family import EncoderTokenizer

BOS_TEXT, EOS_TEXT = "<|startoftext|>", "<|endoftext|>"
CHUNK = 75  # tokens of text in one pass of the text encoder
CONTEXT = CHUNK + 2  # with the beginning and the end token
EOS_ID = 49407  # of CLIP's own vocabulary; what a textual inversion adds comes behind it
MERGES_FILE = Path(__file__).parent / "data" / "clip_merges.txt"

_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"  # kept whole
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # words, single digits, runs of anything else
)


class ClipTokenizer:
    """Captions to CLIP token ids.

    `pad_id` is the id that fills a row up: the end token for SD1 (49407), 0 for SD2.
    """

    def __init__(self, pad_id: int, vocab: dict[str, int] | None = None, merges: Sequence[str] | None = None) -> None:
        self.merges = tuple(merges) if merges is not None else shipped_merges()
        self.vocab = vocab if vocab is not None else vocabulary(self.merges)
        self.pad_id = pad_id
        self.bos_id, self.eos_id = self.vocab[BOS_TEXT], self.vocab[EOS_TEXT]
        self.pad_text = next(text for text, index in self.vocab.items() if index == pad_id)
        self._engine = _engine(self.vocab, self.merges, (BOS_TEXT, EOS_TEXT, self.pad_text))

    @property
    def name(self) -> str:
        """Of the vocabulary and its merges: what gives other ids has another name."""
        digest = hashlib.blake2b("\n".join(self.merges).encode("utf-8", "surrogatepass"), digest_size=8)
        digest.update(f"{len(self.vocab)} {self.pad_text}".encode())
        return f"clip-{digest.hexdigest()}"

    def encode(self, caption: str) -> list[int]:
        """The caption's ids, uncut, without the beginning and end tokens."""
        ids: list[int] = self._engine.encode(caption, add_special_tokens=False).ids
        return ids

    def count(self, caption: str, weighted: bool = False) -> int:
        """How many tokens the caption has, without begin and end; `weighted`: without the marks of its weights."""
        return len(prompt_weights.encode(caption, self.encode)[0] if weighted else self.encode(caption))

    def counts(self, captions: Sequence[str], weighted: bool = False) -> list[int]:
        """`count` of each caption, on all cores."""
        if weighted:
            return [self.count(caption, weighted=True) for caption in captions]
        lengths: list[int] = []
        for start in range(0, len(captions), 1000):  # what is known of each token takes room
            found = self._engine.encode_batch_fast(captions[start : start + 1000], add_special_tokens=False)
            lengths += [len(one.ids) for one in found]
        return lengths

    def ids(self, captions: Sequence[str], chunks: int = 1, padded: bool = True) -> list[list[list[int]]]:
        """Ids as nested lists (B, chunks, 77); with `padded` off (B, 1, L), filled only to the longest of the batch.

        Text past 75 tokens a chunk is cut. Raises ValueError for several chunks without padding, which has no meaning.
        """
        return self._rows([self.encode(caption)[: CHUNK * chunks] for caption in captions], chunks, padded)

    def _rows(self, bodies: Sequence[list[int]], chunks: int, padded: bool) -> list[list[list[int]]]:
        if padded:
            return [self._chunked(body, chunks) for body in bodies]
        if chunks != 1:
            raise ValueError("no_token_padding works with one chunk of 75 tokens; leave max_token_length unset")
        longest = max((len(body) for body in bodies), default=0)
        return [
            [[self.bos_id, *body, self.eos_id] + [self.pad_id] * (longest - len(body))]  # one row a caption
            for body in bodies
        ]

    def tensor(self, captions: Sequence[str], chunks: int = 1, padded: bool = True) -> torch.Tensor:
        """`ids` as an int64 tensor."""
        import torch

        return torch.tensor(self.ids(captions, chunks, padded), dtype=torch.int64)

    def weighted(
        self, captions: Sequence[str], chunks: int = 1, padded: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids int64 and weights float32, both shaped as `tensor`, of captions with weights such as (x:1.3)."""
        import torch

        encoded = [prompt_weights.encode(caption, self.encode) for caption in captions]
        ids = self._rows([body[: CHUNK * chunks] for body, _ in encoded], chunks, padded)
        width = len(ids[0][0]) - 2 if ids else CHUNK
        weights = [prompt_weights.rows(weights, width, chunks) for _, weights in encoded]
        return torch.tensor(ids, dtype=torch.int64), torch.tensor(weights, dtype=torch.float32)

    def _chunked(self, body: list[int], chunks: int) -> list[list[int]]:
        """Rows of 77: beginning, 75 ids, last id. `body` is at most 75 * chunks ids."""
        row = body + [self.eos_id] + [self.pad_id] * (CHUNK * chunks - len(body))
        rows = []
        for start in range(0, CHUNK * chunks, CHUNK):
            middle, last = row[start : start + CHUNK], row[-1]
            if self.pad_id != self.eos_id:
                # The text encoder needs an end in every row. Told by position and not by id, since SD2's filling (0)
                # is also the id of an exclamation mark.
                if len(body) >= start + CHUNK:
                    last = self.eos_id
                if len(body) < start:
                    middle[0] = self.eos_id
            rows.append([self.bos_id, *middle, last])
        return rows

    def save(self, folder: Path) -> None:
        """Write vocab.json, merges.txt, tokenizer_config.json, special_tokens_map.json, as transformers reads them."""
        folder.mkdir(parents=True, exist_ok=True)
        special: dict[str, Any] = {
            "bos_token": BOS_TEXT,
            "eos_token": EOS_TEXT,
            "pad_token": self.pad_text,
            "unk_token": EOS_TEXT,
        }
        config = special | {
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": CONTEXT,
            "tokenizer_class": "CLIPTokenizer",
        }
        _write(folder / "vocab.json", json.dumps(self.vocab, ensure_ascii=False))
        _write(folder / "merges.txt", "\n".join(["#version: 0.2", *self.merges, ""]))
        _write(folder / "tokenizer_config.json", json.dumps(config, indent=2))
        _write(folder / "special_tokens_map.json", json.dumps(special, indent=2))

    @classmethod
    def from_folder(cls, folder: Path, pad_id: int, own_pad: bool = True) -> ClipTokenizer:
        """Read a diffusers folder's `tokenizer/` or a cached one: vocab.json + merges.txt, or tokenizer.json.

        The folder's own pad token beats `pad_id`, except with `own_pad` off. Raises CheckpointError.
        """
        try:
            vocab, merges = _read_vocabulary(folder)
            pad_text = _read_pad_text(folder) if own_pad else None
            return cls(pad_id if pad_text is None else vocab[pad_text], vocab, merges)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"The tokenizer in {folder} cannot be read ({error}). Put CLIP's vocab.json and merges.txt there, or "
                "remove the folder: the tokenizer that ships with this program is then used."
            ) from error


def cached_tokenizer(cache_dir: Path | None, model_id: str, pad_id: int) -> ClipTokenizer:
    """The tokenizer of `--tokenizer_cache_dir`, if its sub-folder is there, else the shipped one.

    The sub-folder is the model id with `_` for `/`. What fills rows up is the caller's: that of OpenCLIP's hub folder,
    which kohya's trainer puts there for SDXL, says another thing than models are trained with. Raises CheckpointError.
    """
    folder = None if cache_dir is None else cache_dir / model_id.replace("/", "_")
    if folder is not None and folder.is_dir():
        return ClipTokenizer.from_folder(folder, pad_id, own_pad=False)
    return shipped_tokenizer(pad_id)


@lru_cache
def shipped_tokenizer(pad_id: int) -> ClipTokenizer:
    """The tokenizer that ships with this program; the plan and the model share one."""
    return ClipTokenizer(pad_id)


def keep_tokenizer(tokenizer: EncoderTokenizer, cache_dir: Path, model_id: str) -> None:
    """Write a tokenizer into `--tokenizer_cache_dir` on first use. Raises OSError."""
    folder = cache_dir / model_id.replace("/", "_")
    if not folder.is_dir():
        tokenizer.save(folder)


def vocabulary(merges: Sequence[str]) -> dict[str, int]:
    """CLIP's numbering: the bytes, the bytes that end a word, one token a merge in order, the two special tokens."""
    letters = byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    return {token: index for index, token in enumerate([*tokens, BOS_TEXT, EOS_TEXT])}


def byte_letters() -> list[str]:
    """One printable letter a byte, in CLIP's order: the printable ones of Latin-1 first, as themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(code) for code in (*printable, *range(256, 256 + others))]


@lru_cache(maxsize=1)
def shipped_merges() -> tuple[str, ...]:
    """The 48 894 merges of data/clip_merges.txt."""
    return _merge_lines(MERGES_FILE)


def _merge_lines(path: Path) -> tuple[str, ...]:
    # Split at "\n" only: merges hold letters such as U+0085 that str.splitlines would take for an end of line.
    lines = path.read_bytes().decode("utf-8").replace("\r\n", "\n").split("\n")
    return tuple(line for line in lines if line and not line.startswith("#version"))


def _engine(vocab: dict[str, int], merges: Sequence[str], special: Sequence[str]) -> Tokenizer:
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    engine = Tokenizer(models.BPE(vocab=vocab, merges=pairs, end_of_word_suffix="</w>", unk_token=EOS_TEXT))
    engine.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    # SD2 fills up with "!" (id 0), so transformers, and with it every diffusers pipeline, reads any "!" of a caption as
    # that token; so do we, or the model would see other ids in training than in use.
    engine.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return engine


def _read_vocabulary(folder: Path) -> tuple[dict[str, int], Sequence[str]]:
    if (folder / "added_tokens.json").is_file() and _read_json(folder / "added_tokens.json"):
        raise ValueError("added_tokens.json adds tokens of its own, which this version does not read")
    if (folder / "vocab.json").is_file():
        return _read_json(folder / "vocab.json"), _merge_lines(folder / "merges.txt")
    model = _read_json(folder / "tokenizer.json")["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return model["vocab"], merges


def _read_pad_text(folder: Path) -> str | None:
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            token = _read_json(folder / name).get("pad_token")
            if token is not None:
                text: str = token["content"] if isinstance(token, dict) else token
                return text
    return None


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, path)
