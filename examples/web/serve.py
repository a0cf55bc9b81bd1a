"""A static server for the page that runs a variant in the browser, and for one bundle.

    npm install
    python serve.py BUNDLE

Any other static server will do, if it sends the two Cross-Origin headers: without them, a page has one thread.
"""

import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).parent
TYPES = {".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm", ".jinja": "text/plain"}


class Handler(SimpleHTTPRequestHandler):
    """Files of this folder, and of the bundle below /bundle/."""

    def __init__(self, *arguments, bundle, **options):
        self.bundle = bundle
        self.extensions_map = {**self.extensions_map, **TYPES}
        super().__init__(*arguments, **options)

    def translate_path(self, path):
        """Returns the file of a request's path. A bundle is one flat folder."""
        name = unquote(urlsplit(path).path)
        if name.startswith("/bundle/"):
            return str(self.bundle / Path(name).name)
        return super().translate_path(path)

    def end_headers(self):
        """Adds what threads need, and lets the browser keep the files that are named by their content."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        is_blob = len(Path(urlsplit(self.path).path).stem) == 64
        self.send_header("Cache-Control", "max-age=31536000, immutable" if is_blob else "no-cache")
        super().end_headers()

    def log_message(self, *arguments):
        """Says nothing of each request."""


def main():
    bundle, port = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 8000
    if not (bundle / "bundle.json").is_file():
        sys.exit(f"{bundle} is no bundle: it has no bundle.json")
    if not (HERE / "node_modules").is_dir():
        sys.exit(f"onnxruntime-web is not installed; run npm install in {HERE}")
    handler = partial(Handler, directory=str(HERE), bundle=bundle)
    with ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
