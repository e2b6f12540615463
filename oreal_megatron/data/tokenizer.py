"""Tokenizers: the tokenizer of a Hugging Face directory, or the built-in tokenizer for arithmetic."""

from __future__ import annotations

import string
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer. name: `arithmetic`, or a directory with a tokenizer.

    Raises:
        ValueError: there is no such directory, or no tokenizer in it can be loaded.
    """
    if name == "arithmetic":
        return arithmetic_tokenizer()
    if not Path(name).is_dir():
        raise ValueError(
            f"model.tokenizer = {name}: neither `arithmetic` nor a directory; name a Hugging Face model directory"
        )
    # tokenizer.json is taken as it is. Where config.json says qwen2, AutoTokenizer makes Qwen2's tokenizer from any
    # other's vocabulary, which splits text into other tokens.
    loader = PreTrainedTokenizerFast if (Path(name) / "tokenizer.json").is_file() else AutoTokenizer
    try:
        return loader.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.tokenizer = {name}: no tokenizer could be loaded: {error}") from error


def arithmetic_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a tokenizer with a token for every printable ASCII character and for a few words, and a chat template."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "system", "user", "assistant", "Compute ", "\\boxed{"]
    characters = ["\n", *string.digits, *sorted(set(string.printable[:95]) - set(string.digits))]
    vocabulary = {token: index for index, token in enumerate([*words[:3], "<|unknown|>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(words[:3])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words[3:]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|unknown|>",
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
