"""Convert a LoRA between kohya's file, diffusers' file and PEFT's folders, and an adapter of any kind to kohya's names.

python tools/convert_lora.py dog.safetensors dog_diffusers
python tools/convert_lora.py dog.safetensors dog_peft --to peft
python tools/convert_lora.py dog_peft dog.safetensors
python tools/convert_lora.py dog_comfyui.safetensors dog.safetensors

Weights, alphas and DoRA magnitudes stay the same, bit for bit, in both directions. A file with layers that the target
format cannot hold is refused, and nothing is written. Besides these formats it reads files of ComfyUI, LyCORIS,
OneTrainer, SimpleTuner and earlier diffusers. Other kinds than LoRA get kohya's names; OFT is written with its
constraint applied, as WebUIs read it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script started by path sees only its own folder

from library.messages import counted
from library.options.flag import flag
from library.options.tool_command import Tool, run_tool
from tools.lora_files import explain_write_errors

if TYPE_CHECKING:
    from library.families.family import Family
    from networks.formats.convert_keys import Format, LoraLayer

FORMATS: tuple[Format, ...] = ("kohya", "diffusers", "peft")


@dataclass(frozen=True)
class ConvertLoraOptions:
    """Command-line options."""

    source: Path = flag(None, "a file of any program, or the folder of diffusers or PEFT")
    target: Path = flag(None, "the new file or folder, which must not exist")
    to: Format | None = flag(
        None, "format to write. Not set: kohya, or diffusers if the source is kohya", choices=FORMATS
    )


def work(options: ConvertLoraOptions) -> None:
    """Convert the LoRA and print a summary. Raises UserError; nothing is written then."""
    from library.families.registry import FAMILIES
    from networks.formats.read_write import read_lora, read_other_kind, write_lora, write_other_kind

    families = [family.adapters for family in FAMILIES]
    with explain_write_errors(options.source):
        other = read_other_kind(options.source, *families) if options.to in (None, "kohya") else None
        if other is not None:
            write_other_kind(options.target, other)
            layers = counted(len({key.partition(".")[0] for key in other.tensors}), "layer")
            print("\n".join([*other.notes, f"{options.source} -> {options.target} (kohya): {layers}"]))
            return
        lora, found = read_lora(options.source, *families)
        target_format: Format = options.to or ("diffusers" if found == "kohya" else "kohya")
        if target_format == "kohya":
            lora.metadata = base_model_facts(lora.layers, FAMILIES) | lora.metadata
        path = write_lora(options.target, lora, target_format)
    by_module = Counter(layer.place.part.module for layer in lora.layers)
    counts = ", ".join(f"{module} {number}" for module, number in by_module.items())
    print("\n".join([*lora.notes, f"{options.source} ({found}) -> {path} ({target_format}): layers of {counts}"]))


def base_model_facts(layers: Sequence[LoraLayer], families: Sequence[Family]) -> dict[str, str]:
    """Return what kohya's files say of the base model, as far as the layers show it: A1111 takes an SDXL LoRA without
    ss_base_model_version for one of SD1. What the model predicts is not known, so SD2's version is not either."""
    parts = {layer.place.part for layer in layers}
    known = [family for family in families if parts <= set(family.adapters)]
    if len(known) > 1:  # SD1 and SD2 have layers of the same names
        known = [family for family in known if ("v2" in family.capabilities) == _is_of_v2(layers)]
    if len(known) != 1:
        return {}
    (family,) = known
    if "v2" in family.capabilities:
        return {"ss_v2": "True"}
    return {"ss_v2": "False", "ss_base_model_version": family.versions["epsilon"]}


def _is_of_v2(layers: Sequence[LoraLayer]) -> bool | None:
    """Whether a LoRA is for SD2 rather than SD1: by the width of the text, or the projections of the U-Net, which are
    Linear there and convolutions in SD1. None: its layers do not show it."""
    for layer in layers:
        if layer.place.bare.endswith(("attn2.to_k", "attn2.to_v", ".q_proj")) and layer.down.shape[1] in (768, 1024):
            return bool(layer.down.shape[1] == 1024)
        if layer.place.bare.endswith((".proj_in", ".proj_out")):
            return layer.down.dim() == 2
    return None


TOOL = Tool(
    "Convert a LoRA between kohya's, diffusers' and PEFT's formats, or an adapter of any kind to kohya's names.",
    "python tools/convert_lora.py SOURCE TARGET [--to FORMAT]",
    ConvertLoraOptions,
    work,
    required={
        "source": "give the LoRA to convert: convert_lora.py dog.safetensors dog_diffusers",
        "target": "give the new file or folder after the source",
    },
    positional=("source", "target"),
)


def main(words: Sequence[str] | None = None) -> int:
    """Convert one LoRA. Returns the exit code: 0 done, 2 user error, 130 interrupted."""
    return run_tool(TOOL, words)


if __name__ == "__main__":
    raise SystemExit(main())
