"""Make the masks of a folder of images, for --masked_loss.

python tools/make_masks.py --input_dir images --output_dir masks --text_input "person"
python tools/make_masks.py --input_dir images --output_dir masks --grabcut --mask_padding 8 --mask_blur 8

Run it again to make what is missing, and what is outdated because the image or the settings have changed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script started by path sees only its own folder

from library.mask_making.options import MaskMakingOptions, check
from library.options.tool_command import Tool, run_tool


def work(options: MaskMakingOptions) -> None:
    """Make the masks. Raises UserError."""
    from library.mask_making.make import make_masks  # not needed for --help

    make_masks(options)


TOOL = Tool(
    "Make the masks of a folder of images, for --masked_loss. Run it again to make what is missing or outdated.",
    'python tools/make_masks.py --input_dir images --output_dir masks --text_input "person" [more flags]',
    MaskMakingOptions,
    work,
    required={
        "input_dir": "give the folder of the images: --input_dir images",
        "output_dir": "give the folder of the masks: --output_dir masks",
    },
    check=check,
    interrupted="interrupted: no incomplete file was left. Run it again to make the other masks",
)


def main(words: Sequence[str] | None = None) -> int:
    """Make the masks. Returns the exit code: 0 done, 2 user error, 130 interrupted."""
    return run_tool(TOOL, words)


if __name__ == "__main__":
    raise SystemExit(main())
