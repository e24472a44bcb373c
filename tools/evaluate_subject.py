"""Evaluate how well checkpoints and adapters draw a subject: DINO, CLIP-I, CLIP-T, PRES and diversity.

python tools/evaluate_subject.py --ckpt base.safetensors --adapters dog.safetensors --subject_images train/10_dog \
    --evaluation_subject "sks dog" --evaluation_class dog --evaluation_prompts live \
    --evaluation_dino models/dino --evaluation_clip models/clip --outdir evaluation --save_to evaluation.md

The protocol of DreamBooth's paper (arXiv 2208.12242): 25 prompts, 4 images each, the same seeds for every model, the
base model among them. Run it again to go on after an interruption, or with more adapters.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script started by path sees only its own folder

from library.evaluation.options import EvaluationOptions, check
from library.options.tool_command import Tool, run_tool


def main(words: Sequence[str] | None = None) -> int:
    """Run the evaluation. Returns the exit code: 0 done, 2 user error, 130 interrupted."""
    return run_tool(TOOL, words)


def evaluate(options: EvaluationOptions) -> None:
    """Draw what is missing, measure, and print the table."""
    from library.evaluation import command  # not needed for --help

    command.evaluate(options)


TOOL = Tool(
    "Evaluate how well checkpoints and adapters draw a subject. Run it again to go on.",
    'python tools/evaluate_subject.py --ckpt BASE --adapters LORA ... --subject_images DIR --evaluation_subject "sks '
    'dog" --evaluation_class dog --evaluation_dino DIR --evaluation_clip DIR --outdir DIR [more flags]',
    EvaluationOptions,
    evaluate,
    check=check,
    interrupted="interrupted: images drawn so far are kept; run it again to go on",
)

if __name__ == "__main__":
    raise SystemExit(main())
