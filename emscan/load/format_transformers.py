"""Hugging Face folders, and the `config.json` in them: the installed transformers has the architecture.

A configuration names an architecture, it brings no code: the class comes from transformers itself. A folder with
weights is loaded whole; without them, or for the bare `config.json`, the model has shapes only and the audit tells its
structure.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, ClassVar

from emscan.load import huggingface, shards
from emscan.load.registry import Content, Format, Options
from emscan.load.source import RefusalError, Source, printable

_LARGEST = 1 << 24  # bytes of a configuration
_COUNTS = re.compile(r"(num|n)_.*(layers?|blocks?|labels|stages)|(num|n)_layer|.*_layers|layers|depths?")
_MOST = 100_000  # layers or labels; no model has as many, and lists of that length are made before any check


class TransformersFormat(Format):
    """`config.json` of a Hugging Face model, by itself or with the weights beside it."""

    name: ClassVar[str] = "transformers"
    title: ClassVar[str] = "a Hugging Face configuration"
    folders: ClassVar[bool] = True

    def matches(self, source: Source) -> bool:
        """A JSON object called config.json, or one that says which type of model it describes."""
        head = source.head[:64].lstrip()
        if Path(source.path).name == "config.json":
            return not _binary(source.head[:64])
        if not head.startswith(b"{") or source.size > _LARGEST:
            return False
        return b'"model_type"' in source.data or b'"architectures"' in source.data

    def load(self, source: Source, options: Options) -> Content:
        """Return the model, with the weights in its folder or on the meta device."""
        fields = _parsed(source)
        files = shards.find(source.folder) if source.folder is not None else shards.Files()
        if not files.paths:
            plan = huggingface.plan(fields, source.folder, trust=options.trust, weights=False)
            notes = [*plan.notes, *_unread(source, files)]
            return Content(huggingface.build(plan), plan.trusted, notes)
        plan = huggingface.plan(fields, source.folder, trust=options.trust, weights=True)
        weights, digests, more = shards.read(files, options)
        module, notes, misfit = huggingface.load(plan, weights, partial=options.partial)
        digest = hashlib.sha256("".join([source.sha256, *digests]).encode()).hexdigest()
        module = module.to(options.device)
        return Content(module, plan.trusted, [*plan.notes, *more, *notes], digest, misfit)


def _binary(head: bytes) -> bool:
    return any(byte < 9 for byte in head)


def _parsed(source: Source) -> dict[str, Any]:
    if source.size > _LARGEST:
        raise RefusalError(f"its configuration has {source.size:,} bytes", "give the config.json of a model")
    try:
        fields = json.loads(source.data)
    except RecursionError:
        raise RefusalError("its configuration is nested too deep", "give the config.json of a model") from None
    except (ValueError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0][:120]
        raise RefusalError(f"its configuration is not JSON ({reason})", "copy or download it again") from None
    if not isinstance(fields, dict):
        raise RefusalError("its configuration is no JSON object", "give the config.json of a model")
    if not isinstance(fields.get("model_type", ""), str):
        raise RefusalError("its model_type is no text", "give the config.json of a model")
    _check_sizes(fields)
    return fields


def _check_sizes(fields: dict[str, Any]) -> None:
    """Refuse counts that nothing could be built from, before anything makes lists of that length."""
    waiting: list[Any] = [fields]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        if not isinstance(part, dict):
            continue
        for name, value in part.items():
            if isinstance(value, dict | list):
                waiting.append(value)
            for count in value if isinstance(value, list) else [value]:
                if isinstance(count, int) and count > _MOST and _COUNTS.fullmatch(str(name)):
                    raise RefusalError(
                        f"its configuration asks for {name} = {printable(count, 40)}", "correct the configuration"
                    )


def _unread(source: Source, files: shards.Files) -> list[str]:
    """Say why there are no weights where there could be some."""
    notes = [f"{name} is of a format that is not read here: structure only" for name in files.others[:1]]
    if source.folder is None and shards.find(Path(source.path).parent).paths:
        notes.append("the weights beside it are not read: give the folder to load them")
    return notes
