"""Read kohya's --dataset_config (general, datasets, subsets) into the records of options/datasets.py.

A value is taken from the subset, else its dataset, else general, else the command line. All mistakes of the file are
reported at once, each with its line. Unlike sd-scripts, integers are accepted for numbers, and masks may be set for
some subsets only and together with metadata, class_tokens or is_reg.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from library.options.dataset_config.keys import DREAMBOOTH, FINE_TUNING, KEYS, Kind, Level, folder, same_place
from library.options.dataset_config.locate import Address
from library.options.dataset_config.sizes import BucketLimits, resolutions_and_batches
from library.options.dataset_config.source import ConfigFile, read_source
from library.options.dataset_config.tables import Layer, describe_key, nearest, read_table
from library.options.datasets import BucketSettings, DatasetSpec, ParsedDatasets, SubsetSpec
from library.options.mistakes import Mistake, Mistakes
from library.options.text_files import DATASETS

FLAG = "dataset_config"

Table = Mapping[str, object]
Fields = Mapping[str, dict[str, Any]]  # record -> fields set by the file


def read_kohya(path: Path, defaults: DatasetSpec, *, masked_loss: bool = False) -> ParsedDatasets:
    """Read the datasets of a TOML or JSON file; its relative paths start at the working directory, as in sd-scripts.

    `defaults` holds the values of the command line: those of a dataset and, in its one subset, those of every subset.
    Its resolution is sizes.NOT_GIVEN if not set; messages show its origin. A faulty value is replaced by the default,
    so that the images can be checked before all mistakes are reported.
    """
    source = read_source(path, FLAG, DATASETS)
    if isinstance(source, Mistake):
        return ParsedDatasets(mistakes=(source,))
    reading = _Reading(source, defaults, masked_loss)
    datasets = reading.file()
    return ParsedDatasets(tuple(datasets), tuple(dict.fromkeys(reading.notes)), tuple(reading.mistakes))


@dataclass
class _Reading:
    """Reads one file into records, collecting mistakes and notes."""

    source: ConfigFile
    defaults: DatasetSpec
    masked_loss: bool
    mistakes: Mistakes = field(default_factory=Mistakes)
    notes: list[str] = field(default_factory=list)

    def file(self) -> list[DatasetSpec]:
        """Read all datasets; mistakes are added to `mistakes`."""
        for address, line in self.source.places.duplicates:
            self.mistakes.add(f"{address[-1]} is set twice in one table ({self.source.name}, line {line})", "keep one")
        tree = self.source.tree
        if not isinstance(tree, dict):
            self.mistakes.add(f"{self.source.name} contains no table", "write an object with general and datasets")
            return []
        for name, raw in tree.items():
            if name not in ("general", "datasets"):
                what = describe_key(self.source, (name,), raw)
                self.mistakes.add(f"{what} is not a top-level key", _top_level_remedy(name))
        general = self._general(tree.get("general"))
        tables = self._list(tree.get("datasets"), "datasets", ("datasets",), "the file describes no dataset")
        found: list[DatasetSpec] = []
        kinds: set[Kind] = set()
        for at, table in tables:
            found += self._dataset(table, at, general, kinds)
        self._note_unused(general, kinds)
        if tables and not found and not self.mistakes:
            self.mistakes.add(f"{self.source.name} leaves nothing to train on", "set num_repeats to 1 or more")
        return found

    def _general(self, raw: object) -> Layer:
        if raw is None:
            return Layer(("general",), {})
        if not isinstance(raw, dict):
            remedy = "write [general] once, in single brackets" if isinstance(raw, list) else "write a table"
            self.mistakes.add(f"general ({self.source.origin(('general',))}) is not a table", remedy)
            return Layer(("general",), {})
        return self._layer(raw, ("general",), "general", None)

    def _layer(self, table: Table, at: Address, level: Level, kind: Kind | None) -> Layer:
        layer = read_table(table, at, level, kind, self.source, self.mistakes)
        self._check_without_effect(layer)
        return layer

    def _list(self, raw: object, name: str, at: Address, missing: str) -> list[tuple[Address, Table]]:
        """The members of a list of tables, each with its address."""
        header = "[[datasets]]" if name == "datasets" else "[[datasets.subsets]]"
        if raw is None or raw == []:
            self.mistakes.add(f"{missing} ({self.source.origin(at)})", f"add {header} (in JSON a list named {name})")
            return []
        if not isinstance(raw, list):
            what = f"{name} ({self.source.origin(at)}) is not a list of tables"
            self.mistakes.add(what, f"write {header} in double brackets (in JSON a list)")
            return []
        found: list[tuple[Address, Table]] = []
        for place, member in enumerate(raw):
            if isinstance(member, dict):
                found.append(((*at, place), member))
            else:
                self.mistakes.add(
                    f"a member of {name} ({self.source.origin((*at, place))}) is not a table", f"write {header}"
                )
        return found

    def _dataset(self, table: Table, at: Address, general: Layer, kinds: set[Kind]) -> list[DatasetSpec]:
        origin = self.source.origin(at)
        subsets = self._list(table.get("subsets"), "subsets", (*at, "subsets"), "the dataset has no subsets")
        kind = self._kind(origin, subsets)
        kinds |= {kind} if kind else {DREAMBOOTH, FINE_TUNING}
        layers = (self._layer(table, at, "dataset", kind), general)
        specs: list[tuple[Address, SubsetSpec]] = []
        mistakes_before = len(self.mistakes)
        for subset_at, subset in subsets:
            own = kind or (FINE_TUNING if subset.get("metadata_file") is not None else DREAMBOOTH)
            spec = self._subset(subset, subset_at, own, layers)
            specs += [(subset_at, spec)] if spec else []
        kept = self._without_repeated(specs)
        without_mistakes = len(self.mistakes) == mistakes_before  # else a faulty subset may have the training images
        trained = [subset for subset in kept if not subset.validation]
        if without_mistakes and trained and all(subset.is_reg for subset in trained):
            self.mistakes.add(
                f"the dataset ({origin}) has only subsets with is_reg = true: regularisation images need "
                "training images in the same dataset",
                "move the subset into the dataset of the training images",
            )
        return self._at_each_resolution(origin, layers, kind or DREAMBOOTH, kept)

    def _kind(self, origin: str, subsets: Sequence[tuple[Address, Table]]) -> Kind | None:
        """The kind of a dataset by kohya's rule; None and a mistake if its subsets disagree."""
        with_metadata = [at for at, subset in subsets if subset.get("metadata_file") is not None]
        if with_metadata and len(with_metadata) < len(subsets):
            lines = ", ".join(str(self.source.places.line((*at, "metadata_file"))) for at in with_metadata)
            self.mistakes.add(
                f"the dataset ({origin}) has subsets with a metadata_file (line {lines}) and subsets without",
                "put them in two datasets",
            )
            return None
        return FINE_TUNING if with_metadata else DREAMBOOTH

    def _at_each_resolution(
        self, origin: str, layers: Sequence[Layer], kind: Kind, subsets: tuple[SubsetSpec, ...]
    ) -> list[DatasetSpec]:
        fields = _fields(layers, kind)
        sizes = resolutions_and_batches(layers, self.defaults, self.source, self.mistakes, self.notes)
        limits = BucketLimits(layers, self.defaults.origin, self.source)
        found: list[DatasetSpec] = []
        for resolution, batch_size in sizes:
            buckets: BucketSettings = replace(self.defaults.buckets, **fields["buckets"], resolution=resolution)
            buckets = limits.check(buckets, self.mistakes, self.notes)
            spec = replace(self.defaults, origin=origin, buckets=buckets, subsets=subsets, batch_size=batch_size)
            found += [replace(spec, **fields["dataset"])] if subsets else []
        return found

    def _subset(self, table: Table, at: Address, kind: Kind, outer: Sequence[Layer]) -> SubsetSpec | None:
        """The record of a subset; None if it is skipped or lacks its path."""
        own = self._layer(table, at, "subset", kind)
        layers = (own, *outer)
        self._check_masks(own)
        repeats = nearest("num_repeats", layers)
        if repeats is not None and repeats.value == 0:
            what = describe_key(self.source, repeats.at, 0)
            self.notes.append(f"{what}: the subset on line {self.source.places.line(at)} is skipped")
            return None
        needed = "metadata_file" if kind == FINE_TUNING else "image_dir"
        if needed not in own.values and "shards" not in own.values:
            if table.get(needed) is None:
                self.mistakes.add(f"the subset ({self.source.origin(at)}) has no {needed}", "write its path")
            return None
        if "image_dir" in own.values and "shards" in own.values:
            what = f"image_dir and shards are both set in the subset ({self.source.origin(at)})"
            self.mistakes.add(what, "keep one of the two")
        if "shard_table" in own.values and "shards" not in own.values:
            what = f"shard_table is set without shards in the subset ({self.source.origin(at)})"
            self.mistakes.add(what, "set shards to the names of the shards or to their folder")
        fields = _fields(layers, kind)
        template = _without_places(self.defaults.subsets[0], kind)
        if fields["subset"].get("mask_dir") is not None and template.alpha_mask:
            if "alpha_mask" not in fields["subset"]:
                place = self.source.origin((*at, "conditioning_data_dir"))
                self.notes.append(
                    f"alpha_mask ({self.defaults.origin}) has no effect: conditioning_data_dir ({place}) sets the masks"
                )
            template = replace(template, alpha_mask=False)
        return replace(
            template,
            origin=self.source.origin(at),
            captions=replace(template.captions, **fields["captions"]),
            images=replace(template.images, **fields["images"]),
            **fields["subset"],
        )

    def _check_masks(self, subset: Layer) -> None:
        masks = nearest("conditioning_data_dir", [subset])
        if masks is None:
            return
        if not self.masked_loss:
            what = f"{describe_key(self.source, masks.at, str(masks.value))} requires --masked_loss"
            self.mistakes.add(what, "add --masked_loss, or remove the key")
        if subset.values.get("alpha_mask"):
            what = f"alpha_mask ({self.source.origin((*subset.at, 'alpha_mask'))}) and conditioning_data_dir "
            what += f"({self.source.origin(masks.at)}) are both set: a subset has one source of masks"
            self.mistakes.add(what, "keep one of the two")

    def _check_without_effect(self, layer: Layer) -> None:
        """Note keys of kohya's files that have no effect here."""
        for name, value in layer.values.items():
            what = describe_key(self.source, (*layer.at, name), value)
            if name == "network_multiplier" and value != 1:
                self.notes.append(f"{what} has no effect, as in kohya's trainer")
            elif name == "cache_info" and value:
                self.notes.append(f"{what} has no effect: metadata_cache.json is neither read nor written")
            elif name == "custom_attributes":
                self._check_attributes(value, (*layer.at, name))

    def _check_attributes(self, attributes: Table, at: Address) -> None:
        for name, raw in attributes.items():
            what = describe_key(self.source, (*at, name), raw)
            if name != "diff_output_preservation":
                self.mistakes.add(
                    f"{what} is not a key of custom_attributes", "its only key is diff_output_preservation"
                )
            elif raw is True:
                self.mistakes.add(
                    f"{what}: a single subset cannot be compared with the base model",
                    "remove it; --preservation base_prediction compares regularisation images (is_reg = true)",
                )
            elif raw is not False and raw is not None:
                self.mistakes.add(f"{what} is neither true nor false", "write false, or remove it")

    def _without_repeated(self, specs: Sequence[tuple[Address, SubsetSpec]]) -> tuple[SubsetSpec, ...]:
        """The subsets without those that repeat an earlier one's path (kohya's rule), with a note for each."""
        first: dict[str, tuple[Address, SubsetSpec]] = {}
        for at, spec in specs:
            name = "metadata_file" if spec.metadata_file is not None else "shards" if spec.shards else "image_dir"
            place = spec.metadata_file or (folder(spec.source) if spec.shards else spec.image_dir)
            before_at, before = first.setdefault(same_place(place), (at, spec))
            if before is spec:
                continue
            what = f"{describe_key(self.source, (*at, name), str(place))} is already a subset of this dataset "
            what += f"({self.source.origin((*before_at, name))})"
            differing = [key for key in ("is_reg", "validation") if getattr(before, key) != getattr(spec, key)]
            if differing:
                self.mistakes.add(f"{what}, once with {differing[0]} = true and once without", "keep one of the two")
            else:
                self.notes.append(f"{what}: the later one is skipped; use num_repeats to repeat images")
        return tuple(spec for _, spec in first.values())

    def _note_unused(self, general: Layer, kinds: set[Kind]) -> None:
        """Note values of general that apply to no dataset of the file."""
        for name, value in general.values.items():
            if kinds and kinds.isdisjoint(KEYS[name].kinds):
                what = describe_key(self.source, ("general", name), list(value) if isinstance(value, tuple) else value)
                self.notes.append(f"{what} has no effect: all datasets of the file take their captions from metadata")


def _top_level_remedy(name: str) -> str:
    if name == "subsets":
        return "write [[datasets.subsets]] below [[datasets]]"
    if name in KEYS:
        return "move it below [general]" if "general" in KEYS[name].levels else "move it into a subset"
    return "the top-level keys are general and datasets"


def _fields(layers: Sequence[Layer], kind: Kind) -> Fields:
    """Values set by the layers, by record and field, without keys that have no meaning for the kind."""
    fields: dict[str, dict[str, Any]] = {name: {} for name in ("dataset", "buckets", "subset", "captions", "images")}
    for key in KEYS.values():
        found = nearest(key.name, layers) if key.target and kind in key.kinds else None
        if key.target and found is not None:
            record, name = key.target.split(".")
            fields[record][name] = found.value
    return fields


def _without_places(template: SubsetSpec, kind: Kind) -> SubsetSpec:
    """The command line's values for a subset, without those that only a subset itself can set."""
    return replace(
        template,
        image_dir=None,
        metadata_file=None,
        shards=None,
        shard_table=None,
        mask_dir=None,
        is_reg=False,
        validation=False,
        class_tokens=template.class_tokens if kind == DREAMBOOTH else None,
        caption_source="metadata" if kind == FINE_TUNING else "files",
    )
