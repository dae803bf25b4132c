"""Model loading and the decoder's forward pass."""

from tilestream.models.config import ModelConfig
from tilestream.models.errors import ModelLoadError
from tilestream.models.loader import LoadedModel, load_model
from tilestream.models.tokenizer import Tokenizer

__all__ = ["LoadedModel", "ModelConfig", "ModelLoadError", "Tokenizer", "load_model"]
