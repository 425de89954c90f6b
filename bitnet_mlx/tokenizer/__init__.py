"""Text to ids and back: tokenizer.json and sentencepiece models, chat templates, streaming text.

Nothing heavy is imported until a tokenizer is loaded.
"""

from bitnet_mlx.tokenizer.detokenize import Detokenizer
from bitnet_mlx.tokenizer.load import Tokenizer, load_tokenizer

__all__ = ["Detokenizer", "Tokenizer", "load_tokenizer"]
