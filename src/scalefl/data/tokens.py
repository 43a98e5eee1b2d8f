"""From text to token ids, all of one length, and which of them count.

Shapes: N texts, L tokens.
"""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalefl.errors import ConfigError, DataError

_log = logging.getLogger("scalefl")

HASH = "hash:"
_PADDING, _START, _FIRST = 0, 1, 2  # the ids of hashed words begin at _FIRST

Tokenizer = Callable[[Sequence[str], int], list[list[int]]]
"""Ids of each text, at most so many."""


def tokenized(texts: Sequence[str], tokenizer: str, max_length: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, int64 [N, L]; L is `max_length`.

    Args:
        texts: N.
        tokenizer: "hash:V", or where a tokenizer of Hugging Face's is; see `Source`.
        max_length: longer texts are cut, shorter ones padded at their end.

    Raises:
        ConfigError: no such tokenizer, or its package is missing.
    """
    encode, padding = _hashing(tokenizer) if tokenizer.startswith(HASH) else _loaded(tokenizer)
    found = encode(texts, max_length)
    input_ids = torch.full((len(texts), max_length), padding)
    attention_mask = torch.zeros(len(texts), max_length, dtype=torch.int64)
    for row, ids in enumerate(found):
        if not ids:
            raise DataError(f"text {row} is empty: nothing of it would count")
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
    full = int((attention_mask[:, -1] == 1).sum())
    if full > 0.1 * len(texts):
        _log.info("%d of %d texts fill max_length = %d tokens or are cut there", full, len(texts), max_length)
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _hashing(name: str) -> tuple[Tokenizer, int]:
    """Words and signs by a checksum of theirs, the same on every machine: 0 pads, 1 begins each text."""
    size = name.removeprefix(HASH)
    if not size.isdecimal() or int(size) <= _FIRST:
        raise ConfigError(f"tokenizer = {name!r}: expected the size of the vocabulary, 3 or more, as 'hash:4096'")
    buckets = int(size) - _FIRST

    def encode(texts: Sequence[str], max_length: int) -> list[list[int]]:
        words = (re.findall(r"\w+|[^\w\s]", text.lower())[: max_length - 1] for text in texts)
        return [[_START, *(_FIRST + zlib.crc32(word.encode()) % buckets for word in row)] for row in words]

    return encode, _PADDING


def _loaded(name: str) -> tuple[Tokenizer, int]:
    path = Path(name).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file() and file.suffix in (".json", ".txt"):
        return _from_file(file)
    return _by_transformers(name, path)


def _from_file(file: Path) -> tuple[Tokenizer, int]:
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(f"tokenizer = {str(file)!r} needs a package: pip install tokenizers") from error
    try:
        if file.suffix == ".json":
            made: Any = tokenizers.Tokenizer.from_file(str(file))
        else:  # one word piece a line, as BERT's vocab.txt
            made = tokenizers.BertWordPieceTokenizer(str(file))
    except Exception as error:  # the package raises bare exceptions
        raise ConfigError(f"cannot read the tokenizer {file}: {error}") from error
    made.no_padding()

    def encode(texts: Sequence[str], max_length: int) -> list[list[int]]:
        made.enable_truncation(max_length)
        return [encoding.ids for encoding in made.encode_batch(list(texts))]

    pads = [made.token_to_id(token) for token in ("[PAD]", "<pad>", "<|pad|>")]
    return encode, next((pad for pad in pads if pad is not None), _PADDING)


def _by_transformers(name: str, path: Path) -> tuple[Tokenizer, int]:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ConfigError(
            f"tokenizer = {name!r}: no tokenizer.json or vocab.txt there, and other tokenizers need a package: "
            "pip install transformers"
        ) from error
    try:
        made = AutoTokenizer.from_pretrained(str(path) if path.exists() else name)
    except Exception as error:  # whatever a package raises that reads files of many kinds, or the network
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"tokenizer = {name!r}: no such file or folder here, and transformers has none of that name ({first}); "
            "'hash:4096' needs nothing"
        ) from error

    def encode(texts: Sequence[str], max_length: int) -> list[list[int]]:
        ids: list[list[int]] = made(list(texts), truncation=True, max_length=max_length)["input_ids"]
        return ids

    return encode, int(made.pad_token_id if made.pad_token_id is not None else made.eos_token_id or _PADDING)
