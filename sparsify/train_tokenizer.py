"""Train a sentencepiece tokenizer that transformers and PowerInfer tokenize alike.

The engine merges greedily by score, which reproduces sentencepiece's BPE model but not its unigram
model. Byte fallback covers every text, and without normalization text round-trips. As the engine
does, the files put BOS in front of a text.
"""

from __future__ import annotations

from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import decoders, normalizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers import PreTrainedTokenizerBase as Tokenizer

from sparsecast.core.errors import InputError, reason_of
from sparsecast.core.models.pretrained import load_pretrained_tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> Tokenizer:
    """Train a tokenizer, write tokenizer.model and transformers' files, and load them.

    A line break is the byte token <0x0A>, as in LLaMA's vocabulary. As a separate piece it would be
    an added token of transformers, which splits text at added tokens; sentencepiece does not.

    Args:
        texts: Training text, taken line by line.
        vocab_size: Number of pieces, including `<unk> <s> </s>` and 256 byte tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = (line for text in texts for line in text.split("\n") if line.strip())
    model = BytesIO()  # sentencepiece would write a file's name into the model
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(
            f"the tokenizer could not be trained with {vocab_size} pieces "
            f"({reason_of(error)}); give more text or a smaller vocabulary"
        ) from error
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    backend = load_pretrained_tokenizer(folder, LlamaTokenizer).backend_tokenizer
    # transformers' pre-tokenizer adds no space before a text that starts with one.
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", left=1),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], pair=["<s>", "$A", "<s>:1", "$B:1"], special_tokens=[("<s>", 1)]
    )
    fast: Any = PreTrainedTokenizerFast
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    fast(tokenizer_object=backend, **special).save_pretrained(folder)
    tokenizer: Tokenizer = load_pretrained_tokenizer(folder)
    return tokenizer
