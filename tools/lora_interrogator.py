"""Show which words a LoRA affects: every token of the vocabulary is encoded with and without it.

python networks/lora_interrogator.py --sd_model sd15.safetensors --model dog.safetensors
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script started by path sees only its own folder

from library.data.batch import TextInput
from library.messages import counted
from library.options.flag import flag
from library.options.mistakes import Mistake, UserError
from library.options.tool_command import Tool, run_tool
from tools.lora_files import compute_device, explain_write_errors, read_files, together
from tools.lora_models import adapted_modules, load, open_models

if TYPE_CHECKING:
    from torch import Tensor

    from library.families.family import Family, Model, TextSettings


@dataclass(frozen=True)
class InterrogateOptions:
    """Command-line options, named as in sd-scripts."""

    sd_model: str = flag(None, "the model: a file or a diffusers folder")
    model: Path = flag(None, "the adapter file, of any kind")
    batch_size: int = flag(256, "tokens per batch", at_least=1)
    clip_skip: int | None = flag(None, "use the k-th last layer of the text encoder", at_least=1, zero_is_off=True)
    v2: bool = flag(False, "the model is Stable Diffusion 2.x; detected from the file, an error if it is not")
    count: int = flag(100, "number of words to show, most affected first", at_least=1)
    device: str | None = flag(None, "device to compute on, such as cuda. Not set: cpu")


def work(options: InterrogateOptions) -> None:
    """Encode the vocabulary with and without the LoRA and print the most affected words."""
    from library.families.family import TextSettings
    from networks.network import from_tensors

    device = compute_device(options.device)
    [opened], [file] = together(
        lambda: open_models({"sd_model": options.sd_model}, v2=options.v2), lambda: read_files([options.model])
    )
    parts = [part for part in opened.family.adapters if part.module != opened.family.backbone]
    tensors = {key: tensor for key, tensor in file.tensors.items() if "_unet_" not in key.partition(".")[0]}
    if not tensors:
        what = f"{options.model} has no text encoder layers"
        raise UserError([Mistake(what, "use a LoRA that was trained on the text encoder too")])
    check_clip_skip(options, opened.family)
    model = load(opened, only={part.module for part in parts})
    for encoder in model.text_encoders.values():
        encoder.to(device)
        layers = encoder.config.num_hidden_layers
        if options.clip_skip is not None and options.clip_skip > layers:
            raise UserError(
                [Mistake(f"--clip_skip {options.clip_skip}, but the text encoder has {counted(layers, 'layer')}")]
            )
    with explain_write_errors(options.model):
        network = from_tensors(adapted_modules(model), parts, tensors)
    ids = vocabulary(model)
    settings = TextSettings(clip_skip=options.clip_skip)
    moved = distances(model, network.to(device).eval(), sorted(ids), options.batch_size, settings)
    print(f"top {min(options.count, len(ids))} of {len(ids)}:")
    for rank, (distance, token) in enumerate(sorted(moved, key=lambda each: (-each[0], each[1]))[: options.count]):
        print(f"[{rank:3d}]: {token:5d} {ids[token]:<20s}: {distance:.5f}")


def check_clip_skip(options: InterrogateOptions, family: Family) -> None:
    """Raise UserError if --clip_skip is set for a family that always uses the same layer."""
    if options.clip_skip is not None and "clip_skip" not in family.capabilities:
        what = f"--clip_skip {options.clip_skip}, but {options.sd_model} is {family.title}"
        raise UserError([Mistake(what, "remove it: these models always use the second to last layer")])


def vocabulary(model: Model) -> dict[int, str]:
    """Return the text of every token id; a word ends with a space. All tokenizers of a model share one vocabulary."""
    from tokenizers import decoders

    reader = decoders.ByteLevel()
    first: Any = next(iter(model.tokenizer.by_encoder.values()))
    vocab: dict[str, int] = first.vocab
    texts = {}
    for text, token in vocab.items():
        ends = text.endswith("</w>")
        plain = text if text.startswith("<|") else reader.decode([text.removesuffix("</w>")])
        texts[token] = plain + " " * ends
    return texts


def distances(
    model: Model, network: Any, tokens: list[int], batch_size: int, settings: TextSettings
) -> list[tuple[float, int]]:
    """Return (mean absolute difference of the hidden states, token id) for each token, encoded as begin, token, end."""
    import torch

    found: list[tuple[float, int]] = []
    with torch.inference_mode():
        for start in range(0, len(tokens), batch_size):
            batch = tokens[start : start + batch_size]
            plain = states(model, batch, settings)
            network.attach()
            try:
                moved = (states(model, batch, settings) - plain).abs().mean((1, 2))
            finally:
                network.detach()
            found += zip(moved.tolist(), batch, strict=True)
    return found


def states(model: Model, tokens: list[int], settings: TextSettings) -> Tensor:
    """Return the hidden states of each token, (n, 3, width), as the U-Net receives them."""
    import torch

    device = next(iter(model.text_encoders.values())).device
    by_encoder: Mapping[str, Any] = model.tokenizer.by_encoder
    text_inputs = {
        name: TextInput(torch.tensor([[[one.bos_id, token, one.eos_id]] for token in tokens], device=device))
        for name, one in by_encoder.items()
    }
    return model.family.encode_text(model.text_encoders, text_inputs, settings)["states"].float()


TOOL = Tool(
    "Show which words a LoRA affects.",
    "python networks/lora_interrogator.py --sd_model MODEL --model LORA [more flags]",
    InterrogateOptions,
    work,
    required={
        "sd_model": "give the model: --sd_model sd15.safetensors",
        "model": "give the LoRA: --model dog.safetensors",
    },
)


def main(words: Sequence[str] | None = None) -> int:
    """Compare one LoRA. Returns the exit code: 0 done, 2 user error, 130 interrupted."""
    return run_tool(TOOL, words)


if __name__ == "__main__":
    raise SystemExit(main())
