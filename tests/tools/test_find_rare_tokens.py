"""tools/find_rare_tokens.py on miniatures: candidates, checks, neighbours, files and mistakes."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from library.families.clip.tokenizer import ClipTokenizer, shipped_merges
from library.rare_tokens import find
from library.rare_tokens.candidates import read_name
from tests import tiny
from tools import find_rare_tokens

NAMES = ("shs", "sts", "wny", "hru", "sks", "ohwx")
COMMON = ["dog", "cat", "house", "red"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family in ("sd1", "sdxl"):
        tiny.write_single_file(root / f"{family}.safetensors", family)
    return root


@pytest.fixture(autouse=True)
def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model has fewer words to encode."""
    monkeypatch.setattr(find, "find_candidates", lambda tokenizer, _: [read_name(each, tokenizer) for each in NAMES])
    monkeypatch.setattr(find, "common_words", lambda tokenizer: COMMON)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = find_rare_tokens.main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def column(out: str) -> list[str]:
    """The names of the printed table, in order."""
    return re.findall(r"^\d+ +(\S+) +\d+ ", out, re.MULTILINE)


def test_without_a_model_the_merges_rank(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """By their ids: 48136, 47993, 24833, 24127, 16184, 1088."""
    code, out, _ = run(capsys, "--family", "sdxl", "--save_to", tmp_path / "new" / "tokens.csv", "--count", 3)
    assert code == 0 and column(out) == ["sks", "ohwx", "wny"]
    with open(tmp_path / "new" / "tokens.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["token"] for row in rows] == ["sks", "ohwx", "wny", "hru", "shs", "sts"]
    assert rows[0]["text_encoder_ids"] == rows[0]["text_encoder_2_ids"] == "48136"


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_model_ranks_by_its_text_encoders(
    family: str, models: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, _ = run(capsys, "--ckpt", models / f"{family}.safetensors", "--save_to", tmp_path / "t.json")
    saved = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))["candidates"]
    assert code == 0 and sorted(column(out)) == sorted(NAMES) and column(out) == [each["token"] for each in saved]
    encoders = tiny.text_names(family)
    assert all(tuple(each["measures"]) == encoders for each in saved)
    assert all(one["word"] in COMMON and 0 <= one["moved"] < 2 for each in saved for one in each["measures"].values())
    assert [each["rarity"] for each in saved] == sorted((each["rarity"] for each in saved), reverse=True)


def test_a_token_whose_embedding_stands_out_is_ranked_last(
    models: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """sks gets an embedding that is a hundred times as long, in the direction of house: far from the median, and with
    the state of house."""
    tensors = load_file(models / "sd1.safetensors")
    table = tensors["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"]
    table[48136] = 100 * table[find.FAMILIES[0].tokenizer().by_encoder["text_encoder"].encode("house")[0]]
    save_file(tensors, tmp_path / "changed.safetensors")
    _, out, _ = run(capsys, "--ckpt", tmp_path / "changed.safetensors")
    assert column(out)[-1] == "sks" and "house" in out.splitlines()[7]


def test_check_tells_tokens_words_and_rarity(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--ckpt", models / "sd1.safetensors", "--check", "SKS", "zwx", "dog", "fuk", "hlmnop")
    said = dict(zip(["sks", "zwx", "dog", "fuk", "hlmnop"], split(out), strict=True))
    assert code == 0 and not column(out)
    assert "one token (48136)" in said["sks"] and "read in lower case: sks" in said["sks"]
    assert "2 tokens, z + wx (89+3561)" in said["zwx"] and "a name of one token" in said["zwx"]
    assert "a word, a name or an abbreviation" in said["dog"] and "nearest common word dog" not in said["dog"]
    assert "profane" in said["fuk"] and "do not know whether" in said["hlmnop"]
    assert all("At least as rare as" in text and "of the 6 candidates" in text for text in said.values())


def split(out: str) -> list[str]:
    """The paragraphs: a line that is not indented begins a new one."""
    paragraphs: list[str] = []
    for line in out.splitlines():
        if line.startswith(" "):
            paragraphs[-1] += "\n" + line
        else:
            paragraphs.append(line)
    return paragraphs


def test_like_lists_what_is_near(models: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A token with the embedding of another one is the nearest to it."""
    tensors = load_file(models / "sd1.safetensors")
    table = tensors["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"]
    tokenizer = find.FAMILIES[0].tokenizer().by_encoder["text_encoder"]
    table[tokenizer.encode("robot")[0]] = table[tokenizer.encode("wny")[0]]
    save_file(tensors, tmp_path / "changed.safetensors")
    code, out, _ = run(capsys, "--ckpt", tmp_path / "changed.safetensors", "--like", "robot")
    assert code == 0 and column(out)[0] == "wny" and "  1.00  " in out
    _, out, _ = run(capsys, "--ckpt", tmp_path / "changed.safetensors", "--like", "wny", "--check", "sks")
    assert "wny" not in column(out) and len(column(out)) == 5 and out.startswith("sks: one token")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "no --ckpt and no --family"),
        (["--family", "sd1", "--ckpt", "x.safetensors"], "--family sd1 with --ckpt"),
        (["--family", "sd1", "--like", "dog"], "--like needs a text encoder"),
        (["--family", "sd1", "--save_to", "tokens.txt"], "neither .json nor .csv"),
        (["--family", "sd1", "--check", "dog " * 51], "51 tokens"),
        (["--family", "sd9"], '--family = "sd9"'),
        (["--family", "sd1", "--max_length", "5"], "--max_length"),
        (["--ckpt", "gone.safetensors"], "gone.safetensors: no such file or folder"),
    ],
)
def test_mistakes(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, *words)
    assert code == 2 and expected in err


def test_a_damaged_model_and_a_folder_that_cannot_be_written_are_told(
    models: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tensors = load_file(models / "sd1.safetensors")
    tensors["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"][5] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    code, _, err = run(capsys, "--ckpt", tmp_path / "nan.safetensors")
    assert code == 2 and "NaN or infinite values" in err and "token_embedding" in err
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "t.csv").mkdir()
    for path, why in (("file/t.json", f"{tmp_path / 'file'} is a file"), ("t.csv", "it is a folder")):
        code, _, err = run(capsys, "--ckpt", tmp_path / "nan.safetensors", "--save_to", tmp_path / path)
        assert code == 2 and f"cannot be written: {why}" in err and "NaN" not in err  # before the weights are read


def test_the_tokenizer_of_a_folder_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With another merge in place of the one that makes sks, it is two tokens."""
    merges = ["q b" if merge == "s ks</w>" else merge for merge in shipped_merges()]
    ClipTokenizer(49407, merges=merges).save(tmp_path / "openai_clip-vit-large-patch14")
    code, out, _ = run(capsys, "--family", "sd1", "--tokenizer_cache_dir", tmp_path, "--check", "sks")
    assert code == 0 and out.startswith("sks: 2 tokens, s + ks")
