"""Whether the captions of a run are encoded before training, which needs no text encoder then. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.data.captions import vary_with_seed

if TYPE_CHECKING:
    from library.data.batch import Tokenize
    from library.training.plan.facts import RunFacts
    from library.training.plan.images import Images

FEW_CAPTIONS = 128  # captions, cached even without the flag: 30 MB, and seconds even on a CPU


def encodes_captions_ahead(facts: RunFacts, *, frozen: bool) -> bool:
    """Whether captions are encoded before training: by --cache_text_encoder_outputs, or where it is cheap, for text
    encoders that are `frozen`, with a few captions that never change."""
    by_flag = facts.options.cache.cache_text_encoder_outputs
    return by_flag or (frozen and _captions_are_few(facts.images, facts.base_model.tokenizer))


def _captions_are_few(images: Images, tokenizer: Tokenize) -> bool:
    """Whether a few fixed captions are all that occur. The length of the run must not matter: a run that is extended
    would compute differently from a long one."""
    if not tokenizer.padded or not captions_are_fixed(images):
        return False
    return len({record.caption for record in images.records}) <= FEW_CAPTIONS


def captions_are_fixed(images: Images) -> bool:
    """Whether every image has the same caption in all epochs."""
    settings = [subset.captions for subset in images.scan.subsets]
    return not any(vary_with_seed(caption) or caption.dropout_every_n_epochs for caption in settings)
