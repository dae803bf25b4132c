"""The tiny models of tests/models."""

from tests.models.conftest import hf_model

__all__ = ["hf_model"]
