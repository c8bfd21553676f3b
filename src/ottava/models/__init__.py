"""Hugging Face model classes, their published tensors, and the chat template with its thinking switch."""
