"""tools/cache_text_encoder_outputs.py as users call it: what the training then finds, several at once, stopped."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests import tiny
from tests.tools.filling import ROOT, finished, flags, kill_after, start
from tests.training.running import World, make_world, run
from tools import cache_text_encoder_outputs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

TOOL = "cache_text_encoder_outputs.py"
# enough different captions for several files of the cache
SHUFFLED = {"shuffle_caption": True, "max_train_epochs": 28, "train_batch_size": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images with captions of many tags."""
    for path in tiny.write_images(tmp_path / "tráin" / "1_dög", 6):
        path.with_suffix(".txt").write_text(f"{path.stem}, a, b, c, d, e, 犬", encoding="utf-8")
    return tmp_path / "tráin"


def counts(text: str) -> list[tuple[int, int]]:
    """(read, encoded) of each line that tells them."""
    return [(int(read), int(made)) for read, made in re.findall(r"captions: (\d+) read, (\d+) encoded", text)]


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "remembered" / "captions").rglob("*.safetensors"))


def states(folder: Path) -> dict[str, bytes]:
    """The states of every text, by the key of the text."""
    return {name: array.tobytes() for path in shards(folder) for name, array in load_file(path).items()}


def test_the_training_finds_every_caption_that_occurs(world, folder, capsys) -> None:
    chosen = {"shuffle_caption": True, "caption_dropout_rate": 0.2, "max_train_epochs": 2}
    words = flags(world, folder, **chosen)
    before = {path.name for path in folder.parent.iterdir()}
    assert cache_text_encoder_outputs.main(words) == 0
    out = capsys.readouterr().out
    ((read, made),) = counts(out)
    assert read == 0 and 6 < made <= 12 and "the captions of 2 epochs (--max_train_epochs)" in out
    assert cache_text_encoder_outputs.main([*words, "--skip_existing"]) == 0
    assert counts(capsys.readouterr().out) == [(made, 0)]
    assert {path.name for path in folder.parent.iterdir()} == before
    trained = [*flags(world, folder, **chosen, cache_text_encoder_outputs_to_disk=True)]
    outcome = run([*trained, f"--output_dir={folder.parent / 'out'}"], capsys)
    assert outcome.code == 0 and counts(outcome.err) == [(made, 0)]


def test_processes_started_by_hand_share_the_work(world, folder, capsys) -> None:
    words = flags(world, folder, **SHUFFLED)
    other = Path(shutil.copytree(folder, folder.parent / "other"))
    both = [start(TOOL, words, WORLD_SIZE="2", RANK=rank) for rank in ("0", "1")]
    assert cache_text_encoder_outputs.main(flags(world, other, **SHUFFLED)) == 0  # meanwhile, alone
    ((_, alone),) = counts(capsys.readouterr().out)
    first, second = (finished(process) for process in both)
    assert "process 1 of 2" in first and second.startswith("process 2 of 2")
    (one,), (two,) = counts(first), counts(second)
    assert alone > 2 * 64 and sum(one) == sum(two) == alone and alone <= one[1] + two[1] < 2 * alone
    assert states(folder) == states(other)
    assert [path.name for path in shards(folder)] == [path.name for path in shards(other)]


def test_killed_and_called_again_it_goes_on(world, folder, capsys) -> None:
    words = flags(world, folder, **SHUFFLED)
    kill_after(1, ".safetensors", ROOT / "tools" / TOOL, words)
    there = len(states(folder))
    assert cache_text_encoder_outputs.main(words) == 0
    ((read, made),) = counts(capsys.readouterr().out)
    assert read == there >= 64 and made > 0
    assert cache_text_encoder_outputs.main(words) == 0
    assert counts(capsys.readouterr().out) == [(read + made, 0)]


def test_without_a_seed_only_captions_that_do_not_vary_are_encoded(world, folder, capsys) -> None:
    assert cache_text_encoder_outputs.main(flags(world, folder, seed=None)) == 0
    assert counts(capsys.readouterr().out) == [(0, 6)]
    assert cache_text_encoder_outputs.main(flags(world, folder, seed=None, shuffle_caption=True)) == 2
    assert "no --seed" in capsys.readouterr().err


def test_all_mistakes_are_told_at_once_and_only_those_that_matter_here(world, folder, capsys) -> None:
    words = flags(world, folder, processes="two", learning_rate_te=1e-5, clip_skip=-1)
    assert cache_text_encoder_outputs.main([*words, "--skip_existin"]) == 2
    told = capsys.readouterr().err
    for word in ("--processes = ", "--learning_rate_te", "did you mean --skip_existing?", "--clip_skip"):
        assert word in told
    assert "--output_dir" not in told and not shards(folder)
