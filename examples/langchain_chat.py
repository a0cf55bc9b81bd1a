"""LangChain with `edgelora serve`: variants as chat models, a stream, and a tool.

edgelora serve BUNDLE
pip install langchain-openai
python langchain_chat.py [VARIANT]
"""

import os
import sys
from typing import Literal

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool
def find_weather(city: Literal["Rome", "Oslo"]) -> str:
    """Finds the weather in a city."""
    return {"Rome": "31 degrees", "Oslo": "12 degrees"}[city]


def main(variant: str) -> None:
    """Asks a variant, streams an answer, and has a tool called."""
    url, key = os.environ.get("EDGELORA_URL", "http://127.0.0.1:8080"), os.environ.get("EDGELORA_KEY", "unused")
    model = ChatOpenAI(model=variant, base_url=f"{url}/v1", api_key=key, max_tokens=120, temperature=0)
    print("answer:", model.invoke("Say hello.").content)
    print("stream:", "".join(chunk.content for chunk in model.stream("Say hello.")))
    called = model.bind_tools([find_weather], tool_choice="find_weather").invoke("How warm is Rome?")
    for call in called.tool_calls:
        print("call:", call["name"], call["args"], "=", find_weather.invoke(call["args"]))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "base")
