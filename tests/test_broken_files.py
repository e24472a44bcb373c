"""Whatever is wrong with a file, every program ends with exit code 2 and a message that names the file, never with a
traceback. Files are damaged one by one in every way that was met in files of others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import gen_img
import train_db
import train_network
from library.training.command import run_recipe
from tests import tiny
from tests.tools import loras
from tools import (
    cache_latents,
    cache_text_encoder_outputs,
    check_lora_weights,
    convert_checkpoint,
    convert_diffusers20_original_sd,
    convert_lora,
    extract_lora_from_dylora,
    extract_lora_from_models,
    lora_interrogator,
    make_class_images,
    merge_lora,
    merge_models,
    resize_lora,
    show_metadata,
    svd_merge_lora,
)

Tensors = dict[str, torch.Tensor]
Words = list[object]
UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer.text_model."
WEIGHT = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
EMBEDDING = f"{TEXT}embeddings.token_embedding.weight"


# --- damages ----------------------------------------------------------------------------------------------------------


def replaced(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    """Replace one tensor by what is made of it."""

    def change(tensors: Tensors) -> None:
        tensors[name] = make(tensors[name])

    return change


def without(part: str) -> Callable[[Tensors], None]:
    """Remove all tensors whose names contain this."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


def added(name: str, tensor: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor})


# a change of the tensors, and words of the message
MODELS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    # SSD-1B and Segmind Vega (huggingface.co/segmind): SDXL's U-Net without some transformer blocks, the middle's too
    "without the middle's attention": (without("middle_block.1."), "from which layers were taken, such as SSD-1B"),
    "without a block of attention": (without("output_blocks.3.1.transformer_blocks.0."), "such as SSD-1B"),
    "without a tensor": (without(WEIGHT), "lacks tensors"),
    "without a layer of text": (without("encoder.layers.1.mlp.fc1"), "lacks tensors"),
    "without the decoder": (without("first_stage_model.decoder."), "incomplete"),
    "int8": (replaced(WEIGHT, lambda it: it.to(torch.int8)), "quantised"),
    "int8 text": (replaced(EMBEDDING, lambda it: it.to(torch.int8)), "quantised"),
    "booleans": (replaced(WEIGHT, lambda it: it > 0), "is BOOL"),
    "complex": (replaced(WEIGHT, lambda it: it.to(torch.complex64)), "is C64"),
    "of rank 0": (replaced(WEIGHT, lambda it: torch.zeros(())), "has the shape ()"),
    "without values": (replaced(WEIGHT, lambda it: it[:0]), "has the shape (0, "),
    "of another shape": (replaced(WEIGHT, lambda it: it[:3, :3]), "has the shape (3, 3)"),
    "a vector for a matrix": (replaced(EMBEDDING, lambda it: it[0]), "sizes cannot be read"),
    "a number for a matrix": (
        replaced("first_stage_model.post_quant_conv.weight", lambda it: torch.zeros(())), "sizes cannot be read"
    ),
    "of a large number": (added(f"{UNET}input_blocks.99999.0.in_layers.0.weight", torch.zeros(3)), "unknown tensor"),
    "of a large layer": (added(f"{TEXT}encoder.layers.99999.mlp.fc1.bias", torch.zeros(3)), "unknown tensor"),
    "with an unknown tensor": (added(f"{UNET}odd.weight", torch.zeros(3)), "unknown tensor"),
}  # fmt: skip


def header(text: str, content: bytes = b" " * 64) -> bytes:
    """The bytes of a .safetensors file with this header."""
    return len(text.encode()).to_bytes(8, "little") + text.encode() + content


ENTRY = '{"a": {"dtype": "F32", "shape": %s, "data_offsets": %s}}'
BYTES: dict[str, bytes] = {
    "empty": b"",
    "a page": b"<!DOCTYPE html><html><body>Not found</body></html>",
    "a header that ends": header('{"a": ['),
    "a list": header("[1, 2]"),
    "metadata that are a list": header('{"__metadata__": [1]}'),
    "infinite shape": header(ENTRY % ("[1e400]", "[0, 8]")),
    "negative shape": header(ENTRY % ("[-2]", "[0, 8]")),
    "words for offsets": header(ENTRY % ("[2]", '[0, "x"]')),
    "more than it holds": header(ENTRY % ("[200]", "[0, 800]")),
    "four bits": header('{"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}'),
    "half a zip": b"PK\x03\x04" + b"\x00" * 64,
    "half a pickle": b"\x80\x02}q\x00(X\x05\x00\x00\x00",
}


def entry(file: str, **entries: object) -> Callable[[Path], None]:
    """Set entries of a JSON file of a diffusers folder."""

    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | entries), encoding="utf-8")

    return change


def text(file: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / file).write_bytes(content)

    return change


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a list for a configuration": (text("unet/config.json", b"[]"), "JSON object"),
    "half a configuration": (text("unet/config.json", b"{"), "cannot be read as JSON"),
    "another encoding": (text("vae/config.json", b'{"a": "\xe4"}'), "cannot be read as JSON"),
    "words for widths": (entry("unet/config.json", block_out_channels="wide"), "block_out_channels = wide"),
    "a broken number of heads": (entry("unet/config.json", attention_head_dim=2.5), "attention_head_dim = 2.5"),
    "a word for a scale": (entry("vae/config.json", scaling_factor="x"), "scaling_factor = x"),
    "a word for betas": (entry("scheduler/scheduler_config.json", beta_start="x"), "beta_start = x"),
    "no kind of pipeline": (text("model_index.json", b"[]"), "JSON object"),
    "a vocabulary that is a list": (text("tokenizer/vocab.json", b"[]"), "tokenizer"),
    "merges that are no text": (text("tokenizer/merges.txt", b"\xff\xfe\x00"), "tokenizer"),
    "weights cut off": (text("unet/diffusion_pytorch_model.safetensors", header("{")), "header is damaged"),
}

NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
DOWN, UP, ALPHA = (f"{NAME}.{role}" for role in ("lora_down.weight", "lora_up.weight", "alpha"))
NAN = float("nan")
LORAS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "NaN": (replaced(DOWN, lambda it: torch.full_like(it, NAN)), "NaN or infinite"),
    "infinite": (replaced(UP, lambda it: torch.full_like(it, float("inf"))), "NaN or infinite"),
    "rank 0": (lambda it: it.update({DOWN: it[DOWN][:0], UP: it[UP][:, :0]}), "no values"),
    "int8": (replaced(DOWN, lambda it: it.to(torch.int8)), "stored as int8"),
    "a number for a factor": (replaced(DOWN, lambda it: torch.zeros(())), "not a matrix"),
    "vectors for factors": (lambda it: it.update({DOWN: torch.zeros(4), UP: torch.zeros(4)}), "not a matrix"),
    "alpha of several numbers": (added(ALPHA, torch.ones(4)), "4 values instead of one"),
    "alpha of none": (added(ALPHA, torch.ones(0)), "no values"),
    "alpha that is NaN": (added(ALPHA, torch.tensor(NAN)), "NaN or infinite"),
    "a vector for a core": (added(f"{NAME}.lora_mid.weight", torch.ones(7)), "not a matrix"),
}


# --- programs ---------------------------------------------------------------------------------------------------------


def train(recipe: object, *words: object) -> int:
    return run_recipe(recipe.RECIPE, [str(word) for word in words])  # type: ignore[attr-defined]


class Programs:
    """Each program, called with a file that is damaged."""

    def __init__(self, root: Path) -> None:
        self.root, self.out = root, root / "out"
        self.model, self.lora = root / "good.safetensors", root / "good_lora.safetensors"
        self.data: Words = ["--train_data_dir", root / "train", "--resolution", 64]
        self.run: Words = [
            *self.data,
            "--output_dir",
            self.out,
            "--max_train_steps",
            1,
            "--max_data_loader_n_workers",
            0,
        ]

    def of_models(self, file: Path) -> dict[str, Callable[[], int]]:
        """The programs that take a whole model, before they compute anything."""
        base, out = ["--pretrained_model_name_or_path", file], self.out / "new.safetensors"
        recipes = {"train_db": train_db, "train_network": train_network}
        adapter = {"train_network": ["--network_module", "networks.lora"]}
        draw: Words = ["--prompt", "a dog", "--steps", 1, "--outdir", self.out]
        tools: dict[str, tuple[Callable[[list[str]], int], Words]] = {
            "gen_img": (gen_img.main, ["--ckpt", file, *draw]),
            "make_class_images": (
                make_class_images.main, ["--ckpt", file, "--prompt", "a dog", "--outdir", self.out, "--count", 1]
            ),
            "cache_latents": (cache_latents.main, [*base, *self.data]),
            "cache_text_encoder_outputs": (cache_text_encoder_outputs.main, [*base, *self.data]),
            "convert_checkpoint": (convert_checkpoint.main, [file, out]),
            "convert_diffusers20_original_sd": (convert_diffusers20_original_sd.main, [file, self.out / "folder"]),
            "extract_lora_from_models": (
                extract_lora_from_models.main, ["--model_org", self.model, "--model_tuned", file, "--save_to", out]
            ),
            "merge_lora": (
                merge_lora.main, ["--sd_model", file, "--models", self.lora, "--ratios", 1, "--save_to", out]
            ),
            "lora_interrogator": (lora_interrogator.main, ["--sd_model", file, "--model", self.lora]),
        }  # fmt: skip
        calls = {name: _call(main, words) for name, (main, words) in tools.items()}
        for name, recipe in recipes.items():
            words = [*base, *self.run, *adapter.get(name, [])]
            calls[name] = lambda recipe=recipe, words=words: train(recipe, *words)  # type: ignore[misc]
        return calls

    def of_vaes(self, file: Path) -> dict[str, Callable[[], int]]:
        """The programs that take another VAE."""
        base: Words = ["--pretrained_model_name_or_path", self.model, "--vae", file]
        drawn: Words = ["--ckpt", self.model, "--vae", file, "--prompt", "a dog", "--steps", 1, "--outdir", self.out]
        return {
            "train_db": lambda: train(train_db, *base, *self.run),
            "cache_latents": _call(cache_latents.main, [*base, *self.data]),
            "gen_img": _call(gen_img.main, drawn),
            "convert_checkpoint": _call(convert_checkpoint.main, [self.model, self.out / "x.ckpt", "--vae", file]),
        }

    def of_loras(self, file: Path) -> dict[str, Callable[[], int]]:
        """The programs that take an adapter, before they compute anything."""
        out = self.out / "new.safetensors"
        two: Words = ["--models", file, self.lora, "--ratios", 1, 1, "--save_to", out]
        return {
            "resize_lora": _call(resize_lora.main, ["--model", file, "--save_to", out, "--new_rank", 2]),
            "merge_lora": _call(merge_lora.main, two),
            "svd_merge_lora": _call(svd_merge_lora.main, [*two, "--new_rank", 2]),
            "extract_lora_from_dylora": _call(
                extract_lora_from_dylora.main, ["--model", file, "--save_to", out, "--unit", 1]
            ),
            "convert_lora": _call(convert_lora.main, [file, self.out / "diffusers"]),
        }

    def with_model_and_lora(self, file: Path) -> dict[str, Callable[[], int]]:
        """The programs that read an adapter once a model is loaded."""
        out = self.out / "new.safetensors"
        words = ["--pretrained_model_name_or_path", self.model, *self.run, "--network_module", "networks.lora"]
        return {
            "network_weights": lambda: train(train_network, *words, "--network_weights", file, "--dim_from_weights"),
            "base_weights": lambda: train(train_network, *words, "--base_weights", file),
            "merge_lora": _call(
                merge_lora.main, ["--sd_model", self.model, "--models", file, "--ratios", 1, "--save_to", out]
            ),
            "lora_interrogator": _call(lora_interrogator.main, ["--sd_model", self.model, "--model", file]),
        }


def _call(main: Callable[[list[str]], int], words: Words) -> Callable[[], int]:
    return lambda: main([str(word) for word in words])


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    root = tmp_path_factory.mktemp("broken")
    tiny.write_single_file(root / "good.safetensors", "sd1")
    tiny.write_diffusers(root / "good", "sd1")
    tiny.write_images(root / "train" / "1_sks dog", 1)
    loras.write(root / "good_lora.safetensors", loras.tensors("sd1", 4, 2.0, 1))
    return Programs(root)


def check(calls: dict[str, Callable[[], int]], file: Path, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every call refuses, and its message has the file and these words."""
    for name, call in calls.items():
        capsys.readouterr()
        code, told = call(), capsys.readouterr().err
        assert code == 2, (name, told)
        assert "Traceback" not in told and str(file) in told and words in told, (name, told)


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", MODELS)
def test_damaged_models(programs: Programs, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    """All are refused before anything is loaded."""
    change, words = MODELS[damage]
    tensors = tiny.original_state_dict("sd1")
    change(tensors)
    path = tmp_path / "damaged.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    check(programs.of_models(path), path, words, capsys)
    assert not programs.out.exists() or not any(programs.out.iterdir())


@pytest.mark.parametrize("damage", FOLDERS)
def test_damaged_folders(programs: Programs, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    change, words = FOLDERS[damage]
    folder = Path(shutil.copytree(programs.root / "good", tmp_path / "damaged"))
    change(folder)
    check(programs.of_models(folder), folder, words, capsys)


@pytest.mark.parametrize("damage", BYTES)
def test_files_that_are_none(
    programs: Programs, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(BYTES[damage])
    for calls in (programs.of_models(path), programs.of_vaes(path), programs.of_loras(path)):
        check(calls, path, "", capsys)
    others = {
        "show_metadata": _call(show_metadata.main, [path]),
        "check_lora_weights": _call(check_lora_weights.main, [path]),
        "merge_models": _call(
            merge_models.main, ["--models", programs.model, path, "--output", tmp_path / "sum.safetensors"]
        ),
    }
    check(others, path, "", capsys)


@pytest.mark.parametrize("damage", LORAS)
def test_damaged_adapters(programs: Programs, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    change, words = LORAS[damage]
    tensors = loras.tensors("sd1", 4, 2.0, 1)
    change(tensors)
    path = loras.write(tmp_path / "damaged.safetensors", {name: it.contiguous() for name, it in tensors.items()})
    check(programs.of_loras(path), path, words, capsys)
    if damage in ("NaN", "rank 0"):  # one check for all: these load a model each
        check(programs.with_model_and_lora(path), path, words, capsys)
    assert check_lora_weights.main([str(path)]) == 0  # shows what is wrong with it


def test_a_model_with_nan(programs: Programs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is found once the model is loaded, and before anything is computed with it."""
    tensors = tiny.original_state_dict("sd1")
    tensors[WEIGHT][0, 0] = NAN
    path = tmp_path / "nan.safetensors"
    save_file(tensors, path)
    calls = programs.of_models(path)
    names = ("train_network", "extract_lora_from_models", "merge_lora")
    check({name: calls[name] for name in names}, path, "NaN or infinite", capsys)
    check({"gen_img": calls["gen_img"]}, Path('the image of "a dog"'), "NaN or infinite", capsys)
    check({"convert": calls["convert_checkpoint"]}, programs.out / "new.safetensors", "NaN or infinite", capsys)
