"""Encoders from local folders: the embeddings are those of transformers' own processor and model; wrong folders are
mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer, Dinov2Model, ViTModel

from library.evaluation.encoder_folders import Kind, check_encoder
from library.evaluation.encoders import ClipEncoder, load_clip, load_dino
from library.options.mistakes import Mistakes, UserError
from tests import tiny
from tests.evaluation import tiny_encoders

CPU = torch.device("cpu")
WRITERS = {"dino": tiny_encoders.write_dino, "dinov2": tiny_encoders.write_dinov2, "clip": tiny_encoders.write_clip}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ëncoders of mine")
    for name, write in WRITERS.items():
        write(folder / name)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Image.Image]:
    folder = tmp_path_factory.mktemp("images")
    paths = [path for size in ((64, 48), (33, 90)) for path in tiny.write_images(folder / str(size), 10, size)]
    return [Image.open(path).convert("RGB") for path in paths]


def clip_of(folder: Path) -> ClipEncoder:
    found = check_encoder("clip", folder, Mistakes())
    assert found is not None
    return load_clip(found, CPU)


@pytest.mark.parametrize(("name", "model_class", "kind"), [("dino", ViTModel, "ViT"), ("dinov2", Dinov2Model, "Bit")])
def test_dino_is_the_class_token_of_transformers(name: str, model_class, kind: str, folders: Path, images) -> None:
    found = check_encoder("dino", folders / name, Mistakes())
    assert found is not None
    embedded = load_dino(found, CPU).images(images)

    processor = tiny_encoders.processor(kind).from_pretrained(folders / name)
    model = model_class.from_pretrained(folders / name).eval()
    with torch.no_grad():
        states = [model(**processor(images=image, return_tensors="pt")).last_hidden_state for image in images]
    assert torch.allclose(embedded, torch.cat([each[:, 0] for each in states]), atol=1e-5)
    assert len(embedded) == 20 and (embedded[0] - embedded[1]).abs().max() > 1e-3


def test_clip_is_that_of_transformers(folders: Path, images) -> None:
    encoder = clip_of(folders / "clip")
    texts = ["a dog", "a photo of a very long dog on a red background"]

    processor = tiny_encoders.processor("CLIP").from_pretrained(folders / "clip")
    model = CLIPModel.from_pretrained(folders / "clip").eval()
    tokenizer = CLIPTokenizer.from_pretrained(folders / "clip")
    with torch.no_grad():
        pairs = [
            model(**processor(images=image, return_tensors="pt"), **tokenizer(texts, padding=True, return_tensors="pt"))
            for image in images
        ]

    def unit(rows):  # the model's own outputs are normalised
        return torch.nn.functional.normalize(rows, dim=1)

    assert torch.allclose(unit(encoder.images(images)), torch.cat([pair.image_embeds for pair in pairs]), atol=1e-5)
    assert torch.allclose(unit(encoder.texts(texts)), pairs[0].text_embeds, atol=1e-5)


def test_a_long_text_is_cut_and_said_to_be(folders: Path) -> None:
    encoder = clip_of(folders / "clip")
    long = "dog " * 75
    assert not encoder.is_cut(long) and encoder.is_cut(f"{long} cat")
    assert torch.equal(encoder.texts([f"{long} cat"]), encoder.texts([f"{long} bird"]))


def test_loading_and_embedding_leave_the_random_state_alone(folders: Path, images) -> None:
    torch.manual_seed(1)
    clip_of(folders / "clip").images(images[:2])
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))


def told(kind: Kind, folder: Path) -> str:
    mistakes = Mistakes()
    assert check_encoder(kind, folder, mistakes) is None
    return " ".join(f"{mistake.what} {mistake.remedy}" for mistake in mistakes)


def test_wrong_folders_are_mistakes_before_anything_is_loaded(folders: Path, tmp_path: Path) -> None:
    assert "is a model of the type clip" in told("dino", folders / "clip")
    assert "give it to --evaluation_dino" in told("clip", folders / "dinov2")
    assert "nothing is downloaded" in told("clip", Path("openai/clip-vit-base-patch32"))
    assert "is a file" in told("dino", folders / "dino" / "model.safetensors")
    assert "has no config.json" in told("dino", tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(folders / "dino", broken)
    (broken / "config.json").write_text("[", encoding="utf-8")
    assert "config.json cannot be read" in told("dino", broken)
    (broken / "config.json").write_text(json.dumps({"model_type": "bert"}), encoding="utf-8")
    assert "of the type bert" in told("dino", broken)


def test_incomplete_folders_are_mistakes(folders: Path, tmp_path: Path) -> None:
    for name in ("dino", "clip"):
        shutil.copytree(folders / name, tmp_path / name)
    weights = tmp_path / "dino" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    assert "incomplete" in told("dino", tmp_path / "dino")
    weights.unlink()
    assert "has no weights" in told("dino", tmp_path / "dino")
    weights.write_bytes(whole)
    (tmp_path / "dino" / "preprocessor_config.json").unlink()
    (tmp_path / "clip" / "vocab.json").unlink()
    mistakes = Mistakes()
    check_encoder("dino", tmp_path / "dino", mistakes)
    check_encoder("clip", tmp_path / "clip", mistakes)
    assert [mistake.what.rpartition(" has ")[2] for mistake in mistakes] == [
        "no preprocessor_config.json", "no tokenizer.json",
    ]  # fmt: skip


def test_missing_weights_are_never_random_ones(folders: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folders / "dino", tmp_path / "dino")
    tensors = load_file(folders / "dino" / "model.safetensors")
    gone = next(name for name in sorted(tensors) if "intermediate" in name)
    del tensors[gone]
    save_file(tensors, tmp_path / "dino" / "model.safetensors", metadata={"format": "pt"})
    found = check_encoder("dino", tmp_path / "dino", Mistakes())
    assert found is not None
    with pytest.raises(UserError, match="1 of its weights are missing"):
        load_dino(found, CPU)


def test_a_fingerprint_changes_with_weights_and_settings(folders: Path, tmp_path: Path) -> None:
    def fingerprint() -> str:
        found = check_encoder("dino", tmp_path / "dino", Mistakes())
        assert found is not None
        return found.fingerprint()

    shutil.copytree(folders / "dino", tmp_path / "dino")
    first = fingerprint()
    config = tmp_path / "dino" / "preprocessor_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("32", "24"), encoding="utf-8")
    second = fingerprint()
    tiny_encoders.write_dino(tmp_path / "dino", seed=1)
    assert len({first, second, fingerprint()}) == 3
