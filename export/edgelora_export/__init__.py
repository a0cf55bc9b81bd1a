"""Merges adapters into a base, quantizes the result, builds ONNX graphs and writes bundles."""

import edgelora_runtime as edgelora_runtime  # turns onnxruntime's telemetry off before a module here imports onnxruntime
