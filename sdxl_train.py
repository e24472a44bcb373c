"""DreamBooth and fine-tuning under the name that sd-scripts has for Stable Diffusion XL: train_db.py, with the text
encoders trained only where --train_text_encoder is given.

    python sdxl_train.py --config_file options.toml

The model's file says what it is. `--help` lists every option, `--dry_run` prints what a run would do.
"""

from __future__ import annotations

from library.options.parse import SDXL
from library.training.command import run_recipe
from library.training.recipe import Recipe
from train_db import whole_model

RECIPE = Recipe(SDXL, whole_model)

if __name__ == "__main__":
    raise SystemExit(run_recipe(RECIPE))
