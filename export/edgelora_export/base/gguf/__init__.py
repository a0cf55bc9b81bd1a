"""Bases in llama.cpp's GGUF files: weights, config, tokenizer and chat template, read from the one file."""
