"""Pictures from a model.

python gen_img.py --ckpt out/dog.safetensors --prompt "a photo of sks dog --n blurry" --images_per_prompt 4
python gen_img.py --ckpt out/dog.safetensors --from_file prompts.txt --outdir pictures --seed 1
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from library.options.mistakes import UserError
from library.sampling.command import GenerateOptions, help_text, parse


def main(words: Sequence[str] | None = None) -> int:
    """Draw what the command line asks for. Returns the exit code: 0 done, 2 mistakes of the user, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):  # prompts in any script must not end a run on a console of few letters
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    words = sys.argv[1:] if words is None else words
    if "--help" in words or "-h" in words:
        print(help_text())
        return 0
    try:
        return draw(parse(words))
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the pictures drawn so far stand", file=sys.stderr)
        return 130


def draw(options: GenerateOptions) -> int:
    """Read the prompts, load the model, write the pictures."""
    from library.sampling.generate import Job, decide, load, write_pictures

    job: Job = decide(options)
    for note in job.notes:
        print(note)
    paths = write_pictures(options, job, load(options, job))
    print(f"{len(paths)} pictures in {options.outdir}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
