"""An agent in forty lines: the model calls tools through `edgelora serve`, this program runs them, and the model answers.

edgelora serve BUNDLE
pip install openai
python agent.py [VARIANT] [QUESTION]
"""

import json
import os
import sys

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("EDGELORA_URL", "http://127.0.0.1:8080") + "/v1", api_key=os.environ.get("EDGELORA_KEY", "unused")
)
STOCK = {"apples": 12, "pears": 3}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "count_stock",
            "description": "Counts how many of a fruit are in stock.",
            "parameters": {"type": "object", "properties": {"fruit": {"enum": list(STOCK)}}, "required": ["fruit"]},
        },
    }
]


def count_stock(fruit: str) -> str:
    """Returns the answer of the tool."""
    return json.dumps({"fruit": fruit, "count": STOCK[fruit]})


def main(variant: str, question: str) -> None:
    """Lets the model call the tool once, and answer with what it returned."""
    messages = [{"role": "user", "content": question}]
    # A small model that was not trained for tools seldom calls one by itself. A trained one can be left to choose: "auto".
    said = (
        client.chat.completions.create(
            model=variant, messages=messages, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_tokens=100
        )
        .choices[0]
        .message
    )
    messages.append(said.to_dict())
    for call in said.tool_calls or ():
        arguments = json.loads(call.function.arguments)  # they fit the schema, unless max_tokens cut them off
        result = count_stock(**arguments)
        print(f"{call.function.name}({arguments}) = {result}")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    answer = client.chat.completions.create(model=variant, messages=messages, tools=TOOLS, tool_choice="none", max_tokens=60)
    print(answer.choices[0].message.content)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "base", sys.argv[2] if len(sys.argv) > 2 else "How many apples are there?")
