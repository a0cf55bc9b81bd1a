"""Turns the telemetry of libraries off. The package imports this module before any other.

onnxruntime reads its variable once, when it is first imported, and its disable_telemetry_events() comes too late: the library
has then written a device id and a database under the user's cache folder (onnxruntime 1.32, Linux).
huggingface_hub reads its variable once as well. Without it, TRL reports each trainer that is made, with the model's architecture
and the GPU's name (TRL 1.16, trainer/base_trainer.py), and transformers adds a session id to its requests.
"""

import os

for _name in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(_name, "1")
