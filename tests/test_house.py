"""The house stands as docs/architecture.md draws it: who imports whom, how large a room may be, what no room does."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

from library.options.flag import Capability

ROOT = Path(__file__).resolve().parent.parent

# Programs under the names that users and front-ends of sd-scripts call: a few lines each, for tools/.
CALLED_SO = (
    "networks.check_lora_weights", "networks.extract_lora_from_dylora", "networks.extract_lora_from_models",
    "networks.lora_interrogator", "networks.merge_lora", "networks.resize_lora", "networks.sdxl_merge_lora",
    "networks.svd_merge_lora", "finetune",
)  # fmt: skip

# Programs under names of sd-scripts: a few lines each that choose options for a recipe.
LIKE = {"sdxl_train": ("train_db",), "fine_tune": ("train_db",), "sdxl_train_network": ("train_network",)}

# Names of sd-scripts that front-ends import: re-exports, in place of rooms.
SHIMS = ("library.train_util", "library.utils", "library.model_util", "library.sdxl_model_util")

# What every room may import.
FOR_ALL = (
    "library.messages", "library.wrong_python", "library.whole_files", "library.limits", "library.bounded",
)  # fmt: skip

# Room -> what it may import of the project. The first row that fits a file counts; a name stands for all below it.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("library.messages", "library.limits", "library.bounded"), ()),
    **dict.fromkeys(SHIMS, ("library", "networks.third_party")),
    "library.wrong_python": (),
    "library.whole_files": (),
    "library.options": ("library.options",),
    "library.checkpoints": ("library.checkpoints",),
    "library.runtime": ("library.runtime", "library.options"),
    "library.objective": ("library.objective", "library.options", "library.checkpoints", "library.runtime"),
    "library.data": ("library.data", "library.options", "library.checkpoints", "library.runtime"),
    "library.watch": ("library.watch", "library.options", "library.training.events"),
    **dict.fromkeys(CALLED_SO, ("tools",)),
    "networks": ("networks", "library.checkpoints"),
    "library.footprint": ("library.footprint",),
    "library.families": (
        "library.footprint",
        "library.families", "library.options", "library.checkpoints", "library.objective.process", "library.data.batch",
        "library.runtime.imports",
        "library.runtime.transfers",
    ),
    "library.convert": (
        "library.convert", "library.families", "library.checkpoints", "library.options", "library.runtime",
        "library.objective.process",
    ),
    "library.rare_tokens": (
        "library.rare_tokens", "library.families", "library.checkpoints", "library.options", "library.runtime",
    ),
    "library.mask_making": (
        "library.mask_making", "library.data", "library.options", "library.checkpoints", "library.runtime",
        "library.families.registry",
    ),
    "library.sampling": (
        "library.sampling", "library.families", "library.objective.process", "library.data.decoding",
        "library.data.image_files", "library.checkpoints", "library.options", "library.runtime", "networks",
    ),
    "library.evaluation": (
        "library.evaluation", "library.sampling", "library.data", "library.checkpoints", "library.options",
        "library.runtime",
    ),
    "library.training": (
        "library.training", "library.options", "library.checkpoints", "library.runtime", "library.objective",
        "library.data", "library.sampling", "library.evaluation", "library.families.registry",
        "library.families.family", "library.families.empty_text", "library.footprint", "networks",
    ),
    "train_": ("library.options", "library.training", "library.families.family", "networks.registry"),
    **{name: ("library.options", "library.training", *recipes) for name, recipes in LIKE.items()},
    "tools": ("tools", "library", "networks"),
    "gen_img": ("library", "networks"),
    "examples": ("examples", "library", "networks"),
    "benchmarks.soak": ("benchmarks", "library", "tests.training.running", "train_db"),  # trains miniatures, in forks
    "benchmarks.card": ("benchmarks", "library", "tests", "train_db", "train_network"),  # trains miniatures, too
    "benchmarks": ("benchmarks", "library"),
    "set_up": (),
}  # fmt: skip
# What only a run itself may use, whatever the row above says.
ONLY_FOR_TRAINING = ("library.training.session", "library.training.loop")
MAY_USE_THEM = ("library.training", "train_", "benchmarks.soak")  # the last imports them before it forks

# Rooms that other programs build on, and the packages they stand on besides the standard library.
PACKAGES = {
    "library.options": {"tomli_w", "psutil"},  # to write --output_config; to find accelerate's launcher, which has it
    "library.checkpoints": {"torch", "safetensors"},
    "library.runtime": {"torch", "tqdm"},
    "library.objective": {"torch"},
    "library.footprint": set(),
    "networks": {"torch"},
    "set_up": set(),
}

# Importing these costs no torch: --help, mistakes and the plan are instant.
INSTANT = (
    "library/options*",
    "library/*util*.py",
    "library/checkpoints/files.py",
    "library/checkpoints/header.py",
    "library/data/scan*",
    "library/data/captions.py",
    "library/data/buckets.py",
    "library/families/family.py",
    "library/families/registry.py",
    "library/footprint*",
    "library/families/sd/sd.py",
    "library/mask_making/plan.py",
    "library/runtime/device.py",
    "library/runtime/seeds.py",
    "library/rare_tokens/find.py",
    "library/sampling/class_images.py",
    "library/sampling/generate.py",
    "library/training/plan*",
    "library/training/*/plan.py",
    "library/evaluation/command.py",
    "library/watch*",
    "library/training/events/*.py",
    "train_*.py",
    "sdxl_train*.py",
    "fine_tune.py",
    "gen_img.py",
    "tools/*.py",
    "finetune/*.py",
)
SLOW = {"torch", "diffusers", "transformers", "accelerate", "numpy", "safetensors"}

# path -> lines it may have, for a file that is better whole than halved. The reason goes beside it.
LONGER_FILES: dict[str, int] = {}
# "path:function" -> lines it may have.
LONGER_FUNCTIONS: dict[str, int] = {}
TABLES = ("library/checkpoints/tables/", "library/options/future_flags.py", "library/options/frontend_keys.py")
WIRING = ("library/training/session.py", "library/training/loop.py")


def sources() -> list[str]:
    """Every Python file of the project but the tests, as paths with '/' from the root."""
    paths = [*ROOT.glob("*.py")]
    for folder in ("library", "networks", "finetune", "tools", "examples", "benchmarks"):
        paths += (ROOT / folder).rglob("*.py")
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


@cache
def text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@cache
def tree(path: str) -> ast.Module:
    return ast.parse(text(path), path)


def module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def below(name: str, room: str) -> bool:
    return name == room or name.startswith(room if room.endswith("_") else room + ".")


def imports(path: str) -> Iterator[tuple[int, str]]:
    """(line, full name) of all that a file imports, wherever in the file: functions and TYPE_CHECKING too."""
    package = module(path).split(".") if path.endswith("__init__.py") else module(path).split(".")[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def is_project(name: str) -> bool:
    head = name.partition(".")[0]
    return (ROOT / head).is_dir() or (ROOT / f"{head}.py").is_file()


def test_imports_go_downwards() -> None:
    wrong = []
    for path in sources():
        room = next((room for room in MAY_IMPORT if below(module(path), room)), None)
        for line, name in imports(path):
            if not is_project(name):
                continue
            allowed = room is None or any(below(name, other) for other in (*MAY_IMPORT[room], *FOR_ALL))
            if any(below(name, other) for other in ONLY_FOR_TRAINING):
                allowed = allowed and any(below(module(path), other) for other in MAY_USE_THEM)
            if not allowed:
                wrong.append(f"{path}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_only_the_wiring_takes_the_whole_plan() -> None:
    """Every other room takes the section that it uses, and can be built and tested without the rest."""
    of_plan = "library.training.plan.plan.Plan"
    takers = {path for path in sources() for _, name in imports(path) if name == of_plan}
    texts = {"library/training/plan/text.py", "library/training/plan/summary.py"}
    assert takers == {"library/training/session.py", "library/training/after_step.py", *texts}


def test_every_file_has_a_row_in_the_import_table() -> None:
    without = [path for path in sources() if not any(below(module(path), room) for room in MAY_IMPORT)]
    assert set(without) <= {"library/__init__.py"}, without


def test_ground_rooms_stand_on_few_packages() -> None:
    wrong = []
    for path in sources():
        room = next((room for room in PACKAGES if below(module(path), room)), None)
        for line, name in imports(path) if room else ():
            head = name.partition(".")[0]
            if not is_project(name) and head not in sys.stdlib_module_names and head not in PACKAGES[room]:
                wrong.append(f"{path}:{line} imports {head}")
    assert not wrong, "\n".join(wrong)


def test_the_plan_needs_no_torch() -> None:
    names = []
    for pattern in INSTANT:
        found = [path for place in ROOT.glob(pattern) for path in ([place] if place.is_file() else place.rglob("*.py"))]
        assert found, f"{pattern} is gone: has the room moved? Then change INSTANT with it."
        names += sorted(module(path.relative_to(ROOT).as_posix()) for path in found)
    program = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
    if slow := {SLOW!r} & set(sys.modules):
        sys.exit(f"importing {{name}} imports {{', '.join(sorted(slow))}}")
"""
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert answer.returncode == 0, answer.stderr


def test_rooms_have_names_that_say_something() -> None:
    empty = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert not [path for path in sources() if empty & set(module(path).split(".")) and module(path) not in SHIMS]


def test_no_room_imports_what_is_there_for_front_ends() -> None:
    outside = [path for path in sources() if module(path) not in SHIMS]
    assert not [path for path in outside for _, name in imports(path) if any(below(name, shim) for shim in SHIMS)]


def test_files_can_be_read_in_one_sitting() -> None:
    scripts = [path.relative_to(ROOT).as_posix() for path in (ROOT / "library").rglob("*.js")]
    files = [*sources(), *(path for path in scripts if not path.endswith(".min.js"))]  # those are of others
    sizes = {path: len(text(path).splitlines()) for path in files if not path.startswith(TABLES)}
    long = {path: size for path, size in sizes.items() if size >= LONGER_FILES.get(path, 400)}
    assert not long
    assert not [path for path in LONGER_FILES if sizes.get(path, 0) < 400], "no longer needed in LONGER_FILES"


def test_functions_can_be_read_at_a_glance() -> None:
    sizes = {}
    for path in sources():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                sizes[f"{path}:{node.name}"] = (node.end_lineno or 0) - node.lineno + 1
    long = {
        name: size
        for name, size in sizes.items()
        if size >= LONGER_FUNCTIONS.get(name, 120 if name.startswith(WIRING) else 60)
    }
    assert not long
    assert not [name for name in LONGER_FUNCTIONS if sizes.get(name, 0) < 60], "no longer needed in LONGER_FUNCTIONS"


def test_public_things_say_what_they_are_for() -> None:
    silent = []
    for path in sources():
        if text(path).strip() and not ast.get_docstring(tree(path)):
            silent.append(path)
        for node in tree(path).body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                silent.append(f"{path}:{node.lineno} {node.name}")
    assert not silent, "\n".join(silent)


def calls(path: str) -> Iterator[tuple[ast.Call, str, set[str]]]:
    """(call, what is called as written, its keywords) of a file."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func), {keyword.arg or "**" for keyword in node.keywords}


def sources_and_tests() -> list[str]:
    return sources() + sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py"))


READ_CODE = {
    "pickle.load", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open", "dill.load", "dill.loads",
    "joblib.load", "cloudpickle.load", "cloudpickle.loads", "pandas.read_pickle", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "eval", "exec", "torch.hub.load",
    "torch.jit.load", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip
LOCAL = ("**ONLY_LOCAL", "local_files_only=True")  # what each from_pretrained of the project says


def runs_what_it_reads(node: ast.Call, function: str) -> bool:
    """Whether a call can run code that came with the data."""
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if function == "torch.load":
        return keywords.get("weights_only") != "True"
    if keywords.get("shell", "False") != "False" or keywords.get("trust_remote_code", "False") != "False":
        return True
    if function == "pickle.loads":  # what was pickled in the same breath is no file
        return not (node.args and ast.unparse(node.args[0]).startswith("pickle.dumps("))
    if keywords.get("allow_pickle", "False") != "False":
        return True
    return function in READ_CODE


def test_no_file_is_loaded_that_could_run_code() -> None:
    files = sources_and_tests()
    found = [(path, node, name) for path in files for node, name, _ in calls(path)]
    wrong = [f"{path}:{node.lineno} {name}" for path, node, name in found if runs_what_it_reads(node, name)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("torch.load(p)", True),
        ("torch.load(p, weights_only=False)", True),
        ("torch.load(p, weights_only=True)", False),
        ("pickle.load(p)", True),
        ("pickle.loads(text)", True),
        ("pickle.loads(pickle.dumps(x))", False),
        ("np.load(p)", False),
        ("np.load(p, allow_pickle=True)", True),
        ("numpy.load(p, allow_pickle=False)", False),
        ("eval(text)", True),
        ("model.eval()", False),
        ("subprocess.run(line, shell=True)", True),
        ("subprocess.run(words, check=True)", False),
        ("yaml.load(text)", True),
        ("yaml.safe_load(text)", False),
        ("X.from_pretrained(p, trust_remote_code=True)", True),
    ],
)
def test_the_search_for_what_runs_code_finds_it(code: str, found: bool) -> None:
    node = ast.parse(code, mode="eval").body
    assert isinstance(node, ast.Call)
    assert runs_what_it_reads(node, ast.unparse(node.func)) is found


def test_no_model_is_looked_for_in_the_network() -> None:
    """A loader of transformers or diffusers asks the hub for what a folder lacks, unless it is told not to."""
    wrong = []
    for path in sources():
        has_pipeline = any(name == "transformers.pipeline" for _, name in imports(path))
        for node, function, _ in calls(path):
            said = {
                ast.unparse(keyword) if keyword.arg else f"**{ast.unparse(keyword.value)}" for keyword in node.keywords
            }
            if function.endswith((".from_pretrained", ".load_lora_weights", ".load_config")) and not said & {*LOCAL}:
                wrong.append(f"{path}:{node.lineno} {function}")
            if has_pipeline and function == "pipeline" and "trust_remote_code=False" not in said:
                wrong.append(f"{path}:{node.lineno}: it asks at the terminal whether code may be run")
            is_hub = path.startswith("library/training/hub/")  # what the flags huggingface_* ask for
            if function.rpartition(".")[2] in {"snapshot_download", "hf_hub_download", "load_dataset"} and not is_hub:
                wrong.append(f"{path}:{node.lineno} {function}")
    assert not wrong, "\n".join(wrong)


def test_files_are_parsed_with_bounds() -> None:
    """library/bounded.py: json and tomllib raise other errors than their own for what is nested thousands deep."""
    own = {"library/bounded.py", "library/options/packages.py"}  # the second reads the project's own file
    allowed = {"json.loads(json.dumps", "json.loads(module.to_json_string()"}
    wrong = [
        f"{path}:{node.lineno} {function}"
        for path in sources()
        if path.startswith(("library/", "networks/", "tools/", "finetune/", "train_", "gen_img")) and path not in own
        for node, function, _ in calls(path)
        if function in {"json.loads", "json.load", "tomllib.loads", "tomllib.load"}
        if not ast.unparse(node).startswith(tuple(allowed))
    ]
    assert not wrong, "\n".join(wrong)


def opens_text_without_encoding(node: ast.Call, function: str, keywords: set[str]) -> bool:
    """Whether a call opens text in whatever encoding the system prefers, judged by the names of the usual functions."""
    if keywords & {"encoding", "**"}:
        return False
    name = function.rpartition(".")[2]
    if name == "read_text":
        return not node.args
    if name == "write_text":
        return len(node.args) < 2
    if name not in {"open", "fdopen", "NamedTemporaryFile", "TemporaryFile"}:
        return False
    first = 1 if function in {"open", "io.open", "os.fdopen"} else 0  # where the mode stands
    modes = [keyword.value for keyword in node.keywords if keyword.arg == "mode"] + node.args[first : first + 1]
    if name.endswith("TemporaryFile") and not modes:
        return False  # binary unless told otherwise
    mode = str(modes[0].value) if modes and isinstance(modes[0], ast.Constant) else ""
    if first == 0 and node.args and not re.fullmatch("[rwxabt+]{1,3}", mode):
        return False  # no method of a path, as its argument is no mode: Image.open(path), archive.open(name)
    return "b" not in mode


def test_text_is_read_and_written_as_utf8() -> None:
    wrong = []
    for path in sources_and_tests():
        for node, function, keywords in calls(path):
            piped = function.startswith("subprocess.") and keywords & {"text", "universal_newlines"}
            if opens_text_without_encoding(node, function, keywords) or (piped and "encoding" not in keywords):
                wrong.append(f"{path}:{node.lineno} {function}(…)")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("open(p)", True),
        ("open(p, 'w')", True),
        ("open(p, 'rb')", False),
        ("open(p, mode='wb')", False),
        ("open(p, encoding='utf-8')", False),
        ("p.open()", True),
        ("p.open('a')", True),
        ("p.open('rb')", False),
        ("Image.open(p)", False),
        ("archive.open('data.pkl')", False),
        ("p.read_text()", True),
        ("p.read_text('utf-8')", False),
        ("p.write_text(s)", True),
        ("p.write_text(s, encoding='utf-8')", False),
        ("os.fdopen(f, 'w')", True),
        ("tempfile.NamedTemporaryFile()", False),
        ("tempfile.NamedTemporaryFile('w')", True),
    ],
)
def test_the_search_for_missing_encodings_finds_them(code: str, found: bool) -> None:
    node = ast.parse(code, mode="eval").body
    assert isinstance(node, ast.Call)
    keywords = {keyword.arg or "**" for keyword in node.keywords}
    assert opens_text_without_encoding(node, ast.unparse(node.func), keywords) is found


# Files that need not be whole, or are kept whole by other means.
WRITES_ITSELF = {
    "library/whole_files.py": "the one place that does it",
    "library/training/events/record.py": "a record grows by lines; one that is cut off is passed over",
    "library/data/scan/remote.py": "the journal of a mirror grows by lines; one that is cut off is passed over",
    "library/data/scan/index.py": "SQLite's own journal keeps the index whole",
    "library/data/shards/table.py": "SQLite wants a path; a whole table is then copied",
    "library/training/hub/repository.py": "a copy in a temporary folder, to upload while the run replaces the file",
    "library/training/console.py": "a log file grows by lines",
    "library/options/tool_command.py": "the null device",
    "library/training/plan/writable_paths.py": "an empty file tries whether a folder can be written",
}
TO_STREAMS = {"torch.save", "np.save", "np.savez", "numpy.save", "numpy.savez", "save_file"}


def writes_itself(node: ast.Call, function: str) -> bool:
    """Whether a call writes, renames or replaces a file by itself, judged by the names of the usual functions."""
    name = function.rpartition(".")[2]
    strings = [given.value for given in node.args if isinstance(given, ast.Constant) and isinstance(given.value, str)]
    strings += [
        str(each.value.value) for each in node.keywords if each.arg == "mode" and isinstance(each.value, ast.Constant)
    ]
    if function in {"os.replace", "os.rename", "shutil.move", "shutil.copyfile", "shutil.copy", "sqlite3.connect"}:
        return True
    if name in {"write_text", "write_bytes", "rename", "touch"}:
        return "." in function and not function.startswith(("writer.", "whole_files.", "self."))
    if name == "replace":  # of a path: that of a text has two arguments, that of a dataclass keywords
        return "." in function and len(node.args) == 1 and not node.keywords
    if name in {"NamedTemporaryFile", "mkstemp", "FileHandler", "save_pretrained"}:
        return True
    if name in {"open", "fdopen"} and not function.startswith("archive."):  # it is written to a stream
        return any(re.fullmatch("[rbt]*[wax+][wax+bt]*", each) for each in strings)
    if function in TO_STREAMS or (name == "save" and strings):  # the second is an image's, with its format
        return not {"stream", "file"} & {ast.unparse(given) for given in node.args[:2]}
    return False


def test_every_file_is_written_whole() -> None:
    rooms = ("library/", "networks/", "finetune/", "tools/", "train_", "gen_img", "sdxl_", "fine_tune")
    found = {
        path: [f"{path}:{node.lineno} {name}(…)" for node, name, _ in calls(path) if writes_itself(node, name)]
        for path in sources()
        if path.startswith(rooms)
    }
    wrong = [line for path, lines in found.items() if path not in WRITES_ITSELF for line in lines]
    assert not wrong, "use library/whole_files.py or library/checkpoints/writer.py:\n" + "\n".join(wrong)
    assert not [path for path in WRITES_ITSELF if not found[path]], "no longer needed in WRITES_ITSELF"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("open(p, 'wb')", True),
        ("open(p, 'r+b')", True),
        ("p.open('x')", True),
        ("p.open(mode='a')", True),
        ("open(p, 'rb')", False),
        ("archive.open(entry, 'w')", False),
        ("p.write_text(s, encoding='utf-8')", True),
        ("write_text(p, s)", False),
        ("p.replace(q)", True),
        ("s.replace('a', 'b')", False),
        ("replace(options, seed=1)", False),
        ("os.replace(p, q)", True),
        ("torch.save(value, p)", True),
        ("torch.save(value, stream)", False),
        ("image.save(p, 'png')", True),
        ("image.save(stream, 'png')", False),
        ("save_file(tensors, p)", True),
    ],
)
def test_the_search_for_files_written_otherwise_finds_them(code: str, found: bool) -> None:
    node = ast.parse(code, mode="eval").body
    assert isinstance(node, ast.Call)
    assert writes_itself(node, ast.unparse(node.func)) is found


NAMES_OF_FAMILIES = {"sd1", "sd2", "sdxl", "refiner"}


def test_nothing_outside_of_families_asks_which_family_it_is() -> None:
    """They are told apart by what they can (capabilities) and by their functions."""
    rooms = ("library/", "networks/", "tools/", "train_", "gen_img", "sdxl_", "fine_tune")
    wrong = []
    for path in sources():
        if path.startswith("library/families/") or not path.startswith(rooms):
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Compare):
                named = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
                if named & NAMES_OF_FAMILIES:
                    wrong.append(f"{path}:{node.lineno} {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


def test_what_is_asked_of_a_family_is_a_capability() -> None:
    """`"snr" in family.capabilities` is true of no family where the word is misspelt, and mypy takes it."""
    wrong = [
        f"{path}:{node.lineno} {ast.unparse(node)}"
        for path in sources()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Compare) and ast.unparse(node.comparators[-1]).endswith(".capabilities")
        if isinstance(node.left, ast.Constant) and node.left.value not in get_args(Capability)
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_at_module_level_changes_while_running() -> None:
    wrong = [
        f"{path}:{node.lineno}"
        for path in sources()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Global)
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_strict_types_in_all_rooms_and_programs() -> None:
    settings = tomllib.loads(text("pyproject.toml"))["tool"]["mypy"]
    programs = {path.name for path in ROOT.glob("*.py")}
    assert settings["strict"] and set(settings["files"]) == {"library", "networks", "finetune", "tools"} | programs


def test_every_shell_script_has_its_batch_file() -> None:
    shell = sorted(ROOT.glob("*.sh"))
    assert [path.stem for path in shell] == sorted(path.stem for path in ROOT.glob("*.bat")) != []
    for path in shell:
        script, batch = text(path.name), text(path.with_suffix(".bat").name)
        # The same programs in the same order: files and modules that Python is started with.
        words = [
            re.findall(r"([\w/]+\.py|-m \w+)", "\n".join(line for line in lines if not re.match(r"\s*(#|rem )", line)))
            for lines in (script.splitlines(), batch.replace("\\", "/").splitlines())
        ]
        assert words[0] == words[1], f"{path.name} and its .bat start different things"


def test_batch_files_have_the_line_ends_of_windows() -> None:
    attributes = text(".gitattributes")
    assert re.search(r"^\*\.bat .*eol=crlf", attributes, re.MULTILINE)
    assert re.search(r"^\*\.sh .*eol=lf", attributes, re.MULTILINE)
    for path in ROOT.glob("*.bat"):
        assert re.search(rb"(?<!\r)\n", path.read_bytes()) is None, path.name


def test_every_requirement_is_pinned() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = [line.partition("#")[0].strip() for line in text(name).splitlines()]
        pinned = re.compile(r"[a-z0-9-]+==[\w.]+(;|$)|-r requirements\.txt$")
        loose = [line for line in lines if line and not pinned.match(line)]
        assert not loose, f"{name}: {loose}"
        assert not [line for line in lines if re.match(r"torchvision|nvidia|triton|open[-_]clip", line)]
