"""The adapters that images are drawn with: --network_weights, and tags in prompts. No torch at module level.

They are merged into the weights, so that an image is that of the merged model; a prompt with other adapters first gets
the weights back.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.files import read_header
from library.checkpoints.header import CheckpointError
from library.families.family import Family, Model
from library.families.registry import whole_model
from library.messages import counted, listed
from library.options.mistakes import Mistake, Mistakes, UserError
from library.sampling.lora_tags import AdapterUse, LoraTag, split_tags
from library.sampling.options import DrawingOptions
from library.sampling.prompts import ImageRequest
from networks.adapter import AdapterError
from networks.formats.layer_names import split
from networks.planned import ModuleShapes, kind_of, why_not_for
from networks.registry import find_kind

if TYPE_CHECKING:
    from torch import Tensor, nn

ENDINGS = (".safetensors", ".pt", ".ckpt")


def with_adapters(
    options: DrawingOptions,
    family: Family | None,
    model: ModuleShapes | None,
    prompts: Sequence[ImageRequest],
    mistakes: Mistakes,
) -> list[ImageRequest]:
    """The prompts without tags, each with the adapters that it is drawn with. Adds mistakes: files that are missing,
    cannot be read or do not fit the model, of which `model` has the shapes; tags that name no file."""
    always = _given(options, mistakes)
    folder = _in_folder(options.network_dir, mistakes)
    found = [_with_tags(prompt, always, folder, mistakes) for prompt in prompts]
    for use in dict.fromkeys(replace(use, multiplier=1, text_multiplier=1) for one in found for use in one.adapters):
        _check_file(use, family, model, mistakes)
    return found


def _given(options: DrawingOptions, mistakes: Mistakes) -> tuple[AdapterUse, ...]:
    """The adapters of --network_weights. Modules and multipliers go by place, as in sd-scripts' gen_img.py."""
    count = len(options.network_weights)
    for flag, values in (("network_module", options.network_module), ("network_mul", options.network_mul)):
        if len(values) > count:
            what = f"--{flag} has {counted(len(values), 'value')}, but --network_weights {counted(count, 'file')}"
            mistakes.add(what, f"give one file for each value of --{flag}, or remove the values that have none")
    rows = zip_longest(options.network_weights, options.network_mul[:count], options.network_module[:count])
    return tuple(
        AdapterUse(path, factor, factor, module)
        for path, factor, module in ((path, 1.0 if mul is None else mul, module) for path, mul, module in rows)
    )


def _in_folder(folder: Path | None, mistakes: Mistakes) -> dict[str, list[Path]] | None:
    """The adapter files of --network_dir and its folders by name, with and without folder and extension."""
    if folder is None:
        return None
    if not folder.is_dir():
        mistakes.add(f"--network_dir {folder} is not a folder", "check the path")
    names: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in ENDINGS:
            inner = path.relative_to(folder)
            for name in {path.stem, path.name, inner.as_posix(), inner.with_suffix("").as_posix()}:
                names.setdefault(name, []).append(path)
    return names


def _with_tags(
    prompt: ImageRequest, always: tuple[AdapterUse, ...], folder: Mapping[str, list[Path]] | None, mistakes: Mistakes
) -> ImageRequest:
    try:
        text, tags = split_tags(prompt.prompt)
        negative, unused = split_tags(prompt.negative_prompt)
    except ValueError as error:
        mistakes.add(f"a prompt has {error}", "write <lora:name:0.8>, or <lora:name:te=0.5:unet=0.8>")
        return prompt
    notes = [f"{tag.text} in a negative prompt is ignored: write it in the prompt" for tag in unused]
    found = (_find(tag, folder, mistakes) for tag in tags)
    uses = tuple(AdapterUse(path, tag.multiplier, tag.text_multiplier)
                 for tag, path in zip(tags, found, strict=True) if path is not None)  # fmt: skip
    return replace(
        prompt, prompt=text, negative_prompt=negative, adapters=(*always, *uses), notes=(*prompt.notes, *notes)
    )


def _find(tag: LoraTag, folder: Mapping[str, list[Path]] | None, mistakes: Mistakes) -> Path | None:
    """The file that a tag names."""
    if folder is None:
        mistakes.add(f"a prompt has {tag.text}, but there is no --network_dir", "add it: the folder of your adapters")
        return None
    paths = folder.get(tag.name, [])
    if not paths:
        near = difflib.get_close_matches(tag.name, folder, n=1)
        remedy = f"did you mean {near[0]}?" if near else "write a file's name without its extension"
        mistakes.add(f"a prompt has {tag.text}, but --network_dir has no file of this name", remedy)
    elif len(paths) > 1:
        what = f"a prompt has {tag.text}, but --network_dir has several: {listed(paths)}"
        mistakes.add(what, "write the folder too: <lora:folder/name:0.8>")
    return paths[0] if len(paths) == 1 else None


def _check_file(use: AdapterUse, family: Family | None, model: ModuleShapes | None, mistakes: Mistakes) -> None:
    """Check, by its header, that the file is an adapter of the module that was given, and for the model."""
    if use.path.is_dir():
        mistakes.add(f"{use.path} is a folder, not an adapter file", "give the .safetensors file in it")
        return
    try:
        header = read_header(use.path)
    except CheckpointError as error:
        mistakes.add(str(error))
        return
    kind = None if use.module is None else find_kind(use.module)
    if use.module is not None and kind is None:
        return  # a third-party module knows its files itself
    tensors, fault = {name: info.shape for name, info in header.tensors.items()}, None
    if family is not None and model is not None:
        fault = why_not_for(tensors, family.adapters, model, family.title)
    found = kind_of({split(name)[1] for name in tensors})  # None: several kinds, and each layer is read as what it is
    if fault is not None and (whole := whole_model(header)) is not None:
        mistakes.add(f"{use.path} is a whole model ({whole.title}), not an adapter", "to draw with it, use --ckpt")
    elif fault is not None:
        mistakes.add(f"{use.path} {fault}", "give an adapter that was trained on this kind of model")
    elif kind is not None and found is not None and found.name != (kind.file_kind or kind.name):
        mistakes.add(f"--network_module {use.module}: {use.path} is {found.title}", "remove --network_module")


def import_modules(prompts: Sequence[ImageRequest]) -> None:
    """Import the third-party network modules, before the model is loaded. Raises UserError."""
    from networks.third_party.modules import import_network_module

    names = dict.fromkeys(use.module for prompt in prompts for use in prompt.adapters if use.module)
    try:
        for name in names:
            if find_kind(name) is None:
                import_network_module(name)
    except AdapterError as error:
        raise UserError([Mistake(str(error), error.remedy)]) from error


class AdapterMerger:
    """Merges adapters into the weights of a model. `restores`: other ones can follow; it then keeps copies of the
    weights that it changes, on the CPU. `say` prints what was assumed of a file of another program."""

    def __init__(self, model: Model, say: Callable[[str], None], *, restores: bool) -> None:
        self._modules: dict[str, nn.Module] = {part.module: model.modules()[part.module] for part in
                                               model.family.adapters}  # fmt: skip
        self._model, self._say, self._restores = model, say, restores
        self._current: tuple[AdapterUse, ...] = ()
        self._kept: dict[nn.Parameter, Tensor] = {}
        self._told: set[Path] = set()

    def use(self, adapters: tuple[AdapterUse, ...]) -> None:
        """Merge these adapters in place of those before. Raises UserError for a file that does not fit."""
        if adapters == self._current:
            return
        for parameter, value in self._kept.items():
            parameter.data.copy_(value)
        for use in adapters:
            try:
                self._merge(use)
            except AdapterError as error:
                raise UserError([Mistake(f"{use.path}: {error}", error.remedy)]) from error
            except CheckpointError as error:
                raise UserError([Mistake(str(error))]) from error
        self._current = adapters

    def _merge(self, use: AdapterUse) -> None:
        from networks import network
        from networks.formats.read_write import read_adapter
        from networks.loading import is_read_here
        from networks.third_party.create import merge_third_party

        parts, backbone = self._model.family.adapters, self._model.family.backbone
        file = read_adapter(use.path, parts)
        if use.module is not None and not is_read_here(use.module, file.tensors):
            self._keep([parameter for module in self._modules.values() for parameter in module.parameters()])
            if use.multiplier:
                merge_third_party(use.module, use.path, self._modules, parts, ratio=use.multiplier)
            return
        if use.path not in self._told:
            self._told.add(use.path)
            for note in file.notes:
                self._say(f"{use.path}: {note}")
        adapter = network.from_tensors(self._modules, parts, file.tensors)
        self._keep([parameter for layer in adapter.layers for parameter in layer.module.parameters()])
        adapter.to(self._model.backbone.device)
        adapter.merge(use.text_multiplier, {backbone: use.multiplier})

    def _keep(self, parameters: Sequence[Any]) -> None:
        for parameter in parameters if self._restores else ():
            if parameter not in self._kept:
                self._kept[parameter] = parameter.detach().to("cpu", copy=True)
