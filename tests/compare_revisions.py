"""Proof that a change leaves every number as it was: the same small trainings in two trees, compared bit for bit.

    python -m tests.compare_revisions --record before.json              # this tree, before the change
    python -m tests.compare_revisions --against before.json             # this tree, after it; --tree DIR: another one
    python -m tests.compare_revisions --base HEAD~3                     # both at once, with a worktree of that commit

Compared are every logged value of every step, and all that a run writes: tensors, metadata, training states, caches and
drawn images. States that the other tree saved are resumed too. The programs are driven by their command lines alone,
so that whatever is inside may change its name. A record holds for the machine and the packages that it was made with.
Exit code 0: all equal, 1: something differs, 2: there is nothing to compare with.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
WORK = (
    Path(tempfile.gettempdir()).resolve() / "compare revisions"
)  # paths are in what is written, so both trees get the same
RESUMED, FOREIGN = ", resumed", ", resumed from the other's state"
# Other ones in every run, or of another commit.
VOLATILE = {"ss_session_id", "ss_training_started_at", "ss_training_finished_at", "modelspec.implementation_version"}

Values = dict[str, str]  # what a run gave: exit code, logged values, content of files, by where it stands


@dataclass(frozen=True)
class Case:
    """A training. "@" in a flag's value: the folder of the data. `resume_at`: a second training goes on from the state
    that was saved after this step."""

    script: str
    model: str
    flags: Mapping[str, object]
    resume_at: int | None = None


COMMON: Mapping[str, object] = {
    "train_data_dir": "@/train", "resolution": 64, "output_name": "dog", "caption_extension": ".txt",
    "use_safetensors": True, "max_data_loader_n_workers": 0, "learning_rate": 1e-3, "seed": 1, "train_batch_size": 2,
    "max_train_steps": 3, "log_with": "tensorboard",
}  # fmt: skip
BUCKETS: Mapping[str, object] = {"enable_bucket": True, "min_bucket_reso": 64, "bucket_reso_steps": 8}
LORA: Mapping[str, object] = {"network_module": "networks.lora", "network_dim": 2}
CASES: Mapping[str, Case] = {
    "sd1 whole, augmented, regularised": Case("train_db.py", "sd1.safetensors", {
        "flip_aug": True, "random_crop": True, "color_aug": True, "shuffle_caption": True, "keep_tokens": 1,
        "caption_dropout_rate": 0.3, "caption_tag_dropout_rate": 0.2, "reg_data_dir": "@/reg",
        "prior_loss_weight": 0.5, "gradient_accumulation_steps": 2, "max_train_steps": 4, "save_every_n_steps": 2,
        "save_state": True, "lr_scheduler": "cosine", "lr_warmup_steps": 2, "stop_text_encoder_training": 3,
        "learning_rate_te": 1e-4, **BUCKETS}, resume_at=2),
    "sd1 whole, masks, min-SNR": Case("train_db.py", "sd1.safetensors", {
        "train_data_dir": "@/masked", "masked_loss": True, "conditioning_data_dir": "@/masks", "mask_floor": 0.1,
        "mask_normalise": "sample", "min_snr_gamma": 5, "cache_latents": True, "vae_batch_size": 2, "flip_aug": True,
        "use_safetensors": False, "save_model_as": "ckpt", "clip_skip": 2}),
    "sd2 whole, v, zero terminal SNR": Case("train_db.py", "sd2", {
        "v2": True, "v_parameterization": True, "zero_terminal_snr": True, "scale_v_pred_loss_like_noise_pred": True,
        "cache_latents_to_disk": True, "flip_aug": True, "save_every_n_epochs": 1, "max_train_steps": 6, **BUCKETS}),
    "sdxl whole, all on disk": Case("train_db.py", "sdxl.safetensors", {
        "cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True, "learning_rate_te": 0,
        "cache_format": "npz", "block_lr": ",".join(["1e-3", "0", *["5e-4"] * 21]), "min_snr_gamma": 5,
        "save_precision": "fp16", **BUCKETS}),
    "refiner, DoRA": Case("train_network.py", "refiner.safetensors", {
        **LORA, "network_args": ["use_dora=True"], "random_crop": True, "data_aesthetic_score": 6.5,
        "save_state_on_train_end": True}),
    "sd1 LoRA, dropouts, Prodigy": Case("train_network.py", "sd1.safetensors", {
        **LORA, "network_alpha": 3, "network_dropout": 0.3, "save_state": True, "reg_data_dir": "@/reg",
        "network_args": ["conv_dim=2", "conv_alpha=1", "rank_dropout=0.2", "module_dropout=0.1"],
        "optimizer_type": "Prodigy", "learning_rate": 1, "shuffle_caption": True, "caption_dropout_rate": 0.3,
        "flip_aug": True, "max_train_steps": 5, "save_every_n_steps": 3}, resume_at=3),
    "sdxl LoKr, captions on disk": Case("train_network.py", "sdxl.safetensors", {
        "network_module": "networks.lokr", "network_dim": 2, "network_args": ["factor=4", "conv_dim=2"],
        "network_train_unet_only": True, "cache_latents": True, "cache_text_encoder_outputs_to_disk": True,
        "caption_dropout_rate": 0.3, "empty_caption": "zeros", "min_snr_gamma": 5}),
    "sd2 LoRA, v, zero terminal SNR": Case("train_network.py", "sd2.safetensors", {
        "v2": True, "v_parameterization": True, "zero_terminal_snr": True, "snr_floor": 0.01, "min_snr_gamma": 5,
        **LORA, "unet_lr": 1e-3, "text_encoder_lr": 5e-4, "max_token_length": 150, "scale_weight_norms": 0.5}),
    "sd1 LoRA, schedule-free": Case("train_network.py", "sd1.safetensors", {
        **LORA, "optimizer_type": "AdamWScheduleFree", "save_state": True,
        "cache_latents_to_disk": True, "save_every_n_steps": 2, "max_train_steps": 4}, resume_at=2),
    "sd1 LoRA, validation, samples": Case("train_network.py", "sd1.safetensors", {
        **LORA, "validation_split": 0.34, "validate_every_n_steps": 2, "sample_prompts": "@/prompts.txt",
        "sample_every_n_steps": 2, "sample_at_first": True, "sample_sampler": "euler_a"}),
    "sd1 LoHa, bf16": Case("train_network.py", "sd1.safetensors", {
        "network_module": "networks.loha", "network_dim": 2, "mixed_precision": "bf16", "save_precision": "bf16",
        "gradient_checkpointing": True, "weighted_captions": True}),
    "sd1 LoRA, noise, huber": Case("train_network.py", "sd1.safetensors", {
        **LORA, "network_train_unet_only": True, "noise_offset": 0.1,
        "noise_offset_random_strength": True, "multires_noise_iterations": 3, "ip_noise_gamma": 0.1,
        "loss_type": "huber", "timestep_bias_strategy": "later", "timestep_bias_multiplier": 2.0,
        "debiased_estimation_loss": True, "max_data_loader_n_workers": 1}),
}  # fmt: skip


def make_images(folder: Path, n: int, size: tuple[int, int], shade: int, captions: Sequence[str] = ()) -> None:
    """Write `n` small images, different from each other, and the captions that there are."""
    folder.mkdir(parents=True)
    for number in range(n):
        image = Image.linear_gradient("L").resize(size).convert("RGB")
        image.paste((shade, 80 * number, 200), (10 * number, 5, 30 + 10 * number, 40))
        image.save(folder / f"image_{number:02d}.png")
        if number < len(captions):
            (folder / f"image_{number:02d}.txt").write_text(captions[number], encoding="utf-8")


def make_inputs(folder: Path) -> None:
    """Write the miniatures, with this tree's tests/tiny.py, and the data."""
    from tests import tiny

    shutil.rmtree(folder, ignore_errors=True)
    for family in ("sd1", "sd2", "sdxl", "refiner"):
        tiny.write_single_file(folder / "models" / f"{family}.safetensors", family)
    tiny.write_diffusers(folder / "models" / "sd2", "sd2", prediction="v_prediction", zero_terminal_snr=True)
    data = folder / "data"
    for room in ("train", "masked"):
        captions = ["a photo of sks dog, (grass:1.2), sky, sun", "sks dog, sea, boat"]
        make_images(data / room / "2_sks dog", 3, (80, 64), 250, captions)
    make_images(data / "train" / "1_zwx cat", 3, (64, 96), 120, ["zwx cat, roof, moon"] * 3)
    make_images(data / "reg" / "1_dog", 3, (96, 72), 40)
    make_images(data / "masks", 2, (80, 64), 100)
    prompts = "sks dog --n bad --w 64 --h 64 --s 2 --l 4 --d 5\nzwx cat, moon --w 64 --h 96 --s 3 --d 6\n"
    (data / "prompts.txt").write_text(prompts, encoding="utf-8")
    for path in folder.rglob("*"):  # images from 2099: caches note the times of files that are not as new as that
        os.utime(path, (4_100_000_000,) * 2 if path.is_relative_to(data) else (1_700_000_000,) * 2)


def hash_of(content: bytes) -> str:
    """Short enough for thousands of them."""
    return hashlib.sha256(content).hexdigest()[:20]


def words(flags: Mapping[str, object], data: Path) -> list[str]:
    """A command line; a flag of True stands alone, one of False is left out, a list is several words."""
    found: list[str] = []
    for name, value in flags.items():
        if isinstance(value, list):
            found += [f"--{name}", *map(str, value)]
        elif value is not False:
            found.append(f"--{name}" if value is True else f"--{name}={str(value).replace('@', str(data))}")
    return found


def start(script: str, arguments: Sequence[str], log: Path) -> str:
    """Run a program as its command line would; its exit code."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    sys.argv = [script, *arguments]
    with log.open("a", encoding="utf-8") as stream, redirect_stdout(stream), redirect_stderr(stream):
        print(">", *sys.argv)
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            return str(end.code or 0)
        except Exception:  # noqa: BLE001 - a crash of the other tree is a result, too
            traceback.print_exc()
            return "crashed"
    return "0"


def train(case: Case, work: Path, done: Path, resume: Path | None = None) -> Values:
    """One training on fresh data with empty caches, and all that came of it. What it wrote is moved to `done`."""
    now, data, inputs = work / "now", work / "now" / "data", work / "inputs" / "data"
    shutil.rmtree(now, ignore_errors=True)
    shutil.copytree(inputs, data)
    flags = {"pretrained_model_name_or_path": work / "inputs" / "models" / case.model, **COMMON, **case.flags}
    if resume is not None:
        flags["resume"] = shutil.copytree(resume, now / "state")
    arguments = words({**flags, "output_dir": now / "out", "logging_dir": now / "logs"}, data)
    values = {"exit code": start(case.script, arguments, now / "log.txt"), **logged(now / "logs")}
    values |= contents(now / "out", "out") | contents(now / "cache", "cache")
    values |= contents(data, "data", {path.relative_to(inputs) for path in inputs.rglob("*")})
    shutil.rmtree(done, ignore_errors=True)
    shutil.move(now, done)
    return values


def logged(folder: Path) -> Values:
    """All scalars of TensorBoard's event files, by step."""
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    found: list[tuple[int, str, str]] = []
    for place in sorted({path.parent for path in folder.rglob("events*")}):
        events = reader.EventAccumulator(str(place), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found += [(event.step, tag, repr(event.value)) for event in events.Scalars(tag)]
    return {f"step {step}: {tag}": value for step, tag, value in sorted(found)}


def contents(folder: Path, title: str, known: Container[Path] = ()) -> Values:
    """All files in a folder but the known ones, taken apart."""
    values: Values = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        # times; drawn from logged values; times and logged values
        is_left_out = path.suffix == ".sqlite" or path.name.endswith(("-loss.png", "-run.jsonl"))
        if path.is_file() and name not in known and not is_left_out:
            label = f"{title}/{re.sub(r'20[0-9]{12}', 'TIME', name.as_posix())}"
            values[label] = "there"
            for key, value in taken_apart(path):
                values[f"{label} {key}"] = value if len(value) < 200 else f"{value[:100]}… {hash_of(value.encode())}"
    return values


def taken_apart(path: Path) -> Iterator[tuple[str, str]]:
    """(where, what) of a file's content, so that a difference has a place."""
    if path.suffix == ".safetensors":
        yield from tensors_of(path.read_bytes())
    elif path.suffix == ".json" and path.stat().st_size < 100_000:  # a vocabulary is longer
        yield from flat(json.loads(path.read_text(encoding="utf-8")))
    elif path.suffix in (".bin", ".pt", ".pkl", ".ckpt"):
        import torch

        yield from flat(torch.load(path, map_location="cpu", weights_only=True))
    elif path.suffix == ".png":
        with Image.open(path) as image:
            yield "pixels", f"{image.mode} {image.size} {hash_of(image.tobytes())}"
            yield from flat(dict(image.info), "info")
    else:
        yield "bytes", hash_of(path.read_bytes())


def tensors_of(content: bytes) -> Iterator[tuple[str, str]]:
    """Metadata and tensors of a .safetensors file."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    for key, value in sorted(header.pop("__metadata__", {}).items()):
        if key not in VOLATILE:
            yield f"metadata {key}", value
    for name, entry in sorted(header.items()):
        first, end = entry["data_offsets"]
        yield f"tensor {name}", f"{entry['dtype']} {entry['shape']} {hash_of(content[start + first : start + end])}"


def flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Containers and tensors by the path to each of their values."""
    if isinstance(value, Mapping) and value:
        for key in sorted(value, key=str):
            yield from flat(value[key], f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)) and not all(isinstance(each, (int, float)) for each in value):
        for number, each in enumerate(value):
            yield from flat(each, f"{name}[{number}]")
    elif hasattr(value, "untyped_storage"):
        import torch

        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        yield name, f"{value.dtype} {list(value.shape)} {hash_of(raw)}"
    else:
        yield name, repr(value)


def train_all(tree: Path, work: Path, names: Sequence[str], foreign: Path | None, answer: Path) -> None:
    """Every training of `names` with the programs of `tree`, and the runs that go on from states, of `foreign` too."""
    sys.path[0] = str(tree)  # in place of this file's folder
    os.chdir(tree)
    found: dict[str, Values] = {}
    for name in names:
        case, runs, kept = CASES[name], work / "runs" / name, work / "states" / name
        found[name] = train(case, work, runs / "whole")
        shutil.rmtree(kept, ignore_errors=True)
        if (state := runs / "whole" / "out" / f"dog-step{case.resume_at or 0:08d}-state").is_dir():
            shutil.copytree(state, kept)
            found[name + RESUMED] = train(case, work, runs / "resumed", kept)
        if case.resume_at and foreign is not None and (foreign / name).is_dir():
            found[name + FOREIGN] = train(case, work, runs / "resumed from the other's state", foreign / name)
    answer.write_text(json.dumps(found), encoding="utf-8")


@contextmanager
def work_folder(work: Path, expected: str | None = None) -> Iterator[str]:
    """The folder for this process alone, with the inputs in it; their hash. Made anew where they are not as expected
    (None: as in the folder)."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        inputs = work / "inputs"
        if expected is None or hash_of(repr(contents(inputs, "")).encode()) != expected:
            make_inputs(inputs)
        found = hash_of(repr(contents(inputs, "")).encode())
        if expected not in (None, found):
            print("The miniatures are not those of the record: tests/tiny.py or the packages have changed.")
            raise SystemExit(2)
        yield found


def run_tree(tree: Path, work: Path, names: Sequence[str], foreign: Path | None = None) -> dict[str, Values]:
    """All trainings in one process that imports `tree`."""
    importlib.import_module("tests.conftest")  # into os.environ: no network, no card
    answer = work / "answer.json"
    answer.unlink(missing_ok=True)
    told = {"XDG_CACHE_HOME": str(work / "now" / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **told, "SOURCE_DATE_EPOCH": "1700000000", "PYTHONHASHSEED": "0", "PYTHONPATH": ""}
    order = json.dumps([str(tree), str(work), list(names), str(foreign or ""), str(answer)])
    subprocess.run([sys.executable, __file__, "--child", order], env=environment, check=True)
    return dict(json.loads(answer.read_text(encoding="utf-8")))


def record(tree: Path, names: Sequence[str], file: Path) -> int:
    """Write what the trainings give in `tree` to `file`, and their states beside it."""
    with work_folder(WORK) as inputs:
        found = run_tree(tree, WORK, names)
        states = file.with_suffix(".states")
        shutil.rmtree(states, ignore_errors=True)
        if (WORK / "states").is_dir():
            shutil.copytree(WORK / "states", states)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"work": str(WORK), "inputs": inputs, "runs": found}, indent=0), encoding="utf-8")
    for name, values in found.items():
        print(f"{name}: {len(values)} values, exit code {values['exit code']}")
    return int(any(values["exit code"] != "0" for values in found.values()))


def difference(one: Values, other: Values) -> str:
    """Where they differ first, and how often; empty: nowhere."""
    places = [place for place in {**one, **other} if one.get(place) != other.get(place)]
    if not places:
        return ""
    before, after = one.get(places[0], "nothing"), other.get(places[0], "nothing")
    return f"{places[0]}: {before} before, {after} now; {len(places)} of {len({**one, **other})} values differ"


def compare(tree: Path, names: Sequence[str], file: Path) -> int:
    """Run the trainings in `tree` and tell where they differ from the record."""
    known = json.loads(file.read_text(encoding="utf-8"))
    names = [name for name in names if name in known["runs"]]
    states, work = file.with_suffix(".states").resolve(), Path(known["work"])
    with work_folder(work, known["inputs"]):
        found = run_tree(tree, work, names, states)
    wanted = [name + kind for name in names for kind in ("", RESUMED, FOREIGN) if not kind or CASES[name].resume_at]
    any_different = not names
    for name in wanted:
        before = known["runs"].get(name.replace(FOREIGN, RESUMED), {})
        if name.endswith(FOREIGN) and name not in found:
            print(f"{name}: skipped, as there is no {states / name.removesuffix(FOREIGN)}")
            continue
        differs = difference(before, found.get(name, {}))
        print(f"{name}: {'different: ' + differs if differs else f'equal ({len(before)} values)'}")
        any_different = any_different or bool(differs)
    if any_different:
        print(f"What the programs said and wrote: {work / 'runs'}")
    return int(any_different)


def compare_with_commit(revision: str, tree: Path, names: Sequence[str]) -> int:
    """Record a commit in a worktree that goes away again, and compare `tree` with it."""
    with tempfile.TemporaryDirectory(prefix="compare revisions ") as folder:
        base, git = Path(folder) / "base", ("git", "-C", str(ROOT), "worktree")
        subprocess.run([*git, "add", "--quiet", "--detach", str(base), revision], check=True)
        try:
            file = Path(folder) / "record.json"
            return record(base, names, file) or compare(tree, names, file)
        finally:
            subprocess.run([*git, "remove", "--force", str(base)], check=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Record or compare."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--child"]:
        tree, work, names, foreign, answer = json.loads(arguments[1])
        train_all(Path(tree), Path(work), names, Path(foreign) if foreign else None, Path(answer))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--record", type=Path, metavar="FILE", help="run the trainings and write what they give")
    what.add_argument("--against", type=Path, metavar="FILE", help="run them again and compare with a record")
    what.add_argument("--base", metavar="REVISION", help="record a commit and compare with it")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout whose programs run; not set = this one")
    parser.add_argument("--only", action="append", metavar="NAME", help="only trainings with this in their name")
    given = parser.parse_args(arguments)
    names = [name for name in CASES if not given.only or any(part in name for part in given.only)]
    tree = given.tree.resolve()
    if given.record:
        return record(tree, names, given.record)
    if given.against:
        return compare(tree, names, given.against)
    return compare_with_commit(given.base, tree, names)


if __name__ == "__main__":
    raise SystemExit(main())
