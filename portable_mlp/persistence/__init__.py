"""Fitted models in files: the library's own format, and ONNX."""

from portable_mlp.persistence.model import load, read_metadata, save, save_checkpoint
from portable_mlp.persistence.modelfile import ModelFileError
from portable_mlp.persistence.objects import register

__all__ = ["ModelFileError", "load", "read_metadata", "register", "save", "save_checkpoint"]
