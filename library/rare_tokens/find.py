"""The work of tools/find_rare_tokens.py: read the model, measure, print, save. No torch at module level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from library.families.family import Model, Tokenizer
from library.families.registry import FAMILIES, CheckpointError, open_model
from library.messages import counted
from library.options.mistakes import Mistake, Mistakes, UserError
from library.rare_tokens.candidates import Name, common_words, find_candidates, read_name
from library.rare_tokens.options import RareTokenOptions
from library.rare_tokens.ranking import Measures, Ranked, rank, rank_by_merges, rarest_first
from library.rare_tokens.report import LOOK, describe_check, save, table
from library.runtime.device import describe_machine
from library.runtime.imports import quiet_libraries
from library.runtime.progress import ProgressBar

MOST_TOKENS = 50
"""Of a name: with the prompt around it, it must fit into one pass of a text encoder."""


def find_rare_tokens(options: RareTokenOptions) -> None:
    """Print candidates and checked names, and save them. Raises UserError."""
    model = None if options.ckpt is None else load_text_encoders(options)
    tokenizer = _tokenizer(options) if model is None else model.tokenizer
    candidates = find_candidates(tokenizer, options.max_length)
    if not candidates:
        raise UserError([Mistake("this tokenizer has no rare word of one token", "use a model with CLIP's tokenizer")])
    checked, like = _names(options, tokenizer)
    if model is None:
        ranked, found = rank_by_merges(candidates, candidates), rank_by_merges(checked, candidates)
    else:
        ranked, found = measure_names(model, options, candidates, checked, like)
    for each in found:
        print("\n".join(describe_check(each, len(candidates))))
    if like is None:
        ranked = rarest_first(ranked)
    else:
        ranked.sort(key=lambda each: each.likeness or 0.0, reverse=True)
    if not checked or like is not None:
        order = "by rarity" if like is None else f'nearest to "{like.text}" first'
        how = "by the order of the merges alone: --ckpt measures them" if model is None else order
        print(f"{counted(len(ranked), 'candidate')}, {how}")
        print("\n".join(table(ranked[: options.count])))
        print(LOOK.format(token=ranked[0].name.text, class_word=options.class_word))
    if options.save_to is not None:
        save(options.save_to, options.ckpt or options.family or "", ranked, found)
        print(f"{counted(len(ranked) + len(found), 'name')} in {options.save_to}")


def _tokenizer(options: RareTokenOptions) -> Tokenizer:
    family = next(family for family in FAMILIES if family.name == options.family)
    try:
        return family.tokenizer(None, options.tokenizer_cache_dir)
    except CheckpointError as error:
        raise UserError([Mistake(f"--tokenizer_cache_dir: {error}")]) from error


def load_text_encoders(options: RareTokenOptions) -> Model:
    """The text encoders of --ckpt, and its tokenizer. Raises UserError."""
    found = describe_machine().kind
    if options.device not in (None, "cpu", found):
        raise UserError([Mistake(f"--device {options.device} is not available", f"remove it to use {found}")])
    try:
        header, family = open_model(options.ckpt or "")
        family.sizes(header)  # before torch is imported, if something is wrong
        quiet_libraries()
        model = family.load(
            header,
            device=options.device or found,
            only=family.text_encoders,
            tokenizer_cache_dir=options.tokenizer_cache_dir,
        )
    except CheckpointError as error:
        raise UserError([Mistake(str(error))]) from error
    if model.broken:
        what = f"{options.ckpt} has NaN or infinite values, first in {model.broken[0]}"
        raise UserError([Mistake(what, "use an undamaged checkpoint")])
    return model


def _names(options: RareTokenOptions, tokenizer: Tokenizer) -> tuple[list[Name], Name | None]:
    """The names of --check, each once, and that of --like. Raises UserError for a name that is too long."""
    checked = [read_name(text.strip(), tokenizer) for text in dict.fromkeys(options.check)]
    like = None if options.like is None else read_name(options.like.strip(), tokenizer)
    mistakes = Mistakes()
    for flag, name in [*(("check", name) for name in checked), *([] if like is None else [("like", like)])]:
        if not 0 < name.tokens <= MOST_TOKENS:
            what = f'--{flag} "{name.text}" has {counted(name.tokens, "token")}'
            mistakes.add(what, f"give a name of 1 to {MOST_TOKENS} tokens")
    mistakes.raise_if_any()
    return checked, like


def measure_names(
    model: Model, options: RareTokenOptions, candidates: Sequence[Name], checked: Sequence[Name], like: Name | None
) -> tuple[list[Ranked], list[Ranked]]:
    """Candidates and checked names, ranked by what all text encoders of the model know of them. With `like` the
    candidates have a likeness: the lowest of any text encoder. Raises UserError."""
    import torch

    from library.rare_tokens import measures as measuring

    texts = list(dict.fromkeys(name.text for name in (*candidates, *checked, *([like] if like else []))))
    measured: dict[str, Mapping[str, Measures]] = {}
    alike: list[list[float]] = []
    words = {encoder: common_words(each) for encoder, each in model.tokenizer.by_encoder.items()}
    total = sum(len(texts) + len(common) for common in words.values())
    try:
        with ProgressBar("measuring", total, unit="prompt") as bar:
            for encoder, tokenizer in model.tokenizer.by_encoder.items():
                common, encoded = (
                    measuring.encode(
                        model.text_encoders[encoder],
                        tokenizer,
                        these,
                        options.class_word,
                        options.batch_size,
                        bar.update,
                    )
                    for these in (words[encoder], texts)
                )
                measured[encoder] = measuring.measure(encoded, texts, common, words[encoder])
                if like is not None:
                    alike.append(measuring.likeness(encoded, texts.index(like.text), common))
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UserError([Mistake("out of memory", "use a smaller --batch_size, or --device cpu")]) from error
    ranked = rank(measured, candidates, candidates)
    if alike:
        likeness = dict(zip(texts, map(min, zip(*alike, strict=True)), strict=True))
        ranked = [replace(each, likeness=likeness[each.name.text]) for each in ranked if each.name != like]
    return ranked, rank(measured, checked, candidates)
