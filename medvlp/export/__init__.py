"""Weights of a run in the forms plain timm, transformers and safetensors read, with a model card."""
