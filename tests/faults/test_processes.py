"""One of two processes is killed: the other ends too, with one message and a state that any number can resume."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import train_network
from tests.training.pairs import ports, start_rank
from tests.training.running import make_world, run


def test_one_of_two_processes_is_killed_and_one_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = make_world(tmp_path)
    flags: dict[str, object] = {"network_module": "networks.lora", "network_dim": 2, "max_train_epochs": 40}
    out = tmp_path / "out"
    words = world.arguments(out, **flags, save_every_n_steps=2)
    file = tmp_path / "cases.json"
    case = {"module": "train_network", "function": "", "words": words, "port": ports(1)[0]}
    file.write_text(json.dumps([case]), encoding="utf-8")
    results = [tmp_path / f"results-{rank}.json" for rank in (0, 1)]
    first, second = (start_rank(rank, 2, file, results[rank], tmp_path) for rank in (0, 1))

    # the second is killed in the middle of the training
    while not any(out.glob("dog-step*.safetensors")) and first.poll() is None:
        time.sleep(0.05)
    second.kill()
    second.wait()
    first.wait()

    # the first notices, saves, and says so once
    (ended,) = json.loads(results[0].read_text(encoding="utf-8"))
    assert ended["code"] == 2 and "Traceback" not in ended["err"]
    assert ended["err"].count("process 2 of 2 ended without a message") == 1
    (state,) = out.glob("dog-step*-state")
    step = int(re.findall(r"step(\d+)-state", state.name)[0])

    # one process goes on with as many batches per step, as if there had never been two
    resumed, whole = tmp_path / "resumed", tmp_path / "whole"
    alone = {**flags, "max_train_epochs": None, "max_train_steps": step + 2, "gradient_accumulation_steps": 2}
    assert run(world.arguments(resumed, **alone, resume=state), capsys, train_network.RECIPE).code == 0
    assert run(world.arguments(whole, **alone), capsys, train_network.RECIPE).code == 0
    one, two = load_file(resumed / "dog.safetensors"), load_file(whole / "dog.safetensors")
    for name, tensor in two.items():
        assert (one[name] - tensor).norm() <= 1e-3 * tensor.norm() + 1e-6, name

    # another number of batches is refused, with the way out
    fewer = {**alone, "gradient_accumulation_steps": 1}
    refused = run(world.arguments(resumed, **fewer, resume=state), capsys, train_network.RECIPE)
    assert refused.code == 2 and "use --gradient_accumulation_steps 2" in refused.err
