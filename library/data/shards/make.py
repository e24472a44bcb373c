"""What tools/make_shards.py does: pack folders, make tables of shards that exist, check and unpack them."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from library.data.image_files import readable_extensions
from library.data.scan.caption_files import check_encoding, normal_extensions
from library.data.scan.folders import folder_datasets, no_folder
from library.data.scan.listing import is_image
from library.data.scan.shard_images import ShardImages, open_images
from library.data.shards.check import check_members
from library.data.shards.check import unpack as unpack_members
from library.data.shards.index import Captions, index_shards
from library.data.shards.member import TABLE_NAME
from library.data.shards.options import ShardOptions
from library.data.shards.pack import Report, pack_folder
from library.data.shards.places import locate, names_shards
from library.messages import counted, readable_bytes
from library.options.convert_values import is_remote
from library.options.datasets import BucketSettings, CaptionSettings, DatasetSpec, SubsetSpec
from library.options.mistakes import Mistake, UserError

_NAMED = 10


def pack(folder: Path, options: ShardOptions) -> None:
    """Pack a folder of images, or each of the folders with repeats in it. Raises UserError."""
    if not folder.is_dir():
        raise UserError([no_folder("--input_dir", folder)])
    _check_encoding(options)
    output = options.output_dir or Path()
    if output.resolve() == folder.resolve():
        what = f"--output_dir {output} is the folder of the images, which would then be read from the shards only"
        raise UserError([Mistake(what, "give another folder")])
    subset = SubsetSpec(
        image_dir=folder,
        origin="--input_dir",
        caption_source="files" if options.in_json is None else "metadata",
        caption_extensions=normal_extensions(options.caption_extension),
        caption_encoding=options.caption_encoding,
        metadata_file=options.in_json,
        recursive=options.recursive,
        mask_dir=options.conditioning_data_dir,
        captions=CaptionSettings(separator=options.caption_separator, wildcard=True),
    )
    subsets = [(subset, output)]
    extensions = readable_extensions()
    if options.in_json is None and not any(is_image(entry.name, extensions) for entry in folder.iterdir()):
        template = DatasetSpec("--input_dir", BucketSettings((512, 512)), (subset,))
        found = folder_datasets(folder, None, template)
        inner = [each for dataset in found.datasets for each in dataset.subsets]
        for note in found.notes if inner else ():
            print(note)
        if inner:
            subsets = [(replace(each, origin="--input_dir"), output / Path(str(each.image_dir)).name) for each in inner]
    for each, place in subsets:
        name = Path(str(each.image_dir)).absolute().name.replace(" ", "_")
        report = pack_folder(
            each,
            place,
            name,
            limit=int(options.shard_size * 1_000_000),
            most_memory=options.max_image_memory,
            shares_masks=len(subsets) > 1,
        )
        _tell(report, place)


def index(text: str, options: ShardOptions) -> None:
    """Make the table of shards. Raises UserError."""
    _check_encoding(options)
    if not names_shards(text):
        text = "::".join(_shards_in(text))
    places = locate(text)
    if options.output_dir is None and is_remote(places.root):
        raise UserError([Mistake("--shards is a URL, where no table can be written", "add --output_dir FOLDER")])
    table = Path(places.table) if options.output_dir is None else options.output_dir / TABLE_NAME
    captions = Captions(options.caption_extension, options.caption_encoding, options.caption_key)
    _tell(index_shards(places, table, captions, options.max_image_memory), table)


def check(text: str, options: ShardOptions) -> None:
    """Compare all files of the shards with their table. Raises UserError."""
    print(f"{counted(check_members(_open(text, options)), 'file')} as in the table")


def unpack(text: str, options: ShardOptions) -> None:
    """Write the files of the shards into --output_dir. Raises UserError."""
    folder = options.output_dir or Path()
    count = unpack_members(_open(text, options), folder, options.conditioning_data_dir)
    print(f"written: {counted(count, 'file')} in {folder}")


def _open(text: str, options: ShardOptions) -> ShardImages:
    subset = SubsetSpec(image_dir=None, origin="the command line", shards=text, mask_dir=text)
    caches = Path(tempfile.gettempdir(), "dreamfolder")
    return open_images(subset, 0, 0, locate(text, options.shard_table), caches)


def _shards_in(folder: str) -> list[str]:
    """The shards in a local folder."""
    if is_remote(folder):
        raise UserError(
            [Mistake(f"--shards {folder} is a folder behind a URL", "name the shards: URL/train-{000..099}.tar")]
        )
    found = sorted(str(path) for path in Path(folder).glob("*.tar"))
    if not found:
        raise UserError([Mistake(f"--shards: {folder} contains no .tar file", "name the shards, or their folder")])
    return found


def _check_encoding(options: ShardOptions) -> None:
    if (mistake := check_encoding(options.caption_encoding)) is not None:
        raise UserError([mistake])


def _tell(report: Report, place: Path) -> None:
    for note in report.notes:
        print(note)
    for name, why in list(report.bad.items())[:_NAMED]:
        print(f"left out: {name} ({why})")
    if len(report.bad) > _NAMED:
        print(f"left out: {len(report.bad) - _NAMED} more")
    what = f"{counted(report.images, 'image')} in {counted(report.shards, 'shard')}, {readable_bytes(report.size)}"
    print(f"written: {place} ({what})")
