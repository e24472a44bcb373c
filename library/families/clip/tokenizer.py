"""CLIP's byte-pair tokenizer for SD1, SD2 and SDXL, from merges that ship with this program.

Algorithm: CLIP (Radford et al. 2021, arXiv 2103.00020, section 2.4); the ids equal those of transformers'
CLIPTokenizer. Captions longer than 75 tokens are split into chunks of 77 as in sd-scripts. No torch: the plan counts
tokens before torch is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from library.bounded import read_bytes, read_json
from library.checkpoints.header import CheckpointError
from library.families.clip import prompt_weights
from library.limits import CONFIG_FILE
from library.whole_files import replacing_folder, write_text

if TYPE_CHECKING:
    import torch

    from library.families.family import EncoderTokenizer

WORD_END = "</w>"
BOS_TEXT, EOS_TEXT = "<|startoftext|>", "<|endoftext|>"
CHUNK = 75  # tokens of text in one pass of the text encoder
CONTEXT = CHUNK + 2  # with begin and end token
EOS_ID = 49407  # the last id of CLIP's vocabulary; textual inversions add higher ones
MERGES_FILE = Path(__file__).parent / "data" / "clip_merges.txt"

_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"  # kept whole
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # words, single digits, runs of anything else
)


class ClipTokenizer:
    """Converts captions to CLIP token ids.

    `pad_id`: the padding id, the end token for SD1 (49407), 0 for SD2.
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
        """Name derived from vocabulary and merges: tokenizers with different ids have different names."""
        digest = hashlib.blake2b("\n".join(self.merges).encode("utf-8", "surrogatepass"), digest_size=8)
        digest.update(f"{len(self.vocab)} {self.pad_text}".encode())
        return f"clip-{digest.hexdigest()}"

    def encode(self, caption: str) -> list[int]:
        """Return the caption's ids, uncut, without begin and end tokens."""
        ids: list[int] = self._engine.encode(caption, add_special_tokens=False).ids
        return ids

    def pieces(self, caption: str) -> list[str]:
        """Return the text of each token of the caption."""
        texts = {index: text for text, index in self.vocab.items()}
        return [_text(texts[index].removesuffix(WORD_END)) for index in self.encode(caption)]

    def whole_words(self) -> dict[str, int]:
        """Return the tokens that stand for a whole word or for the end of one: its text and id."""
        words = ((text.removesuffix(WORD_END), index) for text, index in self.vocab.items() if text.endswith(WORD_END))
        return {_text(letters): index for letters, index in words}

    def count(self, caption: str, *, weighted: bool = False) -> int:
        """Count the tokens of a caption, without begin and end and, if `weighted`, without the weights' syntax."""
        return len(prompt_weights.encode(caption, self.encode)[0] if weighted else self.encode(caption))

    def counts(self, captions: Sequence[str], *, weighted: bool = False) -> list[int]:
        """Count the tokens of many captions, on all cores."""
        if weighted:
            return [self.count(caption, weighted=True) for caption in captions]
        lengths: list[int] = []
        for start in range(0, len(captions), 1000):  # in batches, as encodings need much memory
            encodings = self._engine.encode_batch_fast(captions[start : start + 1000], add_special_tokens=False)
            lengths += [len(encoding.ids) for encoding in encodings]
        return lengths

    def ids(self, captions: Sequence[str], chunks: int = 1, *, padded: bool = True) -> list[list[list[int]]]:
        """Return ids as nested lists (B, chunks, 77), or (B, 1, L) padded to the longest caption if not `padded`.

        Captions are cut after 75 tokens per chunk. Raises ValueError for several chunks without padding.
        """
        return self._rows([self.encode(caption)[: CHUNK * chunks] for caption in captions], chunks, padded=padded)

    def _rows(self, bodies: Sequence[list[int]], chunks: int, *, padded: bool) -> list[list[list[int]]]:
        if padded:
            return [self._chunked(body, chunks) for body in bodies]
        if chunks != 1:
            raise ValueError("no_token_padding works with one chunk of 75 tokens; leave max_token_length unset")
        longest = max((len(body) for body in bodies), default=0)
        return [
            [[self.bos_id, *body, self.eos_id] + [self.pad_id] * (longest - len(body))]  # one row per caption
            for body in bodies
        ]

    def tensor(self, captions: Sequence[str], chunks: int = 1, *, padded: bool = True) -> torch.Tensor:
        """Return `ids` as an int64 tensor."""
        import torch

        return torch.tensor(self.ids(captions, chunks, padded=padded), dtype=torch.int64)

    def weighted(
        self, captions: Sequence[str], chunks: int = 1, *, padded: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids int64 and weights float32 of captions with weights such as (x:1.3), shaped like `tensor`."""
        import torch

        encoded = [prompt_weights.encode(caption, self.encode) for caption in captions]
        ids = self._rows([body[: CHUNK * chunks] for body, _ in encoded], chunks, padded=padded)
        width = len(ids[0][0]) - 2 if ids else CHUNK
        weights = [prompt_weights.rows(weights, width, chunks) for _, weights in encoded]
        return torch.tensor(ids, dtype=torch.int64), torch.tensor(weights, dtype=torch.float32)

    def _chunked(self, body: list[int], chunks: int) -> list[list[int]]:
        """Split at most 75 * chunks ids into rows of 77: begin, 75 ids, end or padding."""
        row = body + [self.eos_id] + [self.pad_id] * (CHUNK * chunks - len(body))
        rows = []
        for start in range(0, CHUNK * chunks, CHUNK):
            middle, last = row[start : start + CHUNK], row[-1]
            if self.pad_id != self.eos_id:
                # The text encoder needs an end token in every row. Found by position, not by id: SD2's padding (0) is
                # also the id of an exclamation mark.
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
        write_text(folder / "vocab.json", json.dumps(self.vocab, ensure_ascii=False))
        write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *self.merges, ""]))
        write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2))
        write_text(folder / "special_tokens_map.json", json.dumps(special, indent=2))

    @classmethod
    def from_folder(cls, folder: Path, pad_id: int, *, own_pad: bool = True) -> ClipTokenizer:
        """Read a diffusers folder's `tokenizer/` or a cached one: vocab.json + merges.txt, or tokenizer.json.

        With `own_pad` the folder's pad token overrides `pad_id`. Raises CheckpointError.
        """
        try:
            vocab, merges = _read_vocabulary(folder)
            pad_text = _read_pad_text(folder) if own_pad else None
            return cls(pad_id if pad_text is None else vocab[pad_text], vocab, merges)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"The tokenizer in {folder} cannot be read ({error}). Put CLIP's vocab.json and merges.txt there, or "
                "remove the folder to use the built-in tokenizer."
            ) from error


def cached_tokenizer(cache_dir: Path | None, model_id: str, pad_id: int) -> ClipTokenizer:
    """Return the tokenizer in a sub-folder of `--tokenizer_cache_dir`, or the built-in one if there is none.

    The sub-folder is the model id with `_` for `/`. Its pad token is ignored: OpenCLIP's hub folder, which sd-scripts
    puts there for SDXL, has another one than models are trained with. Raises CheckpointError.
    """
    folder = None if cache_dir is None else cache_dir / model_id.replace("/", "_")
    if folder is not None and folder.is_dir():
        return ClipTokenizer.from_folder(folder, pad_id, own_pad=False)
    return shipped_tokenizer(pad_id)


@lru_cache
def shipped_tokenizer(pad_id: int) -> ClipTokenizer:
    """Return the built-in tokenizer; the plan and the model share one."""
    return ClipTokenizer(pad_id)


def keep_tokenizer(tokenizer: EncoderTokenizer, cache_dir: Path, model_id: str) -> None:
    """Write a tokenizer into `--tokenizer_cache_dir` on first use. Raises OSError."""
    folder = cache_dir / model_id.replace("/", "_")
    if not folder.is_dir():
        with replacing_folder(folder) as building:
            tokenizer.save(building)


def vocabulary(merges: Sequence[str]) -> dict[str, int]:
    """Return CLIP's vocabulary: bytes, bytes that end a word, one token per merge, the two special tokens."""
    letters = byte_letters()
    tokens = [*letters, *(letter + WORD_END for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    return {token: index for index, token in enumerate([*tokens, BOS_TEXT, EOS_TEXT])}


def byte_letters() -> list[str]:
    """Return one printable letter per byte, in CLIP's order: printable Latin-1 first, as themselves."""
    return list(_bytes_of_letters())


@lru_cache(maxsize=1)
def _bytes_of_letters() -> dict[str, int]:
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [code for code in range(256) if code not in printable]
    letters = [chr(code) for code in (*printable, *range(256, 256 + len(others)))]
    return dict(zip(letters, [*printable, *others], strict=True))


def _text(letters: str) -> str:
    """The text of a token, of which the letters stand for bytes; pieces of a letter are shown as U+FFFD."""
    codes = _bytes_of_letters()
    return bytes(codes[letter] for letter in letters).decode("utf-8", "replace")


@lru_cache(maxsize=1)
def shipped_merges() -> tuple[str, ...]:
    """Return the 48,894 merges of data/clip_merges.txt."""
    return _merge_lines(MERGES_FILE)


def _merge_lines(path: Path) -> tuple[str, ...]:
    # Split at "\n" only: merges contain letters such as U+0085 that str.splitlines takes for line ends.
    lines = read_bytes(path, CONFIG_FILE).decode("utf-8").replace("\r\n", "\n").split("\n")
    return tuple(line for line in lines if line and not line.startswith("#version"))


def _engine(vocab: dict[str, int], merges: Sequence[str], special: Sequence[str]) -> Tokenizer:
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    engine = Tokenizer(models.BPE(vocab=vocab, merges=pairs, end_of_word_suffix=WORD_END, unk_token=EOS_TEXT))
    engine.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    # SD2 pads with "!" (id 0), so transformers, and with it every diffusers pipeline, reads any "!" in a caption as
    # that token. Training must use the same ids as inference.
    engine.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return engine


def _read_vocabulary(folder: Path) -> tuple[dict[str, int], Sequence[str]]:
    if (folder / "added_tokens.json").is_file() and read_json(folder / "added_tokens.json"):
        raise ValueError("added_tokens.json adds tokens, which is not supported")
    if (folder / "vocab.json").is_file():
        return read_json(folder / "vocab.json"), _merge_lines(folder / "merges.txt")
    model = read_json(folder / "tokenizer.json")["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return model["vocab"], merges


def _read_pad_text(folder: Path) -> str | None:
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            token = read_json(folder / name).get("pad_token")
            if token is not None:
                text: str = token["content"] if isinstance(token, dict) else token
                return text
    return None
