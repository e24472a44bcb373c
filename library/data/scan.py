"""The folder convention `<repeats>_<identifier> <class>`: what there is to train on.

The convention is that of kohya's sd-scripts. Unlike there, folders are sorted, each skipped one is noted, endings
match in any letter case, and whatever would silently train on something else than meant (no folder, no picture,
captions under another ending, damaged pictures) is a mistake. No torch here; PIL reads headers only.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field, replace
from pathlib import Path

from library.data.caption_files import CaptionFiles, normal_extension, read_caption
from library.data.headers import OPTIONAL_EXTENSIONS, BadImage, Header, read_header, readable_extensions
from library.options.dataset import DatasetOptions
from library.options.mistakes import Mistake, UserError

_FOLDER = re.compile(r"([0-9]+)(?:_(.*))?", re.ASCII | re.DOTALL)
_CAPTION_EXTENSIONS = (".txt", ".caption")
_BAD_SHARE = 0.1
_MOST_REPEATS = 100_000  # above it a folder's number is a date or a telephone number
_EXAMPLE = '"10_sks dog" (repeats, underscore, identifier and class)'
_REG_EXAMPLE = '"1_dog" (repeats, underscore, class)'


@dataclass(frozen=True)
class Subset:
    """One folder of the convention."""

    folder: Path
    repeats: int
    class_tokens: str  # the caption of its pictures without a caption file
    is_reg: bool


@dataclass(frozen=True)
class ImageRecord:
    """One picture to train on.

    `key` names it in every random draw: kind, folder and file name. Unlike an index it stays when a picture is added
    to or taken from the data, when the data moves, and on another system's sort order.
    """

    path: Path
    key: str
    size: tuple[int, int]  # width, height, upright
    subset: int  # index in Scan.subsets
    caption: str
    from_file: bool  # the caption comes from a file, not from the folder name
    repeats: int
    is_reg: bool
    transparent: bool = False


@dataclass(frozen=True)
class Scan:
    """What a scan found: training records first, both kinds sorted by folder and file name."""

    subsets: tuple[Subset, ...] = ()
    records: tuple[ImageRecord, ...] = ()
    skipped_folders: tuple[tuple[Path, str], ...] = ()  # path, why
    bad_images: tuple[tuple[Path, str], ...] = ()  # path, why
    left_out_reg: int = 0  # regularisation pictures that balancing did not need
    found_reg_samples: int = 0  # regularisation pictures x repeats before balancing
    notes: tuple[str, ...] = ()
    mistakes: tuple[Mistake, ...] = ()

    @property
    def train_samples(self) -> int:
        """Training pictures x repeats."""
        return sum(record.repeats for record in self.records if not record.is_reg)

    @property
    def reg_samples(self) -> int:
        """Regularisation pictures x repeats after balancing: at least train_samples where there is a picture."""
        return sum(record.repeats for record in self.records if record.is_reg)


@dataclass
class _Findings:
    subsets: list[Subset] = field(default_factory=list)
    records: list[ImageRecord] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    bad: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)


def scan(options: DatasetOptions) -> Scan:
    """Read the training and regularisation folders. Mistakes of the user are collected in the result, not raised."""
    found = _Findings()
    extensions = readable_extensions()
    if options.train_data_dir is None:
        remedy = f"give the folder that holds folders like {_EXAMPLE}"
        found.mistakes.append(Mistake("--train_data_dir is not set", remedy))
    else:
        _scan_base(options.train_data_dir, "train_data_dir", False, options.caption_extension, extensions, found)
    if options.reg_data_dir is not None:
        if options.train_data_dir is not None and _same(options.reg_data_dir, options.train_data_dir):
            what = f"--reg_data_dir and --train_data_dir are the same folder: {options.reg_data_dir}"
            found.mistakes.append(Mistake(what, "give two folders, or leave --reg_data_dir out"))
        else:
            _scan_base(options.reg_data_dir, "reg_data_dir", True, options.caption_extension, extensions, found)
    _judge_bad_images(found)
    train = [record for record in found.records if not record.is_reg]
    reg = [record for record in found.records if record.is_reg]
    target = sum(record.repeats for record in train)
    balanced = balance(reg, target) if train else reg
    _note_balance(found.notes, reg, balanced, target)
    _note_contents(found.notes, train + balanced)
    return Scan(
        subsets=tuple(found.subsets),
        records=tuple(train + balanced),
        skipped_folders=tuple(found.skipped),
        bad_images=tuple(found.bad),
        left_out_reg=len(reg) - len(balanced),
        found_reg_samples=sum(record.repeats for record in reg),
        notes=tuple(found.notes),
        mistakes=tuple(found.mistakes),
    )


def balance(reg: list[ImageRecord], target: int) -> list[ImageRecord]:
    """Repeat or trim regularisation pictures until pictures x repeats reaches `target`.

    Walk over the pictures taking each with its own repeats until the sum reaches the target, and leave the rest out; if
    the walk ends first, walk again and again adding 1 to each. Several folders are walked in step, each in proportion
    to its pictures, so that trimming never leaves a whole folder out.
    """
    walk = _in_step(reg)
    repeats: dict[int, int] = {}
    total = 0
    for index in walk:
        if total >= target:
            break
        repeats[index] = reg[index].repeats
        total += reg[index].repeats
    missing = max(0, target - total)
    if walk and missing:
        rounds, rest = divmod(missing, len(walk))
        for place, index in enumerate(walk):
            repeats[index] += rounds + (place < rest)
    return [replace(record, repeats=repeats[index]) for index, record in enumerate(reg) if index in repeats]


def _in_step(records: list[ImageRecord]) -> list[int]:
    sizes: dict[int, int] = {}
    places = []
    for record in records:
        places.append(sizes.get(record.subset, 0))
        sizes[record.subset] = places[-1] + 1
    share = [(2 * place + 1) / sizes[record.subset] for place, record in zip(places, records, strict=True)]
    return sorted(range(len(records)), key=lambda index: (share[index], records[index].subset))


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _scan_base(
    base: Path, flag: str, is_reg: bool, caption_extension: str, extensions: frozenset[str], found: _Findings
) -> None:
    if not base.is_dir():
        found.mistakes.append(Mistake(f"--{flag}: there is no folder {base}", "check the path"))
        return
    first, known = len(found.subsets), len(found.mistakes)
    loose = 0
    for entry in sorted(base.iterdir(), key=lambda path: path.name):
        if not entry.is_dir():
            loose += _is_picture(entry.name, extensions)
            continue
        match = _FOLDER.fullmatch(entry.name)
        if match is None:
            found.skipped.append((entry, "its name does not begin with a number of repeats and an underscore"))
        elif int(match.group(1)) < 1:
            found.skipped.append((entry, "its number of repeats is 0"))
        elif int(match.group(1)) > _MOST_REPEATS:
            what = f"--{flag}: folder {entry} would be repeated {match.group(1)} times"
            found.mistakes.append(Mistake(what, "if its name begins with a date, put the repeats before it: 10_..."))
        else:
            found.subsets.append(Subset(entry, int(match.group(1)), match.group(2) or "", is_reg))
    if len(found.subsets) == first and len(found.mistakes) == known:
        found.mistakes.append(_nothing_found(base, flag, loose))
    elif loose:
        found.notes.append(f"{loose} pictures directly in {base} are not used: only those in its folders are")
    for index in range(first, len(found.subsets)):
        _scan_subset(index, caption_extension, extensions, found)


def _nothing_found(base: Path, flag: str, loose: int) -> Mistake:
    what = f"--{flag}: {base} holds no folder like {_REG_EXAMPLE if flag == 'reg_data_dir' else _EXAMPLE}"
    if not loose:
        return Mistake(what, f"put the pictures into such a folder inside {base}")
    what += f", but {loose} pictures"
    if _FOLDER.fullmatch(base.name):
        return Mistake(what, f"give the folder above it: --{flag}={base.parent}")
    return Mistake(what, f"move the pictures into such a folder inside {base}")


def _scan_subset(index: int, caption_extension: str, extensions: frozenset[str], found: _Findings) -> None:
    subset = found.subsets[index]
    files: list[Path] = []
    folders = 0
    for entry in sorted(subset.folder.iterdir(), key=lambda path: path.name):
        if entry.is_dir():
            folders += 1
        elif not entry.name.startswith("."):
            files.append(entry)
    if folders:
        found.notes.append(f"{subset.folder}: its {folders} sub-folders are not read")
    for ending, package in OPTIONAL_EXTENSIONS.items():
        if ending not in extensions and (count := sum(file.suffix.lower() == ending for file in files)):
            found.notes.append(f"{subset.folder}: {count} {ending} pictures are not used; reading them needs {package}")
    pictures = [file for file in files if _is_picture(file.name, extensions)]
    if not pictures:
        kind = "regularisation folder" if subset.is_reg else "folder"
        found.mistakes.append(Mistake(f"{kind} {subset.folder} holds no picture", "put pictures into it, or remove it"))
        return
    captions = CaptionFiles((file.name for file in files), caption_extension)
    missed = _other_ending(subset, [file.stem for file in pictures], [file.name for file in files], caption_extension)
    if missed is not None:
        found.mistakes.append(missed)
    later_lines = 0
    for path in pictures:
        try:
            header = read_header(path)
        except BadImage as error:
            found.bad.append((path, str(error)))
            continue
        caption, from_file = subset.class_tokens, False
        if (name := captions.find(path.stem)) is not None:
            try:
                caption, more = read_caption(subset.folder / name)
            except UserError as error:
                found.mistakes.extend(error.mistakes)
                continue
            from_file = True
            later_lines += more
        found.records.append(_record(path, header, subset, index, caption, from_file))
    if later_lines:
        found.notes.append(f"{subset.folder}: {later_lines} caption files have more lines; only the first line is used")


def _record(path: Path, header: Header, subset: Subset, index: int, caption: str, from_file: bool) -> ImageRecord:
    kind = "reg" if subset.is_reg else "train"
    key = unicodedata.normalize("NFC", f"{kind}/{subset.folder.name}/{path.name}")
    return ImageRecord(
        path, key, header.size, index, caption, from_file, subset.repeats, subset.is_reg, header.transparent
    )


def _is_picture(name: str, extensions: frozenset[str]) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in extensions


def _other_ending(subset: Subset, stems: list[str], names: list[str], caption_extension: str) -> Mistake | None:
    """Captions under another ending than the one asked for: the class word alone would be trained, unsaid."""
    asked = normal_extension(caption_extension)
    having = _count_captions(stems, names, asked)
    if 2 * having >= len(stems):
        return None
    for ending in _CAPTION_EXTENSIONS:
        other = _count_captions(stems, names, ending)
        if other > having:
            return Mistake(
                f"{subset.folder}: {having} of {len(stems)} pictures have a {asked} file, {other} have a {ending} file",
                f"set --caption_extension={ending}; to train on the folder name instead, move the {ending} files away",
            )
    return None


def _count_captions(stems: list[str], names: list[str], extension: str) -> int:
    captions = CaptionFiles(names, extension)
    return sum(captions.find(stem) is not None for stem in stems)


def _judge_bad_images(found: _Findings) -> None:
    if not found.bad:
        return
    total = len(found.bad) + len(found.records)
    listed = "\n".join(f"  {path}: {why}" for path, why in found.bad[:20])
    more = f"\n  and {len(found.bad) - 20} more" if len(found.bad) > 20 else ""
    if len(found.bad) > _BAD_SHARE * total:
        what = f"{len(found.bad)} of {total} pictures are damaged, more than {_BAD_SHARE:.0%}:\n{listed}{more}"
        found.mistakes.append(Mistake(what, "repair or remove them"))


def _note_balance(notes: list[str], reg: list[ImageRecord], balanced: list[ImageRecord], target: int) -> None:
    if not reg or not target:
        return
    before, after = sum(record.repeats for record in reg), sum(record.repeats for record in balanced)
    text = f"regularisation: {before} samples for {target} training samples"
    if len(balanced) < len(reg):
        text += f"; {len(reg) - len(balanced)} of {len(reg)} pictures are left out"
    elif after > before:
        text += f"; repeated to {after}"
    notes.append(f"{text}; ratio {after / target:.2f} : 1")


def _note_contents(notes: list[str], records: list[ImageRecord]) -> None:
    empty = [record for record in records if not record.caption and record.from_file]
    if empty:
        names = ", ".join(str(record.path) for record in empty[:5]) + (", ..." if len(empty) > 5 else "")
        notes.append(f"{len(empty)} pictures have an empty caption file and are trained on the empty caption: {names}")
    nameless = sum(not record.caption and not record.from_file for record in records)
    if nameless:
        notes.append(f"{nameless} pictures have no caption file and their folder's name has no class: empty caption")
    transparent = sum(record.transparent for record in records)
    if transparent:
        notes.append(f"{transparent} pictures have transparency: they are laid on white")
