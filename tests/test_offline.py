"""Nothing reaches for the network unless a flag asks for it, and no output has a secret: the programs run in a process
that reports every attempt, with secrets in their flags.

The environment has none of the variables that tell Hugging Face's libraries to stay offline, which the other tests set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.running import make_world

SECRET = "QkZ7pW3xT9vL2sRn"
ROOT = Path(__file__).resolve().parent.parent
GUARD = """
import ipaddress, socket, sys

TRIED = []

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        address = (arguments[0],)
    else:
        return
    if not isinstance(address, tuple) or address[0] in (None, "", "localhost", "127.0.0.1", "::1"):
        return
    TRIED.append(f"{event} {address}")
    raise OSError(f"there is no network: {address}")

sys.addaudithook(watch)
try:
    socket.create_connection(("huggingface.co", 443), timeout=1)
except OSError:
    pass
assert TRIED, "the guard sees nothing"
TRIED.clear()

from importlib import import_module

def call(name, *words):
    program = import_module(name)
    try:
        if hasattr(program, "RECIPE"):
            from library.training.command import run_recipe
            code = run_recipe(program.RECIPE, list(words))
        else:
            code = program.main(list(words))
    except SystemExit as end:  # --help
        code = end.code
    print(f"{name}: {code}", flush=True)
    if code or TRIED:
        sys.exit(f"{name} {words[:1]} returned {code} and tried {TRIED}")
"""


@pytest.mark.slow
def test_the_programs_run_without_a_network(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    model, out = str(world.model), tmp_path / "out"
    (tmp_path / "prompts.txt").write_text("a photo of sks dog --w 64 --h 64 --s 1\n", encoding="utf-8")
    words = world.arguments(out, max_train_steps=1, sample_prompts=tmp_path / "prompts.txt", sample_every_n_steps=1)
    hook = {"webhook_type": "raw", "callback_url": f"http://127.0.0.1:9/{SECRET}", "secret": SECRET}
    (tmp_path / "hooks.json").write_text(json.dumps(hook), encoding="utf-8")
    words += [
        f"--wandb_api_key={SECRET}",
        f"--huggingface_token={SECRET}",
        f"--webhook_config={tmp_path / 'hooks.json'}",
    ]
    words += ["--save_state", f"--logging_dir={tmp_path / 'log'}", "--log_config"]
    lora = [
        *words,
        "--network_module=networks.lora",
        "--network_dim=2",
        "--output_name=lora",
        "--cache_latents_to_disk",
    ]
    draw = ["--prompt", "a dog", "--steps", "1", "--W", "64", "--H", "64", "--outdir", str(tmp_path / "drawn")]
    calls = [
        ("train_db", "--help"),
        ("train_db", *words, "--dry_run"),
        ("train_db", *words, "--output_config", f"--config_file={tmp_path / 'options.toml'}"),
        ("train_db", *words),
        ("train_network", *lora),
        ("tools.show_metadata", str(out / "lora.safetensors")),
        ("tools.convert_checkpoint", model, str(tmp_path / "folder")),
        ("tools.convert_lora", str(out / "lora.safetensors"), str(tmp_path / "peft"), "--to", "peft"),
        ("gen_img", "--ckpt", str(tmp_path / "folder"), *draw),
        ("tools.check_lora_weights", str(out / "lora.safetensors")),
    ]
    program = GUARD + "".join(f"call(*{words!r})\n" for words in calls)
    offline = ("HF_", "TRANSFORMERS_OFFLINE", "WANDB", "HTTP", "http", "NO_PROXY", "no_proxy")
    told = {name: value for name, value in os.environ.items() if not name.startswith(offline)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=told, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = done.stdout + done.stderr
    assert SECRET not in told, told[max(0, told.find(SECRET) - 300) : told.find(SECRET) + 50]
    holding = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert holding == [tmp_path / "hooks.json"]  # the user's own
    assert [line for line in done.stdout.splitlines() if line.endswith(": 0")] == [f"{name}: 0" for name, *_ in calls]
