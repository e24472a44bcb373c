"""Fine-tuning under its name in sd-scripts: train_db.py, with the text encoder trained only where
--train_text_encoder is given.

    python fine_tune.py --config_file options.toml

The model's file says what it is. `--help` lists every option, `--dry_run` prints what a run would do.
"""

from __future__ import annotations

from library.options.parse import FINE_TUNING
from library.training.command import run_recipe
from library.training.recipe import Recipe
from train_db import whole_model

RECIPE = Recipe(FINE_TUNING, whole_model)

if __name__ == "__main__":
    raise SystemExit(run_recipe(RECIPE))
