"""OpenAI's own client with `edgelora serve`: a variant, a stream, an answer that fits a schema, and a mix of adapters.

edgelora serve BUNDLE
pip install openai
python openai_client.py [VARIANT] [ADAPTER=WEIGHT …]
"""

import json
import os
import sys

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("EDGELORA_URL", "http://127.0.0.1:8080") + "/v1", api_key=os.environ.get("EDGELORA_KEY", "unused")
)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "is_capital": {"type": "boolean"}},
    "required": ["city", "is_capital"],
    "additionalProperties": False,
}


def main(variant: str, weights: list[str]) -> None:
    """Asks one variant three times, and then a mix if there are weights."""
    question = [{"role": "user", "content": "Name a city."}]
    answer = client.chat.completions.create(model=variant, messages=question, max_tokens=40)
    print(f"{answer.model}: {answer.choices[0].message.content}")
    print(f"the switch took {answer.receipt['milliseconds']:.1f} ms, and {answer.timings['cache_n']} tokens were cached")

    for chunk in client.chat.completions.create(model=variant, messages=question, max_tokens=40, stream=True):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()

    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
    answer = client.chat.completions.create(model=variant, messages=question, response_format=form, max_tokens=100)
    print(json.loads(answer.choices[0].message.content))

    if weights:
        mix = "+".join(weight.replace("=", ":") for weight in weights)  # sql=0.7 medical=0.3 is the model sql:0.7+medical:0.3
        print(client.chat.completions.create(model=mix, messages=question, max_tokens=40).choices[0].message.content)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "base", sys.argv[2:])
