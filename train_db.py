"""DreamBooth and fine-tuning: trains all weights of the U-Net and, unless told otherwise, of the text encoders.

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
    from library.training.adapter.plan import AdapterPlan
    from library.training.optim.learning_rates import Optimization
    from library.training.plan.facts import RunFacts
    from library.training.trainable import Trainable


def whole_model(
    model: Model, facts: RunFacts, optimization: Optimization, adapter: AdapterPlan | None, say: Say
) -> Trainable:
    """What this recipe trains: the U-Net, whole or by blocks (--block_lr), and the text encoders until their end has
    come (--stop_text_encoder_training)."""
    from library.training.saving.model_file import write_model
    from library.training.trainable import Part, Trainable, block_groups

    rates, backbone = optimization.learning_rates, model.family.backbone
    blocks = block_groups(model.backbone, rates.blocks, model.family.block_of)
    # rates of 0 for all blocks leave no group, and without groups a part is trained as a whole
    parts = (
        [Part(backbone, model.backbone, rates.modules[backbone], groups=blocks)] if blocks or not rates.blocks else []
    )
    for number, (name, module) in enumerate(model.text_encoders.items(), 1):
        if name in rates.modules:
            parts.append(Part(f"text_encoder{number}", module, rates.modules[name], rates.text_encoder_stop))
    active = frozenset(rates.modules)
    return Trainable(tuple(parts), active, partial(write_model, facts, model, say))


RECIPE = Recipe(DREAMBOOTH, whole_model)

if __name__ == "__main__":
    raise SystemExit(run_recipe(RECIPE))
