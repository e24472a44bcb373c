"""Class (regularisation) images, made by the model that is to be trained.

python tools/make_class_images.py --ckpt models/sd15.safetensors --outdir reg/1_dog --prompt "a dog" --count 200
python tools/make_class_images.py --ckpt models/sd15.safetensors --outdir reg/1_dog --from_file prompts.txt --dry_run

The same call again draws what is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path, a script finds its own folder only

from library.options.tool_command import Tool, run_tool
from library.sampling.options import DRAWN_SO_FAR, ClassImageOptions, check


def main(words: Sequence[str] | None = None) -> int:
    """Draw what the folder lacks. Returns the exit code: 0 done, 2 mistakes of the user, 130 interrupted."""
    return run_tool(TOOL, words)


def draw(options: ClassImageOptions) -> None:
    """Look into the folder; load the model and draw only if images are missing."""
    from library.sampling.class_images import fill_folder  # --help needs none of it

    fill_folder(options)


TOOL = Tool(
    "Fill a class folder with images that the model itself draws. The same call again draws what is missing.",
    'python tools/make_class_images.py --ckpt MODEL --outdir reg/1_dog --prompt "a dog" --count 200 [more flags]',
    ClassImageOptions,
    draw,
    check=check,
    interrupted=DRAWN_SO_FAR,
)

if __name__ == "__main__":
    raise SystemExit(main())
