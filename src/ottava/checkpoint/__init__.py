"""Model folders: reading and writing safetensors, one digest of exact values, layouts, and the converter.

A checkpoint is a Hugging Face folder. Its tensors are read and written in bands of rows, so that a
model may be larger than the machine's memory, and its headers are distrusted until checked.
"""
