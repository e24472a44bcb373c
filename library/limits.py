"""How much a file of others may ask for: every limit in one place. docs/security.md lists them for users.

A file that asks for more is refused before memory is allocated or time is spent. The limits are far above what real
files need; those on images are flags (--max_image_memory). Imports nothing, so that every room may use it.
"""

from __future__ import annotations

MB, GB = 1_000_000, 1_000_000_000

OPTIONS_FILE = 16 * MB  # bytes of a TOML or JSON file of options, datasets, prompts, boxes, webhooks, trackers
METADATA_FILE = 2 * GB  # bytes of a metadata file: a million images have some 300 MB
CAPTION_FILE = 1 * MB  # bytes of a caption file; a long caption has 2 kB
CONFIG_FILE = 64 * MB  # bytes of a JSON or text file within a model's folder; the largest tokenizer.json has 33 MB
KEY_PARTS = 100  # parts of a dotted TOML key; the TOML reader needs quadratic time for them

SAFETENSORS_HEADER = 100 * MB  # bytes; the safetensors library's own limit
DIMENSIONS = 32  # of a tensor
LONGEST_DIMENSION = 1 << 48
PICKLE_STRUCTURE = 64 * MB  # bytes of a torch pickle without its weights; the largest published ones have 3 MB
PICKLE_STEPS = 10_000_000  # instructions of a pickle; the largest published ones have 0.5 million
PICKLE_NAME = 1000  # characters of a name that a pickle uses, or of a key in it
PICKLE_NAMES = 1000  # different names in it
NESTED_STATE_DICTS = 16  # `state_dict` within `state_dict`
UNPACKED = 20  # times its size that a compressed archive may become; weights hardly shrink
SHARED = 4  # times its data that a file's tensors may come to: tied weights are stored once
CACHED_ARRAY = 1 * GB  # bytes of an array in a latent cache; a 4096x4096 image has 4 MB

PATTERN = 1000  # characters of a pattern in a PEFT configuration
PATTERN_STATES = 500  # of its automaton; a repetition {m,n} counts n times
PATTERNS_STATES = 1000  # of the automata of all patterns in one configuration
PATTERNS = 10_000  # in one configuration; every layer of the largest models is named once

SHARDS = 1_000_000  # archives that one name with braces may stand for

PROMPT_LENGTH = 20_000  # characters of a prompt with its options
PROMPT_SIDE = 8192  # pixels of --w and --h in a prompt, as of the flags
PROMPT_STEPS = 1000  # of --s in a prompt
NESTED_WEIGHTS = 100  # brackets of weights within each other in a caption; more are text
NESTED_WILDCARDS = 20_000  # wildcards within each other; more are text
LARGEST_WEIGHT = 1000.0  # of a piece of a caption, in either direction
