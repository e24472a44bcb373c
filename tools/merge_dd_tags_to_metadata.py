"""Write the tags beside the images of a folder into a metadata file, for --in_json.

python finetune/merge_dd_tags_to_metadata.py train_data meta_cap_dd.json --in_json meta_cap.json --full_path

The tags may be of DeepDanbooru, after which the program is named, or of any other tagger.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script started by path sees only its own folder

from library.options.tool_command import run_tool
from tools.merge_captions_to_metadata import TOOL as OF_CAPTIONS
from tools.merge_captions_to_metadata import MergeTagsOptions, merge

TOOL = replace(
    OF_CAPTIONS,
    title="Write the tags beside images into a metadata file.",
    usage="python finetune/merge_dd_tags_to_metadata.py TRAIN_DATA_DIR OUT_JSON [more flags]",
    options=MergeTagsOptions,
    work=partial(merge, "tags"),
)


def main(words: Sequence[str] | None = None) -> int:
    """Merge. Returns the exit code: 0 done, 2 user error, 130 interrupted."""
    return run_tool(TOOL, words)


if __name__ == "__main__":
    raise SystemExit(main())
