"""tools/merge_lora.py and tools/svd_merge_lora.py as users call them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from networks import sdxl_merge_lora
from tests import tiny
from tests.networks.random_loras import relative
from tests.tools import loras
from tools import merge_lora, svd_merge_lora


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("loras of two")
    one = loras.write(
        folder / "one.safetensors", loras.tensors("sd1", 4, 2.0, 1), ss_seed="1", **{"modelspec.title": "A"}
    )
    other = loras.tensors("sd1", 6, 6.0, 2, kernels=False)
    return one, loras.write(folder / "otra.safetensors", other, ss_seed="2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "base modèl.safetensors"
    spec = {"modelspec.title": "Base", "modelspec.license": "mine"}
    return tiny.write_single_file(path, "sd1", metadata=spec, position_ids=True)


def merge(*words: object) -> int:
    return loras.told(merge_lora.main, words)


def expected_sum(two: tuple[Path, Path], ratios: tuple[float, float]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for path, ratio in zip(two, ratios, strict=True):
        for name, change in loras.deltas(loras.read(path)[0]).items():
            total[name] = total.get(name, torch.zeros_like(change)) + ratio * change
    return total


# --- LoRAs into one ------------------------------------------------------------------------------------------------


def test_all_of_the_sum_is_kept_with_concat(two: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "суммa.safetensors"
    assert sdxl_merge_lora.main is merge_lora.main
    answer = loras.run(
        "merge_lora.py", "--models", *two, "--ratios", 0.7, -0.5, "--save_to", out, "--concat", "--shuffle"
    )
    assert answer.returncode == 0, answer.stderr
    found, metadata = loras.read(out)
    for name, whole in expected_sum(two, (0.7, -0.5)).items():
        assert relative(loras.deltas(found)[name], whole) < 1e-5, name
    assert metadata["modelspec.merged_from"] == "A, otra" and metadata["modelspec.title"] == "суммa"
    assert metadata["ss_base_model_version"] == "sd_v1" and "ss_seed" not in metadata
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora" and metadata["ss_network_dim"] == "Dynamic"


def test_without_it_the_sum_has_the_largest_rank(two: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "sum.safetensors"
    assert merge("--models", *two, "--ratios", 1, 0.5, "--save_to", out, "--save_precision", "bf16") == 0
    found = loras.read(out)[0]
    for name, whole in expected_sum(two, (1, 0.5)).items():
        rank = found[f"{name}.lora_down.weight"].shape[0]
        assert rank == (6 if "attentions" in name or "_te_" in name else 4), name
        u, values, vh = torch.linalg.svd(whole.flatten(1), full_matrices=False)
        best = u[:, :rank] @ values[:rank].diag() @ vh[:rank]
        assert relative(loras.deltas(found)[name].flatten(1), best) < 0.02  # bf16
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def test_a_ratio_of_0_changes_nothing_and_ratios_are_no_squares(two: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "sum.safetensors"
    for concat in ([], ["--concat"]):
        assert merge("--models", *two, "--ratios", 1, 0, "--save_to", out, *concat) == 0
        before, after = loras.read(two[0])[0], loras.read(out)[0]
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert merge("--models", two[0], "--ratios", 0.5, "--save_to", out) == 0
    for name, change in loras.deltas(loras.read(out)[0]).items():
        assert relative(change, 0.5 * loras.deltas(loras.read(two[0])[0])[name]) < 1e-6


def test_minimal_metadata(two: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "sum.safetensors"
    assert merge("--models", *two, "--ratios", 1, 1, "--save_to", out, "--no_metadata", "--precision", "fp16") == 0
    found, metadata = loras.read(out)
    assert {key for key in metadata if not key.startswith("ss")} == set()
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}


def test_the_same_call_makes_the_same_file(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    out = tmp_path / "sum.safetensors"
    files = []
    for _ in range(2):
        assert merge("--models", *two, "--ratios", 1, 0.5, "--save_to", out) == 0
        files.append(out.read_bytes())
    assert files[0] == files[1]


def test_svd_merge(two: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "sum.safetensors"
    given = ["--models", *two, "--ratios", 0.4, 0.6, "--save_to", out, "--new_rank", 5, "--new_conv_rank", 2]
    given += ["--device", "cuda", "--precision", "float", "--save_precision", "float"]  # as kohya_ss sends them
    assert loras.told(svd_merge_lora.main, given) == 0
    found, metadata = loras.read(out)
    for name, whole in expected_sum(two, (0.4, 0.6)).items():
        layer = found[f"{name}.lora_down.weight"]
        rank = layer.shape[0]
        assert rank == (
            2 if layer.ndim == 4 and layer.shape[2] == 3 else 5 if "attentions" in name or "_te_" in name else 4
        )
        u, values, vh = torch.linalg.svd(whole.flatten(1), full_matrices=False)
        assert relative(loras.deltas(found)[name].flatten(1), u[:, :rank] @ values[:rank].diag() @ vh[:rank]) < 1e-4
    assert "conv_dim" in metadata["ss_network_args"]


def test_ratios_by_block(two: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "sum.safetensors"
    blocks = [0.0, *([1.0] * 12), 0.5, *([1.0] * 12)]  # the text encoder not at all, the middle by half
    given = ("--models", two[0], "--ratios", 2, "--save_to", out, "--new_rank", 4, "--lbws", blocks)
    assert loras.told(svd_merge_lora.main, given) == 0
    before, after = (loras.deltas(loras.read(path)[0]) for path in (two[0], out))
    assert after.keys() == {name for name in before if "_te_" not in name}
    for name, change in after.items():
        assert relative(change, (1.0 if "mid_block" in name else 2.0) * before[name]) < 1e-5, name


def test_loras_of_different_models_are_refused(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = loras.write(tmp_path / "sd2.safetensors", loras.tensors("sd2", 4, 2.0, 1), "sd2")
    assert merge("--models", two[0], other, "--ratios", 1, 1, "--save_to", tmp_path / "x.safetensors") == 2
    told = capsys.readouterr().err
    assert "sd_v1" in told and "sd_v2" in told and not (tmp_path / "x.safetensors").exists()


# --- into a model --------------------------------------------------------------------------------------------------


def original_names(name: str) -> str:
    """Where a layer of the mid block or the text encoder stands in the original file."""
    if name.startswith("lora_te_"):
        path = name.removeprefix("lora_te_text_model_")
        path = path.replace("encoder_layers_", "encoder.layers.").replace("_self_attn_", ".self_attn.")
        return f"cond_stage_model.transformer.text_model.{path.replace('_mlp_', '.mlp.')}.weight"
    path = name.removeprefix("lora_unet_mid_block_attentions_0_")
    for old, new in (("transformer_blocks_0_", "transformer_blocks.0."), ("ff_net_0_", "ff.net.0.")):
        path = path.replace(old, new)
    return f"model.diffusion_model.middle_block.1.{path.replace('attn1_', 'attn1.').replace('attn2_', 'attn2.')}.weight"


def test_into_a_model(model: Path, two: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "gemischt.safetensors"
    assert merge("--sd_model", model, "--models", *two, "--ratios", 0.7, 0.5, "--save_to", out) == 0
    before, (after, metadata) = load_file(model), loras.read(out)
    changes = expected_sum(two, (0.7, 0.5))
    seen = 0
    for name, change in changes.items():
        if "mid_block_attentions" in name or "_te_" in name:
            key = original_names(name)
            assert relative(after[key], before[key].double() + change) < 1e-6, name
            seen += 1
    assert seen == 6
    assert sum(not torch.equal(before[key], after[key]) for key in before) == len(changes)
    assert before.keys() == after.keys()
    assert metadata["modelspec.merged_from"] == "Base, A, otra" and metadata["modelspec.license"] == "mine"
    assert metadata["modelspec.title"] == "gemischt"


def test_what_a_model_does_not_tell_is_not_made_up(tmp_path: Path) -> None:
    """SD2 models predict v or noise: a merged one that said the wrong thing would be trained and drawn with wrongly."""
    lora = loras.write(tmp_path / "lora.safetensors", loras.tensors("sd2", 4, 2.0, 1), "sd2")
    out = tmp_path / "new.safetensors"
    for said in ({}, {"modelspec.prediction_type": "v"}):
        model = tiny.write_single_file(tmp_path / "sd2.safetensors", "sd2", metadata={"a": "b", **said})
        assert merge("--sd_model", model, "--v2", "--models", lora, "--ratios", 1, "--save_to", out) == 0
        found = loras.read(out)[1]
        assert found.get("modelspec.prediction_type") == said.get("modelspec.prediction_type")
        assert found.get("modelspec.architecture") == ("stable-diffusion-v2-768-v" if said else None)
        assert found["a"] == "b"
    given = ("--sd_model", model, "--models", lora, "--ratios", 1, "--save_to", out, "--v_parameterization")
    assert merge(*given) == 0 and loras.read(out)[1]["modelspec.prediction_type"] == "v"


def test_a_ratio_of_0_leaves_a_model_bit_for_bit(model: Path, two: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "same.safetensors"
    assert merge("--sd_model", model, "--models", two[0], "--ratios", 0, "--save_to", out, "--no_metadata") == 0
    before, (after, metadata) = load_file(model), loras.read(out)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert not metadata


def test_other_kinds_into_a_model(model: Path, tmp_path: Path) -> None:
    """DoRA by the formula of its paper (arXiv 2402.09353, equation 5), LoHa by LyCORIS': products of two LoRAs."""
    draw = torch.Generator().manual_seed(3)
    dora, loha = (f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_{letter}" for letter in "qv")
    before = load_file(model)
    rows, columns = before[original_names(dora)].shape
    content = {
        f"{dora}.lora_down.weight": torch.randn(4, columns, generator=draw) * 0.1,
        f"{dora}.lora_up.weight": torch.randn(rows, 4, generator=draw),
        f"{dora}.alpha": torch.tensor(2.0),
        f"{dora}.dora_scale": torch.rand(rows, 1, generator=draw) + 0.5,
        f"{loha}.alpha": torch.tensor(3.0),
    }
    for half in ("1", "2"):
        content[f"{loha}.hada_w{half}_a"] = torch.randn(rows, 6, generator=draw)
        content[f"{loha}.hada_w{half}_b"] = torch.randn(6, columns, generator=draw)
    out = tmp_path / "new.safetensors"
    path = loras.write(tmp_path / "mixed.safetensors", content)
    assert merge("--sd_model", model, "--models", path, "--ratios", 1, "--save_to", out) == 0
    after = load_file(out)

    weight = before[original_names(dora)].double()
    direction = (
        weight + 2 / 4 * content[f"{dora}.lora_up.weight"].double() @ content[f"{dora}.lora_down.weight"].double()
    )
    expected = content[f"{dora}.dora_scale"].double() * direction / direction.norm(dim=1, keepdim=True)
    assert relative(after[original_names(dora)], expected) < 1e-6
    halves = [content[f"{loha}.hada_w{n}_a"].double() @ content[f"{loha}.hada_w{n}_b"].double() for n in (1, 2)]
    expected = before[original_names(loha)].double() + 3 / 6 * halves[0] * halves[1]
    assert relative(after[original_names(loha)], expected) < 1e-6
    assert sum(not torch.equal(before[key], after[key]) for key in before) == 2


def test_ratios_by_block_into_a_model(model: Path, two: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "new.safetensors"
    blocks = [0.0, *([1.0] * 12), 0.5, *([1.0] * 12)]  # the text encoder not at all, the middle by half
    given = ("--sd_model", model, "--models", two[0], "--ratios", 1, "--save_to", out, "--lbws", blocks)
    assert merge(*given) == 0
    before, after, changes = load_file(model), load_file(out), loras.deltas(loras.read(two[0])[0])
    for name, change in changes.items():
        if "mid_block_attentions" in name:
            key = original_names(name)
            assert relative(after[key], before[key].double() + 0.5 * change) < 1e-6, name
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith("cond_stage_model."))


@pytest.mark.parametrize("ending", [".ckpt", ""])
def test_other_files_of_models(model: Path, two: tuple[Path, Path], tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"new{ending}"
    given = ("--sd_model", model, "--models", two[0], "--ratios", 1, "--save_to", out, "--save_precision", "fp16")
    assert merge(*given) == 0
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    if ending:
        found = torch.load(out, weights_only=True)["state_dict"]["model.diffusion_model.middle_block.1." + name[23:]]
    else:
        found = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")[name]
    before = load_file(model)["model.diffusion_model.middle_block.1." + name[23:]]
    change = loras.deltas(loras.read(two[0])[0])["lora_unet_" + name.removesuffix(".weight").replace(".", "_")]
    assert found.dtype == torch.float16 and relative(found, before + change) < 1e-3


def test_what_does_not_fit_is_listed_and_nothing_is_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = loras.tensors("sd1", 4, 2.0, 1)
    content["lora_unet_nowhere.lora_down.weight"] = torch.ones(4, 8)
    content["lora_unet_nowhere.lora_up.weight"] = torch.ones(8, 4)
    path = loras.write(tmp_path / "a.safetensors", content)
    out = tmp_path / "x.safetensors"
    assert merge("--sd_model", model, "--models", path, "--ratios", 1, "--save_to", out) == 2
    told = capsys.readouterr().err
    assert "a.safetensors" in told and "lora_unet_nowhere" in told and not out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], ["no --models", "no --ratios", "no --save_to"]),
        (["--models", "a", "b", "--ratios", "1", "--save_to", "x.bin", "--conct"], ["2 files", "x.bin", "--concat?"]),
        (["--models", "a.safetensors", "b.pt", "--ratios", "1", "1", "--save_to", "x.pt"], ["a.safetensors", "b.pt"]),
        (["--models", "a", "--ratios", "viel", "--save_to", "x.pt"], ["--ratios", "not a number"]),
        (["--models", "a", "--ratios", "1", "--save_to", "x.pt", "--precision", "fp8"], ["float, fp16, bf16"]),
        (["--models", "a", "--ratios", "1", "--save_to", "x.pt", "--lbws", "[1,2]"], ["2 numbers"]),
        (
            ["--sd_model", "gone", "--models", "a", "--ratios", "1", "--save_to", "x.pt", "--concat"],
            ["--concat", "x.pt"],
        ),
        (
            ["--sd_model", "gone.ckpt", "--models", "a", "--ratios", "1", "--save_to", "x.ckpt"],
            ["--sd_model: gone.ckpt", "a: no such file"],
        ),
    ],
)
def test_mistakes_are_told_without_a_traceback(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert merge(*words) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in said), told
    assert "Traceback" not in told and not list(tmp_path.iterdir())


def test_a_model_of_another_kind_than_said(
    model: Path, two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.safetensors"
    assert merge("--sd_model", model, "--v2", "--models", two[0], "--ratios", 1, "--save_to", out) == 2
    assert "--v2, but" in capsys.readouterr().err
