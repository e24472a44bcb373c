"""Models that find words: what transformers itself finds in the same image, and mistakes before they are loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    OwlViTForObjectDetection,
    SegformerForSemanticSegmentation,
    YolosForObjectDetection,
)

from library.mask_making.options import MaskMakingOptions
from library.mask_making.text_models import TextModel, choose_model, load_finder
from library.options.mistakes import Mistakes, UserError
from tests.mask_making import models
from tests.mask_making.pictures import photograph

IMAGE = Image.fromarray(photograph(0)[0])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a miniature by its name, with a space and another script in its path."""
    root = tmp_path_factory.mktemp("models ø 模型")

    def written(name: str) -> Path:
        return root / name if (root / name).exists() else getattr(models, name)(root / name)

    return written


def choose(folder: Path, text: str, **more: object) -> TextModel:
    mistakes = Mistakes()
    model = choose_model(options(folder, text, **more), mistakes)
    mistakes.raise_if_any()
    assert model is not None
    return model


def options(folder: Path | str, text: str, **more: object) -> MaskMakingOptions:
    return MaskMakingOptions(**{"text_input": text, "model": str(folder), "device": "cpu", **more})  # type: ignore[arg-type]


def test_clipseg_gives_the_pixels_that_are_sure_enough(folders) -> None:
    folder = folders("clipseg")
    phrases = ["a person", "dog"]
    processor, model = CLIPSegProcessor.from_pretrained(folder), CLIPSegForImageSegmentation.from_pretrained(folder)
    with torch.no_grad():
        inputs = processor(text=phrases, images=[IMAGE] * 2, padding=True, return_tensors="pt")
        small = torch.sigmoid(model(**inputs).logits).numpy()
    sure = np.max([cv2.resize(one, IMAGE.size, interpolation=cv2.INTER_LINEAR) for one in small], axis=0)
    threshold = float(np.median(sure))
    found = load_finder(choose(folder, "a person, dog", threshold=threshold))(IMAGE).mask
    clear = np.abs(sure - threshold) > 1e-4
    assert clear.mean() > 0.9 and found is not None and found.shape == (120, 160)
    assert np.array_equal(found[clear] > 0, (sure > threshold)[clear])
    alone = load_finder(choose(folder, "dog", threshold=threshold))(IMAGE).mask
    assert alone is not None and not (alone[clear] > found[clear]).any(), "a phrase finds no more alone"


def test_a_detector_of_classes_gives_the_boxes_of_those_asked_for(folders) -> None:
    folder = folders("yolos")
    processor, model = AutoImageProcessor.from_pretrained(folder), YolosForObjectDetection.from_pretrained(folder)
    with torch.no_grad():
        outputs = model(**processor(images=IMAGE, return_tensors="pt"))
    (every,) = processor.post_process_object_detection(outputs, 0.05, [(120, 160)])
    assert len(set(every["labels"].tolist())) == 2, "the miniature finds both classes"
    for number, name in enumerate(("Individual", "dog")):
        expected = every["boxes"][every["labels"] == number].int().tolist()
        found = load_finder(choose(folder, name, threshold=0.05))(IMAGE).boxes
        assert sorted(map(list, found)) == sorted(expected) != []


def test_a_detector_of_words_gives_boxes_for_each(folders) -> None:
    folder = folders("owlvit")
    processor, model = AutoImageProcessor.from_pretrained(folder), OwlViTForObjectDetection.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)(["red ball"], return_tensors="pt")
    with torch.no_grad():
        outputs = model(**tokens, **processor(images=IMAGE, return_tensors="pt"))
    scores = torch.sigmoid(outputs.logits[0].max(dim=-1).values)
    threshold = float(scores.median())
    (expected,) = processor.post_process_object_detection(outputs, threshold, torch.tensor([[120, 160]]))
    found = load_finder(choose(folder, "red ball", threshold=threshold))(IMAGE).boxes
    assert sorted(map(list, found)) == sorted(expected["boxes"].int().tolist()) and 0 < len(found) < len(scores)


def test_a_segmentation_gives_the_areas_of_the_classes_asked_for(folders) -> None:
    folder = folders("segformer")
    processor, model = (
        AutoImageProcessor.from_pretrained(folder),
        SegformerForSemanticSegmentation.from_pretrained(folder),
    )
    with torch.no_grad():
        outputs = model(**processor(images=IMAGE, return_tensors="pt"))
    (expected,) = processor.post_process_semantic_segmentation(outputs, [(120, 160)])
    person = load_finder(choose(folder, "person"))(IMAGE).mask
    assert person is not None and np.array_equal(person > 0, expected.numpy() == 0) and 0 < (person > 0).mean() < 1
    both = load_finder(choose(folder, "DOG, person"))(IMAGE).mask
    assert both is not None and (both == 255).all()


def mistakes_of(folder: Path | str, text: str = "dog", **more: object) -> list[str]:
    mistakes = Mistakes()
    choose_model(options(folder, text, **more), mistakes)
    return [str(mistake) for mistake in mistakes]


def write_config(folder: Path, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_mistakes_are_told_from_the_config_alone(tmp_path: Path) -> None:
    detector = {"architectures": ["DetrForObjectDetection"], "model_type": "detr", "id2label": {"0": "cat", "1": "dog"}}
    told = mistakes_of(write_config(tmp_path / "detr", **detector), "dog, Person", device="mps")
    assert len(told) == 4
    assert "--device mps is not available" in told[0]
    assert "no preprocessor_config.json" in told[1] and "no weights" in told[2]
    assert '"Person" is no class' in told[3] and "cat, dog" in told[3]

    (told_of_other,) = mistakes_of(write_config(tmp_path / "other", architectures=["GPT2LMHeadModel"]))
    assert "is GPT2LMHeadModel, which cannot be used here" in told_of_other and "--grabcut" in told_of_other
    for broken in ("", "[1]", "{"):
        (tmp_path / "other" / "config.json").write_text(broken, encoding="utf-8")
        assert len(mistakes_of(tmp_path / "other")) == 1
    (tmp_path / "empty").mkdir()
    assert "config.json cannot be read" in mistakes_of(tmp_path / "empty")[0]
    (tmp_path / "file").touch()
    assert "is a file" in mistakes_of(tmp_path / "file")[0]
    assert "no such file or folder" in mistakes_of(tmp_path / "none")[0]


def test_a_threshold_that_changes_nothing_is_a_mistake(folders) -> None:
    (told,) = mistakes_of(folders("segformer"), threshold=0.5)
    assert "--threshold has no effect" in told


def test_a_hub_name_is_found_in_the_cache_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (told,) = mistakes_of("", "dog")
    assert "CIDAS/clipseg-rd64-refined" in told and "hf download CIDAS/clipseg-rd64-refined" in told
    assert "--grabcut" in told
    snapshot = tmp_path / "models--CIDAS--clipseg-rd64-refined" / "snapshots" / "0"
    snapshot.parent.mkdir(parents=True)
    folders("clipseg").rename(snapshot)
    assert choose("", "dog").folder == snapshot
    snapshot.rename(folders("owlvit").parent / "clipseg")


def test_weights_that_cannot_be_loaded_are_a_user_error(tmp_path: Path) -> None:
    config = {"architectures": ["YolosForObjectDetection"], "model_type": "yolos", "id2label": {"0": "dog"}}
    folder = write_config(tmp_path / "m", **config)
    for name, content in (("preprocessor_config.json", "{}"), ("model.safetensors", "no weights")):
        (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_finder(choose(folder, "dog"))


def test_the_identity_follows_weights_and_question(folders, tmp_path: Path) -> None:
    folder = folders("segformer")
    one = choose(folder, "dog").identity()
    assert one == choose(folder, "dog").identity() != choose(folder, "person").identity()
    (folder / "model.safetensors").replace(tmp_path / "kept")
    (folder / "model.safetensors").write_bytes(b"others")
    assert choose(folder, "dog").identity() != one
    (tmp_path / "kept").replace(folder / "model.safetensors")
