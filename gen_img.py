"""Generate images with a model.

python gen_img.py --ckpt out/dog.safetensors --prompt "a photo of sks dog --n blurry" --images_per_prompt 4
python gen_img.py --ckpt out/dog.safetensors --from_file prompts.txt --outdir images --seed 1
"""

from __future__ import annotations

from collections.abc import Sequence

from library.options.tool_command import Tool, run_tool
from library.sampling.options import INTERRUPTED, REMEDIES, GenerateOptions, check


def main(words: Sequence[str] | None = None) -> int:
    """Draw all images. Returns the exit code: 0 done, 2 user error, 130 interrupted."""
    return run_tool(TOOL, words)


def draw(options: GenerateOptions) -> None:
    """Read the prompts, load the model, write the images."""
    from library.sampling.generate import draw_prompts  # not needed for --help

    draw_prompts(options)


TOOL = Tool(
    "Generate images with a model.",
    'python gen_img.py --ckpt MODEL --prompt "..." [more flags]',
    GenerateOptions,
    draw,
    check=check,
    interrupted=INTERRUPTED,
    remedies=REMEDIES,
)

if __name__ == "__main__":
    raise SystemExit(main())
