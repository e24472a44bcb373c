"""DreamBooth and fine-tuning: trains all weights of the U-Net and, unless told otherwise, of the text encoder.

    python train_db.py --config_file dreambooth.toml
    accelerate launch train_db.py --pretrained_model_name_or_path model.safetensors --train_data_dir train …

`train` holds folders named `<repeats>_<identifier> <class>`, such as `10_sks dog`. `--help` lists every option,
`--dry_run` prints what a run would do.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from library.options.parse import DREAMBOOTH
from library.training.command import run_recipe
from library.training.recipe import Recipe, Say

if TYPE_CHECKING:
    from library.families.family import Model
    from library.training.parts import Trained
    from library.training.plan.plan import Plan


def whole_model(model: Model, plan: Plan, say: Say) -> Trained:
    """What this recipe trains: the whole U-Net, and the text encoder until its end has come
    (--stop_text_encoder_training)."""
    from library.training.model_file import write_model
    from library.training.parts import Part, Trained

    rates = plan.rates
    parts, active = [Part("unet", model.unet, rates.unet or 0.0)], {"unet"}
    if rates.text_encoder is not None:
        parts.append(Part("text_encoder1", model.text_encoder, rates.text_encoder, rates.text_encoder_stop))
        active.add("text_encoder")
    return Trained(tuple(parts), frozenset(active), partial(write_model, plan, model, say))


RECIPE = Recipe(DREAMBOOTH, whole_model)

if __name__ == "__main__":
    raise SystemExit(run_recipe(RECIPE))
