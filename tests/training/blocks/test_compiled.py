"""Compiled blocks: the same losses, files without names of torch.compile, exact resumes, and few compilations.

Without inductor, which takes minutes: what is compiled is then computed by torch's usual kernels.
"""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open

from library.options.mistakes import UserError
from library.runtime.device import Machine
from library.training.blocks import compile_plan
from library.training.blocks.checkpoints import checkpoint_activations
from library.training.blocks.compile_plan import Compilation, missing_for
from library.training.blocks.compiled import compile_blocks, compiling
from library.training.blocks.place import place
from library.training.blocks.plan import BlocksPlan
from tests.training.blocks.test_swap import CPU, adapted, blocks_of, gradients, unet, watch
from tests.training.running import World, assert_equal_files, make_world, run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def keys(folder: Path) -> list[str]:
    """The names of tensors in all files below a folder."""
    found = []
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found += [*file.keys()]
    return found


def compilations(out: str) -> int:
    found = re.search(r"compiled (\d+) times", out)
    assert found is not None
    return int(found.group(1))


def test_20_steps_of_a_whole_model_in_two_buckets(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files have the model's own names, and a resumed run, which begins with another bucket, computes the same."""
    flags: dict[str, object] = {
        "enable_bucket": True,
        "min_bucket_reso": 64,
        "resolution": 96,
        "max_train_steps": 20,
        "use_ema": True,
        "stop_text_encoder_training": -1,
        "gradient_checkpointing": True,
    }
    plain = run(world.arguments(tmp_path / "plain", **flags), capsys)
    flags |= {"torch_compile": True, "dynamo_backend": "eager"}
    saves = {"save_every_n_steps": 18, "save_state": True}
    compiled = run(world.arguments(tmp_path / "compiled", **flags, **saves), capsys)
    assert compiled.code == 0, compiled.err
    assert "once for all sizes" in compiled.out
    assert compilations(compiled.err) < 38, "as many as blocks: none shares its code"
    assert compiled.losses == plain.losses and len(plain.losses) == 20
    names = keys(tmp_path / "compiled")
    assert len(names) > len(keys(tmp_path / "plain")) and not [name for name in names if "_orig_mod" in name]
    assert_equal_files(tmp_path / "plain" / "dog.safetensors", tmp_path / "compiled" / "dog.safetensors")
    state = tmp_path / "compiled" / "dog-step00000018-state"
    rest = run(world.arguments(tmp_path / "rest", **flags, resume=state), capsys)
    assert rest.losses == {step: loss for step, loss in compiled.losses.items() if step > 18}
    models = [path.name for path in (tmp_path / "rest").glob("*.safetensors")]
    assert len(models) > 1, "the average is missing"
    for name in models:
        assert_equal_files(tmp_path / "compiled" / name, tmp_path / "rest" / name)


def test_swapped_and_checkpointed_blocks_under_an_adapter_are_compiled() -> None:
    plain = unet()
    model = copy.deepcopy(plain).train()
    expected = gradients(plain, adapted(plain))
    trained = adapted(model)
    checkpoint_activations(model)
    names = [name for name in blocks_of(model) if name.startswith(("mid_block", "up_blocks.0"))]
    said: list[str] = []
    with compiling(compilation := Compilation("aot_eager"), said.append):
        plan = BlocksPlan("U-Net", dict.fromkeys(names, 0), swapped=tuple(blocks_of(model)), compilation=compilation)
        swap = place(model, plan, CPU, pytest.fail)
        assert swap is not None
        alive = watch(swap)
        found = gradients(model, trained)
    for one, other in zip(found, expected, strict=True):  # its derivatives are sums in another order
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert max(alive) == 2
    assert compilations(said[0]) <= len(names)
    assert not [name for name in model.state_dict() if "_orig_mod" in name]


def test_what_compiles_nothing_is_said(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_plan.shutil, "which", lambda name: None)
    dry = {"dry_run": True, "torch_compile": True}
    without = run(world.arguments(tmp_path, **dry), capsys)
    assert without.code == 0 and "inductor needs a C++ compiler" in without.out
    strict = run(world.arguments(tmp_path, **dry, strict=True), capsys)
    assert strict.code != 0 and "inductor needs a C++ compiler" in strict.err
    old = run(world.arguments(tmp_path, **dry, dynamo_backend="fx2trt"), capsys)
    assert old.code != 0 and "--dynamo_backend fx2trt: the installed torch does not have it" in old.err


def test_what_each_device_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_plan.importlib.util, "find_spec", lambda name: None)
    assert "triton" in missing_for("inductor", Machine("cuda", "a card"))
    assert missing_for("inductor", Machine("mps", "Apple GPU")) == ""
    assert missing_for("cudagraphs", Machine("cpu", "a processor"))
    assert missing_for("eager", Machine("cpu", "a processor")) == ""


def test_a_compiled_pass_can_be_back_propagated_twice() -> None:
    """For a fused backward pass that measures its gradients first. torch would let it write into what is kept."""
    block = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8))
    inputs = torch.randn(4, 8)
    with compiling(Compilation("aot_eager"), lambda text: None, twice=True):
        compiled = torch.compile(block.forward, backend="aot_eager")
        loss = compiled(inputs).sigmoid().sum()
        first = torch.autograd.grad(loss, list(block.parameters()), retain_graph=True)
        second = torch.autograd.grad(loss, list(block.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_compiler_that_fails_is_told_without_a_traceback() -> None:
    """Ctrl-C stops it as well: it is a process of the same terminal."""

    def failing(graph: Any, inputs: Any) -> Any:
        raise OSError("g++ was stopped")

    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    plan = Compilation(backend="inductor")
    compile_blocks(model, ["0"], replace(plan, backend=cast(Any, failing)))
    with pytest.raises(UserError, match="inductor failed, or was interrupted: .*stopped"), compiling(plan, print):
        model(torch.ones(1, 2))
