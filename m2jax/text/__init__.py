"""Text in and out: tokenizers, streaming text, chat templates. Knows no arrays."""

from m2jax.text.chat import chat_template, render_chat
from m2jax.text.detokenize import Detokenizer
from m2jax.text.files import special_strings
from m2jax.text.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Detokenizer",
    "Tokenizer",
    "chat_template",
    "load_tokenizer",
    "render_chat",
    "special_strings",
]
