"""Images drawn with adapters: by flags and by tags in prompts, with every kind, alone and together."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gen_img
from library.options.mistakes import UserError
from library.options.tool_command import tool_flags
from library.sampling.draw_command import decide
from library.sampling.lora_tags import AdapterUse, split_tags
from library.sampling.options import REMEDIES, GenerateOptions
from tests import tiny
from tests.networks import models
from tests.tools import loras
from tools import make_class_images, merge_lora

# diffusers' and numpy's remarks about their own future
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

KINDS = {
    "lora": ("networks.lora", ["conv_dim=2"]),
    "dora": ("networks.lora", ["use_dora=True"]),
    "loha": ("networks.loha", ["conv_dim=2"]),
    "lokr": ("networks.lokr", ["factor=4"]),
    "oft": ("networks.oft", []),
    "ia3": ("networks.ia3", []),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_single_file(tmp_path_factory.mktemp("m") / "sd1.safetensors", "sd1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of each kind, large enough to be seen."""
    folder = tmp_path_factory.mktemp("the loras")
    base = models.tiny()
    for name, (module, arguments) in KINDS.items():
        made = models.trained(models.create(base, *arguments, module=module, dim=4, alpha=4), 0.3)
        made.write(folder / f"{name}.safetensors", None, {})
    (folder / "old").mkdir()
    loras.write(folder / "old" / "dog v1.5.safetensors", loras.tensors("sd1", 4, 4.0, 1))
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters for other families, beside the folder of a whole model."""
    others = tiny.write_diffusers(tmp_path_factory.mktemp("others") / "sd1", "sd1")
    for family in ("sd2", "sdxl"):
        models.create(models.small(family), family=family).write(others / f"{family}.safetensors", None, {})
    return others


def drawn(model: Path, out: Path, *words: object, prompt: str = "a dog", code: int = 0) -> list[np.ndarray]:
    given = ["--ckpt", model, "--outdir", out, "--steps", "2", "--W", "64", "--H", "64", "--seed", "1"]
    assert gen_img.main([*map(str, given), "--prompt", prompt, *map(str, words)]) == code
    images = []
    for path in sorted(out.glob("*.png"), key=lambda path: path.name[18:]) if out.exists() else []:
        with Image.open(path) as image:
            images.append(np.asarray(image).astype(int))
    return images


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_is_that_of_the_merged_model(kind: str, model: Path, folder: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged.safetensors"
    words = ["--sd_model", model, "--models", folder / f"{kind}.safetensors", "--ratios", 0.7, "--save_to", merged]
    assert loras.told(merge_lora.main, words) == 0
    (plain,) = drawn(model, tmp_path / "plain")
    (expected,) = drawn(merged, tmp_path / "merged")
    (found,) = drawn(model, tmp_path / "a", "--network_weights", folder / f"{kind}.safetensors", "--network_mul", "0.7")
    assert np.abs(expected - plain).max() > 8
    assert np.abs(found - expected).max() <= 1


def test_several_are_merged_in_their_order(model: Path, folder: Path, tmp_path: Path) -> None:
    """OFT rotates what stands before it, so the order counts."""
    files = [folder / "lora.safetensors", folder / "oft.safetensors"]
    merged = tmp_path / "merged.safetensors"
    words = ["--sd_model", model, "--models", *files, "--ratios", 0.5, 1, "--save_to", merged]
    assert loras.told(merge_lora.main, words) == 0
    (expected,) = drawn(merged, tmp_path / "m")
    given = ["--network_module", "networks.lora", "--network_weights", *files, "--network_mul", 0.5]
    without_effect = ["--network_merge", "--network_pre_calc", "--network_merge_n_models", 1]  # of sd-scripts
    (found,) = drawn(model, tmp_path / "a", *given, *without_effect)
    assert np.abs(found - expected).max() <= 1


def test_a_multiplier_of_0_is_the_base_and_a_tag_is_a_flag(model: Path, folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "a dog --d 1\na dog <lora:dora:0.8> --d 1\na dog<lyco:old/dog v1.5:0> --d 1\na dog <lora:dora:0.8> --d 1\n"
        "a dog --d 1\na dog <lora:lora:te=0:unet=0.8> --d 1\n",
        encoding="utf-8",
    )
    given = ["--outdir", tmp_path / "a", "--from_file", prompts, "--network_dir", folder, "--batch_size", 4]
    size = ["--ckpt", model, "--steps", 2, "--W", 64, "--H", 64]
    assert gen_img.main([*map(str, [*given, *size])]) == 0
    images = []
    for path in sorted((tmp_path / "a").iterdir(), key=lambda path: path.name[18:]):
        with Image.open(path) as image:
            assert image.text["prompt"] == "a dog"
            images.append((image.text.get("networks"), np.asarray(image).astype(int)))
    names = [None, "dora.safetensors 0.8", "dog v1.5.safetensors 0", "dora.safetensors 0.8", None,
             "lora.safetensors 0.8 (text encoder 0)"]  # fmt: skip
    assert [name for name, _ in images] == names
    (plain,) = drawn(model, tmp_path / "plain")
    (flag,) = drawn(model, tmp_path / "b", "--network_weights", folder / "dora.safetensors", "--network_mul", "0.8")
    (zero,) = drawn(model, tmp_path / "c", "--network_weights", folder / "dora.safetensors", "--network_mul", "0")
    for index in (0, 2, 4):
        assert np.array_equal(images[index][1], plain), "the weights come back bit for bit"
    assert np.array_equal(zero, plain)
    assert np.array_equal(images[1][1], flag) and np.array_equal(images[3][1], flag)
    assert not np.array_equal(images[5][1], plain)


def test_tags_are_those_of_a1111() -> None:
    text, tags = split_tags("a <lora:dog> in <lyco:snow v1.2:0.5:.8>, <lora:x:te=0.1:unet=-1> (sun:1.2) <hypernet:y:1>")
    assert text == "a in, (sun:1.2) <hypernet:y:1>"
    assert [(tag.name, tag.text_multiplier, tag.multiplier) for tag in tags] == [
        ("dog", 1, 1),
        ("snow v1.2", 0.5, 0.8),
        ("x", 0.1, -1),
    ]
    for wrong in ("<lora:dog:much>", "<lora:dog:1:2:3>", "<lora:dog:dyn=4>", "<lora::1>", "<lora:dog:nan>"):
        with pytest.raises(ValueError, match="lora"):
            split_tags(wrong)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--network_weights", "gone.safetensors"], ["gone.safetensors: no such file"]),
        (["--network_weights", "{folder}"], ["is a folder, not an adapter file"]),
        (["--network_mul", "1"], ["--network_mul has 1 value, but --network_weights 0 files"]),
        (["--network_module", "networks.lora"], ["--network_module has 1 value, but"]),
        (["--network_weights", "{model}"], ["sd1.safetensors is a whole model (Stable Diffusion 1.x)", "use --ckpt"]),
        (["--network_weights", "{folder}/oft.safetensors", "--network_module", "networks.lora"], ["is OFT"]),
        (["--network_weights", "{others}/sd2.safetensors"], ["sd2.safetensors is for a model of other sizes"]),
        (["--network_weights", "{others}/sdxl.safetensors"], ["layers that Stable Diffusion 1.x does not have"]),
        (["--network_weights", "{others}/unet/diffusion_pytorch_model.safetensors"], ["model.safetensors has no adap"]),
        (["--network_dir", "nowhere"], ["--network_dir nowhere"]),
        (["--prompt", "a <lora:dog:1>"], ["<lora:dog:1>, but there is no --network_dir"]),
        (["--network_dir", "{folder}", "--prompt", "a <lora:dorra:1>"], ["<lora:dorra:1>", "did you mean dora?"]),
        (["--network_dir", "{folder}", "--prompt", "a <lora:dora:big>"], ['"big" is not a number']),
        (["--network_module", "no_such.module", "--network_weights", "{folder}/oft.safetensors"], ["no_such"]),
    ],
)
def test_mistakes_before_the_model_is_loaded(
    words: list[str],
    said: list[str],
    model: Path,
    folder: Path,
    others: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("library.families.sd.load.load", None)
    filled = [word.format(folder=folder, model=model, others=others) for word in words]
    prompt = [] if "--prompt" in words else ["--prompt", "a dog"]
    assert gen_img.main(["--ckpt", str(model), *prompt, *filled]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in said), error


def test_embeddings_beside_an_adapter_are_no_mistake(model: Path, tmp_path: Path) -> None:
    """OneTrainer writes them into its files; they are left out, with a note."""
    tensors = loras.tensors("sd1", 4, 4.0, 1) | {"bundle_emb.dog.string_to_param.*": torch.ones(2, 768)}
    path = loras.write(tmp_path / "bundled.safetensors", tensors)
    drawing = decide(GenerateOptions(ckpt=str(model), prompt="a dog", network_weights=(path,)))
    assert drawing.prompts[0].adapters == (AdapterUse(path),)


@pytest.mark.parametrize(
    ("flag", "remedy"),
    [
        ("network_args", "the file says all"),  # before: did you mean --network_dir?
        ("network_show_meta", "show_metadata.py"),  # --network_weights?
        ("from_module", "--from_file"),
        ("mask_path", "inpainting is not supported"),  # --image_path?
        ("vae_batch_size", "only speed and memory"),  # --batch_size?
    ],
)
def test_flags_of_sd_scripts_are_answered(flag: str, remedy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gen_img.main(["--ckpt", "a", "--prompt", "a", f"--{flag}", "x"]) == 2
    said = capsys.readouterr().err
    assert f"--{flag} (command line) is not a flag" in said and remedy in said and "did you mean" not in said


def test_remedies_name_flags_that_exist() -> None:
    known = tool_flags(GenerateOptions)
    assert not REMEDIES.keys() & known.keys()
    assert {name for text in REMEDIES.values() for name in re.findall(r"--(\w+)", text)} <= known.keys()


def test_a_tag_in_the_negative_prompt_is_told(model: Path, folder: Path) -> None:
    options = GenerateOptions(ckpt=str(model), prompt="a dog --n fog <lora:lora:1>", network_dir=folder)
    drawing = decide(options)
    assert drawing.prompts[0].negative_prompt == "fog" and drawing.prompts[0].adapters == ()
    assert any("negative prompt is ignored" in note for note in drawing.notes)


def test_the_same_name_in_two_folders_needs_the_folder(model: Path, folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dog.safetensors").write_bytes((folder / "lora.safetensors").read_bytes())
    options = GenerateOptions(ckpt=str(model), prompt="a dog <lora:dog:1>", network_dir=tmp_path)
    with pytest.raises(UserError, match="has several"):
        decide(options)
    options = GenerateOptions(ckpt=str(model), prompt="a dog <lora:two/dog>", network_dir=tmp_path)
    assert decide(options).prompts[0].adapters == (AdapterUse(tmp_path / "two" / "dog.safetensors"),)


def test_class_images_remember_the_adapters(model: Path, folder: Path, tmp_path: Path) -> None:
    given = ["--ckpt", model, "--outdir", tmp_path / "1_dog", "--steps", 2, "--W", 64, "--H", 64, "--prompt", "a dog"]
    given += ["--count", 1, "--seed", 1, "--network_weights"]
    assert loras.told(make_class_images.main, [*given, folder / "lora.safetensors"]) == 0
    assert loras.told(make_class_images.main, [*given, folder / "lora.safetensors", "--dry_run"]) == 0
    assert loras.told(make_class_images.main, [*given, folder / "loha.safetensors", "--dry_run"]) == 2
    assert loras.told(make_class_images.main, given[:-1] + ["--dry_run"]) == 2


def test_files_of_other_programs_are_drawn_with(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same LoRA under diffusers' names, which hold no alpha: it is the rank, as in diffusers."""
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    name = f"lora_unet_{path.replace('.', '_')}"
    content = {key: value for key, value in loras.tensors("sd1", 4, 4.0, 1).items() if key.startswith(name)}
    foreign = {
        f"unet.{path}.lora_A.weight": content[f"{name}.lora_down.weight"],
        f"unet.{path}.lora_B.weight": content[f"{name}.lora_up.weight"],
    }
    ours = loras.write(tmp_path / "ours.safetensors", content)
    theirs = loras.write(tmp_path / "theirs.safetensors", foreign)
    (expected,) = drawn(model, tmp_path / "a", "--network_weights", ours)
    (found,) = drawn(model, tmp_path / "b", "--network_weights", theirs)
    assert "1 layer without alpha" in capsys.readouterr().out
    assert np.array_equal(found, expected)


def test_a_file_of_lycoris_is_drawn_as_it_was_trained(tmp_path: Path) -> None:
    """Its own merge_to scales a LoHa by alpha / dim twice; the outside value is its forward pass while it trains."""
    pytest.importorskip("lycoris")
    from types import SimpleNamespace

    from library.families.registry import FAMILIES
    from library.sampling.adapters import AdapterMerger
    from networks.third_party.create import create_third_party

    path = tmp_path / "loha.safetensors"
    models.trained(models.create(models.tiny(), module="networks.loha", dim=4, alpha=2), 0.1).write(path, None, {})
    trained, merged = models.tiny(), models.tiny()
    arguments = ["algo=loha", "preset=attn-mlp"]
    theirs = create_third_party("lycoris.kohya", trained, models.PARTS["sd1"], dim=4, alpha=2, arguments=arguments)
    own = theirs.network.state_dict().keys()
    kept = {key: value for key, value in loras.read(path)[0].items() if key in own}
    theirs.load(
        loras.write(path, kept | {key: torch.zeros_like(theirs.network.state_dict()[key]) for key in own - kept.keys()})
    )
    theirs.module.eval()
    model = SimpleNamespace(modules=lambda: merged, family=FAMILIES[0], backbone=merged["unet"])
    use = AdapterUse(path, module="lycoris.kohya")
    AdapterMerger(model, print, restores=False).use((use,))  # type: ignore[arg-type]
    with torch.no_grad():
        expected, found = models.outputs(trained)[0], models.outputs(merged)[0]
        base = models.outputs(models.tiny())[0]
    assert float((expected - base).norm()) > 0.01
    assert float((found - expected).norm()) < 1e-2 * float((expected - base).norm())


def test_two_multipliers_change_the_text_encoder_and_the_unet(folder: Path) -> None:
    """merge(te, {"unet": u}) is as two merges, of the layers of each."""
    from networks import adapter_files, network

    tensors = adapter_files.read(folder / "lora.safetensors").tensors
    one, other = models.tiny(), models.tiny()
    network.from_tensors(one, models.PARTS["sd1"], tensors).merge(0.25, {"unet": 0.5})
    for prefix, ratio in (("lora_te", 0.25), ("lora_unet", 0.5)):
        part = {key: value for key, value in tensors.items() if key.startswith(prefix)}
        network.from_tensors(other, models.PARTS["sd1"], part).merge(ratio)
    for name in one:
        pairs = zip(one[name].parameters(), other[name].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
