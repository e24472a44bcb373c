"""LoRA and its relatives under the name that sd-scripts has for Stable Diffusion XL: train_network.py and nothing else.

    python sdxl_train_network.py --config_file lora.toml

The model's file says what it is. `--help` lists every option, `--dry_run` prints what a run would do.
"""

from __future__ import annotations

from library.options.parse import SDXL_ADAPTERS
from library.training.command import run_recipe
from library.training.recipe import Recipe
from train_network import network

RECIPE = Recipe(SDXL_ADAPTERS, network)

if __name__ == "__main__":
    raise SystemExit(run_recipe(RECIPE))
