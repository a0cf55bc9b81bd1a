"""The fields of requests, as JSON Schemas: one declaration for the check at the door and for the OpenAPI description.

Fields that are the runtime's own options are described by decode/options.py. Their bounds are here, since a description needs
them as numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgelora_runtime.decode.options import OPTIONS
from edgelora_runtime.errors import suggest_name
from edgelora_runtime.serve.failures import RequestFailed

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
        },
        "required": ["role"],
    },
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
_INPUT_ITEM: Schema = {
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
OLLAMA_CHAT = _make_object({**_OLLAMA, "messages": MESSAGES}, ("model", "messages"))
OLLAMA_GENERATE = _make_object({**_OLLAMA, "prompt": TEXT, "system": {"type": "string"}, "raw": BOOLEAN}, ("model", "prompt"))
OLLAMA_EMBED = _make_object(
    {
        "model": _MODEL,
        "input": {"anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 256}]},
        "truncate": {"const": False},
        "keep_alive": {"type": ["string", "number"]},
    },
    ("model", "input"),
)

# Values of a field that ask for nothing, which clients send for fields that they do not use.
_ASKS_FOR_NOTHING: tuple[object, ...] = (None, False, 0, "", [], {}, "none", ["text"])


def check_fields(body: Mapping[str, Any], schema: Schema, unsupported: Mapping[str, str]) -> dict[str, Any]:
    """Returns the fields of a request that are not null. A whole number that was written as 2.0 becomes 2.

    unsupported: fields of the API that this server does not have, with the reason. Raises RequestFailed with 400, which names the
    field.
    """
    known = schema["properties"]
    for name, reason in unsupported.items():
        if name in body and name not in known and body[name] not in _ASKS_FOR_NOTHING:
            raise RequestFailed(400, f"{name} is not supported: {reason}", param=name, code="unsupported_parameter")
    for name in body:
        if name not in known and name not in unsupported:
            said = suggest_name([name[:100]], known) or "; leave it out"
            raise RequestFailed(400, f"no parameter {name[:100]!r}{said}", param=name[:100], code="unknown_parameter")
    given = {name: value for name, value in body.items() if name in known and value is not None}
    for name in schema["required"]:
        if name not in given:
            raise RequestFailed(400, f"{name} is missing; give it", param=name, code="missing_required_parameter")
    for name, value in given.items():
        _check_value(name, value, known[name])
    return {name: _make_whole(value, known[name]) for name, value in given.items()}


def _check_value(name: str, value: object, schema: Schema) -> None:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    wrong = best_match(Draft202012Validator(schema).iter_errors(value))
    if wrong is not None:
        where = name + "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in wrong.absolute_path)
        raise RequestFailed(400, f"{where}: {wrong.message}", param=name, code="invalid_value")


def _make_whole(value: Any, schema: Schema) -> Any:
    inner = schema.get("anyOf", [schema])[0]
    if isinstance(value, float) and inner.get("type") == "integer":
        return int(value)
    if isinstance(value, dict) and "properties" in inner:
        return {key: _make_whole(item, inner["properties"].get(key, {})) for key, item in value.items()}
    if isinstance(value, list):
        return [int(item) if isinstance(item, float) else item for item in value]
    return value
