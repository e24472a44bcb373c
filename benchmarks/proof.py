"""Convert full-size Stable Diffusion XL or its refiner both ways and compare with diffusers; exit code 1 on a fault.

    python benchmarks/proof.py --model base.safetensors [--folder work] [--only text latents unet]

The file is one of benchmarks/full_size_xl.py, or any other of these two families in the original layout. In turn, each
in a process of its own:

folder   the file becomes a diffusers folder: names and shapes are those of diffusers' and transformers' modules
names    diffusers' own converter of single files gives the folder's tensors from the file, bit by bit
back     the folder becomes a file: every tensor of the original as it was, bit by bit
saved    the file is loaded in its own precision and saved as training does: again bit by bit
text     states and pooled vectors of a caption and of an empty one: the family and diffusers' pipeline, fp32
latents  the latents of a crop of an odd-sized image, and what they decode to
unet     the U-Net's output for these latents, conditioned on size and crop

About 14 GB of memory and, beside the file, twice its size of disk are needed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import full_size_xl, proof_sides  # noqa: E402
from benchmarks.machine import describe  # noqa: E402
from benchmarks.pairs import peak_memory  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

    from library.families.family import SaveAs

    Loads = dict[str, Callable[[], Tensor]]

LIMIT = 1e-5
STEPS = ("folder", "names", "back", "saved", *proof_sides.SIDES)
# Where single files have the parts, the second text encoder in the base and in the refiner.
PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.",),
    "text_encoder": ("conditioner.embedders.0.transformer.",),
    "text_encoder_2": ("conditioner.embedders.1.model.", "conditioner.embedders.0.model."),
}
# Single files hold these, and no module of diffusers or transformers takes them.
HOMELESS = re.compile(r".*\.(logit_scale|position_ids)")


# --- files: each function gives the faults that it finds --------------------------------------------------------------


def folder(model: Path, work: Path) -> Iterator[str]:
    """The diffusers folder that the file becomes, against modules of the published sizes."""
    convert(model, work / "diffusers", "diffusers_safetensors")
    modules = published(model)
    if not modules:
        print("  not of the published sizes: names and shapes are not looked at here")
    for part, module in modules.items():
        found = weights(work, part)
        shapes = {name: tuple(load().shape) for name, load in found.items()}
        print(f"  {part}: {len(found)} tensors")
        yield from unlike(part, shapes, full_size_xl.shapes(part, module))
        written = json.loads((work / "diffusers" / part / "config.json").read_text(encoding="utf-8"))
        wanted = full_size_xl.TEXTS.get(part) or dict(module.config)
        said = {key: plain(written.get(key)) for key in wanted if not key.startswith("_")}
        yield from unlike(f"{part}/config.json", said, {key: plain(wanted[key]) for key in said})


def names(model: Path, work: Path) -> Iterator[str]:
    """The folder's tensors against those that diffusers' own converter makes of the file."""
    from diffusers.loaders import single_file_utils as judge

    whole = loads(model)
    for place in sorted((work / "diffusers").glob("*/*.safetensors")):
        part = place.parent.name
        prefix = next(prefix for prefix in PREFIXES[part] if any(name.startswith(prefix) for name in whole))
        source = {name: load() for name, load in whole.items() if name.startswith(prefix)}
        config = json.loads((place.parent / "config.json").read_text(encoding="utf-8"))
        if part == "unet":
            made = judge.convert_ldm_unet_checkpoint(source, config)
        elif part == "vae":
            made = judge.convert_ldm_vae_checkpoint(source, config)
        elif part == "text_encoder":
            made = judge.convert_ldm_clip_checkpoint(source)
        else:
            made = judge.convert_open_clip_checkpoint(None, source, prefix)
        expected = {name: partial(same, made[name]) for name in made if not HOMELESS.fullmatch(name)}
        print(f"  {part}: {len(expected)} tensors")
        yield from unequal(part, weights(work, part), expected)


def back(model: Path, work: Path) -> Iterator[str]:
    """The file that the folder becomes, against the first file."""
    written = work / "back.safetensors"
    convert(work / "diffusers", written, "safetensors")
    before, after = loads(model), loads(written)
    lost = {name for name in before if HOMELESS.fullmatch(name)} - after.keys()
    print(f"  {len(after)} tensors; no place in a folder: {', '.join(sorted(lost)) or 'none'}")
    yield from unequal(written.name, after, {name: before[name] for name in before if name not in lost})
    written.unlink()


def saved(model: Path, work: Path) -> Iterator[str]:
    """The file that is saved of the loaded model, against the first file."""
    import torch

    from library.families.registry import load_model, open_model, save_model

    written = work / "saved.safetensors"
    header, _ = open_model(str(model))
    save_model(load_model(header, dtype=torch.float16), written, save_as="safetensors")
    after = loads(written)
    print(f"  {len(after)} tensors")
    yield from unequal(written.name, after, loads(model))
    written.unlink()


def convert(source: Path, path: Path, save_as: SaveAs) -> None:
    """What tools/convert_checkpoint.py does."""
    from library.convert.convert_checkpoint import Conversion
    from library.convert.convert_checkpoint import convert as write
    from library.families.registry import open_model

    write(*open_model(str(source)), path, Conversion(save_as))


def published(model: Path) -> dict[str, Any]:
    """The modules of the published model that the file is of the size of; none if it is of another size."""
    from library.families.registry import open_model

    header, family = open_model(str(model))
    width = header.tensors["model.diffusion_model.input_blocks.0.0.weight"].shape[0]
    is_full = width == full_size_xl.UNETS[family.name]["block_out_channels"][0]
    return full_size_xl.modules(family.name) if is_full else {}


def weights(work: Path, part: str) -> Loads:
    """The tensors of a part of the folder."""
    (path,) = (work / "diffusers" / part).glob("*.safetensors")
    return loads(path)


def loads(path: Path) -> Loads:
    """The tensors of a file, by the safetensors library and not by the program."""
    from safetensors import safe_open

    opened: Any = safe_open(path, "pt")
    return {name: partial(opened.get_tensor, name) for name in opened.keys()}


def same(tensor: Tensor) -> Tensor:
    """What it is given."""
    return tensor


def plain(value: Any) -> Any:
    """A value of a configuration as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def unlike(where: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    """What is missing, too much, or not equal."""
    for what, few in (("lacks", expected.keys() - found.keys()), ("has too many", found.keys() - expected.keys())):
        if few:
            yield f"{where} {what}: {len(few)}, such as {', '.join(sorted(few)[:5])}"
    for name in sorted(found.keys() & expected.keys()):
        if found[name] != expected[name]:
            yield f"{where}: {name} is {found[name]}, not {expected[name]}"


def unequal(where: str, found: Loads, expected: Loads) -> Iterator[str]:
    """Where tensors are not those expected, bit by bit."""
    import torch

    yield from unlike(where, dict.fromkeys(found), dict.fromkeys(expected))
    for name in sorted(found.keys() & expected.keys()):
        tensor, wanted = found[name](), expected[name]()
        if tensor.dtype != wanted.dtype or tensor.shape != wanted.shape:
            yield f"{where}: {name} is {tensor.dtype} {tuple(tensor.shape)}, not {wanted.dtype} {tuple(wanted.shape)}"
            continue
        one, other = (each.contiguous().reshape(-1).view(torch.uint8) for each in (tensor, wanted))
        if not torch.equal(one, other):
            yield f"{where}: {name} has other values"


FILES: dict[str, Callable[[Path, Path], Iterator[str]]] = {
    "folder": folder,
    "names": names,
    "back": back,
    "saved": saved,
}


# --- all of it -------------------------------------------------------------------------------------------------------


def work_alone(step: str, side: str, model: Path, work: Path) -> int:
    """Do a step of the proof in this process; the exit code."""
    faults = []
    if step in FILES:
        faults = list(FILES[step](model, work))
        for fault in faults[:20]:
            print(f"  FAULT {fault}")
    else:
        proof_sides.find(step, side, model, work)
    print(f"  {side}: peak {peak_memory(os.getpid()) / 2**20:.0f} MiB, pages of mapped files counted")
    return 1 if faults else 0


def in_turn(step: str, model: Path, work: Path) -> bool:
    """Do a step, each side of it in a process of its own; whether it proved what it should."""
    print(f"{step}:", flush=True)
    for side in ("files",) if step in FILES else tuple(proof_sides.SIDES[step]):
        started = time.perf_counter()
        command = [sys.executable, __file__, "--model", str(model), "--folder", str(work), "--alone", step, side]
        if subprocess.run(command, check=False).returncode:
            print(f"  FAILED ({side})")
            return False
        print(f"  {side}: {time.perf_counter() - started:.1f} s", flush=True)
    found = {} if step in FILES else proof_sides.differences(work, step)
    for name, difference in found.items():
        print(f"  {name}: greatest difference {difference:.1e}{'' if difference <= LIMIT else ' FAILED'}")
    return all(difference <= LIMIT for difference in found.values())


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="where to write, and to leave what was written; default: nowhere")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS, help="steps; the folder has what they need")
    parser.add_argument("--alone", nargs=2, metavar=("STEP", "SIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        return work_alone(*options.alone, options.model, options.folder)
    print(describe())
    with tempfile.TemporaryDirectory() as temporary:
        work = options.folder or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        proof_sides.write_image(work / "image.png")
        failed = [step for step in options.only if not in_turn(step, options.model, work)]
    print(f"FAILED: {', '.join(failed)}" if failed else "all as it should be")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
