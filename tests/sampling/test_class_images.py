"""A class folder's images keep their numbers, prompts and seeds, whatever is drawn when; what differs is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from library.options.mistakes import UserError
from library.sampling.class_images import RECORD, ClassFolder, fill_folder, inspect_folder, with_seeds
from library.sampling.draw_command import decide
from library.sampling.options import ClassImageOptions
from library.sampling.prompts import ImageRequest
from tests import tiny

DOG, CAT, OWN_SEED = ImageRequest("a dog"), ImageRequest("a cat"), ImageRequest("a bird", seed=500)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.write_single_file(tmp_path_factory.mktemp("m") / "base.safetensors", "sd1")


def chosen(model: Path, folder: Path, **changes) -> ClassImageOptions:
    start = ClassImageOptions(ckpt=str(model), outdir=folder, prompt="a dog", W=64, H=64, steps=1, count=4, seed=7)
    return replace(start, **changes)


def look(options: ClassImageOptions) -> ClassFolder:
    return inspect_folder(options, decide(options))


def record(folder: Path, options: ClassImageOptions) -> None:
    """Leave what a call leaves that is stopped before its first image."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(entry) for entry in look(options).record]
    (folder / RECORD).write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_prompts_are_taken_in_turn_and_seeds_count_up() -> None:
    images = with_seeds([DOG, OWN_SEED, CAT], 40, 6)
    assert [(image.prompt, image.seed) for image in images] == [
        ("a dog", 40), ("a bird", 500), ("a cat", 42), ("a dog", 43), ("a bird", 501), ("a cat", 45),
    ]  # fmt: skip


def test_a_larger_count_only_adds_images() -> None:
    assert with_seeds([DOG, CAT], 1, 9)[:5] == with_seeds([DOG, CAT], 1, 5)


def test_only_what_is_missing_is_drawn(model, tmp_path) -> None:
    options = chosen(model, tmp_path)
    assert look(options).missing == [0, 1, 2, 3]
    record(tmp_path, options)
    (tmp_path / "class_00002.png").write_bytes(b"x")
    assert look(options).missing == [0, 2, 3]
    assert look(replace(options, count=2)).missing == [0]
    assert look(replace(options, count=5)).missing == [0, 2, 3, 4]


def test_without_a_seed_the_recorded_ones_go_on(model, tmp_path) -> None:
    options = chosen(model, tmp_path, seed=None, prompt="a bird --d 3")
    record(tmp_path, options)
    assert [image.seed for image in look(options).requests] == [3, 4, 5, 6]

    options = chosen(model, tmp_path / "other", seed=None)
    first = look(options).requests[0].seed
    assert look(options).requests[0].seed != first, "any seed: one in 2**32 that two are equal"
    record(tmp_path / "other", options)
    seeds = [json.loads(line)["seed"] for line in (tmp_path / "other" / RECORD).read_text("utf-8").splitlines()]
    assert [image.seed for image in look(replace(options, count=6)).requests] == [seeds[0] + n for n in range(6)]
    assert seeds == [seeds[0] + n for n in range(4)]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"steps": 2}, "steps: 1 there, 2 now"),
        ({"W": 128}, "width: 64 there, 128 now"),
        ({"H": 128}, "height: 64 there, 128 now"),
        ({"scale": 3.0}, "scale: 7.5 there, 3.0 now"),
        ({"sampler": "euler_a"}, "sampler: 'ddim' there, 'euler_a' now"),
        ({"seed": 8}, "seed: 7 there, 8 now (class_00001.png)"),
        ({"prompt": "a cat"}, "prompt: 'a dog' there, 'a cat' now"),
        ({"negative_prompt": "fog"}, "negative_prompt: '' there, 'fog' now"),
        ({"clip_skip": 2}, "clip_skip: 1 there, 2 now"),
        ({"bf16": True}, "precision: 'fp32' there, 'bf16' now"),
        ({"v_parameterization": True}, "prediction: 'epsilon' there, 'v' now"),
        ({"max_embeddings_multiples": 1}, "max_embeddings_multiples: 3 there, 1 now"),
        ({"steps": 2, "count": 2}, "steps: 1 there, 2 now"),
    ],
)
def test_other_settings_are_refused_and_named(model, tmp_path, change, told) -> None:
    options = chosen(model, tmp_path)
    record(tmp_path, options)
    with pytest.raises(UserError) as refused:
        look(replace(options, **change))
    assert told in str(refused.value) and str(tmp_path / RECORD) in str(refused.value)
    assert str(refused.value).count(" there, ") == 1


def test_all_that_differs_is_told_at_once(model, tmp_path) -> None:
    options = chosen(model, tmp_path)
    record(tmp_path, options)
    with pytest.raises(UserError, match=r"(?s)prompt: .*seed: .*steps: ") as refused:
        look(replace(options, steps=3, prompt="a cat", seed=1))
    assert str(refused.value).count(" there, ") == 3


def test_what_changes_no_image_is_not_refused(model, tmp_path) -> None:
    options = chosen(model, tmp_path / "reg")
    record(tmp_path / "reg", options)
    renamed = shutil.copy(model, tmp_path / "renamed.safetensors")
    for change in ({"batch_size": 3}, {"ckpt": str(renamed)}, {"clip_skip": 1}, {"device": "cpu"}, {"count": 99}):
        look(replace(options, **change))


def test_another_model_or_vae_is_told_by_its_content(model, tmp_path) -> None:
    options = chosen(model, tmp_path / "reg")
    record(tmp_path / "reg", options)
    (tmp_path / "new").mkdir()
    other = tiny.write_single_file(tmp_path / "new" / model.name, "sd1", seed=1)
    digest = hashlib.sha256(other.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=f"model_sha256: .* there, '{digest}' now"):
        look(replace(options, ckpt=str(other)))
    vae = tiny.write_vae_file(tmp_path / "vae.safetensors")
    with pytest.raises(UserError, match="vae_sha256: None there, "):
        look(replace(options, vae=str(vae)))


def test_a_diffusers_folder_is_known_by_its_weights(tmp_path) -> None:
    folder = tiny.write_diffusers(tmp_path / "dog", "sd1")
    options = chosen(folder, tmp_path / "reg")
    record(tmp_path / "reg", options)
    moved = folder.rename(tmp_path / "moved")
    look(replace(options, ckpt=str(moved)))
    weights = moved / "text_encoder" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="model_sha256"):
        look(replace(options, ckpt=str(moved)))


def test_images_of_unknown_origin_are_not_taken_for_ours(model, tmp_path) -> None:
    (tmp_path / "class_00001.png").write_bytes(b"x")
    (tmp_path / "my own.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"not in class_images\.jsonl: class_00001\.png"):
        look(chosen(model, tmp_path))
    (tmp_path / "class_00001.png").unlink()
    assert len(look(chosen(model, tmp_path)).missing) == 4


@pytest.mark.parametrize("content", ["{", "[]", '"x"', '{"file": "class_00001.png"}', "\udcff"])
def test_a_damaged_record_is_told(model, tmp_path, content) -> None:
    (tmp_path / RECORD).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="cannot be read"):
        look(chosen(model, tmp_path))


def test_a_place_where_nothing_can_be_written_is_told(model, tmp_path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="--outdir"):
            fill_folder(chosen(model, folder))


def test_captions_are_written_without_drawing_again_and_never_replaced(model, tmp_path, capsys) -> None:
    options = chosen(model, tmp_path)
    record(tmp_path, options)
    for number in (1, 2, 3, 4):
        (tmp_path / f"class_0000{number}.png").write_bytes(b"x")
    (tmp_path / "class_00002.txt").write_text("mine", encoding="utf-8")
    fill_folder(replace(options, write_captions=True, caption_extension="txt"))
    captions = {path.name: path.read_text("utf-8").strip() for path in tmp_path.glob("*.txt")}
    assert captions == {f"class_0000{number}.txt": "mine" if number == 2 else "a dog" for number in (1, 2, 3, 4)}
    assert "nothing to draw" in capsys.readouterr().out
