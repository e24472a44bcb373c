"""A pickle is a program. Ours is read without running any of it; what would run code is refused and named."""

from __future__ import annotations

import argparse
import builtins
import collections
import os
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from library.checkpoints.files import CheckpointError, open_tensors, read_header

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3)}


class Calls:
    """Pickles as a call of any function: what an attacker writes."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "builtins.exec", "builtins.getattr", "builtins.open"])
def test_a_pickle_that_would_run_code_is_refused_and_nothing_runs(tmp_path: Path, name: str, new: bool) -> None:
    trace = tmp_path / "it_ran"
    code = f"open({str(trace)!r}, 'w').close()"
    evil = {
        "os.system": Calls(os.system, f'"{sys.executable}" -c "{code}"'),
        "builtins.eval": Calls(eval, code),
        "builtins.exec": Calls(exec, code),
        "builtins.getattr": Calls(getattr, Path(trace), "touch"),
        "builtins.open": Calls(builtins.open, str(trace), "w"),
    }[name]
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": WEIGHTS, "callbacks": evil}, path, _use_new_zipfile_serialization=new)
    shown = {"os.system": f"{os.system.__module__}.system", "builtins.open": f"{open.__module__}.open"}.get(name, name)
    for read in (read_header, open_tensors):
        with pytest.raises(CheckpointError, match=rf"evil\.ckpt: refused.*{shown}"):
            read(path)
    assert not trace.exists()
    if name != "builtins.getattr":  # that one only fetches; the others prove that the file was a real weapon
        pickle.loads(pickle.dumps(evil))
        assert trace.exists()


def test_all_refused_names_are_listed(tmp_path: Path) -> None:
    torch.save({"a": Calls(eval, "1"), "b": Calls(getattr, 1, "real"), "state_dict": WEIGHTS}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"builtins\.eval, builtins\.getattr"):
        read_header(tmp_path / "x.ckpt")


def test_a_pickle_in_the_newer_protocol_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(pickle.dumps(Calls(os.system, "true"), protocol=4))
    with pytest.raises(CheckpointError, match="system"):
        read_header(path)


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class that pickles as pytorch_lightning's ModelCheckpoint; the package itself is not there when reading."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    kind = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = kind  # type: ignore[attr-defined]
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": module.__name__})  # type: ignore[attr-defined]
    kind.settings = module.AttributeDict(lr=0.5)  # type: ignore[attr-defined]
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return kind


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_what_trainers_leave_in_published_files_is_let_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lightning: type, new: bool
) -> None:
    callback = lightning()
    callback.best = {"path": "last.ckpt", "score": numpy.float32(0.25)}
    content = {
        "state_dict": collections.OrderedDict(WEIGHTS),
        "global_step": numpy.int64(470_000),
        "epoch": 6,
        "callbacks": {lightning: {"monitor": "val/loss", "best": numpy.float64(0.5), "object": callback}},
        "hyper_parameters": argparse.Namespace(lr=1e-4, betas=(0.9, 0.999)),
        "settings": lightning.settings,  # type: ignore[attr-defined]
        "counts": collections.defaultdict(int, {"a": 1}),
        "kinds": [int, dict, numpy.dtype("float32")],
    }
    path = tmp_path / "v1.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=new)
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, name)
    header = read_header(path)
    assert header.metadata["global_step"] == "470000" and header.metadata["epoch"] == "6"
    assert open_tensors(path).get("a.weight").equal(WEIGHTS["a.weight"])


def test_parameters_count_as_tensors(tmp_path: Path) -> None:
    torch.save({"state_dict": {"p": torch.nn.Parameter(torch.ones(2))}}, tmp_path / "x.ckpt")
    reader = open_tensors(tmp_path / "x.ckpt")
    assert reader.header.tensors["p"].shape == (2,)
    assert not reader.get("p").requires_grad


def test_a_file_without_tensors_and_a_foreign_zip(tmp_path: Path) -> None:
    torch.save({"optimizer": 1}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="contains no tensors"):
        read_header(tmp_path / "x.ckpt")
    import zipfile

    with zipfile.ZipFile(tmp_path / "y.ckpt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="a zip archive without model weights"):
        read_header(tmp_path / "y.ckpt")
