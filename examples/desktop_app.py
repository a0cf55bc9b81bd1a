"""A desktop app: a conversation in a window, with a choice of variants and a stop button.

Run it with `python desktop_app.py BUNDLE`. The model works in a thread, and the window polls a queue for its pieces.
"""

from __future__ import annotations

import queue
import sys
import threading
import tkinter as tk
from tkinter import ttk
from typing import TYPE_CHECKING

from edgelora_runtime import EdgeloraError, Runtime

if TYPE_CHECKING:
    from edgelora_runtime import TextStream

_POLL = 30  # milliseconds


class ChatWindow:
    """A window around one conversation."""

    def __init__(self, root: tk.Tk, runtime: Runtime) -> None:
        self.chat = runtime.chat(max_tokens=400)
        self.stream: TextStream | None = None
        self._root = root
        self._pieces: queue.Queue[str | None] = queue.Queue()  # None ends an answer
        root.title("edgelora")
        self.variant = ttk.Combobox(root, values=list(runtime.variants), state="readonly")
        self.variant.set(runtime.current)
        self.variant.bind("<<ComboboxSelected>>", lambda _: self.chat.switch(self.variant.get()))
        self.text = tk.Text(root, wrap="word", state="disabled", width=80, height=24)
        self.entry = ttk.Entry(root)
        self.entry.bind("<Return>", lambda _: self.ask())
        self.button = ttk.Button(root, text="Send", command=self.ask)
        self.variant.pack(fill="x")
        self.text.pack(fill="both", expand=True)
        self.entry.pack(side="left", fill="x", expand=True)
        self.button.pack(side="right")
        self.entry.focus()

    def ask(self) -> None:
        """Sends the line that was typed."""
        question = self.entry.get().strip()
        if not question or self.stream is not None:
            return
        try:
            self.stream = self.chat.stream(question)
        except EdgeloraError as error:
            self._show(f"\n[{error}]\n")
            return
        self.entry.delete(0, "end")
        self._show(f"\n> {question}\n")
        self.button.configure(text="Stop", command=self.stream.cancel)
        threading.Thread(target=self._write, args=(self.stream,), daemon=True).start()
        self._root.after(_POLL, self._poll)

    def _write(self, stream: TextStream) -> None:
        """Reads an answer, in a thread."""
        try:
            for piece in stream:
                self._pieces.put(piece)
        except EdgeloraError as error:
            self._pieces.put(f"[{error}]")
        self._pieces.put(None)

    def _poll(self) -> None:
        while not self._pieces.empty():
            piece = self._pieces.get()
            if piece is None:
                self.stream = None
                self.button.configure(text="Send", command=self.ask)
                self._show("\n")
                return
            self._show(piece)
        self._root.after(_POLL, self._poll)

    def _show(self, text: str) -> None:
        self.text.configure(state="normal")
        self.text.insert("end", text)
        self.text.configure(state="disabled")
        self.text.see("end")


def main() -> None:
    """Opens the bundle that the command line names, and runs until the window is closed."""
    with Runtime(sys.argv[1]) as runtime:
        root = tk.Tk()
        ChatWindow(root, runtime)
        root.mainloop()


if __name__ == "__main__":
    main()
