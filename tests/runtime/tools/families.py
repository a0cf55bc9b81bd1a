"""Chat templates that write calls as families do whose templates no installed package has.

Each writes a conversation, its calls and its tools. What matters here is how calls are written, so the rest is short.
"""

# ruff: noqa: E501 - a template stands on one line, since a line break is text

from __future__ import annotations

_MESSAGES = "{{ bos_token }}{% if tools %}tools: {{ tools | tojson }}\n{% endif %}{% for m in messages %}"
_IM_START = "{% if tools %}<|im_start|>system\n{TOOLS}<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
_IM_END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_EXAMPLE = (
    "You may call functions: {{ tools | tojson }}. For each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)

# https://huggingface.co/mistralai/Mistral-7B-Instruct-v0.3: a list of objects with ids of nine characters
MISTRAL_LIST = (
    _MESSAGES + "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% elif m.tool_calls %}[TOOL_CALLS] ["
    "{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    "{{ (c.function | tojson)[:-1] }}, \"id\": \"{{ c.id }}\"}{{ ', ' if not loop.last else ']' + eos_token }}{% endfor %}"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# https://huggingface.co/mistralai/Mistral-Small-3.2-24B-Instruct-2506: a mark per call, with its id
MISTRAL_IDS = (
    _MESSAGES
    + "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    "{% else %}{{ m.content or '' }}{% for c in m.tool_calls %}[TOOL_CALLS]{{ c.function.name }}[CALL_ID]{{ c.id }}[ARGS]{{ c.function.arguments | tojson }}"
    "{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
)
# https://huggingface.co/mistralai/Ministral-3-8B-Reasoning-2512: a mark per call, and thoughts
MISTRAL_ARGUMENTS = (
    _MESSAGES
    + "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    "{% else %}{% if m.reasoning_content %}[THINK]{{ m.reasoning_content }}[/THINK]{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls %}[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
)
# https://huggingface.co/microsoft/Phi-4-mini-instruct, with calls in a list as its card has them
PHI_4_MINI = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}{% if m.tool_calls %}<|tool_call|>[{% for c in m.tool_calls %}{{ c.function | tojson }}"
    "{{ ', ' if not loop.last }}{% endfor %}]<|/tool_call|>{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
# https://huggingface.co/ibm-granite/granite-4.0-micro
GRANITE_4 = (
    "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content or '' }}{% for c in m.tool_calls %}"
    '{{ \'\n\' if not loop.first or m.content }}<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|end_of_text|>\n{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
# https://huggingface.co/HuggingFaceTB/SmolLM3-3B shows the model an example, and writes no calls
SMOLLM3 = (_IM_START + _IM_END).replace("{TOOLS}", _EXAMPLE)
# https://huggingface.co/NousResearch/Hermes-2-Pro-Llama-3-8B
HERMES = (
    _IM_START.replace("{TOOLS}", _EXAMPLE)
    + '{% for c in m.tool_calls %}<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>\n{% endfor %}'
    + _IM_END
)
# https://huggingface.co/google/functiongemma-270m-it
FUNCTION_GEMMA = (
    "{% macro value(v) %}{% if v is string %}<escape>{{ v }}<escape>{% elif v is mapping %}{{ '{' }}{% for k, i in v | dictsort %}{{ k }}:{{ value(i) }}"
    "{{ ',' if not loop.last }}{% endfor %}{{ '}' }}{% elif v is boolean or v is number or v is none %}{{ v | tojson }}{% else %}[{% for i in v %}{{ value(i) }}"
    "{{ ',' if not loop.last }}{% endfor %}]{% endif %}{% endmacro %}{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content or '' }}{% for c in m.tool_calls %}<start_function_call>call:{{ c.function.name }}{{ value(c.function.arguments) }}<end_function_call>{% endfor %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct knows no tools
SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

WRITE_CALLS = {
    "mistral-list": MISTRAL_LIST,
    "mistral-ids": MISTRAL_IDS,
    "mistral-arguments": MISTRAL_ARGUMENTS,
    "phi-4-mini": PHI_4_MINI,
    "granite-4": GRANITE_4,
    "hermes": HERMES,
    "function-gemma": FUNCTION_GEMMA,
}
# Marks that are special tokens in the models' vocabularies, and marks that are added tokens with a text.
SPECIAL = (
    "[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<|im_start|>", "<|im_end|>",
    "<|python_tag|>", "<|tool_call_start|>", "<|tool_call_end|>", "<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>", "<escape>",
    "<start_function_call>", "<end_function_call>", "<|tool_response>",
)  # fmt: skip
ADDED = (
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    "<|tool_call|>",
    "<|/tool_call|>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
)
