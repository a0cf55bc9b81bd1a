"""Turns onnxruntime's telemetry off. The package imports this module before any other.

onnxruntime reads the variable once, when it is first imported, and its disable_telemetry_events() comes too late: the library
has then written a device id and a database under the user's cache folder (onnxruntime 1.32, Linux).
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
