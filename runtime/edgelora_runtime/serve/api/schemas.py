"""The fields of requests, as JSON Schemas: one declaration for the check at the door and for the OpenAPI description.

Fields that are the runtime's own options are described by decode/options.py. Their bounds are here, since a description needs
them as numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgelora_runtime.decode.options import OPTIONS

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

Schema = dict[str, Any]

_MOST = (1 << 31) - 1
MOST_ANSWERS = 16
TEXT: Schema = {"type": "string", "minLength": 1}
BOOLEAN: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}
OBJECTS: Schema = {"type": "array", "items": OBJECT}
STOP: Schema = {"anyOf": [TEXT, {"type": "array", "items": TEXT, "maxItems": 16}]}
TOKENS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": _MOST}, "minItems": 1}
NUMBER: Schema = {"type": "number", "minimum": -1e6, "maximum": 1e6}

# Options of the runtime that a request may have under the same name. Those that a runtime lacks are left out.
_OPTIONS: dict[str, Schema] = {
    "max_tokens": {"type": "integer", "minimum": 1, "maximum": _MOST},
    "temperature": {"type": "number", "minimum": 0, "maximum": 100},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"type": "integer", "minimum": 0, "maximum": _MOST},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "seed": {"type": "integer", "minimum": 0, "maximum": (1 << 63) - 1},
    "stop": STOP,
    "logit_bias": {"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "repetition_penalty": {"type": "number", "minimum": 0.01, "maximum": 100},  # below, logits overflow float32
    "timeout": {"type": "number", "minimum": 0.001, "maximum": 1e6},
    "ignore_eos": BOOLEAN,
    "regex": TEXT,
    "grammar": TEXT,
    "speculation": {"enum": list(OPTIONS["speculation"].choices)},
}
_CHAT_ONLY: dict[str, Schema] = {
    "documents": OBJECTS,
    "date": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"},
    "continue_final_message": BOOLEAN,
}

# Fields that say something about the client or about OpenAI's own service, and change no answer here.
_WITHOUT_EFFECT: dict[str, Schema] = {
    "user": {"type": "string"},
    "metadata": {"type": "object"},
    "store": BOOLEAN,
    "service_tier": {"type": "string"},
    "safety_identifier": {"type": "string"},
    "prompt_cache_key": {"type": "string"},
}

_MODEL: Schema = {
    **TEXT,
    "maxLength": 512,
    "description": 'A variant, "auto" for the router\'s choice, or a live mix such as sql:0.7+medical:0.3.',
}
_LORA: Schema = {
    "type": "array",
    "maxItems": 64,
    "description": "A live mix as llama.cpp's server takes it: adapters by number or name. Others weigh 0.",
    "items": {
        "type": "object",
        "properties": {"id": {"anyOf": [{"type": "integer", "minimum": 0}, TEXT]}, "scale": NUMBER},
        "required": ["id", "scale"],
        "additionalProperties": False,
    },
}
RESPONSE_FORMAT: Schema = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"type": {"enum": ["text", "json_object"]}},
            "required": ["type"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {
                "type": {"const": "json_schema"},
                "json_schema": {
                    "type": "object",
                    "properties": {
                        "name": {"type": "string"},
                        "description": {"type": "string"},
                        "schema": OBJECT,
                        "strict": {"type": ["boolean", "null"]},
                    },
                    "required": ["schema"],
                    "additionalProperties": False,
                },
            },
            "required": ["type", "json_schema"],
            "additionalProperties": False,
        },
    ]
}
_CALLS: Schema = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "id": {"type": "string"},
            "type": {"const": "function"},
            "function": {
                "type": "object",
                "properties": {"name": TEXT, "arguments": {"type": ["string", "object"]}},
                "required": ["name"],
            },
        },
        "required": ["function"],
    },
}
MESSAGES: Schema = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {
            "role": TEXT,
            "content": {
                "anyOf": [
                    {"type": "string"},
                    {"type": "null"},
                    {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                            "required": ["type", "text"],
                        },
                    },
                ]
            },
            "reasoning_content": {"type": ["string", "null"]},
            "tool_calls": {"anyOf": [_CALLS, {"type": "null"}]},
            "tool_call_id": {"type": ["string", "null"]},
        },
        "required": ["role"],
    },
}
_FUNCTION: Schema = {
    "name": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"},
    "description": {"type": ["string", "null"]},
    "parameters": {"type": ["object", "null"]},
    "strict": {"type": ["boolean", "null"]},
}
_FUNCTION_TYPE: Schema = {"const": "function"}
_MOST_TOOLS = 128
TOOLS: Schema = {
    "type": "array",
    "maxItems": _MOST_TOOLS,
    "items": {
        "type": "object",
        "properties": {
            "type": _FUNCTION_TYPE,
            "function": {"type": "object", "properties": _FUNCTION, "required": ["name"]},
        },
        "required": ["type", "function"],
    },
}
_CHOICES: Schema = {"enum": ["none", "auto", "required"]}
TOOL_CHOICE: Schema = {
    "anyOf": [
        _CHOICES,
        {
            "type": "object",
            "properties": {
                "type": _FUNCTION_TYPE,
                "function": {"type": "object", "properties": {"name": TEXT}, "required": ["name"]},
            },
            "required": ["type", "function"],
        },
    ]
}
_STREAMING: dict[str, Schema] = {
    "stream": BOOLEAN,
    "stream_options": {
        "type": "object",
        "properties": {"include_usage": BOOLEAN, "include_obfuscation": BOOLEAN},
        "additionalProperties": False,
    },
    "n": {"type": "integer", "minimum": 1, "maximum": MOST_ANSWERS, "description": "The number of answers."},
}


def describe_option(name: str, schema: Schema) -> Schema:
    """Returns an option's schema with the help that its declaration gives."""
    return {**schema, "description": OPTIONS[name].help}


def _make_object(fields: Mapping[str, Schema], required: Collection[str]) -> Schema:
    """Returns the schema of a request. Fields that are not required may be null, which means their default."""
    properties = {name: schema if name in required else {"anyOf": [schema, {"type": "null"}]} for name, schema in fields.items()}
    return {"type": "object", "properties": properties, "required": sorted(required), "additionalProperties": False}


OPTION_SCHEMAS = {name: describe_option(name, schema) for name, schema in _OPTIONS.items() if name in OPTIONS}
CHAT_OPTION_SCHEMAS = {name: describe_option(name, schema) for name, schema in _CHAT_ONLY.items()}
_GENERATION = {"model": _MODEL, "lora": _LORA, **OPTION_SCHEMAS, **_STREAMING, **_WITHOUT_EFFECT}

CHAT = _make_object(
    {
        **_GENERATION,
        **CHAT_OPTION_SCHEMAS,
        "messages": MESSAGES,
        "max_completion_tokens": OPTION_SCHEMAS["max_tokens"],
        "logprobs": BOOLEAN,
        "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
        "response_format": RESPONSE_FORMAT,
        "chat_template_kwargs": describe_option("template_options", OBJECT),
        "tools": TOOLS,
        "tool_choice": TOOL_CHOICE,
        "parallel_tool_calls": BOOLEAN,
    },
    ("model", "messages"),
)
COMPLETION = _make_object(
    {
        **_GENERATION,
        "prompt": {
            "anyOf": [
                TEXT,
                TOKENS,
                {"type": "array", "items": TEXT, "minItems": 1, "maxItems": MOST_ANSWERS},
                {"type": "array", "items": TOKENS, "minItems": 1, "maxItems": MOST_ANSWERS},
            ]
        },
        "logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
        "response_format": RESPONSE_FORMAT,
    },
    ("model", "prompt"),
)
_TEXT_FORMAT: Schema = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"type": {"enum": ["text", "json_object"]}},
            "required": ["type"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {
                "type": {"const": "json_schema"},
                "name": {"type": "string"},
                "description": {"type": "string"},
                "schema": OBJECT,
                "strict": {"type": ["boolean", "null"]},
            },
            "required": ["type", "schema"],
            "additionalProperties": False,
        },
    ]
}
_INPUT_MESSAGE: Schema = {
    "type": "object",
    "properties": {
        "type": {"const": "message"},
        "id": {"type": "string"},
        "status": {"type": "string"},
        "role": {"enum": ["user", "assistant", "system", "developer"]},
        "content": {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"enum": ["input_text", "output_text"]}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                    },
                },
            ]
        },
    },
    "required": ["role", "content"],
    "additionalProperties": False,
}
_STATUS: Schema = {"type": ["string", "null"]}
_INPUT_CALL: Schema = {
    "type": "object",
    "properties": {
        "type": {"const": "function_call"},
        "id": {"type": ["string", "null"]},
        "call_id": TEXT,
        "name": TEXT,
        "arguments": {"type": "string"},
        "status": _STATUS,
    },
    "required": ["type", "call_id", "name", "arguments"],
}
_INPUT_RESULT: Schema = {
    "type": "object",
    "properties": {
        "type": {"const": "function_call_output"},
        "id": {"type": ["string", "null"]},
        "call_id": TEXT,
        "output": {"type": "string"},
        "status": _STATUS,
    },
    "required": ["type", "call_id", "output"],
}
_INPUT_THOUGHT: Schema = {
    "type": "object",
    "properties": {
        "type": {"const": "reasoning"},
        "content": {
            "type": ["array", "null"],
            "items": {
                "type": "object",
                "properties": {"type": {"const": "reasoning_text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
    },
    "required": ["type"],
}
_INPUT_ITEM: Schema = {"anyOf": [_INPUT_MESSAGE, _INPUT_CALL, _INPUT_RESULT, _INPUT_THOUGHT]}
RESPONSE = _make_object(
    {
        "model": _MODEL,
        "lora": _LORA,
        **{name: schema for name, schema in OPTION_SCHEMAS.items() if name != "max_tokens"},
        **_WITHOUT_EFFECT,
        "stream": BOOLEAN,
        "input": {"anyOf": [TEXT, {"type": "array", "items": _INPUT_ITEM, "minItems": 1}]},
        "instructions": {"type": "string"},
        "max_output_tokens": OPTION_SCHEMAS["max_tokens"],
        "text": {"type": "object", "properties": {"format": _TEXT_FORMAT}, "additionalProperties": False},
        "tools": {
            "type": "array",
            "maxItems": _MOST_TOOLS,
            "items": {"type": "object", "properties": {"type": _FUNCTION_TYPE, **_FUNCTION}, "required": ["type", "name"]},
        },
        "tool_choice": {
            "anyOf": [
                _CHOICES,
                {"type": "object", "properties": {"type": _FUNCTION_TYPE, "name": TEXT}, "required": ["type", "name"]},
            ]
        },
        "parallel_tool_calls": BOOLEAN,
        "chat_template_kwargs": describe_option("template_options", OBJECT),
    },
    ("model", "input"),
)
EMBEDDING = _make_object(
    {
        "model": _MODEL,
        "lora": _LORA,
        "input": {
            "anyOf": [
                TEXT,
                TOKENS,
                {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 256},
                {"type": "array", "items": TOKENS, "minItems": 1, "maxItems": 256},
            ]
        },
        "encoding_format": {"enum": ["float", "base64"]},
        "user": {"type": "string"},
    },
    ("model", "input"),
)
_OLLAMA_OPTIONS: Schema = {
    "type": "object",
    "properties": {
        **{name: OPTION_SCHEMAS[name] for name in ("temperature", "top_p", "top_k", "min_p", "seed", "stop")},
        **{name: OPTION_SCHEMAS[name] for name in ("presence_penalty", "frequency_penalty") if name in OPTION_SCHEMAS},
        "repeat_penalty": OPTION_SCHEMAS["repetition_penalty"],
        "num_predict": {"type": "integer", "minimum": -2, "maximum": _MOST},
        "num_ctx": {"type": "integer", "minimum": 1, "maximum": _MOST},
    },
    "additionalProperties": False,
}
_OLLAMA: dict[str, Schema] = {
    "model": _MODEL,
    "stream": BOOLEAN,
    "format": {"anyOf": [{"enum": ["json", ""]}, OBJECT]},
    "options": _OLLAMA_OPTIONS,
    "keep_alive": {"type": ["string", "number"]},
}
_THINK: Schema = {
    "enum": [True, False, "low", "medium", "high"],
    "description": "Whether to think before the answer, or how much.",
}
OLLAMA_CHAT = _make_object({**_OLLAMA, "messages": MESSAGES, "tools": TOOLS, "think": _THINK}, ("model", "messages"))
OLLAMA_GENERATE = _make_object(
    {**_OLLAMA, "prompt": TEXT, "system": {"type": "string"}, "raw": BOOLEAN, "think": _THINK}, ("model", "prompt")
)
OLLAMA_EMBED = _make_object(
    {
        "model": _MODEL,
        "input": {"anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 256}]},
        "truncate": {"const": False},
        "keep_alive": {"type": ["string", "number"]},
    },
    ("model", "input"),
)
