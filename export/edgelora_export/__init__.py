"""Merges adapters into a base, quantizes the result, builds ONNX graphs and writes bundles."""
